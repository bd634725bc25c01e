"""Segments: the files that records of translated code lie in (store.py).

A segment has a head, *groups* of records that were made on one page, and an index: where each group lies, and for each
record its name, its group and a checksum, in the order of names. Who opens a segment reads its index; a group is read,
and checked, when it is wanted. A segment is written whole under a name of its own and renamed; after that nobody
changes it.

What is in segments is executed, so only files count that nobody but this user could have written: the directory is
ours and closed to others, links are not followed, owner and mode are looked at on the open file.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from time import time_ns
from typing import BinaryIO, NamedTuple

_HEAD = struct.Struct("<8sIIIQ")  # magic, CRC-32 of the index, groups, records, where the index begins
_MAGIC = b"SkepSeg2"
_SUMMED = 12
"""In the head: what the CRC-32 counts begins there."""
GROUP = 256 << 10
"""Bytes of a group; more records of the same page make another one."""
ABANDONED = 60 * 10**9
"""A draft that nobody holds and that is older than this, in ns, belongs to a VM that was killed."""
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC


class Name(NamedTuple):
    """What a record is looked for by."""

    key: int
    """64 bits that must be equal."""
    shown: int
    """Eight bytes of the guest's, 0 where they do not count."""
    mask: int
    """A bit for each of them that counts."""


MASKS = tuple(sum(0xFF << 8 * i for i in range(8) if bits >> i & 1) for bits in range(256))
"""Bits for bytes, by a name's ``mask``."""


def _open(directory: int, name: str) -> int:
    """Open for reading what only we can have written; raises OSError and ValueError."""
    file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _FILE, dir_fd=directory)
    status = os.fstat(file)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return file
    os.close(file)
    raise ValueError("others could have written it")


class Segment:
    """One file, open for reading."""

    def __init__(self, directory: int, name: str) -> None:
        """Raises OSError where it is not there, and ValueError where it is not what was written."""
        self.name = name
        self._file = _open(directory, name)
        try:
            self.size = os.fstat(self._file).st_size
            self._load()
        except BaseException:
            os.close(self._file)
            raise

    def _load(self) -> None:
        head = os.pread(self._file, _HEAD.size, 0)
        if len(head) < _HEAD.size or head[:8] != _MAGIC:
            raise ValueError("it is no segment")
        _, crc, groups, records, at = _HEAD.unpack(head)
        self._ends = array("Q")
        """By group: where it ends in the file."""
        self._sums = array("I")
        self._keys = array("Q")
        self._shown = array("Q")
        self._groups = array("I")
        self._checks = array("I")
        self._masks = array("B")
        columns = (self._keys, self._shown, self._groups, self._checks, self._masks)
        tables = [(self._ends, groups), (self._sums, groups), *((column, records) for column in columns)]
        if self.size != at + sum(table.itemsize * n for table, n in tables):
            raise ValueError("its size is wrong")
        found = zlib.crc32(head[_SUMMED:])
        for table, n in tables:
            data = os.pread(self._file, table.itemsize * n, at)
            found = zlib.crc32(data, found)
            at += table.itemsize * n
            table.frombytes(data)
        if found != crc:
            raise ValueError("its index is spoiled")

    def close(self) -> None:
        os.close(self._file)

    def forget(self) -> None:
        """There is nothing in it any more."""
        self._keys = array("Q")

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def groups(self) -> int:
        return len(self._ends)

    def find(self, key: int, shown: int) -> Iterator[int]:
        """The groups that have records of a key and of these eight bytes."""
        keys = self._keys
        at = bisect_left(keys, key)
        last = -1
        while at < len(keys) and keys[at] == key:
            if self._groups[at] != last and shown & MASKS[self._masks[at]] == self._shown[at]:
                last = self._groups[at]
                yield last
            at += 1

    def has(self, key: int, check: int) -> bool:
        """Whether there is a record of this key and this CRC-32."""
        keys = self._keys
        at = bisect_left(keys, key)
        while at < len(keys) and keys[at] == key:
            if self._checks[at] == check:
                return True
            at += 1
        return False

    def group(self, number: int) -> bytes:
        """The records of a group. Raises ValueError where they are not what was written, and OSError."""
        start = self._ends[number - 1] if number else _HEAD.size
        data = os.pread(self._file, self._ends[number] - start, start)
        if zlib.crc32(data) != self._sums[number]:
            raise ValueError("its records are spoiled")
        return data

    def records(self, number: int) -> Iterator[tuple[int, bytes]]:
        """The records of a group, each with its CRC-32."""
        data = self.group(number)
        at = 0
        while at < len(data):
            record = data[at : at + int.from_bytes(data[at : at + 4], "little")]
            yield zlib.crc32(record), record
            at += len(record)


