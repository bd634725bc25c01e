"""What a Linux kernel's memory tells of it: where it lies, its own log, its own symbols.

A kernel that cannot speak, for want of a console or of time, has still written everything into its log, and with
CONFIG_KALLSYMS it carries the names of its functions. Both lie in its image, which its page tables map at the top
of the address space. All of it is searched for, nothing is believed: what does not fit together is not there.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from skep.engine.amd64 import msrs
from skep.explain.amd64 import AddressSpace
from skep.explain.symbols import SystemMap, with_offset
from skep.memory import GuestMemory

_LOWEST, _BEYOND = 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_C000_0000
"""Where amd64's Linux maps its image (__START_KERNEL_map, 1 GiB with KASLR)."""
_LINKED_AT = 0xFFFF_FFFF_8100_0000
"""_text without KASLR."""
_STEP = 2 << 20
_LARGEST = 256 << 20
_CHUNK = 1 << 20
_TRIES = 100
"""Places that look like the beginning of something; a guest may have made more of them."""


class Image(NamedTuple):
    """The kernel in memory: ``size`` bytes from virtual ``va``, at guest-physical ``gpa`` in one piece."""

    va: int
    gpa: int
    size: int


def find_image(space: AddressSpace) -> Image | None:
    first = None
    last = 0
    for va in range(_LOWEST, _BEYOND, _STEP):
        page = space.page(va)
        if page is None:
            continue
        if first is None:
            first = va, page.gpa
        elif page.gpa - first[1] != va - first[0] or va - first[0] >= _LARGEST:
            break
        last = va
    return None if first is None else Image(first[0], first[1], last + _STEP - first[0])


