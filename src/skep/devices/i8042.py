"""The keyboard controller, with a keyboard and no mouse (IBM PC/AT Technical Reference; Intel 8042).

Ports 0x60 and 0x64, and port 0x92 (PS/2's fast A20 and reset). The controller translates the keyboard's scan code set 2
to set 1, as software expects, unless it is told not to. The mouse's interface test finds its clock line stuck low, so
that a driver that probes gives up at once. A20 is always open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from skep.contracts.io import IoRegion, IrqLine
from skep.devices.ps2keyboard import Ps2Keyboard
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus

DATA_PORT, STATUS_PORT, FAST_PORT = 0x60, 0x64, 0x92

STATUS_OUTPUT_FULL, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED = 1 << 0, 1 << 2, 1 << 3, 1 << 4

# The command byte.
KEYBOARD_INTERRUPT, SYSTEM, KEYBOARD_DISABLED, MOUSE_DISABLED, TRANSLATE = 1 << 0, 1 << 2, 1 << 4, 1 << 5, 1 << 6
_FROM_FIRMWARE = KEYBOARD_INTERRUPT | SYSTEM | MOUSE_DISABLED | TRANSLATE

_OUTPUT_PORT = 0b0000_0011
"""CPU reset not asserted, A20 open."""
_A20 = 1 << 1
_BREAK = 0xF0  # in set 2 the next code is of a key released, which in set 1 has bit 7 set

_SET_1 = bytes.fromhex(
    "ff 43 41 3f 3d 3b 3c 58 64 44 42 40 3e 0f 29 59 65 38 2a 70 1d 10 02 5a 66 71 2c 1f 1e 11 03 5b"
    "67 2e 2d 20 12 05 04 5c 68 39 2f 21 14 13 06 5d 69 31 30 23 22 15 07 5e 6a 72 32 24 16 08 09 5f"
    "6b 33 25 17 18 0b 0a 60 6c 34 35 26 27 19 0c 61 6d 73 28 74 1a 0d 62 6e 3a 36 1c 1b 75 2b 63 76"
    "55 56 77 78 79 7a 0e 7b 7c 4f 7d 4b 47 7e 7f 6f 52 53 50 4c 4d 48 01 45 57 4e 51 4a 37 49 46 54"
    "80 81 82 41 54"
) + bytes(range(0x85, 0x100))
"""What the controller's translation makes of each byte."""


class I8042(Fields):
    """``reset_machine`` is called in the middle of the guest's write, under the board lock."""

    name = "i8042"
    state_fields: ClassVar[tuple[str, ...]] = (
        "memory", "response", "output", "last_was_command", "parameter_of", "released", "keyboard",
    )  # fmt: skip

    def __init__(self, irq: IrqLine, keyboard: Ps2Keyboard, reset_machine: Callable[[], None]) -> None:
        self._irq = irq
        self._reset_machine = reset_machine
        self.keyboard = keyboard
        self.memory = bytearray(32)
        """Byte 0 is the command byte."""
        self.fast = _FastA20(reset_machine)
        keyboard.ready = self._fill
        self.reset()

    def reset(self) -> None:
        """As firmware leaves it."""
        self.memory[:] = bytes(32)
        self.memory[0] = _FROM_FIRMWARE
        self.response: int | None = None
        """The answer to a command, which waits for the output buffer."""
        self.output: int | None = None
        """The output buffer."""
        self.released = False
        """The last byte from the keyboard was a break prefix, and is to be part of the next."""
        self.last_was_command = False
        self.parameter_of = 0
        """The command that the next byte at port 0x60 belongs to; 0 for none."""
        self.keyboard.reset()
        self._drive()

    def pause(self) -> None:
        """Keys wait with whom they come from."""
        self.keyboard.hold(True)

    def resume(self) -> None:
        self.keyboard.hold(False)

    def loaded(self) -> None:
        self._drive()

    def close(self) -> None:
        """Nothing is held."""

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(_Port(self._read_data, self._write_data), 1), (_Port(self._status, self._command), 1), (self.fast, 1)]

    def attach(self, bus: Bus) -> None:
        for port, (region, length) in zip((DATA_PORT, STATUS_PORT, FAST_PORT), self.regions(), strict=True):
            bus.add_ports(port, length, region, self.name)

    # The output buffer.

    def _fill(self) -> None:
        """What waits goes into the buffer, if that is empty."""
        if self.output is None:
            self.output, self.response = self.response, None
        while self.output is None and not self.memory[0] & KEYBOARD_DISABLED:
            code = self.keyboard.send()
            if code is None:
                break
            self.output = self._translated(code)
        self._drive()

    def _translated(self, code: int) -> int | None:
        """The byte for the guest; None: it only says something of the next one."""
        if not self.memory[0] & TRANSLATE:
            return code
        if code == _BREAK:
            self.released = True
            return None
        released, self.released = self.released, False
        return _SET_1[code] | (0x80 if released else 0)

    def _drive(self) -> None:
        self._irq.set(self.output is not None and bool(self.memory[0] & KEYBOARD_INTERRUPT))

    def _respond(self, value: int) -> None:
        self.response = value
        self._fill()

    def _set_command_byte(self, value: int) -> None:
        self.memory[0] = value
        self._fill()

    # The ports.

    def _status(self) -> int:
        return (
            STATUS_UNLOCKED
            | (STATUS_COMMAND if self.last_was_command else 0)
            | self.memory[0] & STATUS_SYSTEM
            | (STATUS_OUTPUT_FULL if self.output is not None else 0)
        )

    def _read_data(self) -> int:
        value, self.output = self.output, None
        self._drive()  # low, also where the next byte raises it at once: the interrupt is an edge
        self._fill()
        return value or 0

    def _write_data(self, value: int) -> None:
        command, self.parameter_of = self.parameter_of, 0
        self.last_was_command = False
        if command == 0x60:
            self._set_command_byte(value)
        elif 0x61 <= command <= 0x7F:
            self.memory[command & 0x1F] = value
        elif command == 0xD1:  # output port
            if not value & 1:  # CPU reset asserted
                self._reset_machine()
        elif command in (0xD2, 0xD3):  # as if a device had sent it
            self._respond(value)
        elif command != 0xD4:  # that would be for the mouse
            self.memory[0] &= ~KEYBOARD_DISABLED
            self.keyboard.receive(value)

    def _command(self, value: int) -> None:
        self.last_was_command = True
        self.parameter_of = 0
        if 0x20 <= value <= 0x3F:
            self._respond(self.memory[value & 0x1F])
        elif 0x60 <= value <= 0x7F or 0xD1 <= value <= 0xD4:
            self.parameter_of = value
        elif value == 0xAA:  # self test
            self.memory[0] |= SYSTEM
            self._respond(0x55)
        elif value == 0xA9:  # the mouse's interface test: clock line stuck low
            self._respond(0x01)
        elif value == 0xAB:  # the keyboard's: nothing wrong
            self._respond(0x00)
        elif value == 0xA7:
            self.memory[0] |= MOUSE_DISABLED
        elif value == 0xA8:
            self.memory[0] &= ~MOUSE_DISABLED
        elif value == 0xAD:
            self.memory[0] |= KEYBOARD_DISABLED
        elif value == 0xAE:
            self._set_command_byte(self.memory[0] & ~KEYBOARD_DISABLED)
        elif value == 0xC0:  # input port: keyboard not inhibited
            self._respond(0x80)
        elif value == 0xD0:
            self._respond(_OUTPUT_PORT)
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