class Draft:
    """A segment that is being written: records in the order in which they come, in a file without the segment's name.
    It is locked as long as its VM lives."""

    def __init__(self, directory: int, name: str) -> None:
        self._directory = directory
        self._name = name
        self._file = os.open(f".{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, 0o600, dir_fd=directory)
        self._keys = array("Q")
        self._shown = array("Q")
        self._groups = array("I")
        self._sizes = array("I")
        self._checks = array("I")
        self._masks = array("B")
        self.size = 0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._out = os.fdopen(os.dup(self._file), "wb", buffering=1 << 16)
        except BaseException:
            self.drop()
            raise

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, group: int, name: Name, check: int, data: bytes) -> None:
        """A record that is ``data``, whose first four bytes are its length; ``check`` is its CRC-32."""
        self._out.write(data)
        self._keys.append(name.key)
        self._shown.append(name.shown)
        self._masks.append(name.mask)
        self._groups.append(group)
        self._sizes.append(len(data))
        self._checks.append(check)
        self.size += len(data)

    def finish(self, others: Sequence[Segment], least: int) -> bool:
        """Order the records by their groups, and give the segment its name. Those that ``others`` have are left out;
        where fewer than ``least`` are left, nothing is done."""
        self._out.flush()
        order = list(range(len(self)))
        for other in others:
            order = [i for i in order if not other.has(self._keys[i], self._checks[i])]
        if len(order) < least:
            return False
        order.sort(key=self._groups.__getitem__)
        temporary = f".{self._name}+"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE, 0o600, dir_fd=self._directory)
        try:
            with os.fdopen(file, "wb", buffering=1 << 20) as out:
                self._write(out, order)
            os.rename(temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            _remove(self._directory, temporary)
            raise
        return True

    def _write(self, out: BinaryIO, order: list[int]) -> None:
        sizes, page = self._sizes, self._groups
        starts = array("Q", accumulate(sizes, initial=0))
        ends, sums, groups = array("Q"), array("I"), array("I", bytes(4 * len(self)))
        out.write(bytes(_HEAD.size))
        end, total, mine = _HEAD.size, 0, -1
        with mmap.mmap(self._file, self.size, access=mmap.ACCESS_READ) as records:
            for i in order:
                n = sizes[i]
                if page[i] != mine or total + n > GROUP:
                    ends.append(end)
                    sums.append(0)
                    mine, total = page[i], 0
                data = records[starts[i] : starts[i] + n]
                out.write(data)
                end += n
                total += n
                ends[-1] = end
                sums[-1] = zlib.crc32(data, sums[-1])
                groups[i] = len(ends) - 1
        order.sort(key=self._keys.__getitem__)  # of one key, the groups stay in order
        columns = (self._keys, self._shown, groups, self._checks, self._masks)
        index = (array(column.typecode, map(column.__getitem__, order)) for column in columns)
        rest = b"".join(table.tobytes() for table in (ends, sums, *index))
        out.write(rest)
        counts = len(ends), len(order), end
        crc = zlib.crc32(rest, zlib.crc32(_HEAD.pack(_MAGIC, 0, *counts)[_SUMMED:]))
        out.seek(0)
        out.write(_HEAD.pack(_MAGIC, crc, *counts))

    def drop(self) -> None:
        """Remove the draft, finished or not."""
        if hasattr(self, "_out"):
            try:
                self._out.close()
            except OSError:
                pass  # the disk is full
        os.close(self._file)
        _remove(self._directory, f".{self._name}")


def read_whole(directory: int, name: str) -> bytes:
    """What :func:`write_whole` wrote; raises OSError and ValueError."""
    with os.fdopen(_open(directory, name), "rb") as file:
        check, data = file.read(4), file.read()
    if not data or zlib.crc32(data) != int.from_bytes(check, "little"):
        raise ValueError("it is spoiled")
    return data


def write_whole(directory: int, name: str, data: bytes) -> None:
    """Keep ``data``, all at once. Raises OSError."""
    temporary = f".{name}.{os.urandom(8).hex()}"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE, 0o600, dir_fd=directory)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(zlib.crc32(data).to_bytes(4, "little") + data)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        _remove(directory, temporary)
        raise


def abandoned(directory: int, name: str) -> bool:
    """Whether a file that is no segment yet belongs to no VM that lives."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _FILE, dir_fd=directory)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return time_ns() - os.fstat(file).st_mtime_ns > ABANDONED
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def _remove(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


def open_directory(path: Path) -> int:
    """Our own directory, closed to others, made if it is missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(directory)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(directory)
        raise PermissionError(errno.EPERM, "others may enter the directory of translated code")
    return directory
