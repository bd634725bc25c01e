"""Translations kept on disk, from one VM to the next.

A *record* is a block's machine code without its place: what depends on where the block lies is listed beside it, and so
are the bytes of the guest that it was made from and those it looked ahead at. Wherever a guest shows the same bytes at
the same offset of a page in the same mode, the record is that block. Constants of 4 and 8 bytes that the code only
copies are not compared: a kernel that was loaded at another address has others there.

Records lie in *segments*, files that a VM writes whole when it ends and that nobody changes after that. What is in them
is executed, so only files count that nobody but this user could have written: the directory is ours and closed to
others, links are not followed, owner and mode are looked at on the open file. A checksum finds what is cut off or
spoiled, and the name of a segment says which translator on which CPU made it; anything else is removed in time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import iced_x86

from skep.engine.translate.layout import Mode

LIMIT = 256 << 20
"""Bytes of all segments; beyond, those that were not used longest go."""
MAX_SEGMENTS = 6
"""With more, the records that were used and the new ones become one segment."""
WORTH = 64
"""A segment with fewer records, or with less than a twentieth of what there is, is not written."""

_SEGMENT = struct.Struct("<8sIIQ")  # magic, CRC-32 of the rest, records, bytes of records; records, then entries
_MAGIC = b"SkepSeg1"
_ENTRY = struct.Struct("<QQ")  # key; group << 40 | position
_HEAD = struct.Struct("<IHHHHHBBHHH")
"""Bytes in all, page offset, mode, guest bytes, code bytes, plain entry, flags that are live, how many links, copies,
bytes of looks, marks"""
_LINK = struct.Struct("<HHHB")  # displacement, its stub, target's page offset, SMAP's mode changes
_COPY = struct.Struct("<HHB")  # in the code, in the guest's bytes, bytes
_LOOK = struct.Struct("<HBB")  # page offset, bytes, bytes of the mask that follows them
_ENDBR = b"\xf3\x0f\x1e\xfa"
_IMMEDIATE = frozenset(bytes((b,)) for b in (0x05, 0x0D, 0x25, 0x2D, 0x35, 0x3D, 0x68, 0xA9, *range(0xB8, 0xC0)))


class Look(NamedTuple):
    """Bytes that a block rests on without containing them."""

    offset: int
    data: bytes
    mask: bytes
    """Empty, or zeros where another constant is as good."""


class Record(NamedTuple):
    """A block without its place."""

    offset: int
    mode: int
    data: bytes
    """The guest's bytes."""
    code: bytes
    entry: int
    live: int
    links: Sequence[tuple[int, int, int, bool]]
    """Jumps within the page: the displacement's offset, its stub's, the target's offset in the page, in the other
    mode of SMAP"""
    copies: Sequence[tuple[int, int, int]]
    """Constants that may differ: offset in the code, in ``data``, bytes"""
    looks: Sequence[Look]
    marks: array[int]

    def pack(self) -> bytes:
        looks = b"".join(_LOOK.pack(o, len(d), len(m)) + d + m for o, d, m in self.looks)
        parts = [self.data, *(_LINK.pack(*x) for x in self.links), *(_COPY.pack(*x) for x in self.copies)]
        body = b"".join((*parts, looks, self.marks.tobytes(), self.code))
        counts = len(self.links), len(self.copies), len(looks), len(self.marks)
        sizes = len(self.data), len(self.code), self.entry, self.live
        return _HEAD.pack(_HEAD.size + len(body), self.offset, self.mode, *sizes, *counts) + body


class Stored(NamedTuple):
    """A record in a segment, of which the code has not been looked at: where its parts stand."""

    blob: bytes
    offset: int
    mode: int
    size: int
    entry: int
    live: int
    data: int
    links: int
    n_links: int
    copies: int
    n_copies: int
    looks: int
    marks: int
    code: int
    end: int

    def same(self, guest: memoryview) -> bool:
        """Whether ``guest`` shows the record's bytes but for the constants that may differ."""
        at = self.data
        if guest == self.blob[at : at + self.size]:
            return True
        if not self.n_copies:
            return False
        theirs, ours = bytearray(guest), bytearray(self.blob[at : at + self.size])
        for i in range(self.n_copies):
            _, of, k = _COPY.unpack_from(self.blob, self.copies + i * _COPY.size)
            theirs[of : of + k] = ours[of : of + k] = bytes(k)
        return theirs == ours

    def each_look(self) -> Iterator[Look]:
        at = self.looks
        while at < self.marks:
            offset, n, m = _LOOK.unpack_from(self.blob, at)
            at += _LOOK.size
            yield Look(offset, self.blob[at : at + n], self.blob[at + n : at + n + m])
            at += n + m

    def each_link(self) -> Iterator[tuple[int, int, int, int]]:
        yield from _LINK.iter_unpack(self.blob[self.links : self.copies])

    def each_copy(self) -> Iterator[tuple[int, int, int]]:
        yield from _COPY.iter_unpack(self.blob[self.copies : self.looks])


