"""Local APICs that the engine has: the board keeps their state, under the names of :mod:`skep.irqchip.lapic`, and
passes on what others send them.

While processors run, the engine's is the truth. At a pause it is read, and at the end of the pause written back: its
timers would go on meanwhile, and a state may have been loaded. So whoever saves, loads or looks finds the same fields,
whoever has the APICs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from skep.errors import HostError
from skep.irqchip import lapic
from skep.irqchip.apicbus import MSI_BASE, ApicBus, Delivery, Message
from skep.irqchip.ioapic import DELIVERY_SHIFT, LEVEL, LOGICAL, VECTOR
from skep.irqchip.lapic import (
    BASE_EXTD,
    CURRENT_COUNT,
    DFR,
    DIVIDE,
    ESR,
    ICR,
    ICR_HIGH,
    ID,
    INITIAL_COUNT,
    IRR,
    ISR,
    LDR,
    LVT_LINT1,
    LVT_MASKED,
    LVT_TIMER,
    MSR_APIC_BASE,
    MSR_TSC_DEADLINE,
    SVR,
    TMR,
    TPR,
    VERSION,
    LocalApic,
)
from skep.irqchip.lapictimer import TSC_DEADLINE, ApicTimer

if TYPE_CHECKING:
    from skep.contracts.interrupts import EngineApic, LocalApics
    from skep.locks import Lock

_PAGE = 1024
_MESSAGES = 512
"""From eventfds at once, at most: what any KVM has room for."""
_BITMAPS = (("isr", ISR), ("tmr", TMR), ("irr", IRR))
_REGISTERS = (("tpr", TPR), ("dfr", DFR), ("svr", SVR), ("esr", ESR))


class HostedApics(ApicBus):
    """What goes to local APICs goes to the engine. Implements :class:`skep.contracts.io.BoundSink`."""

    def __init__(self, lock: Lock) -> None:
        super().__init__(lock)
        self._engine: LocalApics | None = None
        self._watched: dict[int, tuple[int, int]] = {}
        self._bound: dict[int, tuple[int, int]] = {}
        """Messages that eventfds send."""

    def adopt(self, engine: LocalApics | None) -> None:
        """Whose they are from now on; None: there are none."""
        with self.lock:
            self._engine = engine
            if engine is not None:
                engine.watch(self._watched)
                for fd, message in self._bound.items():
                    if not engine.bind(fd, *message):
                        raise HostError("this KVM takes no more messages from eventfds", "kvm.irqchip", "make it off")

    def signal(self, address: int, data: int) -> None:
        if address & ~0xF_FFFF == MSI_BASE and self._engine is not None:
            self._engine.signal(address, data)

    def bind(self, fd: int, address: int, data: int) -> bool:
        if address & ~0xF_FFFF != MSI_BASE or len(self._bound) >= _MESSAGES:
            return False
        if self._engine is not None and not self._engine.bind(fd, address, data):
            return False
        self._bound[fd] = address, data
        return True

    def unbind(self, fd: int) -> None:
        del self._bound[fd]
        if self._engine is not None:
            self._engine.unbind(fd)

    def bound_vectors(self) -> int:
        """A bit for each vector that eventfds send."""
        return functools.reduce(int.__or__, (1 << (data & VECTOR) for _, data in self._bound.values()), 0)

    def send(self, message: Message) -> None:
        if self._engine is not None:
            self._engine.signal(*_message(message))

    def pins_changed(self, entries: list[int]) -> None:
        watched = {
            pin: _message(
                Message(entry >> 56, bool(entry & LOGICAL), entry >> DELIVERY_SHIFT & 7, entry & VECTOR, level=True)
            )
            for pin, entry in enumerate(entries)
            if entry & LEVEL and entry & VECTOR >= 16
        }
        if watched != self._watched:
            self._watched = watched
            if self._engine is not None:
                self._engine.watch(watched)


def _message(message: Message) -> tuple[int, int]:
    """As a device would write it (SDM 3, 11.11), with the upper bits of a wide destination where x2APICs have them."""
    destination = message.destination
    address = MSI_BASE | (destination & 0xFF) << 12 | message.logical << 2 | (destination & ~0xFF) << 32
    return address, message.vector | message.delivery << 8 | (0xC000 if message.level else 0)


class _StoppedTimer(ApicTimer):
    """Only what is to be saved: the engine's runs."""

    def loaded(self) -> None:
        """Nothing is armed."""


