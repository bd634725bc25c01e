"""The local APIC: xAPIC page and x2APIC MSRs (Intel SDM 3, chapter 11; 10 in older editions).

IRR, ISR and TMR are Python integers of 256 bits, so the most urgent vector is ``bit_length() - 1``. Whether an
interrupt may be taken is kept in one flag, brought up to date by whatever changes it: the engine asks far more
often than anything changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from skep.contracts.interrupts import IN_SERVICE, Lent
from skep.contracts.io import IoSpace
from skep.irqchip.apicbus import Delivery, Message
from skep.irqchip.lapictimer import TSC_DEADLINE, ApicTimer
from skep.state import Fields, SavedState

if TYPE_CHECKING:
    from skep.clock import GuestClock
    from skep.contracts.interrupts import Loan
    from skep.irqchip.apicbus import ApicBus

MSR_APIC_BASE = 0x1B
MSR_TSC_DEADLINE = 0x6E0
MSR_X2APIC = 0x800

DEFAULT_BASE = 0xFEE0_0000
BASE_BSP, BASE_EXTD, BASE_EN = 1 << 8, 1 << 10, 1 << 11

# Register offsets in the xAPIC page; an x2APIC MSR is 0x800 + offset / 16.
ID, VERSION, TPR, APR, PPR, EOI, RRD, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
INITIAL_COUNT, CURRENT_COUNT, DIVIDE, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0

LVT_MASKED = 1 << 16
LVT_LEVEL = 1 << 15
LVT_REMOTE_IRR = 1 << 14
SVR_ENABLE, SVR_NO_EOI_BROADCAST = 1 << 8, 1 << 12

ERROR_SEND_VECTOR, ERROR_RECEIVE_VECTOR, ERROR_REGISTER = 1 << 5, 1 << 6, 1 << 7

VERSION_VALUE = 1 << 24 | 5 << 16 | 0x15  # EOI-broadcast suppression, six LVT entries
_SVR_BITS = 0x11FF
_ICR_BITS = 0xCCFFF  # not bit 12, delivery status, which always reads idle
_LVT_READ_ONLY = 0x5000  # delivery status, always idle; remote IRR
_WRITABLE = {
    TPR: 0xFF, SVR: _SVR_BITS, ESR: 0, INITIAL_COUNT: 0xFFFF_FFFF, DIVIDE: 0xB,
    LVT_TIMER: 0x7_00FF, LVT_THERMAL: 0x1_07FF, LVT_PERF: 0x1_07FF,
    LVT_LINT0: 0x1_A7FF, LVT_LINT1: 0x1_A7FF, LVT_ERROR: 0x1_00FF,
}  # fmt: skip
"""The bits that may be written, of registers without an effect of their own."""
_LINT = (LVT_LINT0, LVT_LINT1)
_NMIS = 2


class LocalApic(Fields):
    """One processor's. Implements :class:`skep.contracts.interrupts.LocalInterrupts` and, as the xAPIC page, IoRegion.

    The page is reached through :class:`ApicView`, as each processor sees its own at one address.
    """

    state_fields: ClassVar[tuple[str, ...]] = (
        "apic_base", "xapic_id", "tpr", "ldr", "dfr", "svr", "irr", "isr", "tmr", "esr", "errors", "icr", "lvt",
        "lines", "extint_latched", "nmi_latched", "timer",
    )  # fmt: skip

    def __init__(
        self,
        apic_id: int,
        apics: ApicBus,
        clock: GuestClock,
        acknowledge_pic: Callable[[], int],
        *,
        bsp: bool,
        physical_bits: int = 52,
    ) -> None:
        """``acknowledge_pic`` is INTA to the 8259 pair; ``physical_bits`` is MAXPHYADDR, for the reserved bits of
        IA32_APIC_BASE. The first processor (``bsp``) leaves reset in virtual wire mode, as firmware would set it."""
        self.name = f"lapic{apic_id}"
        self.apic_id = apic_id
        self.kick: Callable[[], None] = _nothing
        """Called, under the board lock, when an interrupt or NMI begins to wait."""
        self.on_init: Callable[[], None] = _nothing
        self.on_sipi: Callable[[int], None] = _nothing_to_start
        self.page = DEFAULT_BASE
        """Where the xAPIC page is, or -1 while there is none."""
        self.lock = apics.lock
        self._apics = apics
        self._clock = clock
        self._acknowledge_pic = acknowledge_pic
        self._bsp = bsp
        self._base_bits = ((1 << physical_bits) - 1) & ~0xFFF | BASE_EN | BASE_EXTD | BASE_BSP
        self._ready = False
        self._loan: Loan | None = None
        """Who has ISR, the task priority and ICR meanwhile; nothing waits in IRR then."""
        self._box: Loan | None = None
        """Where other processors may have left interrupts."""
        self._lent_timer = False
        self.lines = 0
        self.timer = self.make_timer()
        apics.locals.append(self)
        self.reset()

    def make_timer(self) -> ApicTimer:
        return ApicTimer(self._clock, self._timer_expired)

    # The life of a device.

    def reset(self) -> None:
        """Power-on, and what firmware does to the first processor's LINT pins (MP specification 3.6.2.2)."""
        self.apic_base = DEFAULT_BASE | BASE_EN | (BASE_BSP if self._bsp else 0)
        self.xapic_id = self.apic_id & 0xFF
        self._reset_registers()
        self._box = None  # the vCPU that comes now has another
        if self._bsp:
            self.svr |= SVR_ENABLE
            self.lvt[_index(LVT_LINT0)] = Delivery.EXTINT << 8
            self.lvt[_index(LVT_LINT1)] = Delivery.NMI << 8
        self._base_changed()

    def _reset_registers(self) -> None:
        """SDM 11.4.7.1. The lines belong to those who drive them."""
        self.tpr = self.ldr = 0
        self.dfr = 0xFFFF_FFFF
        self.svr = 0xFF
        self.irr = self.isr = self.tmr = 0
        self._loan = None
        self.esr = self.errors = 0
        self.icr = 0
        self.lvt = [LVT_MASKED] * 6
        self.extint_latched = False
        self.nmi_latched = 0
        """NMIs that wait; of those that come at once the first is as good as delivered, and one waits behind it."""
        self.timer.reset()

    def _base_changed(self) -> None:
        enabled, extended = self.apic_base & BASE_EN, self.apic_base & BASE_EXTD
        self._enabled = bool(enabled)
        self._x2apic = bool(extended)
        self.page = self.apic_base & ~0xFFF if enabled and not extended else -1
        self._update()

    def pause(self) -> None:
        """The clock stands still while the VM is frozen, so the timer does."""

    def resume(self) -> None:
        """The clock goes on."""

    def save(self) -> SavedState:
        with self.lock:
            self._take_back()
        return super().save()

    def loaded(self) -> None:
        self._ready = False  # so that what waits kicks
        self._base_changed()

    def close(self) -> None:
        self.timer.close()

    # LocalInterrupts: the engine's questions, on the vCPU's own thread.

    def pending(self) -> bool:
        if self._box is not None:
            self._take_back()
        return self._ready

    def acknowledge(self) -> int | None:
        with self.lock:
            if not self._ready:
                return None
            if self._extint_waits():  # not subject to the processor priority (SDM 11.8.1)
                self.extint_latched = False
                vector = self._acknowledge_pic()
            else:
                vector = self.irr.bit_length() - 1
                bit = 1 << vector
                self.irr ^= bit
                self.isr |= bit
            self._ready = False
            self._update()  # kicks if more waits
            return vector

    def take_nmi(self) -> bool:
        if not self.nmi_latched:
            return False
        with self.lock:
            latched = self.nmi_latched
            self.nmi_latched -= latched > 0
            return latched > 0

    def read_tpr(self) -> int:
        self._take_back()
        return self.tpr >> 4

    def write_tpr(self, value: int) -> None:
        with self.lock:
            self._take_back()
            self.tpr = (value & 0xF) << 4
            self._update()

    def read_msr(self, index: int) -> int | None:
        with self.lock:
            self._take_back()
            if index == MSR_TSC_DEADLINE:
                return self.timer.tsc_deadline
            if index == MSR_APIC_BASE:
                return self.apic_base
            if not self._x2apic:
                return None
            offset = (index - MSR_X2APIC) << 4
            if offset == ICR:
                return self.icr
            if offset == LDR:
                return self._x2apic_ldr()
            if offset in (EOI, SELF_IPI, ICR_HIGH, DFR, APR, RRD):
                return None
            return self._read_register(offset)

    def lend(self, loan: Loan) -> None:
        if not self._x2apic or not self.svr & SVR_ENABLE:
            return
        with self.lock:
            if self.irr or self._extint_waits() or self.isr & self.tmr or self.isr.bit_count() > IN_SERVICE:
                self.timer.settle()
                return
            timer = self.lvt[0]
            vector = timer & 0xFF
            if timer & LVT_MASKED or vector < 16 or self.timer.mode != TSC_DEADLINE:
                vector = 0
                self.timer.settle()
            lent = Lent(self.isr, self.timer.lend() if vector else 0, self.tpr, self.icr)
            self.isr = self.tpr = 0  # whoever interrupts kicks, and the vCPU looks
            self._loan = self._box = loan
            self._lent_timer = vector != 0
            loan.give(lent, vector)

    def _take_back(self) -> None:
        with self.lock:
            loan, self._loan = self._loan, None
            if loan is not None:
                self.isr, deadline, self.tpr, self.icr, edges = loan.take()
                self.tmr &= ~edges | self.irr
                if self._lent_timer:
                    self.timer.take_back(deadline)
            if self._empty_box() or loan is not None:
                self._update()

    def collect(self) -> None:
        with self.lock:
            if self._loan is None and self._empty_box():
                self._update()

    def _empty_box(self) -> bool:
        """Whether there was anything. What is for a disabled APIC gets lost."""
        bits = 0 if self._box is None else self._box.collect()
        if bits and self._enabled and self.svr & SVR_ENABLE:
            self.irr |= bits
            self.tmr &= ~bits
        return bits != 0

    def settle(self) -> None:
        with self.lock:
            self._take_back()
            self.timer.settle()

    def write_msr(self, index: int, value: int) -> bool:
        with self.lock:
            self._take_back()
            if index == MSR_TSC_DEADLINE:
                self.timer.set_tsc_deadline(value)
                return True
            if index == MSR_APIC_BASE:
                return self._write_apic_base(value)
            if not self._x2apic:
                return False
            return self._write_x2apic((index - MSR_X2APIC) << 4, value)

    def _write_apic_base(self, value: int) -> bool:
        """SDM 11.12.5: the modes' states and the transitions that fault."""
        enabled, extended = value & BASE_EN, value & BASE_EXTD
        if value & ~self._base_bits or (extended and not enabled):
            return False
        if self._x2apic and enabled and not extended:
            return False
        if extended and not self._enabled:
            return False
        if self._enabled and not enabled:
            self._reset_registers()
            self.xapic_id = self.apic_id & 0xFF
        self.apic_base = value
        self._base_changed()
        return True

    def _write_x2apic(self, offset: int, value: int) -> bool:
        """As the page, but reserved bits and read-only registers fault (SDM 11.12.1.2)."""
        if offset == EOI:
            if value:
                return False
            self._end_of_interrupt()
            return True
        if offset == ICR:
            if value & 0xFFFF_FFFF & ~_ICR_BITS:
                return False
            self.icr = value
            self._send(value >> 32, wide=True)
            return True
        if offset == SELF_IPI:
            if value > 0xFF:
                return False
            self._send_fixed_to(self, value)
            return True
        if LVT_TIMER <= offset <= LVT_ERROR:
            value &= ~_LVT_READ_ONLY
        writable = _WRITABLE.get(offset)
        if writable is None or value & ~writable:
            return False
        self._write_register(offset, value)
        return True

    # The xAPIC page. Registers are 32 bits on 16-byte boundaries (SDM 11.4.1).

    def read(self, offset: int, size: int) -> int:
        register = offset & 0xFF0
        if register == LDR:
            value: int | None = self.ldr
        elif register == ICR:
            value = self.icr & 0xFFFF_FFFF
        elif register == ICR_HIGH:
            value = self.icr >> 32
        elif register in (EOI, SELF_IPI):
            value = None if register == SELF_IPI else 0
        else:
            value = self._read_register(register)
        if value is None:
            self._error(ERROR_REGISTER)
            value = 0
        within = offset & 0xF
        return value >> 8 * within & (1 << 8 * size) - 1 if within < 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset & 0xF or size < 4:  # undefined by the SDM: no effect
            return
        value &= 0xFFFF_FFFF
        if offset == EOI:
            self._end_of_interrupt()
        elif offset == ICR:
            self.icr = self.icr & ~0xFFFF_FFFF | value & _ICR_BITS
            self._send(self.icr >> 56, wide=False)
        elif offset == ICR_HIGH:
            self.icr = self.icr & 0xFFFF_FFFF | (value & 0xFF00_0000) << 32
        elif offset == ID:
            self.xapic_id = value >> 24
        elif offset == LDR:
            self.ldr = value & 0xFF00_0000
        elif offset == DFR:
            self.dfr = value | 0x0FFF_FFFF
        elif offset in _WRITABLE:
            self._write_register(offset, value & _WRITABLE[offset])
        elif offset not in (VERSION, PPR, CURRENT_COUNT, APR, RRD) and not ISR <= offset < ESR:
            self._error(ERROR_REGISTER)

    # Registers that both ways share.

    def _read_register(self, offset: int) -> int | None:
        """The value, or None where there is no register."""
        if LVT_TIMER <= offset <= LVT_ERROR:
            return self.lvt[_index(offset)]
        if ISR <= offset < ESR:
            bits = self.isr if offset < TMR else self.tmr if offset < IRR else self.irr
            return bits >> ((offset & 0x70) << 1) & 0xFFFF_FFFF
        if offset == CURRENT_COUNT:
            return self.timer.current_count()
        if offset == ID:
            return self.apic_id if self._x2apic else self.xapic_id << 24
        if offset == PPR:
            return self.processor_priority()
        if offset == ESR:
            return self.esr
        if offset == TPR:
            return self.tpr
        if offset == SVR:
            return self.svr
        if offset == INITIAL_COUNT:
            return self.timer.initial_count
        if offset == DIVIDE:
            return self.timer.divide
        if offset == VERSION:
            return VERSION_VALUE
        if offset == DFR:
            return self.dfr
        return 0 if offset in (APR, RRD) else None

    def _write_register(self, offset: int, value: int) -> None:
        if offset == INITIAL_COUNT:
            self.timer.set_initial_count(value)
        elif offset == TPR:
            self.tpr = value
            self._update()
        elif LVT_TIMER <= offset <= LVT_ERROR:
            self._write_lvt(offset, value)
        elif offset == SVR:
            self.svr = value
            if not value & SVR_ENABLE:
                self.lvt = [entry | LVT_MASKED for entry in self.lvt]
            self._update()
        elif offset == DIVIDE:
            self.timer.set_divide(value)
        elif offset == ESR:
            self.esr, self.errors = self.errors, 0

    def _write_lvt(self, offset: int, value: int) -> None:
        if not self.svr & SVR_ENABLE:
            value |= LVT_MASKED
        index = _index(offset)
        self.lvt[index] = value | self.lvt[index] & LVT_REMOTE_IRR if value & LVT_LEVEL else value
        if offset == LVT_TIMER:
            self.timer.set_mode(value >> 17 & 3)
        elif offset in _LINT:
            pin = _LINT.index(offset)
            if self.lines >> pin & 1 and value & LVT_LEVEL:
                self._lint_asserted(pin)
        self._update()

    # Interrupts: in, to the processor, and their end.

    def is_addressed(self, message: Message) -> bool:
        """SDM 11.6.2."""
        destination = message.destination
        if not self._enabled:
            return False
        if destination == (0xFFFF_FFFF if message.wide else 0xFF):
            return True
        if not message.logical:
            return destination == (self.apic_id if self._x2apic else self.xapic_id)
        if self._x2apic:
            mine = self._x2apic_ldr()
            return destination >> 16 == mine >> 16 and bool(destination & mine & 0xFFFF)
        mine = self.ldr >> 24
        if self.dfr >> 28 == 0xF:  # flat
            return bool(destination & mine)
        return bool(destination & mine & 0xF) and destination >> 4 in (mine >> 4, 0xF)

    def accept(self, delivery: int, vector: int, level: bool) -> None:
        """A message arrives. Under the board lock."""
        if delivery in (Delivery.FIXED, Delivery.LOWEST_PRIORITY):
            if not self.svr & SVR_ENABLE:
                return
            if vector < 16:
                self._error(ERROR_RECEIVE_VECTOR)
                return
            bit = 1 << vector
            self.irr |= bit
            self.tmr = self.tmr | bit if level else self.tmr & ~bit
            self._update()
        elif delivery == Delivery.NMI:
            if self.nmi_latched < _NMIS:
                self.nmi_latched += 1
                self.kick()
        elif delivery == Delivery.EXTINT:
            self.extint_latched = True
            self._update()
        elif delivery == Delivery.INIT:
            self._reset_registers()
            self._update()
            self.on_init()
        elif delivery == Delivery.STARTUP:
            self.on_sipi(vector)

    def set_lint(self, pin: int, level: bool) -> None:
        """The wire at LINT0 (the 8259 pair's INT) or LINT1 (NMI). Under the board lock."""
        bit = 1 << pin
        was = self.lines & bit
        self.lines = self.lines | bit if level else self.lines & ~bit
        if level and not was:
            self._lint_asserted(pin)
        self._update()

    def _lint_asserted(self, pin: int) -> None:
        entry = self.lvt[_index(_LINT[pin])]
        delivery = entry >> 8 & 7
        if not self._enabled:  # the pins are INTR and NMI (SDM 11.4.3)
            if pin == 1:
                self.accept(Delivery.NMI, 0, False)
        elif not entry & LVT_MASKED and delivery != Delivery.EXTINT:
            level = bool(entry & LVT_LEVEL) and delivery == Delivery.FIXED and pin == 0
            if level:
                if entry & LVT_REMOTE_IRR:
                    return
                self.lvt[_index(_LINT[pin])] = entry | LVT_REMOTE_IRR
            self.accept(delivery, entry & 0xFF, level)

    def _extint_waits(self) -> bool:
        if self.extint_latched:
            return True
        if not self.lines:
            return False
        if not self._enabled:
            return bool(self.lines & 1)
        for pin in (0, 1):
            entry = self.lvt[_index(_LINT[pin])]
            if self.lines >> pin & 1 and entry & (LVT_MASKED | 0x700) == Delivery.EXTINT << 8:
                return True
        return False

    def processor_priority(self) -> int:
        """PPR (SDM 11.8.3.1)."""
        serving = (self.isr.bit_length() - 1) & 0xF0 if self.isr else 0
        return self.tpr if self.tpr & 0xF0 >= serving else serving

    def _update(self) -> None:
        """Bring ``pending`` up to date, and kick where it turns true. What is lent counts as not in service, so the
        vCPU is kicked, and looks."""
        ready = self._extint_waits() or bool(
            self.irr and self._enabled and (self.irr.bit_length() - 1) >> 4 > self.processor_priority() >> 4
        )
        if ready and not self._ready:
            self._ready = True
            self.kick()
        else:
            self._ready = ready

    def _end_of_interrupt(self) -> None:
        if not self.isr:
            return
        vector = self.isr.bit_length() - 1
        bit = 1 << vector
        self.isr ^= bit
        if self.tmr & bit:
            self._end_of_local_level(vector)
            if not self.svr & SVR_NO_EOI_BROADCAST:
                self._apics.end_of_interrupt(vector)
        self._update()

    def _end_of_local_level(self, vector: int) -> None:
        index = _index(LVT_LINT0)
        entry = self.lvt[index]
        if entry & LVT_REMOTE_IRR and entry & 0xFF == vector:
            self.lvt[index] = entry & ~LVT_REMOTE_IRR
            if self.lines & 1:
                self._lint_asserted(0)

    def _error(self, error: int) -> None:
        self.errors |= error
        entry = self.lvt[_index(LVT_ERROR)]
        if not entry & LVT_MASKED and entry & 0xFF >= 16:  # an illegal vector here would err about itself
            self.accept(Delivery.FIXED, entry & 0xFF, False)

    def _timer_expired(self) -> None:
        if not self.lvt[0] & LVT_MASKED:
            self.accept(Delivery.FIXED, self.lvt[0] & 0xFF, False)

    # Interrupts to others.

    def _send(self, destination: int, *, wide: bool) -> None:
        """What a write of ICR's low half starts (SDM 11.6.1)."""
        delivery, vector = self.icr >> 8 & 7, self.icr & 0xFF
        shorthand = self.icr >> 18 & 3
        level = bool(self.icr & 1 << 15)
        if delivery == Delivery.INIT and level and not self.icr & 1 << 14:  # INIT level de-assert: arbitration only
            return
        if delivery in (Delivery.FIXED, Delivery.LOWEST_PRIORITY):
            if vector < 16:
                self._error(ERROR_SEND_VECTOR)
                return
            level = False  # an IPI is an edge, whatever the trigger mode says (SDM 11.6.1, "Trigger Mode")
        if shorthand == 0:
            self._apics.send(Message(destination, bool(self.icr & 1 << 11), delivery, vector, level, wide))
        elif shorthand == 1:
            if delivery == Delivery.FIXED:
                self._send_fixed_to(self, vector)
        else:
            for apic in self._apics.locals:
                if apic.enabled and (apic is not self or shorthand == 2):
                    apic.accept(delivery, vector, level)

    @property
    def enabled(self) -> bool:
        return self._enabled

    def _send_fixed_to(self, apic: LocalApic, vector: int) -> None:
        if vector < 16:
            self._error(ERROR_SEND_VECTOR)
        else:
            apic.accept(Delivery.FIXED, vector, False)

    def _x2apic_ldr(self) -> int:
        """SDM 11.12.10.2."""
        return (self.apic_id >> 4) << 16 | 1 << (self.apic_id & 0xF)


class ApicView:
    """The I/O space as one processor sees it: its own APIC's page, and the bus. Implements IoSpace."""

    def __init__(self, bus: IoSpace, apic: LocalApic) -> None:
        self._bus = bus
        self._apic = apic
        self.port_read = bus.port_read
        self.port_write = bus.port_write

    def mmio_read(self, gpa: int, size: int) -> int:
        apic = self._apic
        if gpa & ~0xFFF != apic.page:
            return self._bus.mmio_read(gpa, size)
        with apic.lock:
            return apic.read(gpa & 0xFFF, size)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        apic = self._apic
        if gpa & ~0xFFF != apic.page:
            self._bus.mmio_write(gpa, size, value)
        else:
            with apic.lock:
                apic.write(gpa & 0xFFF, size, value)


def _index(offset: int) -> int:
    """An LVT register's place in ``lvt``."""
    return (offset - LVT_TIMER) >> 4


def _nothing() -> None:
    """Nobody is to be told yet."""


def _nothing_to_start(vector: int) -> None:
    """No processor waits for a start-up message."""
