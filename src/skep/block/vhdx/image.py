"""A disk in a VHDX file: fixed, dynamic, or differing from a parent."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from skep.block.backend import Buffers, File, read_at, write_at
from skep.block.choices import byte_size, choice
from skep.block.file import create_file, open_file
from skep.block.format import BackingName, Can, CheckResult, DamagedImage, Image, ImageError, Option
from skep.block.places import Owned
from skep.block.secrets import NO_SECRETS, Secrets
from skep.block.sectors import SectorImage
from skep.block.sparse import Kind
from skep.block.tables import Table, contiguous
from skep.block.vhdx import layout
from skep.block.vhdx.layout import MIB, NO_GUID, Header, Metadata, Region
from skep.block.vhdx.log import MOST_SECTORS, SECTOR, Log, pack_entry

_ENTRY = struct.Struct("<Q")
_BITS = struct.Struct("<B")

# States of a block (2.5.1.1). Blocks of sector bitmaps are NOT_PRESENT or FULLY_PRESENT.
_NOT_PRESENT, _UNDEFINED, _ZERO, _UNMAPPED, _FULLY_PRESENT, _PARTIALLY_PRESENT = 0, 1, 2, 3, 6, 7
_STATE = 7
_OFFSET = ~(MIB - 1) & (1 << 64) - 1

_FIXED_BATCH = 1 << 17
"""Entries of a fixed image's BAT that are written at once."""


