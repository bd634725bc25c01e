"""KVM's local APICs, as the board sees them: the split irqchip (api.rst, KVM_CAP_SPLIT_IRQCHIP), or the whole.

With the former the I/O APIC is the board's. Its level-triggered inputs are told to KVM as routes, for which it ends
KVM_RUN where the guest ends such an interrupt; all other ends stay in the kernel. A message that is sent often gets a
route of its own and an eventfd (KVM_IRQFD).
"""

from __future__ import annotations

from collections.abc import Mapping

from skep.engine.kvm import uapi
from skep.engine.kvm.routes import PINS, Routes
from skep.engine.kvm.uapi import ioctl


class KvmApics:
    """See :class:`skep.contracts.interrupts.LocalApics`."""

    def __init__(self, fd: int, *, chips: bool = False) -> None:
        """``fd`` is a VM without vCPUs; with ``chips`` it gets all other interrupt controllers besides."""
        self._fd = fd
        self._chips = chips
        self._routes = Routes(fd, chips=chips)
        self._bound: dict[int, int] = {}
        """GSIs, by eventfd."""
        flags = uapi.X2APIC_API_USE_32BIT_IDS | uapi.X2APIC_API_DISABLE_BROADCAST_QUIRK
        if chips:
            ioctl(fd, uapi.CREATE_IRQCHIP)
            self._routes.watch({})
        else:
            ioctl(fd, uapi.ENABLE_CAP, uapi.EnableCap(uapi.CAP_SPLIT_IRQCHIP, 0, (PINS, 0, 0, 0)))
        ioctl(fd, uapi.ENABLE_CAP, uapi.EnableCap(uapi.CAP_X2APIC_API, 0, (flags, 0, 0, 0)))

    def signal(self, address: int, data: int) -> None:
        message = uapi.Msi(address & 0xFFFF_FFFF, address >> 32, data)
        try:
            ioctl(self._fd, uapi.SIGNAL_MSI, message)
        except OSError:
            pass  # nobody is addressed, or a reserved way of delivery: lost, as on a board

    def watch(self, messages: Mapping[int, tuple[int, int]]) -> None:
        if not self._chips:
            self._routes.watch(messages)

    def bind(self, fd: int, address: int, data: int) -> bool:
        try:
            gsi = self._routes.add(address, data)
        except OSError:
            return False
        try:
            ioctl(self._fd, uapi.IRQFD, uapi.Irqfd(fd, gsi))
        except OSError:
            self._routes.remove(gsi)
            return False
        self._bound[fd] = gsi
        return True

    def unbind(self, fd: int) -> None:
        gsi = self._bound.pop(fd)
        ioctl(self._fd, uapi.IRQFD, uapi.Irqfd(fd, gsi, uapi.IRQFD_FLAG_DEASSIGN))
        self._routes.remove(gsi)
