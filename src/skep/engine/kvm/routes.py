"""KVM's table of what each of its interrupt lines, the GSIs, leads to (api.rst, KVM_SET_GSI_ROUTING).

The table is set as a whole, which takes the kernel up to milliseconds. It has the pins of the I/O APIC first, and
behind them the messages that are sent by eventfds.
"""

from __future__ import annotations

from collections.abc import Mapping

from skep.engine.kvm import uapi
from skep.engine.kvm.uapi import ioctl

PINS = 24
"""GSIs of the I/O APIC's inputs."""


class Routes:
    """Of one VM; used under the board lock."""

    def __init__(self, fd: int, *, chips: bool) -> None:
        """``fd`` is the VM's. ``chips``: KVM has the I/O APIC and the 8259 pair, and the first GSIs are
        their inputs."""
        self._fd = fd
        self._chips = _inputs() if chips else []
        """(GSI, chip, input)."""
        self._pins: dict[int, tuple[int, int]] = {}
        self._messages: dict[int, tuple[int, int]] = {}

    def watch(self, messages: Mapping[int, tuple[int, int]]) -> None:
        """The inputs of the board's own I/O APIC of whose ends of interrupts KVM is to tell; (address, data) by GSI."""
        self._pins = dict(messages)
        self._set()

    def add(self, address: int, data: int) -> int:
        """A GSI that sends this message. Raises OSError where the kernel has no room for it."""
        gsi = next(gsi for gsi in range(PINS, PINS + len(self._messages) + 1) if gsi not in self._messages)
        self._messages[gsi] = address, data
        try:
            self._set()
        except OSError:
            del self._messages[gsi]
            raise
        return gsi

    def remove(self, gsi: int) -> None:
        """Nobody raises it any more; the kernel forgets it at the next change."""
        del self._messages[gsi]

    def _set(self) -> None:
        sent = self._pins | self._messages
        routing = uapi.irq_routing(len(self._chips) + len(sent))
        for entry, (gsi, chip, number) in zip(routing.entries, self._chips, strict=False):
            entry.gsi, entry.type = gsi, uapi.IRQ_ROUTING_IRQCHIP
            entry.irqchip.irqchip, entry.irqchip.pin = chip, number
        for entry, (gsi, (address, data)) in zip(routing.entries[len(self._chips) :], sent.items(), strict=True):
            entry.gsi, entry.type = gsi, uapi.IRQ_ROUTING_MSI
            entry.msi.address_lo, entry.msi.address_hi, entry.msi.data = address & 0xFFFF_FFFF, address >> 32, data
        ioctl(self._fd, uapi.SET_GSI_ROUTING, routing)


def _inputs() -> list[tuple[int, int, int]]:
    """The 8254's line is input 2 of the I/O APIC, as the board has it."""
    pair = [
        (gsi, uapi.IRQCHIP_PIC_SLAVE if gsi > 7 else uapi.IRQCHIP_PIC_MASTER, gsi % 8) for gsi in range(16) if gsi != 2
    ]
    return pair + [(gsi, uapi.IRQCHIP_IOAPIC, gsi or 2) for gsi in range(PINS) if gsi != 2]
