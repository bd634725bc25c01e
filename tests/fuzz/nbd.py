"""What an NBD server says as a fuzzer's input: all of it is there before the client has asked anything, and nothing
follows. The client's requests are always the same, so their cookies are."""

from __future__ import annotations

import random
import socket
import subprocess
import threading
import time
from pathlib import Path

from skep.block.backend import read_at, write_at
from skep.block.nbd.address import Address
from skep.block.nbd.client import NbdFile
from skep.block.nbd.connection import Connection
from skep.block.nbd.handshake import shake_hands
from skep.errors import UserError
from tests.block.hostile import LONGEST, attempt, bounded

_TIMEOUT = 5.0
_ROOM = 1 << 20
"""Of the socket: an input, and all that the client says."""


class _Said(NbdFile):
    """An export of a server that has said everything."""

    def __init__(self, link: socket.socket) -> None:
        self._said = link
        super().__init__(Address("", path="/nowhere"))

    def _connect(self) -> Connection:
        try:
            return Connection(self._said, shake_hands(self._said, "", "nowhere"))
        except OSError as error:
            raise UserError(f"it hung up: {error}") from None


def talk(file: NbdFile) -> None:
    for offset, length in ((0, 4096), (65536, 512), (file.size // 2 // 512 * 512, 1024)):
        if offset + length <= file.size:
            attempt(lambda offset=offset, length=length: read_at(file, offset, length))
            attempt(lambda offset=offset, length=length: write_at(file, offset, b"w" * length))
            attempt(lambda offset=offset, length=length: file.write_zeroes(offset, length, True))
            attempt(lambda offset=offset, length=length: file.discard(offset, length))
    attempt(file.flush)
    attempt(lambda: [extent for extent, _ in zip(file.extents(0, file.size), range(1000), strict=False)])


def run(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, bounded(LONGEST):
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
            end.settimeout(_TIMEOUT)
        try:
            theirs.send(data)
        except (TimeoutError, BlockingIOError):
            return
        theirs.shutdown(socket.SHUT_WR)
        try:
            with _Said(ours) as file:
                talk(file)
        except (OSError, UserError):
            pass


def sound(directory: Path) -> list[bytes]:
    """What servers said: QEMU's, of a qcow2 image with holes, and of a small raw one."""
    holes, small = directory / "holes.qcow2", directory / "small"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", holes, "8M"], check=True, timeout=60)
    small.write_bytes(random.Random(1).randbytes(66048))
    return [recorded(directory, holes, "qcow2"), recorded(directory, small, "raw")]


def recorded(directory: Path, image: Path, format: str) -> bytes:
    path = directory / "socket"
    command = ["qemu-nbd", "-f", format, "-k", str(path), str(image)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            ends = time.monotonic() + 30
            while not path.exists() and time.monotonic() < ends:
                time.sleep(0.01)
            return _overheard(path)
        finally:
            server.terminate()
            server.wait()
            path.unlink(missing_ok=True)


def _overheard(path: Path) -> bytes:
    said = bytearray()
    ours, between = socket.socketpair()
    with ours, between, socket.socket(socket.AF_UNIX) as server:
        server.connect(str(path))

        def hand_on(source: socket.socket, target: socket.socket, keep: bytearray | None) -> None:
            while data := source.recv(1 << 16):
                if keep is not None:
                    keep += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

        threads = [
            threading.Thread(target=hand_on, args=(between, server, None)),
            threading.Thread(target=hand_on, args=(server, between, said)),
        ]
        for thread in threads:
            thread.start()
        with _Said(ours) as file:
            talk(file)
        for thread in threads:
            thread.join()
    return bytes(said)
