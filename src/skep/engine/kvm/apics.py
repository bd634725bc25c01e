"""KVM's local APICs, as the board sees them: the split irqchip (api.rst, KVM_CAP_SPLIT_IRQCHIP).

The I/O APIC is the board's. Its level-triggered inputs are told to KVM as routes, for which it ends KVM_RUN where the
guest ends such an interrupt; all other ends stay in the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

from skep.engine.kvm import uapi
from skep.engine.kvm.uapi import ioctl

PINS = 24
"""Routes that are kept for the I/O APIC."""


class KvmApics:
    """See :class:`skep.contracts.interrupts.LocalApics`."""

    def __init__(self, fd: int) -> None:
        """``fd`` is a VM without vCPUs."""
        self._fd = fd
        flags = uapi.X2APIC_API_USE_32BIT_IDS | uapi.X2APIC_API_DISABLE_BROADCAST_QUIRK
        ioctl(fd, uapi.ENABLE_CAP, uapi.EnableCap(uapi.CAP_SPLIT_IRQCHIP, 0, (PINS, 0, 0, 0)))
        ioctl(fd, uapi.ENABLE_CAP, uapi.EnableCap(uapi.CAP_X2APIC_API, 0, (flags, 0, 0, 0)))

    def signal(self, address: int, data: int) -> None:
        message = uapi.Msi(address & 0xFFFF_FFFF, address >> 32, data)
        try:
            ioctl(self._fd, uapi.SIGNAL_MSI, message)
        except OSError:
            pass  # nobody is addressed, or a reserved way of delivery: lost, as on a board

    def watch(self, messages: Mapping[int, tuple[int, int]]) -> None:
        routing = uapi.irq_routing(len(messages))
        for entry, (pin, (address, data)) in zip(routing.entries, messages.items(), strict=True):
            entry.gsi, entry.type = pin, uapi.IRQ_ROUTING_MSI
            entry.msi.address_lo, entry.msi.address_hi, entry.msi.data = address & 0xFFFF_FFFF, address >> 32, data
        ioctl(self._fd, uapi.SET_GSI_ROUTING, routing)
