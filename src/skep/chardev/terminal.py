"""The user's terminal: raw while the guest has it, as it was afterwards, whatever happens in between."""

from __future__ import annotations

import os
import termios
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

_GUARD = 'read -r word || stty "$1" <&1'
"""Runs in a shell beside us, its standard input a pipe from us, its output the terminal. The pipe ends without a
word only if we were killed or crashed; then the guard does what we no longer can."""

_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


class Terminal:
    """One terminal, by a descriptor that is open on it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[int | list[bytes | int]] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def ours(self) -> bool:
        """We are in the foreground; a background job that touched the terminal would be stopped."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return False

    def raw(self) -> None:
        """Every key goes to the guest, and what the guest prints comes out as it is (cfmakeraw(3)).

        A line feed does not return the carriage any more, also for what we ourselves have to say.
        """
        self._saved = termios.tcgetattr(self._fd)
        self._start_guard()
        mode = termios.tcgetattr(self._fd)
        mode[_IFLAG] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        mode[_OFLAG] &= ~termios.OPOST
        mode[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        mode[_CFLAG] = mode[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[_CC][termios.VMIN] = 1
        mode[_CC][termios.VTIME] = 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, mode)

    def restore(self) -> None:
        """As it was before ``raw``; more than once does nothing more."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        try:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, saved)
        except termios.error:
            pass  # The terminal is gone.
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.communicate(b"restored\n")

    def _start_guard(self) -> None:
        import subprocess  # few consoles are terminals

        try:
            modes = subprocess.run(["stty", "-g"], stdin=self._fd, capture_output=True, text=True, check=True).stdout
            self._guard = subprocess.Popen(
                ["sh", "-c", _GUARD, "skep-terminal", modes.strip()],
                stdin=subprocess.PIPE,
                stdout=self._fd,
                stderr=subprocess.DEVNULL,
                # Outside our process group and session: what ends us must not end it.
                start_new_session=True,
            )
        except (OSError, subprocess.CalledProcessError):
            self._guard = None  # No stty: we restore by ourselves, as long as we live.
