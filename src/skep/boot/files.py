"""The files of a boot, as they were when the VM was made: a reset loads them again, whatever became of them since."""

from __future__ import annotations

import os
from contextlib import suppress
from os import PathLike
from typing import TypeAlias

from skep.errors import UserError
from skep.memory import GuestMemory

FileName: TypeAlias = str | PathLike[str]

_CHUNK = 1 << 20


class BootFiles:
    """What every protocol starts from: a kernel, perhaps an initrd, a command line."""

    def __init__(self, kernel: FileName, initrd: FileName | None = None, cmdline: str = "") -> None:
        """Raises UserError for what cannot be read, is empty, or is no text."""
        self.cmdline = _encoded(cmdline)
        self.kernel = BootFile(kernel, "kernel")
        try:
            self.initrd = BootFile(initrd, "initrd") if initrd is not None else None
        except BaseException:
            self.kernel.close()
            raise

    def check_cmdline(self, longest: int) -> None:
        """The command line may have ``longest`` bytes."""
        if len(self.cmdline) > longest:
            what = f"the kernel's command line has {len(self.cmdline)} bytes, this kernel takes {longest}"
            raise UserError(what, "boot.cmdline")

    def load_initrd(self, memory: GuestMemory, above: int, limit: int) -> int:
        """Put the initrd, if there is one, out of the kernel's way: as high below ``limit`` as low RAM allows, and not
        below ``above``. Gives its address, 0 without one."""
        if self.initrd is None:
            return 0
        start = (min(memory.low_size, limit) - self.initrd.size) & ~0xFFF
        if start < above:
            mib = (self.initrd.size + 0xFFFFF) >> 20
            what = f"the initrd has {mib} MiB and does not fit into {memory.size >> 20} MiB of memory"
            raise UserError(what, self.initrd.path, "give the guest more with --memory")
        self.initrd.load(memory, start, 0, self.initrd.size)
        return start

    @property
    def initrd_size(self) -> int:
        return self.initrd.size if self.initrd is not None else 0

    def no_room(self, memory: GuestMemory, end: int) -> UserError:
        """The kernel ends at ``end``, which is more than there is."""
        what = f"the kernel needs {(end + 0xFFFFF) >> 20} MiB of memory, the guest has {memory.size >> 20}"
        return UserError(what, self.kernel.path, "give it more with --memory")

    def close(self) -> None:
        self.kernel.close()
        if self.initrd is not None:
            self.initrd.close()


def _encoded(cmdline: str) -> bytes:
    try:
        line = cmdline.encode()
    except UnicodeEncodeError:
        raise UserError("the kernel's command line is not text", "boot.cmdline") from None
    if b"\0" in line:
        raise UserError("the kernel's command line contains a NUL", "boot.cmdline")
    return line


class BootFile:
    """A copy of a file, in a file without a name that ends with us.

    Not in our memory: a kernel and its initramfs are tens of megabytes that are read once a boot. The copy is in
    TMPDIR or /var/tmp, where the kernel can write it out, or in a memfd where that cannot be.
    """

    def __init__(self, path: FileName, what: str) -> None:
        """``what`` it is, for the messages. Raises UserError where it cannot be read, or is empty."""
        self.path = path
        self.size = 0
        self._fd = -1
        self._fd = _nameless()
        try:
            self._copy(what)
            if not self.size:
                raise UserError(f"the {what} is empty", path)
        except BaseException:
            self.close()
            raise

    def _copy(self, what: str) -> None:
        try:
            with open(self.path, "rb", buffering=0) as file:
                with suppress(OSError):  # no regular file, or a full disk: what is left goes by hand
                    while n := os.sendfile(self._fd, file.fileno(), None, _CHUNK):
                        self.size += n
                while data := file.read(_CHUNK):
                    self._append(data)
        except IsADirectoryError:
            raise UserError("is a directory", self.path, f"pass the {what}'s file") from None
        except (OSError, ValueError) as e:
            reason = e.strerror.lower() if isinstance(e, OSError) and e.strerror else str(e)
            raise UserError(f"cannot read the {what}: {reason}", self.path) from None

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                n = os.pwrite(self._fd, view, self.size)
            except OSError:  # a full disk, most likely
                self._to_memory()
                continue
            self.size += n
            view = view[n:]

    def _to_memory(self) -> None:
        """Go on in a memfd; what that does not take, nothing will."""
        old, self._fd = self._fd, os.memfd_create("skep-boot")
        try:
            at = 0
            while at < self.size:
                at += os.pwrite(self._fd, os.pread(old, _CHUNK, at), at)
        finally:
            os.close(old)

    def read(self, n: int, start: int = 0) -> bytes:
        """n bytes from ``start``, or as many as there are."""
        return os.pread(self._fd, n, start)

    def load(self, memory: GuestMemory, gpa: int, start: int, n: int) -> None:
        """Put n bytes from ``start``, or as many as there are, into guest memory at ``gpa``."""
        n = min(n, self.size - start)
        with memory.view(gpa, n) as view:
            at = 0
            while at < n:
                at += os.preadv(self._fd, [view[at:]], start + at)
        memory.dma_write(gpa, n)

    def close(self) -> None:
        """It can be called again, and comes by itself with the last reference."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def _nameless() -> int:
    directory = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        return os.open(directory, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # no such directory, no right to it, a file system that cannot do it
        return os.memfd_create("skep-boot")
