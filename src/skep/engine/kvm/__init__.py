"""The engine that runs guests on hardware virtualization, through Linux's KVM (Documentation/virt/kvm/api.rst)."""

from skep.engine.kvm.engine import KvmEngine

__all__ = ["KvmEngine"]
