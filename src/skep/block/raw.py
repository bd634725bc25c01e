"""Raw images: a regular file or a block device whose bytes are the disk's bytes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import time
from collections.abc import Callable

from skep.block.backend import Buffers
from skep.block.locking import lock_image
from skep.block.options import BlockOptions
from skep.errors import HostError, UserError

_IOV_MAX = 1024  # Linux's UIO_MAXIOV
_BOUNCE = 1 << 20
_ZEROES = bytes(1 << 20)

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10  # fallocate(2)
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_SLOW_NS = 2_000_000
"""A write that took as long had to wait: for dirty pages to be written back, or the file system's own reads."""
_WARY_NS = 100_000_000
"""For how long it is to be expected of others then."""


class RawImage:
    """An open raw image. Make one with :func:`open_raw`.

    ``alignment`` is 1, or, for a descriptor opened with O_DIRECT, what the host demands of memory addresses, file
    offsets and lengths: buffers that do not have it go through a buffer that does.
    """

    def __init__(self, fd: int, size: int, *, read_only: bool, write_cache: bool, alignment: int = 1) -> None:
        self.size = size
        self.read_only = read_only
        self.write_cache = write_cache
        self._fd = fd
        self._alignment = alignment
        self._lost: OSError | None = None
        self._nowait = alignment == 1
        self._slow_until = 0 if alignment == 1 and write_cache else 1 << 63

    def preadv(self, buffers: Buffers, offset: int) -> None:
        if self._alignment > 1 and not self._aligned(buffers):
            self._bounced(buffers, offset, self._read_bounced)
        else:
            _transfer(os.preadv, self._fd, buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        if self._alignment > 1 and not self._aligned(buffers):
            self._bounced(buffers, offset, self._write_bounced)
        else:
            _transfer(os.pwritev, self._fd, buffers, offset)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        if not self._nowait or len(buffers) > _IOV_MAX:
            return False
        try:
            return os.preadv(self._fd, buffers, offset, os.RWF_NOWAIT) == sum(map(len, buffers))
        except BlockingIOError:
            return False
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            self._nowait = False
            return False

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        # Few file systems have RWF_NOWAIT for writes. To the page cache they seldom wait, and then not alone.
        begun = time.monotonic_ns()
        if begun < self._slow_until:
            return False
        _transfer(os.pwritev, self._fd, buffers, offset)
        ended = time.monotonic_ns()
        if ended - begun > _SLOW_NS:
            self._slow_until = ended + _WARY_NS
        return True

    def discard(self, offset: int, length: int) -> None:
        self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        mode = _PUNCH_HOLE if unmap else _ZERO_RANGE
        if not self._allocate(mode | _KEEP_SIZE, offset, length):
            end = offset + length
            for at in range(offset, end, len(_ZEROES)):
                self.pwritev([memoryview(_ZEROES)[: end - at]], at)

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate(2), which block devices have too. False: not on this file system."""
        while _fallocate(self._fd, mode, offset, length):
            code = ctypes.get_errno()
            if code == errno.EOPNOTSUPP:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        if not self.write_cache:  # O_DSYNC is for writes
            self.flush()
        return True

    def flush(self) -> None:
        # The kernel reports a failed write-back once and then forgets the pages: a second fdatasync would succeed
        # although the data is gone.
        if self._lost is not None:
            raise self._lost
        try:
            os.fdatasync(self._fd)
        except OSError as e:
            self._lost = e
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _aligned(self, buffers: Buffers) -> bool:
        mask = self._alignment - 1
        for buffer in filter(None, buffers):
            if buffer.readonly or (ctypes.addressof(ctypes.c_char.from_buffer(buffer)) | len(buffer)) & mask:
                return False
        return True

    def _bounced(self, buffers: Buffers, offset: int, move: Callable[[memoryview, Buffers, int], None]) -> None:
        rest = list(buffers)
        total = sum(map(len, rest))
        with mmap.mmap(-1, min(total, _BOUNCE)) as page, memoryview(page) as bounce:
            while rest:
                piece, rest = _split(rest, _BOUNCE)
                n = sum(map(len, piece))
                with bounce[:n] as part:
                    move(part, piece, offset)
                offset += n

    def _read_bounced(self, bounce: memoryview, buffers: Buffers, offset: int) -> None:
        _transfer(os.preadv, self._fd, [bounce], offset)
        at = 0
        for buffer in buffers:
            buffer[:] = bounce[at : at + len(buffer)]
            at += len(buffer)

    def _write_bounced(self, bounce: memoryview, buffers: Buffers, offset: int) -> None:
        at = 0
        for buffer in buffers:
            bounce[at : at + len(buffer)] = buffer
            at += len(buffer)
        _transfer(os.pwritev, self._fd, [bounce], offset)


def open_raw(options: BlockOptions) -> RawImage:
    """Open and lock the image. Raises UserError, and leaves nothing open then."""
    path = options.path
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if options.read_only else os.O_RDWR)
    if options.no_cache:
        flags |= os.O_DIRECT
    if options.synchronous:
        flags |= os.O_DSYNC
    try:
        fd = os.open(path, flags)
    except OSError as e:
        raise _open_error(options, e) from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISBLK(mode):
            if not options.read_only:
                claimed = _claim(path, flags)
                os.close(fd)
                fd = claimed
        elif not stat.S_ISREG(mode):
            what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
            raise UserError(f"the disk is {what}", path)
        if options.lock:
            lock_image(fd, path, write=not options.read_only)
        size = os.lseek(fd, 0, os.SEEK_END)
        _check_size(size, options)
        alignment = _direct_alignment(fd, options) if options.no_cache else 1
    except BaseException:
        os.close(fd)
        raise
    return RawImage(fd, size, read_only=options.read_only, write_cache=not options.synchronous, alignment=alignment)


def _open_error(options: BlockOptions, error: OSError) -> UserError:
    path = options.path
    if error.errno == errno.ENOENT:
        return UserError("there is no such disk image", path, "qemu-img create or truncate -s SIZE makes one")
    if error.errno == errno.EISDIR:
        return UserError("the disk is a directory", path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not options.read_only and os.access(path, os.R_OK):
        return UserError("the disk image is not writable", path, "say ro to open it read-only")
    if error.errno == errno.EINVAL and options.no_cache:
        return HostError("this file system has no direct I/O", path, "leave nocache out")
    return UserError(f"the disk image cannot be opened: {error.strerror}", path)


def _claim(path: str, flags: int) -> int:
    """A block device that the host has mounted, or swaps to, is not for a guest to write: O_EXCL finds out
    (open(2))."""
    try:
        return os.open(path, flags | os.O_EXCL)
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise UserError("the block device is in use by this host, perhaps mounted", path, "say ro") from None
        raise UserError(f"the block device cannot be opened: {e.strerror}", path) from None


def _check_size(size: int, options: BlockOptions) -> None:
    """A size that is no whole number of blocks is refused: rounding down would hide data, rounding up grow the file."""
    unit = options.block.logical
    if size == 0:
        raise UserError("the disk image is empty", options.path, "truncate -s SIZE gives it a size")
    if size % unit:
        full = -(-size // unit) * unit
        raise UserError(
            f"the size, {size} bytes, is not a multiple of {unit}", options.path, f"truncate -s {full} rounds it up"
        )


def _direct_alignment(fd: int, options: BlockOptions) -> int:
    """The smallest aligned transfer that the host takes on an O_DIRECT descriptor, by trying."""
    for alignment in (512, 1024, 2048, 4096):
        with mmap.mmap(-1, 2 * alignment) as page, memoryview(page)[alignment : 2 * alignment] as buffer:
            try:
                os.preadv(fd, [buffer], 0)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise UserError(f"the disk image cannot be read: {e.strerror}", options.path) from None
                continue
        if alignment > options.block.logical:
            todo = f"say sectorsize={alignment}, or leave nocache out"
            raise HostError(f"direct I/O works in blocks of {alignment} bytes here", options.path, todo)
        return alignment
    raise HostError("direct I/O does not work on this file system", options.path, "leave nocache out")


def _transfer(move: Callable[[int, Buffers, int], int], fd: int, buffers: Buffers, offset: int) -> None:
    """All of it: the kernel may stop early, at 2 GiB or at a signal, and takes 1024 buffers at most."""
    rest = buffers
    while rest:
        n = move(fd, rest if len(rest) <= _IOV_MAX else rest[:_IOV_MAX], offset)
        if n == 0:
            raise OSError(errno.EIO, "the image ends before the disk does")
        rest = _split(rest, n)[1]
        offset += n


def _split(buffers: Buffers, n: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first n bytes, and the rest."""
    for i, buffer in enumerate(buffers):
        if n < len(buffer):
            return [*buffers[:i], buffer[:n]] if n else list(buffers[:i]), [buffer[n:], *buffers[i + 1 :]]
        n -= len(buffer)
    return list(buffers), []