class HostedApic(LocalApic):
    """Implements :class:`skep.contracts.interrupts.HostedInterrupts`.

    The wires of the 8259 pair and of the NMI button are still the board's; what the LVT makes of them is the engine's.
    """

    _apics: HostedApics
    _apic: EngineApic | None = None

    def make_timer(self) -> ApicTimer:
        return _StoppedTimer(self._clock, _never)

    # HostedInterrupts, on the vCPU's thread.

    def attach(self, apic: EngineApic) -> None:
        with self.lock:
            self._apic = apic
            self._give(apic)

    def detach(self) -> None:
        with self.lock:
            self._apic = None

    def end_of_interrupt(self, vector: int) -> None:
        with self.lock:
            self._apics.end_of_interrupt(vector)

    def pending(self) -> bool:
        """The 8259 pair asks; whether the APIC lets that through the engine knows."""
        return bool(self.lines & 1)

    def acknowledge(self) -> int | None:
        with self.lock:
            return self._acknowledge_pic() if self.lines & 1 else None

    def take_nmi(self) -> bool:
        """The button was pressed, and LINT1 is where the guest wants to hear of it."""
        if not super().take_nmi() or self._apic is None:
            return False
        page = self._apic.registers()
        return _word(page, LVT_LINT1) & (LVT_MASKED | 0x700) == Delivery.NMI << 8

    def read_msr(self, index: int) -> int | None:
        return None

    def write_msr(self, index: int, value: int) -> bool:
        return False

    def set_lint(self, pin: int, level: bool) -> None:
        bit = 1 << pin
        was = self.lines & bit
        self.lines = self.lines | bit if level else self.lines & ~bit
        if level and not was:
            if pin == 1:
                self.nmi_latched = 1
            self.kick()

    def _update(self) -> None:
        """What waits, the engine knows."""

    # The life of a device.

    def pause(self) -> None:
        with self.lock:
            if self._apic is not None:
                self._take(self._apic)

    def resume(self) -> None:
        with self.lock:
            if self._apic is not None:
                # What an eventfd was told before the pause may have come during it: the kernel does some of it later.
                self.irr |= _bits(self._apic.registers(), IRR) & self._apics.bound_vectors()
                self._give(self._apic)

    def _take(self, apic: EngineApic) -> None:
        page = apic.registers()
        self.apic_base = apic.read_msr(MSR_APIC_BASE)
        extended = self.apic_base & BASE_EXTD
        if not extended:
            self.xapic_id, self.ldr = _word(page, ID) >> 24, _word(page, LDR)
        for name, offset in _REGISTERS:
            setattr(self, name, _word(page, offset))
        for name, offset in _BITMAPS:
            setattr(self, name, _bits(page, offset))
        self.icr = _word(page, ICR) | _word(page, ICR_HIGH) << 32
        self.lvt = [_word(page, LVT_TIMER + 16 * i) for i in range(len(self.lvt))]
        timer = self.timer
        timer.mode = self.lvt[0] >> 17 & 3
        timer.divide = _word(page, DIVIDE)
        timer.initial_count = _word(page, INITIAL_COUNT)
        timer.tsc_deadline = apic.read_msr(MSR_TSC_DEADLINE) if timer.mode == TSC_DEADLINE else 0
        timer.set_left(_word(page, CURRENT_COUNT))
        self._base_changed()

    def _give(self, apic: EngineApic) -> None:
        page = bytearray(_PAGE)
        extended = self.apic_base & BASE_EXTD
        values = {
            ID: self.apic_id if extended else self.xapic_id << 24,
            VERSION: lapic.VERSION_VALUE,
            LDR: 0 if extended else self.ldr,
            ICR: self.icr & 0xFFFF_FFFF,
            ICR_HIGH: self.icr >> 32,
            INITIAL_COUNT: self.timer.initial_count,
            CURRENT_COUNT: self.timer.current_count(),
            DIVIDE: self.timer.divide,
            **{offset: getattr(self, name) for name, offset in _REGISTERS},
            **{LVT_TIMER + 16 * i: entry for i, entry in enumerate(self.lvt)},
            **{at + 16 * i: getattr(self, name) >> 32 * i & 0xFFFF_FFFF for name, at in _BITMAPS for i in range(8)},
        }
        for offset, value in values.items():
            page[offset : offset + 4] = value.to_bytes(4, "little")
        apic.write_msr(MSR_APIC_BASE, self.apic_base)
        apic.set_registers(bytes(page))
        if self.timer.mode == TSC_DEADLINE:
            apic.write_msr(MSR_TSC_DEADLINE, self.timer.tsc_deadline)


def _word(page: bytes, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 4], "little")


def _bits(page: bytes, offset: int) -> int:
    """ISR, TMR or IRR: a bit for each vector."""
    return sum(_word(page, offset + 16 * i) << 32 * i for i in range(8))


def _never() -> None:
    """The engine's timer expires, not this one."""
