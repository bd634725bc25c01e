"""What is left of the keyboard controller: the CPU reset line and A20, without keyboard and mouse.

Ports 0x60 and 0x64 (IBM PC/AT Technical Reference; Intel 8042), and port 0x92 (PS/2's fast A20 and reset). The self
test passes and the interface tests find the clock lines stuck low, so that a driver that probes gives up without
waiting for time-outs; ACPI does not list the controller, and Linux then does not probe. A20 is always open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from skep.contracts.device import Passive
from skep.contracts.io import IoRegion
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus

STATUS_OUTPUT_FULL, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED = 1 << 0, 1 << 2, 1 << 3, 1 << 4

_OUTPUT_PORT = 0b0000_0011
"""CPU reset not asserted, A20 open."""
_A20 = 1 << 1


class I8042(Passive, Fields):
    """``reset_machine`` is called in the middle of the guest's write, under the board lock."""

    name = "i8042"
    state_fields: ClassVar[tuple[str, ...]] = ("memory", "output", "last_was_command", "parameter_of")

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine
        self.memory = bytearray(32)
        """Byte 0 is the command byte."""
        self.fast = _FastA20(reset_machine)
        self.reset()

    def reset(self) -> None:
        self.memory[:] = bytes(32)
        self.memory[0] = 0x30  # both devices disabled
        self.output: int | None = None
        self.last_was_command = False
        self.parameter_of = 0
        """The command that the next byte at port 0x60 belongs to; 0 for none."""

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(_Port(self._read_data, self._write_data), 1), (_Port(self._status, self._command), 1), (self.fast, 1)]

    def attach(self, bus: Bus) -> None:
        for port, (region, length) in zip((0x60, 0x64, 0x92), self.regions(), strict=True):
            bus.add_ports(port, length, region)

    def _status(self) -> int:
        return (
            STATUS_UNLOCKED
            | (STATUS_COMMAND if self.last_was_command else 0)
            | self.memory[0] & STATUS_SYSTEM
            | (STATUS_OUTPUT_FULL if self.output is not None else 0)
        )

    def _read_data(self) -> int:
        value, self.output = self.output, None
        return value or 0

    def _write_data(self, value: int) -> None:
        command, self.parameter_of = self.parameter_of, 0
        self.last_was_command = False
        if 0x60 <= command <= 0x7F:
            self.memory[command & 0x1F] = value
        elif command == 0xD1 and not value & 1:  # output port, CPU reset asserted
            self._reset_machine()
        elif command in (0xD2, 0xD3):  # as if a device had sent it
            self.output = value
        # Without a command, or with 0xd4, it is for a device that is not there.

    def _command(self, value: int) -> None:
        self.last_was_command = True
        self.parameter_of = 0
        if 0x20 <= value <= 0x3F:
            self.output = self.memory[value & 0x1F]
        elif 0x60 <= value <= 0x7F or 0xD1 <= value <= 0xD4:
            self.parameter_of = value
        elif value == 0xAA:  # self test
            self.memory[0] |= STATUS_SYSTEM
            self.output = 0x55
        elif value in (0xA9, 0xAB):  # interface tests, of mouse and keyboard: clock line stuck low
            self.output = 0x01
        elif value == 0xA7:
            self.memory[0] |= 0x20
        elif value == 0xA8:
            self.memory[0] &= ~0x20
        elif value == 0xAD:
            self.memory[0] |= 0x10
        elif value == 0xAE:
            self.memory[0] &= ~0x10
        elif value == 0xC0:  # input port: keyboard not inhibited
            self.output = 0x80
        elif value == 0xD0:
            self.output = _OUTPUT_PORT
        elif value >= 0xF0 and not value & 1:  # pulse output port bit 0, the CPU's reset
            self._reset_machine()


class _Port:
    """A port of one byte."""

    def __init__(self, get: Callable[[], int], put: Callable[[int], None]) -> None:
        self._get, self._put = get, put

    def read(self, offset: int, size: int) -> int:
        return self._get()

    def write(self, offset: int, size: int, value: int) -> None:
        self._put(value & 0xFF)


class _FastA20:
    """Port 0x92: bit 0 resets when it is set, bit 1 is A20."""

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine

    def read(self, offset: int, size: int) -> int:
        return _A20

    def write(self, offset: int, size: int, value: int) -> None:
        if value & 1:
            self._reset_machine()
