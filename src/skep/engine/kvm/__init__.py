"""The engine that runs guests on hardware virtualization, through Linux's KVM (Documentation/virt/kvm/api.rst)."""

from skep.engine.kvm.engine import KvmEngine, can_host_apics, can_host_chips

__all__ = ["KvmEngine", "can_host_apics", "can_host_chips"]
