"""The protocol layer: the bytes of one of the host's files or block devices, below every format."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Iterator

from skep.block.backend import Buffers, Extent, Located, split, write_zeroes_as_data
from skep.block.closing import Closing
from skep.block.locking import lock_image
from skep.errors import HostError, UserError
from skep.locks import Lock, Order

_IOV_MAX = 1024  # Linux's UIO_MAXIOV
_BOUNCE = 1 << 20
_SHORT = "the image ends before the disk does"

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10  # fallocate(2)
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_NO_COPY_RANGE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_SLOW_NS = 2_000_000
"""A write that took as long had to wait: for dirty pages to be written back, or the file system's own reads."""
_WARY_NS = 100_000_000
"""For how long it is to be expected of others then."""


class HostFile(Closing):
    """A regular file or a block device of the host. Make one with :func:`open_file` or :func:`create_file`.

    A :class:`skep.block.backend.Storage` that takes any offset and length, not only whole sectors. What lies beyond its
    end is EIO to a reader; a writer makes it longer.

    ``alignment`` is 1, or, for a descriptor opened with O_DIRECT, what the host demands of memory addresses, file
    offsets and lengths: transfers that do not have it go through a buffer that does.

    Of a ``volatile`` one nothing is made durable, as nobody needs it after a loss of power.
    """

    def __init__(
        self,
        fd: int,
        path: str,
        size: int,
        *,
        read_only: bool,
        write_cache: bool,
        alignment: int = 1,
        volatile: bool = False,
    ) -> None:
        """The descriptor is this object's own from now on."""
        self._volatile = volatile
        self.path = path
        self.size = size
        self.read_only = read_only
        self.write_cache = write_cache
        self.alignment = alignment
        self._fd = fd
        self._lost: OSError | None = None
        self._nowait = alignment == 1
        self._in_memory = False
        """The whole file system is; it knows nothing of RWF_NOWAIT."""
        self._slow_until = 0 if alignment == 1 and write_cache else 1 << 63
        self._lock = Lock("image file", Order.FILE)
        """Over changes of ``size``, and over writes of part of a block under O_DIRECT."""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        if self.alignment > 1 and not self._aligned(buffers, offset):
            self._bounced(buffers, offset, self._read_bounced)
        else:
            _transfer(os.preadv, self._fd, buffers, offset, sum(map(len, buffers)))

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        length = sum(map(len, buffers))
        if self.alignment > 1 and not self._aligned(buffers, offset):
            with self._lock:
                self._bounced(buffers, offset, self._write_bounced)
        else:
            _transfer(os.pwritev, self._fd, buffers, offset, length)
        if offset + length > self.size:
            self._grown(offset + length)

    def _grown(self, end: int) -> None:
        with self._lock:
            self.size = max(self.size, end)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        if not self._nowait or len(buffers) > _IOV_MAX:
            return False
        try:
            flags = 0 if self._in_memory else os.RWF_NOWAIT
            return os.preadv(self._fd, buffers, offset, flags) == sum(map(len, buffers))
        except BlockingIOError:
            return False
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            self._nowait = self._in_memory = _is_tmpfs(self._fd)
            return self._nowait and self.read_now(buffers, offset)

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        # Few file systems have RWF_NOWAIT for writes. To the page cache they seldom wait, and then not alone.
        begun = time.monotonic_ns()
        if begun < self._slow_until:
            return False
        length = sum(map(len, buffers))
        _transfer(os.pwritev, self._fd, buffers, offset, length)
        if offset + length > self.size:
            self._grown(offset + length)
        ended = time.monotonic_ns()
        if ended - begun > _SLOW_NS:
            self._slow_until = ended + _WARY_NS
        return True

    def locate(self, offset: int, length: int, write: bool) -> Located | None:
        if offset + length > self.size or (write and self.read_only):
            return None
        return Located(self, offset)

    def discard(self, offset: int, length: int) -> None:
        self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        mode = _PUNCH_HOLE if unmap else _ZERO_RANGE
        if not self._allocate(mode | _KEEP_SIZE, offset, length):
            write_zeroes_as_data(self, offset, length)

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

    def resize(self, size: int) -> None:
        with self._lock:
            os.ftruncate(self._fd, size)
            self.size = size

    def allocate(self, offset: int, length: int) -> None:
        """Reserve space on the host, so that a write there cannot run out of it."""
        os.posix_fallocate(self._fd, offset, length)
        self._grown(offset + length)

    def allocated(self) -> int:
        """Bytes of the host's that the file takes."""
        return os.fstat(self._fd).st_blocks * 512

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = min(offset + length, self.size)
        while offset < end:
            try:
                data = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError as e:
                # ENXIO: no data up to the end. Block devices know nothing of holes.
                data = end if e.errno == errno.ENXIO else offset
            if data > offset:
                hole_end = min(data, end)
                yield Extent(offset, hole_end - offset, zero=True, host=offset)
                offset = hole_end
            if offset < end:
                try:
                    hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
                except OSError:
                    hole = end
                data_end = min(max(hole, offset + 1), end)
                yield Extent(offset, data_end - offset, data=True, host=offset)
                offset = data_end

    def flush(self) -> None:
        # The kernel reports a failed write-back once and then forgets the pages: a second fdatasync would succeed
        # although the data is gone.
        if self._lost is not None:
            raise self._lost
        if self._volatile:
            return
        try:
            os.fdatasync(self._fd)
        except OSError as e:
            self._lost = e
            raise

    @property
    def fd(self) -> int:
        """For who knows how to ask the kernel himself."""
        return self._fd

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _aligned(self, buffers: Buffers, offset: int) -> bool:
        mask = self.alignment - 1
        if offset & mask:
            return False
        for buffer in filter(None, buffers):
            if buffer.readonly or (ctypes.addressof(ctypes.c_char.from_buffer(buffer)) | len(buffer)) & mask:
                return False
        return True

    def _bounced(self, buffers: Buffers, offset: int, move: Callable[[memoryview, Buffers, int], None]) -> None:
        """Through a buffer of whole blocks: ``move`` finds in it what is at ``offset`` with its offset in a block."""
        rest = list(buffers)
        with mmap.mmap(-1, _BOUNCE + self.alignment) as page, memoryview(page) as bounce:
            while rest:
                piece, rest = split(rest, _BOUNCE - offset % self.alignment)
                n = sum(map(len, piece))
                first = offset % self.alignment
                with bounce[: -(-(first + n) // self.alignment) * self.alignment] as part:
                    move(part, piece, offset)
                offset += n

    def _read_bounced(self, bounce: memoryview, buffers: Buffers, offset: int) -> None:
        at = offset % self.alignment
        self._fill(bounce, offset - at, at + sum(map(len, buffers)))
        for buffer in buffers:
            buffer[:] = bounce[at : at + len(buffer)]
            at += len(buffer)

    def _write_bounced(self, bounce: memoryview, buffers: Buffers, offset: int) -> None:
        at = offset % self.alignment
        if at or sum(map(len, buffers)) != len(bounce):
            bounce[:] = bytes(len(bounce))
            self._fill(bounce, offset - at, 0)
        start = offset - at
        for buffer in buffers:
            bounce[at : at + len(buffer)] = buffer
            at += len(buffer)
        _transfer(os.pwritev, self._fd, [bounce], start, len(bounce))

    def _fill(self, bounce: memoryview, offset: int, needed: int) -> None:
        """Read whole blocks, of which the file may end before the last is full; at least ``needed`` bytes."""
        got = 0
        while got < len(bounce):
            n = os.preadv(self._fd, [bounce[got:]], offset + got)
            got += n
            if n == 0 or got % self.alignment:
                break
        if got < needed:
            raise OSError(errno.EIO, _SHORT)


def open_file(
    path: str,
    *,
    read_only: bool = False,
    no_cache: bool = False,
    synchronous: bool = False,
    lock: bool = True,
    volatile: bool = False,
) -> HostFile:
    """Open and lock a file or block device. Raises UserError, and leaves nothing open then."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)
    if no_cache:
        flags |= os.O_DIRECT
    if synchronous:
        flags |= os.O_DSYNC
    try:
        fd = os.open(path, flags)
    except OSError as e:
        raise _open_error(path, e, read_only, no_cache) from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISBLK(mode):
            if not read_only:
                claimed = _claim(path, flags)
                os.close(fd)
                fd = claimed
        elif not stat.S_ISREG(mode):
            what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
            raise UserError(f"the disk is {what}", path)
        if lock:
            lock_image(fd, path, write=not read_only)
        size = os.lseek(fd, 0, os.SEEK_END)
        alignment = _direct_alignment(fd, path) if no_cache else 1
    except BaseException:
        os.close(fd)
        raise
    return HostFile(
        fd,
        path,
        size,
        read_only=read_only,
        write_cache=not synchronous,
        alignment=alignment,
        volatile=volatile,
    )


def create_file(path: str, size: int = 0) -> HostFile:
    """A new file of ``size`` bytes, all zeros, instead of what was there; a block device, which must be as long, stays
    as it is. Raises UserError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as e:
        raise UserError(f"the file cannot be made: {e.strerror}", path) from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISBLK(mode):
            claimed = _claim(path, os.O_RDWR | os.O_CLOEXEC)
            os.close(fd)
            fd = claimed
            if (has := os.lseek(fd, 0, os.SEEK_END)) < size:
                raise UserError(f"the device has {has} bytes, and the image needs {size}", path)
            return HostFile(fd, path, has, read_only=False, write_cache=True)
        if not stat.S_ISREG(mode):
            raise UserError("neither a file nor a block device", path)
        lock_image(fd, path, write=True)
        try:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
        except OSError as e:
            raise UserError(f"the file cannot be {size} bytes long: {e.strerror}", path) from None
    except BaseException:
        os.close(fd)
        raise
    return HostFile(fd, path, size, read_only=False, write_cache=True)


def copy_range(source: Located, target: Located, length: int) -> bool:
    """copy_file_range(2): the host copies, which some file systems do by sharing blocks, and some servers without
    sending them. False: it cannot between these two, and a part may be copied."""
    done = 0
    while done < length:
        here, there = source.offset + done, target.offset + done
        try:
            n = os.copy_file_range(source.file.fd, target.file.fd, length - done, here, there)
        except OSError as e:
            if e.errno in _NO_COPY_RANGE:
                return False
            raise
        if n == 0:  # the file ends here; who reads it is told
            return False
        done += n
    if not target.file.write_cache:  # O_DSYNC is for writes
        target.file.flush()
    return True


def _open_error(path: str, error: OSError, read_only: bool, no_cache: bool) -> UserError:
    if error.errno == errno.ENOENT:
        return UserError("there is no such disk image", path, "skep image create or truncate -s SIZE makes one")
    if error.errno == errno.EISDIR:
        return UserError("the disk is a directory", path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not read_only and os.access(path, os.R_OK):
        return UserError("the disk image is not writable", path, "say ro to open it read-only")
    if error.errno == errno.EINVAL and no_cache:
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


def _direct_alignment(fd: int, path: str) -> int:
    """The smallest aligned transfer that the host takes on an O_DIRECT descriptor, by trying."""
    for alignment in (512, 1024, 2048, 4096):
        with mmap.mmap(-1, 2 * alignment) as page, memoryview(page)[alignment : 2 * alignment] as buffer:
            try:
                os.preadv(fd, [buffer], 0)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise UserError(f"the disk image cannot be read: {e.strerror}", path) from None
                continue
        return alignment
    raise HostError("direct I/O does not work on this file system", path, "leave nocache out")


def _is_tmpfs(fd: int) -> bool:
    try:
        with open(f"/proc/self/fdinfo/{fd}") as info, open("/proc/self/mountinfo") as every:
            mount, mounts = re.search(r"^mnt_id:\s*(\d+)$", info.read(), re.MULTILINE), every.read()
    except OSError:
        return False
    return mount is not None and re.search(rf"^{mount[1]} .* - tmpfs ", mounts, re.MULTILINE) is not None


def _transfer(
    move: Callable[[int, Buffers, int], int], fd: int, buffers: Buffers, offset: int, length: int
) -> None:
    """All the ``length`` bytes: the kernel may stop early, at 2 GiB or at a signal, and takes 1024 buffers at most."""
    rest = buffers
    while length:
        n = move(fd, rest if len(rest) <= _IOV_MAX else rest[:_IOV_MAX], offset)
        if n == length:
            return
        if n == 0:
            raise OSError(errno.EIO, _SHORT)
        rest = split(rest, n)[1]
        offset += n
        length -= n