class Physical:
    """Searching in guest memory without touching pages that the guest did not."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def read(self, gpa: int, n: int) -> bytes:
        """Up to ``n`` bytes."""
        memory = self._memory
        n = min(n, (memory.low_size if gpa < memory.low_size else memory.top) - gpa)
        if n <= 0 or not memory.is_ram(gpa, n):
            return b""
        offset = gpa if gpa < memory.low_size else memory.low_size + gpa - memory.high_base
        return os.pread(memory.fd, n, offset)

    def find(self, pattern: bytes, gpa: int, size: int) -> Iterator[int]:
        """Where ``pattern`` lies in these bytes, the first first."""
        overlap = len(pattern) - 1
        for start in range(gpa, gpa + size, _CHUNK):
            data = self.read(start, min(_CHUNK + overlap, gpa + size - start))
            at = data.find(pattern)
            while at >= 0:
                yield start + at
                at = data.find(pattern, at + 1)


# The kernel's log (kernel/printk/printk_ringbuffer.c, since 5.10). In the ring of text each message stands behind a
# word that names it, one more than that of the message before. How long it is, and its time, are in an array of
# records (struct printk_info), one for each message, numbered from 0.

_LOG_MOST = 4 << 20
_MESSAGES_MOST = 100_000
_MESSAGE_LONGEST = 4096
_BANNER = b"Linux version "
_INFO = struct.Struct("<QQHBBI64x")  # seq, ts_nsec, text_len, facility, flags and level, caller_id, dev_info


def find_log(physical: Physical, image: Image) -> list[str]:
    """The messages since the first, with their times; none where the log is not found, or has come round."""
    for at in islice(physical.find(_BANNER, image.gpa, image.size), _TRIES):
        texts = list(_texts(physical.read(at - 8, _LOG_MOST))) if not at & 7 else []
        if len(texts) > 2:
            return _timed(physical, image, texts)
    return []


def _texts(data: bytes) -> Iterator[bytes]:
    """Each message with whatever is behind it in its room."""
    at = 0
    for _ in range(_MESSAGES_MOST):
        following = struct.pack("<Q", int.from_bytes(data[at : at + 8], "little") + 1 & (1 << 64) - 1)
        end = data.find(following, at + 8, at + _MESSAGE_LONGEST)
        while end >= 0 and end & 7:
            end = data.find(following, end + 1, at + _MESSAGE_LONGEST)
        if end < 0:
            yield data[at + 8 : at + _MESSAGE_LONGEST]
            return
        yield data[at + 8 : end]
        at = end


def _timed(physical: Physical, image: Image, texts: list[bytes]) -> list[str]:
    middle = len(texts) // 2
    numbers = physical.find(struct.pack("<Q", middle), image.gpa, image.size)
    likely = (at for at in numbers if physical.read(at - _INFO.size, 8) == struct.pack("<Q", middle - 1))
    for at in islice(likely, _TRIES):
        first = at - middle * _INFO.size
        data = physical.read(first, len(texts) * _INFO.size) if first >= image.gpa else b""
        records = list(_INFO.iter_unpack(data[: len(data) // _INFO.size * _INFO.size]))
        if len(records) > middle + 1 and [record[0] for record in records[: middle + 2]] == list(range(middle + 2)):
            return [
                f"[{record[1] // 10**9:5}.{record[1] // 1000 % 10**6:06}] " + _plain(text[: record[2]])
                for number, (record, text) in enumerate(zip(records, texts, strict=False))
                if record[0] == number  # the last may be in the making
            ]
    return [_plain(text.split(b"\0")[0].split(b"\n")[0]) for text in texts]


def _plain(text: bytes) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text.decode("utf-8", "replace"))


# The kernel's symbols (scripts/kallsyms.c): names as indices into a table of 256 pieces; every 256th name has a marker.

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_SYMBOLS_MOST = 1 << 20
_TOKENS_MOST = 16 << 10
_SHORTEST, _LONGEST_MEAN = 3, 64
"""Bytes of a compressed name, on average over 256."""
_MARKERS_LEAST = 8


class Kallsyms:
    """The functions of the kernel in memory, by its own table."""

    source = "the kernel's own table"

    def __init__(self, base: int, offsets: memoryview, names: bytes, markers: list[int], tokens: list[str]) -> None:
        self._base = base
        self._offsets = offsets
        self._names = names
        self._markers = markers
        self._tokens = tokens
        # With CONFIG_KALLSYMS_ABSOLUTE_PERCPU an address is base - 1 - offset; or the offset itself, if not negative.
        self._first = bisect_right(offsets, -1, key=lambda one: -1 if one >= 0 else 0) if len(offsets) else 0
        self._negative = self._first < len(offsets)

    def __bool__(self) -> bool:
        return True

    def name(self, va: int) -> str | None:
        if self._negative:
            key = self._base - 1 - va
            at = bisect_right(self._offsets, -key, lo=self._first, key=lambda one: -one) - 1
            if at < self._first:
                return None
            start = self._base - 1 - self._offsets[at]
        else:
            at = bisect_right(self._offsets, va - self._base) - 1
            if at < 0:
                return None
            start = self._base + self._offsets[at]
        name = self._symbol(at)
        return with_offset(name[1:], va - start) if name[:1] in "tTwW" and va - start < _STEP else None

    def _symbol(self, index: int) -> str:
        """The type and the name of a symbol."""
        at = self._markers[index >> 8]
        for _ in range(index & 0xFF):
            at = _after(self._names, at)
        start, end = _name(self._names, at)
        return "".join(self._tokens[piece] for piece in self._names[start:end])


def _name(names: bytes, at: int) -> tuple[int, int]:
    """Where the pieces of the name at ``at`` lie: behind a length of one byte, or of two, 7 bits each (since 6.1)."""
    if at >= len(names):
        return at, at
    length = names[at]
    if length & 0x80 and at + 1 < len(names):
        return at + 2, min(at + 2 + (length & 0x7F | names[at + 1] << 7), len(names))
    return at + 1, min(at + 1 + length, len(names))


def _after(names: bytes, at: int) -> int:
    return _name(names, at)[1]


def find_symbols(physical: Physical, image: Image) -> Kallsyms | None:
    for at in islice(physical.find(_DIGITS, image.gpa, image.size), _TRIES):
        found = _symbols_around(physical, image, at)
        if found is not None:
            return found
    return None


def _symbols_around(physical: Physical, image: Image, digits: int) -> Kallsyms | None:
    """``digits`` is the token "0" in kallsyms_token_table."""
    rest = physical.read(digits, _TOKENS_MOST)
    end = 0
    for _ in range(256 - ord("0")):
        end = rest.find(b"\0", end) + 1
        if not end:
            return None
    index_at = digits + end + (-(digits + end) & 7)
    index = physical.read(index_at, 512)
    if len(index) < 512:
        return None
    starts = struct.unpack("<256H", index)
    table = digits - starts[ord("0")]
    data = physical.read(table, index_at - table)
    if table & 7 or starts[0] or list(starts) != sorted(starts) or starts[-1] >= len(data):
        return None
    tokens = [data[start : data.find(b"\0", start)].decode("ascii", "replace") for start in starts]
    return _names_before(physical, image, table, index_at + 512, tokens)


def _names_before(physical: Physical, image: Image, table: int, behind: int, tokens: list[str]) -> Kallsyms | None:
    """kallsyms_markers are before the token table, in some versions with kallsyms_seqs_of_names between them;
    kallsyms_names before the markers, and kallsyms_num_syms before those."""
    before = min(table - image.gpa, _SYMBOLS_MOST * 3 + (_SYMBOLS_MOST >> 8) * 4)
    data = physical.read(table - before, before)
    data = data[len(data) & 7 :]
    found = _markers(data)
    if found is None:
        return None
    at, markers = found
    end = table - len(data) + at
    room = min(markers[-1] + 256 * 64, end - image.gpa - 8)
    data = physical.read(end - room - 8, room + 8)
    if len(data) < room + 8:
        return None
    for size in range(markers[-1] & ~7, room & ~7, 8):
        at = len(data) - size
        number = int.from_bytes(data[at - 8 : at], "little")
        count = number + 255 >> 8
        if count in (len(markers), len(markers) - 1) and _fits(data[at:], markers):
            addresses = _addresses(physical, end - size - 8, behind, number)
            return None if addresses is None else Kallsyms(*addresses, data[at:], markers, tokens)
    return None


def _markers(data: bytes) -> tuple[int, list[int]] | None:
    """The last place in ``data`` from which words go up from 0 as the offsets of every 256th name do."""
    at = data.rfind(bytes(4))
    while at >= 0:
        if not at & 7:
            markers = [0]
            for (word,) in struct.iter_unpack("<I", data[at + 4 : len(data) & ~3]):
                if not _SHORTEST << 8 <= word - markers[-1] <= _LONGEST_MEAN << 8:
                    break
                markers.append(word)
            if len(markers) >= _MARKERS_LEAST:
                return at, markers
        at = data.rfind(bytes(4), 0, at + 3)
    return None


def _fits(names: bytes, markers: list[int]) -> bool:
    """The first 512 names end where the markers say."""
    at = 0
    for marker in markers[1:3]:
        for _ in range(256):
            at = _after(names, at)
        if at != marker:
            return False
    return True


def _addresses(physical: Physical, number_at: int, behind: int, number: int) -> tuple[int, memoryview] | None:
    """kallsyms_offsets and kallsyms_relative_base: before the number of symbols, since 6.4 behind the token index."""
    size = 4 * number + (4 * number & 4)
    for offsets_at, base_at in ((number_at - 8 - size, number_at - 8), (behind, behind + size)):
        data = physical.read(offsets_at, 4 * number)
        base = int.from_bytes(physical.read(base_at, 8), "little")
        if len(data) == 4 * number and _LOWEST <= base < _BEYOND and not base & 0xFFF:
            return base, memoryview(data).cast("i")
    return None


# Where KASLR has put a kernel whose System.map is known.


def fit(system_map: SystemMap, space: AddressSpace, state: dict[str, Any], image: Image | None) -> bool:
    """Set the map's slide; False if the map does not belong to this kernel, or nothing tells."""
    found = []
    for name, address in _witnesses(space, state):
        linked = system_map.addresses.get(name)
        if linked is not None and address:
            found.append(address - linked)
    if not found and image is not None:
        found.append(image.va - system_map.addresses.get("_text", _LINKED_AT))
    if not found or len(set(found)) > 1 or found[0] % _STEP or not 0 <= found[0] < _BEYOND - _LOWEST:
        return False
    system_map.slide = found[0]
    return True


def _witnesses(space: AddressSpace, state: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Symbols whose address the processor knows."""
    table = state.get("idtr", {})
    gate = int.from_bytes(space.read(int(table.get("base", 0)) + 14 * 16, 16), "little")
    handler = (gate & 0xFFFF) | (gate >> 32 & 0xFFFF_0000) | (gate >> 64 & 0xFFFF_FFFF) << 32
    yield "asm_exc_page_fault", handler if handler >= _LOWEST and int(table.get("limit", 0)) == 4095 else 0
    yield "entry_SYSCALL_64", int(state.get("msrs", {}).get(msrs.LSTAR, 0))