def matches(look: Look, guest: memoryview) -> bool:
    if guest == look.data:
        return True
    if not look.mask:
        return False
    mask = int.from_bytes(look.mask, "little")
    return int.from_bytes(guest, "little") & mask == int.from_bytes(look.data, "little") & mask


def _key(offset: int, mode: int, head: bytes) -> int:
    """``head`` is the first bytes of code. A function's ENDBR64 and what a tracer may put behind it say nothing; an
    immediate behind the first byte may differ."""
    if head[:4] == _ENDBR:
        head = head[9:11]
    elif head[:1] in _IMMEDIATE:
        head = head[:1]
    return offset << 48 | mode << 32 | int.from_bytes(head[:2], "little")


def identity() -> str:
    """The name of all segments that this translator, with this decoder, can use. What it needs of the host's CPU is
    the same everywhere (features.py)."""
    digest = hashlib.sha256()
    for path in sorted(Path(iced_x86.__file__).parent.glob("*.so")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


class Store:
    """The segments of one directory, for one VM: what there is to adopt, and what is new.

    Nothing here raises for what is on disk or not: without a usable directory there are no records, and none is kept.
    ``problem`` says why.
    """

    def __init__(self, directory: Path | None, identity: str = "", limit: int = LIMIT) -> None:
        """``directory`` None: nothing is kept."""
        self.problem = ""
        self._limit = limit
        self._identity = identity
        self._blobs: list[bytes] = []
        self._names: list[str] = []
        self._keys = array("Q")
        self._where = array("Q")
        self._of = array("H")
        """By record: its segment."""
        self._first: dict[int, int] = {}
        self._more: dict[int, list[int]] = {}
        self._used: set[int] = set()
        self._draft: _Draft | None = None
        """The segment of what is new."""
        self.adopted = 0
        self._directory = -1
        if directory is None:
            return
        try:
            self._directory = _open_directory(directory)
            self._load()
        except OSError as error:
            self.problem = f"{error.strerror or error}: {directory}"

    @property
    def keeps(self) -> bool:
        """Whether what is new can be kept."""
        return self._directory >= 0

    def __len__(self) -> int:
        return len(self._keys)

    def close(self) -> None:
        """Keep what is new, and give everything back."""
        if self._directory < 0:
            return
        try:
            self._keep()
        except OSError as error:
            self.problem = error.strerror or str(error)
        finally:
            if self._draft is not None:
                self._draft.drop()
                self._draft = None
            os.close(self._directory)
            self._directory = -1

    # Adopting

    def find(self, offset: int, mode: int, head: bytes) -> Iterator[int]:
        """Records that may be the block at ``offset`` of a page that begins with ``head``."""
        key = _key(offset, mode, head)
        first = self._first.get(key)
        if first is not None:
            yield first
            yield from self._more.get(key, ())

    def group(self, number: int) -> range:
        """The records that were made on one page together with this one."""
        mine = self._where[number] >> 40
        first = last = number
        while first and self._where[first - 1] >> 40 == mine and self._of[first - 1] == self._of[number]:
            first -= 1
        last += 1
        while last < len(self._where) and self._where[last] >> 40 == mine and self._of[last] == self._of[number]:
            last += 1
        return range(first, last)

    def record(self, number: int) -> Stored:
        blob = self._blobs[self._of[number]]
        at = self._where[number] & (1 << 40) - 1
        length, offset, mode, size, _, entry, live, links, copies, looks, marks = _HEAD.unpack_from(blob, at)
        data = at + _HEAD.size
        links_at = data + size
        copies_at = links_at + links * _LINK.size
        looks_at = copies_at + copies * _COPY.size
        marks_at = looks_at + looks
        return Stored(
            blob, offset, mode, size, entry, live, data, links_at, links, copies_at, copies, looks_at, marks_at,
            marks_at + 2 * marks, at + length,
        )  # fmt: skip

    def key(self, number: int, page: int) -> int:
        """The key that the block of a record has on a page."""
        word = self._keys[number]
        return (page | word >> 48) << Mode.BITS | word >> 32 & 0xFFFF

    def use(self, number: int) -> None:
        """A record was adopted."""
        self._used.add(number)
        self.adopted += 1

    # Keeping

    def put(self, group: int, record: Record) -> None:
        """A block was made that no record was."""
        if self._directory < 0 or len(record.code) >= 1 << 16 or len(record.links) >= 256:
            return
        try:
            if self._draft is None:
                self._draft = _Draft(self._directory, f"{self._identity}-{os.urandom(8).hex()}.seg")
            if self._draft.size < self._limit:
                self._draft.add(group, _key(record.offset, record.mode, record.data), record.pack())
        except OSError as error:
            self.problem = error.strerror or str(error)
            self.close()

    def _load(self) -> None:
        found = []
        for name in os.listdir(self._directory):
            if name.startswith(self._identity) and name.endswith(".seg"):
                found.append((_modified(self._directory, name), name))
        for _, name in sorted(found):
            try:
                blob = _read(self._directory, name)
            except FileNotFoundError:  # another VM has just replaced it
                continue
            n = _check(blob)
            if n < 0:
                os.unlink(name, dir_fd=self._directory)
                continue
            both = array("Q")
            both.frombytes(blob[len(blob) - n * _ENTRY.size :])
            self._of.extend(array("H", (len(self._blobs),)) * n)
            self._keys.extend(both[::2])
            self._where.extend(both[1::2])
            self._blobs.append(blob)
            self._names.append(name)
        first, more = self._first, self._more
        for key, number in zip(self._keys, count()):
            if key in first:
                more.setdefault(key, []).append(number)
            else:
                first[key] = number

    def _keep(self) -> None:
        whole = len(self._blobs) >= MAX_SEGMENTS
        for number in {self._of[i] for i in self._used}:
            try:
                os.utime(self._names[number], dir_fd=self._directory, follow_symlinks=False)
            except FileNotFoundError:  # replaced meanwhile
                pass
        draft = self._draft
        if draft is None or len(draft) < max(WORTH, len(self) // 20):
            return
        if whole:
            for i in self._used:
                stored = self.record(i)
                data = stored.blob[stored.data - _HEAD.size : stored.end]
                draft.add(1 << 23 | self._where[i] >> 40, self._keys[i], data)
        if draft.size < self._limit:
            draft.finish()
            self._tidy(set(self._names) if whole else set())

    def _tidy(self, replaced: set[str]) -> None:
        """Remove what has been replaced, what other translators made, what was left half done, and what is too much."""
        found = []
        for name in os.listdir(self._directory):
            try:
                status = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            found.append((status.st_mtime_ns, status.st_size, name))
        total = 0
        for when, size, name in sorted(found, reverse=True):
            total += size
            old = name.startswith(".") and found and max(found)[0] - when > 3600 * 10**9
            if name in replaced or old or total > self._limit:
                try:
                    os.unlink(name, dir_fd=self._directory)
                except FileNotFoundError:
                    pass


class _Draft:
    """A segment that is being written. It has its name when it is finished."""

    def __init__(self, directory: int, name: str) -> None:
        self._directory = directory
        self._name = name
        file = os.open(f".{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
        self._file = os.fdopen(file, "wb", buffering=1 << 16)
        self._file.write(bytes(_SEGMENT.size))
        self._finished = False
        self._crc = 0
        self._keys = array("Q")
        self._where = array("Q")
        self.size = _SEGMENT.size

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, group: int, key: int, data: bytes) -> None:
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._keys.append(key)
        self._where.append((group & 0xFFFFFF) << 40 | self.size)
        self.size += len(data)

    def finish(self) -> None:
        """Records of a group stand together in the table, in the order in which they came."""
        where = self._where
        order = sorted(range(len(where)), key=where.__getitem__)
        table = b"".join(_ENTRY.pack(self._keys[i], where[i]) for i in order)
        self._file.write(table)
        head = _SEGMENT.pack(_MAGIC, zlib.crc32(table, self._crc), len(order), self.size - _SEGMENT.size)
        self._file.seek(0)
        self._file.write(head)
        self._file.close()
        os.rename(f".{self._name}", self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._finished = True

    def drop(self) -> None:
        """Close; what was not finished goes."""
        if not self._finished:
            try:
                self._file.close()
                os.unlink(f".{self._name}", dir_fd=self._directory)
            except OSError:
                pass  # another VM found it too much, and removed it; or the disk is full, and one removes it later


def _open_directory(path: Path) -> int:
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


def _modified(directory: int, name: str) -> int:
    """When a segment was used last, in ns; 0 where another VM has just removed it."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime_ns
    except FileNotFoundError:
        return 0


def _read(directory: int, name: str) -> bytes:
    """A segment's bytes, nothing if others could have written it."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    with os.fdopen(file, "rb") as source:
        status = os.fstat(source.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return b""
        return source.read()


def _check(blob: bytes) -> int:
    """How many records a segment has; -1 where it is not what was written."""
    if len(blob) < _SEGMENT.size:
        return -1
    magic, crc, n, size = _SEGMENT.unpack_from(blob)
    whole: bool = magic == _MAGIC and len(blob) == _SEGMENT.size + n * _ENTRY.size + size
    return n if whole and zlib.crc32(memoryview(blob)[_SEGMENT.size :]) == crc else -1


def directory() -> Path:
    """Where translated code is kept unless the configuration says otherwise (XDG Base Directory Specification)."""
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (told if told.is_absolute() else Path.home() / ".cache") / "skep" / "code"


