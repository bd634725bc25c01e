"""ACPI fixed hardware: PM1a, the PM timer, GPE0, and the reset register (ACPI 6.4, 4.8; ICH9 data sheet 13.8, 13.7.5).

The fixed events are the power button, the RTC's alarm and the timer; the others have their bits and never happen.
General-purpose events are for others on the board to raise. There are two sleeping states, S3 (suspend to RAM), which
the button and the alarm end, and S5 (soft off); and no system management mode: SCI_EN is always set, as after a
firmware that hands over in ACPI mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from skep.contracts.io import IoRegion, IrqLine
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus
    from skep.clock import GuestClock

BASE, SIZE = 0x600, 16
"""PM1a_EVT_BLK is at the base (4 bytes)."""
CONTROL, TIMER, GPE0 = 4, 8, 12
"""PM1a_CNT_BLK (2 bytes), PM_TMR_BLK (4 bytes) and GPE0_BLK, from the base."""
GPE0_SIZE = 4
"""16 events: as many status bits, then as many enable bits."""
SCI_GSI = 9
PM_TIMER_HZ = 3_579_545
SLEEP_TYPE_S3, SLEEP_TYPE_S5 = 1, 5
"""SLP_TYP of the DSDT's _S3 and _S5."""
RESET_PORT = 0xCF9
RESET_VALUE = 0x06
"""RESET_REG and RESET_VALUE of the FADT: RST_CPU with SYS_RST."""

_NS = 1_000_000_000

# Status register; the enable register has the same bits, but for the wake status.
TMR_STS, GBL_STS, PWRBTN_STS, SLPBTN_STS, RTC_STS, WAK_STS = (1 << bit for bit in (0, 5, 8, 9, 10, 15))
_ENABLE_BITS = TMR_STS | GBL_STS | PWRBTN_STS | SLPBTN_STS | RTC_STS
_STATUS_BITS = _ENABLE_BITS | WAK_STS
SCI_EN, SLP_EN = 1 << 0, 1 << 13
_CONTROL_BITS = 0x1C02  # SLP_TYP, BM_RLD


class AcpiPm(Fields):
    """The registers at :data:`BASE`, and :attr:`reset_control` for port 0xcf9.

    ``power_off``, ``reset_machine``, ``sleep`` and ``wake`` are called under the board lock, all but ``wake`` in the
    middle of the guest's write: they take note, and return. For each ``sleep`` there is one ``wake`` at most.
    """

    name = "acpi-pm"
    state_fields: ClassVar[tuple[str, ...]] = (
        "status", "enable", "control", "asleep", "timer_high", "gpe_status", "gpe_enable", "reset_control",
    )  # fmt: skip

    def __init__(
        self,
        clock: GuestClock,
        sci: IrqLine,
        power_off: Callable[[], None],
        reset_machine: Callable[[], None],
        sleep: Callable[[], None],
        wake: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._sci = sci
        self._power_off = power_off
        self._sleep = sleep
        self._wake = wake
        self._timer = clock.timer(self._timer_toggled)
        self.reset_control = ResetControl(reset_machine)
        self.reset()

    def reset(self) -> None:
        self.status = self.enable = self.control = 0
        self.gpe_status = self.gpe_enable = 0
        self.asleep = False
        """In S3."""
        self.timer_high = self._ticks() >> 31
        """How often the timer's bit 31 had changed when TMR_STS was set last."""
        self.reset_control.reset()
        self._changed()

    def pause(self) -> None:
        """The clock stands still while the VM is frozen, so the timer does."""

    def resume(self) -> None:
        """The clock goes on."""

    def close(self) -> None:
        self._timer.close()

    def loaded(self) -> None:
        self._changed()

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(self, SIZE), (self.reset_control, 1)]

    def attach(self, bus: Bus) -> None:
        """Port 0xcf9 lies within a PCI bus's CONFIG_ADDRESS, which passes it on to ``reset_control``."""
        bus.add_ports(BASE, SIZE, self)

    def press_power_button(self) -> None:
        """The guest's operating system decides what follows. Under the board lock."""
        self.status |= PWRBTN_STS
        self._changed()

    def note_alarm(self) -> None:
        """The RTC's. Under the board lock."""
        self.status |= RTC_STS
        self._changed()

    def raise_event(self, number: int) -> None:
        """A general-purpose event, which the DSDT's ``_GPE`` has a method for. Under the board lock."""
        self.gpe_status |= 1 << number
        self._changed()

    def _ticks(self) -> int:
        return self._clock.now_ns() * PM_TIMER_HZ // _NS

    def _changed(self) -> None:
        """Drive the SCI; watch the timer's bit 31 where its change is to interrupt."""
        self._note_timer()
        if self.asleep and self.status & (self.enable & RTC_STS | PWRBTN_STS):
            self.asleep = False
            self.status |= WAK_STS
            self._wake()
        self._sci.set(bool(self.status & self.enable or self.gpe_status & self.gpe_enable))
        if self.enable & TMR_STS and not self.status & TMR_STS:
            self._timer.arm(-(-(self.timer_high + 1 << 31) * _NS // PM_TIMER_HZ))
        else:
            self._timer.cancel()

    def _note_timer(self) -> None:
        """TMR_STS: bit 31 of the timer changed since it was noted last (ACPI 4.8.3.3)."""
        high = self._ticks() >> 31
        if high != self.timer_high:
            self.timer_high = high
            self.status |= TMR_STS

    def _timer_toggled(self) -> None:
        """On the clock's thread, under the board lock."""
        self._changed()

    def read(self, offset: int, size: int) -> int:
        if offset == TIMER and size == 4:  # the one that is read often
            return self._ticks() & 0xFFFF_FFFF
        self._note_timer()
        control = self.control | SCI_EN
        registers = self.status | self.enable << 16 | control << 32 | (self._ticks() & 0xFFFF_FFFF) << 64
        registers |= self.gpe_status << 96 | self.gpe_enable << 112
        return registers >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self._note_timer()
        bits = value << 8 * offset
        written = ((1 << 8 * size) - 1) << 8 * offset
        self.status &= ~(bits & _STATUS_BITS)  # write 1 to clear
        self.gpe_status &= ~(bits >> 96) & 0xFFFF
        self.gpe_enable = (self.gpe_enable & ~(written >> 112) | bits >> 112) & 0xFFFF
        self.enable = (self.enable & ~(written >> 16) | bits >> 16 & written >> 16) & _ENABLE_BITS
        self._changed()
        if written >> 32 & 0xFFFF:
            control = self.control & ~(written >> 32) | bits >> 32 & written >> 32
            self.control = control & _CONTROL_BITS
            sleep_type = control >> 10 & 7 if control & SLP_EN else None
            if sleep_type == SLEEP_TYPE_S5:
                self._power_off()
            elif sleep_type == SLEEP_TYPE_S3 and not self.asleep:
                self.asleep = True
                self._sleep()
                self._changed()


class ResetControl(Fields):
    """Port 0xcf9: RST_CPU (bit 2) going from 0 to 1 resets; SYS_RST (1) and FULL_RST (3) choose how hard."""

    state_fields: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine
        self.value = 0

    def reset(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        rises = value & ~self.value & 0x04
        self.value = value & 0x0E
        if rises:
            self._reset_machine()