class VhdxImage(SectorImage):
    """[MS-VHDX]. An image whose log is not empty is replayed when it is opened for writing, and not opened for reading
    alone, as QEMU has it."""

    format = "vhdx"
    most_significant_first = False
    can = Can.WRITE | Can.DISCARD | Can.ZERO | Can.CHECK | Can.REPAIR | Can.BACKING
    create_options: ClassVar = {
        "log_size": Option("Log size; min 1MB.", "1048576", told=True),
        "block_size": Option(
            "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.", "0", told=True
        ),
        "subformat": Option("VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.", "dynamic"),
        "block_state_zero": Option("Accepted, and always off: a new image's blocks are not present.", "off"),
    }

    def __init__(self, file: File) -> None:
        path = file.path
        if file.size < MIB or bytes(read_at(file, 0, 8)) != layout.SIGNATURE:
            raise ImageError("this is not a VHDX image", path)
        header = layout.read_header(file, path)
        log = Region(header.log_offset, header.log_length)
        self.replayed = False
        """The log had to be replayed: whoever had the image before did not close it."""
        if header.log != NO_GUID:
            header = self._replay(file, header, log)
        regions = layout.read_regions(file, path, log)
        metadata = layout.read_metadata(file, path, regions[layout.METADATA])
        bat = regions[layout.BAT]
        if metadata.bat_entries * _ENTRY.size > bat.length:
            raise ImageError("the VHDX block table is too short for the disk", path)
        table = Table(file, _ENTRY, metadata.bat_entries, contiguous(bat.offset, SECTOR), SECTOR // _ENTRY.size)
        super().__init__(file, metadata.size, metadata.block_size, table)
        bitmap_bytes = -(-metadata.blocks // metadata.chunk_ratio) * MIB
        self._bits = Table(file, _BITS, bitmap_bytes, self._bits_at, SECTOR)
        self.metadata = metadata
        self.sector = metadata.logical_sector
        self._header = header
        self._log = log
        self._regions = [Region(0, MIB), log, *regions.values()]
        self._ratio = metadata.chunk_ratio
        self._differs = metadata.locator is not None
        self._end = -(-file.size // MIB) * MIB
        self._sequence = 0
        """Of the last entry in the log."""
        self._log_at = 0
        """Where in the log the next one goes."""
        self._stable = 0
        """The file's size that the commit under way can rely on."""
        self._writing = False
        """The header says that the disk has changed."""

    def _replay(self, file: File, header: Header, region: Region) -> Header:
        log = Log(file, file.path, region, header.log)
        if file.read_only:
            if log.empty:
                return header
            raise ImageError(
                "the VHDX log has to be replayed, and the image is opened read-only",
                file.path,
                "skep image check -r all replays it",
            )
        try:
            self.replayed = log.replay(file)
            file.flush()
            header = header.next(log=NO_GUID)
            write_at(file, layout.HEADER_AT[header.slot], header.pack())
            file.flush()
        except OSError as e:
            raise ImageError(f"the VHDX log cannot be replayed: {e.strerror}", file.path) from None
        return header

    # Blocks.

    def _index(self, block: int) -> int:
        """Of the block's entry: between the entries of blocks are those of their sector bitmaps (2.5)."""
        return block + block // self._ratio

    def _bitmap_index(self, chunk: int) -> int:
        return (chunk + 1) * self._ratio + chunk

    def _find(self, block: int) -> tuple[Kind, int]:
        entry = self._table[self._index(block)]
        state = entry & _STATE
        if state == _FULLY_PRESENT or (state == _PARTIALLY_PRESENT and self._differs):
            host = entry & _OFFSET
            if not self._inside(host, self._block_length(block)):
                raise DamagedImage(self.path, f"block {block} is at {host:#x}, beyond the file")
            return Kind.DATA, host
        if state == _NOT_PRESENT:
            return Kind.ABSENT, 0
        if state in (_UNDEFINED, _ZERO, _UNMAPPED):
            return Kind.ZERO, 0
        raise DamagedImage(self.path, f"block {block} is in state {state}")

    def _inside(self, host: int, length: int) -> bool:
        return host >= MIB and host + length <= self.file.size

    def _bind(self, block: int, host: int) -> None:
        self._table[self._index(block)] = host | _FULLY_PRESENT

    def _bind_zero(self, block: int) -> bool:
        self._table[self._index(block)] = _ZERO
        return True

    def _mapped(self, block: int) -> bool:
        return self._differs and self._table[self._index(block)] & _STATE == _PARTIALLY_PRESENT

    def _bit(self, block: int) -> int:
        chunk, within = divmod(block, self._ratio)
        return chunk * MIB * 8 + within * (self.block_size // self.sector)

    def _bits_at(self, page: int) -> int | None:
        """A page is 4096 bytes of a chunk's bitmap of 1 MiB."""
        chunk, within = divmod(page, MIB // SECTOR)
        entry = self._table[self._bitmap_index(chunk)]
        if entry & _STATE != _FULLY_PRESENT:
            return None
        host = entry & _OFFSET
        if not self._inside(host, MIB):
            raise DamagedImage(self.path, f"sector bitmap {chunk} is at {host:#x}, beyond the file")
        return host + within * SECTOR

    def _ensure(self, block: int) -> None:
        kind, _ = self._find(block)
        if not self._differs or kind is Kind.ZERO:
            self._bind(block, self._reserve())
            return
        chunk = block // self._ratio
        index = self._bitmap_index(chunk)
        if self._table[index] & _STATE != _FULLY_PRESENT:
            self._table[index] = self._reserve(MIB) | _FULLY_PRESENT
        first = self._bit(block) // 8
        if any(self._bits[at] for at in range(first, first + self.block_size // self.sector // 8)):
            self._clear_bits(block)
        self._table[self._index(block)] = self._reserve() | _PARTIALLY_PRESENT

    def _clear_bits(self, block: int) -> None:
        """What a block that was given up has left in its bitmap."""
        first = self._bit(block) // 8
        for at in range(first, first + self.block_size // self.sector // 8):
            if self._bits[at]:
                self._bits[at] = 0

    # Changes.

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        if not self._writing:
            self._begin_writing()
        super().pwritev(buffers, offset)

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return self._writing and super().write_now(buffers, offset)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if not self._writing:
            self._begin_writing()
        super().write_zeroes(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        if not self._writing:
            self._begin_writing()
        super().discard(offset, length)

    def _begin_writing(self) -> None:
        """Say in the header that file and disk change, and under which GUID the log will be (2.2.2.1), durably."""
        self._must_be_writable()
        with self._flushing:
            if not self._writing:
                guids = {name: os.urandom(16) for name in ("file_write", "data_write", "log")}
                self._write_header(self._header.next(**guids))
                self._writing = True

    def _write_header(self, header: Header) -> None:
        write_at(self.file, layout.HEADER_AT[header.slot], header.pack())
        self.file.flush()
        self._header = header

    def _begin(self) -> bool:
        self._stable = self.file.size // MIB * MIB
        return super()._begin()

    def _commit(self) -> None:
        with self._lock:
            units = [*self._bits.units(SECTOR), *self._table.units(SECTOR)]
        for first in range(0, len(units), MOST_SECTORS):
            if first:
                self.file.flush()  # what the last entry logged is in its place before this one replaces it
            self._log_and_write(units[first : first + MOST_SECTORS])

    def _log_and_write(self, units: Sequence[tuple[int, bytes]]) -> None:
        """An entry of the log, durable, then the tables in place, not durably: the next commit begins with a flush."""
        self._sequence += 1
        entry = pack_entry(units, self._header.log, self._log_at, self._sequence, self._stable, self._stable)
        if self._log_at + len(entry) > self._log.length:
            self._log_at = 0
            entry = pack_entry(units, self._header.log, 0, self._sequence, self._stable, self._stable)
        write_at(self.file, self._log.offset + self._log_at, entry)
        self.file.flush()
        self._log_at += len(entry)
        for offset, data in units:
            write_at(self.file, offset, data)

    def _finish(self) -> None:
        if self._writing:
            self.flush()
            self.file.flush()
            self._write_header(self._header.next(log=NO_GUID))

    # As a whole.

    def backing_name(self) -> BackingName | None:
        locator = self.metadata.locator
        if locator is None:
            return None
        for key in ("relative_path", "absolute_win32_path", "volume_path"):
            if name := locator.get(key):
                return BackingName(name.replace("\\", "/").removeprefix("./"), "vhdx")
        raise ImageError("the VHDX parent locator has no path", self.path)

    def check_backing(self, backing: Image) -> None:
        linkage = (self.metadata.locator or {}).get("parent_linkage", "").strip("{}").lower()
        if isinstance(backing, VhdxImage) and linkage != layout.guid_text(backing._header.data_write):
            raise ImageError(f"its parent was changed since: {backing.path}", self.path)

    def _skip(self, block: int, end: int) -> int:
        chunk, within = divmod(self._table.skip(self._index(block), self._index(end)), self._ratio + 1)
        return chunk * self._ratio + min(within, self._ratio)

    def _reserved(self) -> Iterator[tuple[int, int]]:
        return iter(self._regions)

    def _owned(self) -> Iterator[Owned]:
        """Blocks by their numbers, sectors' bitmaps by numbers behind those."""
        yield from super()._owned()
        if not self._differs:
            return
        for chunk in range(-(-self._blocks // self._ratio)):
            with self._lock:
                entry = self._table[self._bitmap_index(chunk)]
            if entry & _STATE == _FULLY_PRESENT:
                host = entry & _OFFSET
                wrong = (
                    f"sector bitmap {chunk} is at {host:#x}, beyond the file" if not self._inside(host, MIB) else None
                )
                yield Owned(self._blocks + chunk, host, MIB, wrong)

    def _forget(self, block: int) -> None:
        chunk = block - self._blocks
        self._table[self._index(block) if chunk < 0 else self._bitmap_index(chunk)] = _NOT_PRESENT

    def check(self) -> CheckResult:
        result = super().check()
        result.corruptions_fixed += self.replayed
        return result

    @classmethod
    def create(
        cls,
        path: str,
        size: int,
        options: Mapping[str, str],
        backing: BackingName | None = None,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        fixed = choice(path, options, "subformat", "dynamic", "fixed") == "fixed"
        block_size = byte_size(path, options, "block_size", 0) or _usual_block_size(size)
        log_size = byte_size(path, options, "log_size", MIB)
        if not MIB <= block_size <= layout.LARGEST_BLOCK or block_size & (block_size - 1):
            raise ImageError(f"a VHDX block size of {block_size} is not possible", path, "powers of 2, 1M to 256M, are")
        if not MIB <= log_size < 1 << 32 or log_size % MIB:
            raise ImageError(f"a VHDX log of {log_size} bytes is not possible", path, "whole MiB, below 4 GiB, are")
        if not 0 < size <= layout.MAX_SIZE:
            raise ImageError(f"a VHDX disk of {size} bytes is not possible", path, "up to 64 TiB are")
        if fixed and backing is not None:
            raise ImageError("a fixed VHDX image lies over no other", path)
        locator = None if backing is None else _locator(path, backing)
        metadata = Metadata(size, block_size, fixed, disk_id=os.urandom(16), locator=locator)
        log = Region(MIB, log_size)
        items = Region(log.offset + log.length, MIB)
        bat = Region(items.offset + MIB, -(-metadata.bat_entries * _ENTRY.size // MIB) * MIB)
        first = bat.offset + bat.length
        with create_file(path, first + (metadata.blocks * block_size if fixed else 0)) as file:
            write_at(file, 0, layout.SIGNATURE + layout.CREATOR)
            header = Header(1, os.urandom(16), os.urandom(16), NO_GUID, log.length, log.offset)
            write_at(file, layout.HEADER_AT[0], header.pack())
            write_at(file, layout.HEADER_AT[1], header.next().pack())
            for offset in layout.REGIONS_AT:
                write_at(file, offset, layout.pack_regions({layout.BAT: bat, layout.METADATA: items}))
            write_at(file, items.offset, layout.pack_metadata(metadata))
            if fixed:
                _write_fixed(file, metadata, bat.offset, first)


def _usual_block_size(size: int) -> int:
    """As QEMU chooses it."""
    for limit, block_size in ((32 << 40, 64 * MIB), (100 << 30, 32 * MIB), (1 << 30, 16 * MIB)):
        if size > limit:
            return block_size
    return 8 * MIB


def _write_fixed(file: File, metadata: Metadata, bat: int, host: int) -> None:
    ratio = metadata.chunk_ratio
    for first in range(0, metadata.bat_entries, _FIXED_BATCH):
        entries = array("Q")
        for index in range(first, min(first + _FIXED_BATCH, metadata.bat_entries)):
            chunk, within = divmod(index, ratio + 1)
            block = chunk * ratio + within
            entries.append(0 if within == ratio else host + block * metadata.block_size | _FULLY_PRESENT)
        write_at(file, bat + first * _ENTRY.size, entries.tobytes())


def _locator(path: str, backing: BackingName) -> dict[str, str]:
    """What an overlay says of its parent (2.6.2.6.3), which has to be there."""
    if backing.format not in (None, "vhdx"):
        raise ImageError("a VHDX image lies over a VHDX image only", path)
    parent = os.path.join(os.path.dirname(path), backing.name)
    with open_file(parent, read_only=True) as file:
        header = layout.read_header(file, parent)
    return {
        "parent_linkage": "{" + layout.guid_text(header.data_write) + "}",
        "relative_path": backing.name.replace("/", "\\"),
        "absolute_win32_path": os.path.abspath(parent).replace("/", "\\"),
    }
