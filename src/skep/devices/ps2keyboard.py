"""A PS/2 keyboard at the end of its cable (IBM PS/2 Hardware Interface Technical Reference, Keyboards).

It speaks scan code set 2, and no other. Whoever has keys to press gives it the bytes that such a keyboard sends for
them (:meth:`Ps2Keyboard.inject`); repeating a key that is held is theirs too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from skep.locks import Lock
from skep.state import Fields

ACK, RESEND, SELF_TEST_PASSED, ECHO = 0xFA, 0xFE, 0xAA, 0xEE
IDENTITY = b"\xab\x83"
"""An MF2 keyboard."""
SCROLL_LOCK, NUM_LOCK, CAPS_LOCK = 1 << 0, 1 << 1, 1 << 2
"""Bits of :attr:`Ps2Keyboard.leds`."""

_SET_LEDS, _ECHO, _SCAN_CODE_SET, _IDENTIFY, _SET_RATE = 0xED, 0xEE, 0xF0, 0xF2, 0xF3
_ENABLE, _DISABLE, _DEFAULTS, _RESEND, _RESET = 0xF4, 0xF5, 0xF6, 0xFE, 0xFF
_SET = 2
_BUFFER = 16
"""Bytes of scan codes that wait; real ones keep as many."""
_ANSWERS = 16
"""Bytes of answers that wait: more than any command has, and a guest that reads none gets no more."""


class Ps2Keyboard(Fields):
    """``ready`` is set by whom the cable leads to, and called under the board lock when there is something to send."""

    name = "keyboard"
    state_fields: ClassVar[tuple[str, ...]] = ("answers", "codes", "scanning", "leds", "rate", "parameter_of", "last")

    def __init__(self, lock: Lock) -> None:
        """``lock`` is the board's."""
        self._lock = lock
        self.ready: Callable[[], None] = _nobody
        self._held = False
        self.reset()

    def reset(self) -> None:
        """Power-on; the result of its self test was read by firmware."""
        self.answers = b""
        """Wait to be sent, before any scan code."""
        self.codes = b""
        self.last = 0
        """The byte that was sent last."""
        self._defaults()
        self.scanning = True

    def _defaults(self) -> None:
        self.leds = 0
        self.rate = 0x2B  # 10.9 a second after 500 ms
        """Typematic rate and delay, as the command has them."""
        self.parameter_of = 0
        """The command that the next byte belongs to; 0 for none."""
        self.codes = b""

    def inject(self, codes: bytes) -> bool:
        """Keys were pressed or released: the bytes of scan code set 2 for it, from any thread.

        False where they do not fit, or the VM is frozen, and then none of them was taken; a keyboard that is not
        scanning takes all, and forgets them.
        """
        with self._lock:
            if self._held or len(self.codes) + len(codes) > _BUFFER:
                return False
            if not self.scanning:
                return True
            self.codes += codes
            self.ready()
            return True

    def hold(self, held: bool) -> None:
        """While ``held``, nobody can press a key. Not under the board lock."""
        with self._lock:
            self._held = held

    # The cable, under the board lock.

    def send(self) -> int | None:
        """The next byte to the controller; None: there is none."""
        if self.answers:
            self.last, self.answers = self.answers[0], self.answers[1:]
        elif self.codes:
            self.last, self.codes = self.codes[0], self.codes[1:]
        else:
            return None
        return self.last

    def receive(self, value: int) -> None:
        """A byte from the controller: a command, or what belongs to one."""
        command, self.parameter_of = self.parameter_of, 0
        if command and value < _SET_LEDS:
            self._parameter(command, value)
        else:
            self._command(value)
        self.ready()

    def _answer(self, *values: int) -> None:
        self.answers = (self.answers + bytes(values))[:_ANSWERS]

    def _parameter(self, command: int, value: int) -> None:
        if command == _SET_LEDS:
            self.leds = value & (SCROLL_LOCK | NUM_LOCK | CAPS_LOCK)
        elif command == _SET_RATE:
            self.rate = value & 0x7F
        elif value not in (0, _SET):  # another scan code set
            self._answer(RESEND)
            return
        self._answer(ACK)
        if command == _SCAN_CODE_SET and value == 0:  # which one is it?
            self._answer(_SET)

    def _command(self, value: int) -> None:
        if value in (_SET_LEDS, _SCAN_CODE_SET, _SET_RATE):
            self.parameter_of = value
            self._answer(ACK)
        elif value == _ECHO:
            self._answer(ECHO)
        elif value == _IDENTIFY:
            self._answer(ACK, *IDENTITY)
        elif value == _RESEND:
            self._answer(self.last)
        elif value in (_ENABLE, _DISABLE, _DEFAULTS, _RESET):
            if value == _ENABLE:
                self.codes = b""
            else:
                self._defaults()
            self.scanning = value != _DISABLE
            self._answer(ACK)
            if value == _RESET:
                self._answer(SELF_TEST_PASSED)
        else:
            self._answer(RESEND)


def _nobody() -> None:
    """The cable is not plugged in yet."""
