"""Translations kept on disk, from one VM to the next.

A *record* is a block's machine code without its place: what depends on where the block lies is listed beside it, and so
are the bytes of the guest that it was made from and those it looked ahead at. Wherever a guest shows the same bytes at
the same offset of a page in the same mode, the record is that block. Constants of 2, 4 and 8 bytes that the code only
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
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from time import time_ns

import iced_x86

from skep.engine.translate.notes import Notes
from skep.engine.translate.segment import (
    MASKS,
    Draft,
    Name,
    Segment,
    abandoned,
    open_directory,
    read_whole,
    write_whole,
)
from skep.engine.translate.tables import RECORD, RUN, RUN_MASKED, WHICH

LIMIT = 256 << 20
"""Bytes of all segments; beyond, those that were not used longest go."""
MAX_SEGMENTS = 6
"""With more, all but the largest and what is new become one segment."""
WORTH = 64
"""A segment with fewer records, or with less than a twentieth of what was adopted, is not written."""
OLD = 7 * 86400 * 10**9
"""Nanoseconds after which what another translator compiled goes."""
READ = 2 << 20
"""Bytes of groups that are remembered."""
SEEN_BITS = 17

Group = tuple[int, int]
"""The number of a segment, and of a group in it."""

_RUN = struct.Struct("<HHHxx")
_WHICH = struct.Struct("<HH").unpack_from
assert _RUN.size == RUN
_ENDBR = b"\xf3\x0f\x1e\xfa"
_IMMEDIATE = frozenset(bytes((b,)) for b in (0x05, 0x0D, 0x25, 0x2D, 0x35, 0x3D, 0x68, 0xA9, *range(0xB8, 0xC0)))


def _key(offset: int, mode: int, head: bytes) -> tuple[int, int]:
    """A name's key, and which bytes of the code the name shows. ``head`` is the first bytes of code. A function's
    ENDBR64 and what a tracer may put behind it say nothing; an immediate behind the first byte may differ."""
    at = 9 if head[:4] == _ENDBR else 0
    word = head[at : at + 1] if head[at : at + 1] in _IMMEDIATE else head[at : at + 2]
    return offset << 48 | mode << 32 | int.from_bytes(word, "little"), at


def _name(data: bytes) -> Name:
    """Of a packed record."""
    offset, mode = _WHICH(data, WHICH)
    run, size, how = _RUN.unpack_from(data, RECORD)
    start = RECORD + RUN + (run & 7)
    end = start + size
    key, at = _key(offset, mode, data[start : min(end, start + 17)])
    start += at
    shown = data[start : min(end, start + 8)]
    mask = (1 << len(shown)) - 1
    if how & RUN_MASKED:
        start += (run + size + 7 >> 3) - (run >> 3) << 3
        mask = _bits(data[start : start + len(shown)])
    return Name(key, int.from_bytes(shown, "little") & MASKS[mask], mask)


@lru_cache(1 << 10)
def _bits(mask: bytes) -> int:
    """A bit for each byte that is not 0."""
    return sum(1 << i for i, byte in enumerate(mask) if byte)


_IMPORTED = time_ns()


@lru_cache(1)
def identity(imported: int = _IMPORTED) -> str:
    """The name of all segments that this translator, with this decoder, can use. What it needs of the host's CPU is
    the same everywhere (features.py). Asked once: before this process ends, the sources on disk may be
    another version's. Empty where they have changed since they were ``imported`` (ns, by the clock of files), for what
    they say is not what runs."""
    digest = hashlib.sha256()
    for path in sorted(Path(iced_x86.__file__).parent.glob("*.so")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stat().st_ctime_ns > imported:
            return ""
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
        self._read: dict[Group, bytes] = {}
        """The groups that were wanted last."""
        self._bytes = 0
        self._new: list[tuple[int, Name, int, bytes]] | None = []
        """What is new, until it is worth a file."""
        self._draft: Draft | None = None
        self._seen = array("Q", bytes(8 << SEEN_BITS))
        """Hashed by themselves, checksums of what was put last, so that what is made again is not put again."""
        self.adopted = 0
        self._notes: Notes | None = None
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
            self.sort_notes()
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

    # What depends on the translator alone

    def made(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What ``make`` gives, or gave to another VM of this translator."""
        if self._directory < 0:
            return make()
        name = f"{self._identity}.{name}"
        try:
            return read_whole(self._directory, name)
        except (OSError, ValueError):
            pass  # not there yet, or not what was written
        data = make()
        try:
            write_whole(self._directory, name, data)
        except OSError as error:
            self.problem = error.strerror or str(error)
        return data

    # Adopting

    def find(self, offset: int, mode: int, head: bytes) -> Iterator[Group]:
        """Groups with records that may be the block at ``offset`` of a page that begins with ``head``."""
        key, at = _key(offset, mode, head)
        shown = int.from_bytes(head[at : at + 8], "little")
        for i, segment in enumerate(self._segments):
            for group in segment.find(key, shown):
                yield i, group

    def group(self, group: Group) -> bytes:
        """The records that were made on one page together; nothing where they are spoiled."""
        data = self._read.pop(group, None)
        if data is None:
            segment, number = group
            try:
                data = self._segments[segment].group(number)
            except (OSError, ValueError) as error:
                self.problem = str(error)
                self._segments[segment].forget()
                self._remove(self._segments[segment].name)
                return b""
            while self._read and self._bytes + len(data) > READ:
                self._bytes -= len(self._read.pop(next(iter(self._read))))
            self._bytes += len(data)
        self._read[group] = data
        return data

    def use(self, group: Group, count: int) -> None:
        """Of a group so many records were adopted."""
        self._used[group[0]][group[1]] = 1
        self.adopted += count

    # Keeping

    def note(self, page: int, record: bytes) -> None:
        """A block was made that no record was: write down its packed record. ``page`` is the same for all that are made
        on one page."""
        if not record:  # too long
            return
        try:
            if self._notes is None:
                self._notes = Notes(self._directory)
            if self._notes.size < self._limit:
                self._notes.add((page, record))
        except OSError as error:
            self.problem = error.strerror or str(error)
            self.close()

    def sort_notes(self) -> None:
        """What was noted goes to a draft of a segment; at the VM's end."""
        if self._notes is not None:
            try:
                for page, record in self._notes:
                    self._put(page, record)
            finally:
                self._notes.close()
                self._notes = None

    def _put(self, page: int, data: bytes) -> None:
        name = _name(data)
        check = zlib.crc32(data)
        number = check & (1 << SEEN_BITS) - 1
        if self._seen[number] == name.key ^ check << 32:
            return
        self._seen[number] = name.key ^ check << 32
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
        if draft.size < self._limit and draft.finish(kept, WORTH):
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
                    for group in range(len(used)):
                        if used[group] == wanted and (wanted or draft.size < self._limit // 2):
                            self._copy(draft, segment, group, page, others)
                            page += 1
        return merged

    @staticmethod
    def _copy(draft: Draft, segment: Segment, group: int, page: int, others: list[Segment]) -> None:
        try:
            for check, record in segment.records(group):
                name = _name(record)
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
            mine = name.startswith(self._identity)
            if name[0] == ".":
                gone = abandoned(self._directory, name)
            else:
                gone = not mine and status.st_mtime_ns < time_ns() - OLD
                if not mine or name.endswith(".seg"):
                    found.append((status.st_mtime_ns, status.st_size, name))
            if gone:
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


