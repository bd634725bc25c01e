"""The serial port on a pseudo-terminal of its own: ``screen /dev/pts/3``, or any terminal program."""

from __future__ import annotations

import array
import fcntl
import os
import select
import termios
import time
import tty
from collections.abc import Callable

from skep.chardev.line import PATIENCE, Line
from skep.chardev.loop import Loop
from skep.errors import HostError

_GATHER = 0.005
"""Seconds between two looks whether a reader has taken all."""
_SURELY = 4
"""Looks at an empty terminal that mean nothing more comes: the kernel passes output on in pieces."""
_LOOK = 0.25
"""Seconds between two looks whether somebody has opened it: that is no event to wait for."""


class Pty(Line):
    """A :class:`~skep.contracts.chardev.CharBackend`. The kernel hangs the master up while nobody has the terminal
    open; the output waits here then, not in the terminal's own small buffer."""

    def __init__(self, loop: Loop, say: Callable[[str], None]) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise HostError(f"no pseudo-terminal: {(error.strerror or str(error)).lower()}", "/dev/ptmx") from None
        self.name = os.ttyname(slave)
        tty.setraw(slave)  # it stays so, also if nobody has the terminal open
        os.fchmod(slave, 0o600)
        os.close(slave)
        os.set_blocking(self._master, False)
        super().__init__(loop, f"pty:{self.name}", say)
        say(f"its terminal is {self.name}")

    def _open(self) -> None:
        """Look whether somebody is there, and again later if not."""
        if self._closed or self._link is not None:
            return
        if self._nobody():
            self._loop.call_later(_LOOK, self._open)
        else:
            self._attach(self._master)

    def _left(self, fd: int) -> None:
        self._open()

    def _shut(self) -> None:
        self._wait_until_read()
        os.close(self._master)

    def _nobody(self) -> bool:
        poll = select.poll()
        poll.register(self._master, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    def _wait_until_read(self) -> None:
        """What the terminal still holds is lost to its reader when we close the master."""
        if self._nobody():
            return
        slave = os.open(self.name, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        unread = array.array("i", [0])
        deadline = time.monotonic() + PATIENCE
        empty = 0
        while empty < _SURELY and time.monotonic() < deadline:
            time.sleep(_GATHER)
            fcntl.ioctl(slave, termios.FIONREAD, unread)
            empty = 0 if unread[0] else empty + 1
        os.close(slave)
