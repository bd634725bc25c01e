"""Translations kept on disk, from one VM to the next.

A *record* is a block's machine code without its place: what depends on where the block lies is listed beside it, and so
are the bytes of the guest that it was made from and those it looked ahead at. Wherever a guest shows the same bytes at
the same offset of a page in the same mode, the record is that block. Constants of 4 and 8 bytes that the code only
copies are not compared: a kernel that was loaded at another address has others there.

Records lie in *segments* (segment.py), which a VM writes when it ends. The name of a segment says which translator
made it; anything else is removed in time.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import iced_x86

from skep.engine.translate.segment import MASKS, Draft, Name, Segment, abandoned, open_directory

LIMIT = 256 << 20
"""Bytes of all segments; beyond, those that were not used longest go."""
MAX_SEGMENTS = 6
"""With more, all but the largest and what is new become one segment."""
WORTH = 64
"""A segment with fewer records, or with less than a twentieth of what was adopted, is not written."""
READ = 64
"""Groups that are remembered."""
SEEN_BITS = 17

Group = tuple[int, int]
"""The number of a segment, and of a group in it."""

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
    """A record in its group, of which the code has not been looked at: where its parts stand."""

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


def _stored(blob: bytes, at: int) -> Stored:
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


def matches(look: Look, guest: memoryview) -> bool:
    if guest == look.data:
        return True
    if not look.mask:
        return False
    mask = int.from_bytes(look.mask, "little")
    return int.from_bytes(guest, "little") & mask == int.from_bytes(look.data, "little") & mask


def _key(offset: int, mode: int, head: bytes) -> tuple[int, int]:
    """A name's key, and which bytes of the code the name shows. ``head`` is the first bytes of code. A function's
    ENDBR64 and what a tracer may put behind it say nothing; an immediate behind the first byte may differ."""
    at = 9 if head[:4] == _ENDBR else 0
    word = head[at : at + 1] if head[at : at + 1] in _IMMEDIATE else head[at : at + 2]
    return offset << 48 | mode << 32 | int.from_bytes(word, "little"), at


def _name(record: Stored) -> Name:
    data = record.blob[record.data : record.links]
    key, at = _key(record.offset, record.mode, data)
    mask = (1 << max(0, min(8, len(data) - at))) - 1
    for _, of, k in record.each_copy():
        for i in range(max(0, of - at), min(8, of + k - at)):
            mask &= ~(1 << i)
    return Name(key, int.from_bytes(data[at : at + 8], "little") & MASKS[mask], mask)


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
        self._segments: list[Segment] = []
        self._used: list[bytearray] = []
        """By segment, by group: 1 where something of it was adopted."""
        self._read: dict[Group, list[Stored]] = {}
        """The groups that were wanted last."""
        self._new: list[tuple[int, Name, int, bytes]] | None = []
        """What is new, until it is worth a file."""
        self._draft: Draft | None = None
        self._seen = array("Q", bytes(8 << SEEN_BITS))
        """Hashed by themselves, checksums of what was put last, so that what is made again is not put again."""
        self.adopted = 0
        self._directory = -1
        if directory is None:
            return
        try:
            self._directory = open_directory(directory)
            self._load(self._names())
        except OSError as error:
            self.problem = f"{error.strerror or error}: {directory}"

    @property
    def keeps(self) -> bool:
        """Whether what is new can be kept."""
        return self._directory >= 0

    def __len__(self) -> int:
        return sum(map(len, self._segments))

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
            for segment in self._segments:
                segment.close()
            self._segments.clear()
            os.close(self._directory)
            self._directory = -1

    # Adopting

    def find(self, offset: int, mode: int, head: bytes) -> Iterator[Group]:
        """Groups with records that may be the block at ``offset`` of a page that begins with ``head``."""
        key, at = _key(offset, mode, head)
        shown = int.from_bytes(head[at : at + 8], "little")
        for i, segment in enumerate(self._segments):
            for group in segment.find(key, shown):
                yield i, group

    def records(self, group: Group) -> list[Stored]:
        """What was made on one page together."""
        records = self._read.pop(group, None)
        if records is None:
            segment, number = group
            try:
                blob = self._segments[segment].group(number)
            except (OSError, ValueError) as error:
                self.problem = str(error)
                self._segments[segment].forget()
                self._remove(self._segments[segment].name)
                return []
            if len(self._read) >= READ:
                del self._read[next(iter(self._read))]
            records = []
            at = 0
            while at < len(blob):
                records.append(_stored(blob, at))
                at = records[-1].end
        self._read[group] = records
        return records

    def use(self, group: Group) -> None:
        """A record of a group was adopted."""
        self._used[group[0]][group[1]] = 1
        self.adopted += 1

    # Keeping

    def put(self, page: int, record: Record) -> None:
        """A block was made that no record was. ``page`` is the same for all that are made on one page."""
        if self._directory < 0 or len(record.code) >= 1 << 16 or len(record.links) >= 256:
            return
        data = record.pack()
        name = _name(_stored(data, 0))
        check = zlib.crc32(data)
        number = check & (1 << SEEN_BITS) - 1
        if self._seen[number] == name.key ^ check << 32:
            return
        self._seen[number] = name.key ^ check << 32
        self._add(page, name, check, data)

    def _add(self, page: int, name: Name, check: int, data: bytes) -> None:
        try:
            if self._new is not None:
                self._new.append((page, name, check, data))
                if len(self._new) < WORTH:
                    return
                self._draft = Draft(self._directory, f"{self._identity}-{os.urandom(8).hex()}.seg")
                for one in self._new:
                    self._draft.add(*one)
                self._new = None
            elif self._draft is not None and self._draft.size < self._limit:
                self._draft.add(page, name, check, data)
        except OSError as error:
            self.problem = error.strerror or str(error)
            self.close()

    def _names(self) -> list[str]:
        """The segments that there are, the one that was used last at the end."""
        found = []
        for name in os.listdir(self._directory):
            if name.startswith(self._identity) and name.endswith(".seg"):
                try:
                    found.append((os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_mtime_ns, name))
                except FileNotFoundError:  # another VM has just replaced it
                    pass
        return [name for _, name in sorted(found)]

    def _load(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                segment = Segment(self._directory, name)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                self._remove(name)
                continue
            self._segments.append(segment)
            self._used.append(bytearray(segment.groups))

    def _keep(self) -> None:
        for segment, used in zip(self._segments, self._used, strict=True):
            if 1 in used:
                try:
                    os.utime(segment.name, dir_fd=self._directory, follow_symlinks=False)
                except FileNotFoundError:  # replaced meanwhile
                    pass
        draft = self._draft
        if draft is None or len(draft) < self.adopted // 20:
            return
        known = {segment.name for segment in self._segments}
        self._load(name for name in self._names() if name not in known)
        replaced = self._merge(draft) if len(self._segments) >= MAX_SEGMENTS else []
        kept = [segment for segment in self._segments if segment not in replaced]
        if draft.size < self._limit and draft.finish(lambda key, check: any(s.has(key, check) for s in kept), WORTH):
            for segment in replaced:
                self._remove(segment.name)
            self._tidy()

    def _merge(self, draft: Draft) -> list[Segment]:
        """Add the records of all segments but the largest to a draft, those that were of use first."""
        merged = sorted(self._segments, key=lambda segment: segment.size)[:-1]
        page = 1 << 31
        for wanted in (1, 0):
            for segment, used in zip(self._segments, self._used, strict=True):
                if segment in merged:
                    others = merged[: merged.index(segment)]
                    for group, one in enumerate(used):
                        if one == wanted and (wanted or draft.size < self._limit // 2):
                            self._copy(draft, segment, group, page, others)
                            page += 1
        return merged

    @staticmethod
    def _copy(draft: Draft, segment: Segment, group: int, page: int, others: list[Segment]) -> None:
        try:
            for check, record in segment.records(group):
                name = _name(_stored(record, 0))
                if not any(other.has(name.key, check) for other in others):
                    draft.add(page, name, check, record)
        except ValueError:
            pass  # spoiled since

    def _tidy(self) -> None:
        """Remove what other translators made, what was left half done, and what is too much."""
        found = []
        for name in os.listdir(self._directory):
            try:
                status = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not name.startswith("."):
                found.append((status.st_mtime_ns, status.st_size, name))
            elif abandoned(self._directory, name):
                self._remove(name)
        total = 0
        for _, size, name in sorted(found, reverse=True):
            total += size
            if total > self._limit:
                self._remove(name)

    def _remove(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._directory)
        except FileNotFoundError:
            pass



def directory() -> Path:
    """Where translated code is kept unless the configuration says otherwise (XDG Base Directory Specification)."""
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (told if told.is_absolute() else Path.home() / ".cache") / "skep" / "code"


