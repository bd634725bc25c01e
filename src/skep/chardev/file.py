"""The serial port's output at the end of a file; it has no input."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from skep.chardev.writer import Writer
from skep.contracts.chardev import BackendStatus, Receiver
from skep.errors import UserError


class File:
    """A :class:`~skep.contracts.chardev.CharBackend`. The file grows from VM to VM; where it cannot, as on a full file
    system, the last MiB waits until it can."""

    def __init__(self, path: str, key: str, say: Callable[[str], None]) -> None:
        if not path:
            raise UserError("names no file", key, "say file:PATH")
        self._path = path
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        try:
            self._fd = os.open(path, flags | os.O_NONBLOCK, 0o666)  # a FIFO without a reader fails at once
        except OSError as error:
            raise UserError(f"{path}: {(error.strerror or str(error)).lower()}", key) from None
        if stat.S_ISFIFO(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise UserError(f"{path}: not a file", key, "for a reader of its own give it a pty or a unix socket")
        self._writer = Writer(self._fd, "console-file")
        self._writer.failed = lambda error: say(
            f"cannot write to {path}: {(error.strerror or str(error)).lower()}; the last MiB is kept meanwhile"
        )

    def connect(self, receiver: Receiver) -> None:
        self._writer.backlog.drained = receiver.drained

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def output_room(self) -> int:
        return self._writer.room()

    def room_available(self) -> None:
        """It never has anything to say."""

    def status(self) -> BackendStatus:
        return BackendStatus(f"file:{self._path}", True, self._writer.waiting, self._writer.dropped)

    def close(self) -> None:
        self._writer.backlog.drained = None
        if self._fd >= 0 and self._writer.close():
            os.close(self._fd)
        self._fd = -1
