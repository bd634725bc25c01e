"""A program with a pseudo-terminal of its own, for tests."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from types import TracebackType

_TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background may ignore it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class OnTerminal:
    """``python ARGUMENTS`` in a session of its own, whose controlling terminal is a pseudo-terminal of ours."""

    def __init__(self, *arguments: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = self.mode()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": "src"},
        )

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self.master)
        os.close(self.slave)

    def read_until(self, text: bytes, timeout: float = 10.0) -> bytes:
        got = b""
        deadline = time.monotonic() + timeout
        while text not in got and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                got += os.read(self.master, 4096)
        assert text in got, got
        return got

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def mode(self) -> list[object]:
        return list(termios.tcgetattr(self.slave))
