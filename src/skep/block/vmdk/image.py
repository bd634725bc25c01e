"""A disk in VMDK files: a descriptor and one extent after another."""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from skep.block.backend import Buffers, Extent, File, read_at, split, write_at
from skep.block.choices import choice, switch
from skep.block.file import create_file, open_file
from skep.block.format import SECTOR, BackingName, Can, CheckResult, Image, ImageError, Option
from skep.block.secrets import NO_SECRETS, Secrets
from skep.block.sparse import SparseImage
from skep.block.vmdk.descriptor import MOST_BYTES, NO_PARENT, Descriptor, ExtentLine, cid_place
from skep.block.vmdk.extent import (
    ESX,
    HOSTED,
    Below,
    FlatExtent,
    SparseExtent,
    SparseHeader,
    ZeroExtent,
    make_sparse,
)
from skep.block.vmdk.sesparse import SeSparseExtent

_SPLIT = 2 << 30
_SPARSE, _FLAT, _SPLIT_SPARSE, _SPLIT_FLAT, _STREAM = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
)
Part = SparseExtent | SeSparseExtent | FlatExtent | ZeroExtent
_ADAPTERS = ("ide", "lsilogic", "buslogic", "legacyESX")


class VmdkImage(Image):
    """VMware's "Virtual Disk Format 5.0". The first write of all changes the content ID, as overlays expect."""

    format = "vmdk"
    locks_tables = True
    can = Can.WRITE | Can.DISCARD | Can.ZERO | Can.COMPRESS | Can.CHECK | Can.REPAIR | Can.BACKING
    create_options: ClassVar = {
        "adapter_type": Option("Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX"),
        "compat6": Option("VMDK version 6 image", "off", told=True),
        "hwversion": Option("VMDK hardware version", "undefined", told=True),
        "toolsversion": Option("VMware guest tools version"),
        "subformat": Option(
            "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | "
            "twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
            _SPARSE,
        ),
        "zeroed_grain": Option("Enable efficient zero writes using the zeroed-grain GTE feature", "off"),
    }

    def __init__(self, file: File) -> None:
        self.file = file
        self.path = file.path
        self.read_only = file.read_only
        self.write_cache = file.write_cache
        self._parts: list[Part] = []
        self._starts: list[int] = []
        self._changed = False
        magic = bytes(read_at(file, 0, 4))
        self._descriptor_at = (0, min(file.size, MOST_BYTES))
        if magic in (HOSTED, ESX):
            self._open_monolithic()
        else:
            self.descriptor = Descriptor.parse(read_at(file, *self._descriptor_at), self.path)
            self.size = sum(line.sectors for line in self.descriptor.extents) * SECTOR

    def _open_monolithic(self) -> None:
        """A sparse extent with its descriptor in it, or without one: part of another disk, read by itself."""
        part = SparseExtent(self.file, Below(self, 0))
        header = part.header
        self._descriptor_at = (header.descriptor * SECTOR, min(header.descriptor_length * SECTOR, MOST_BYTES))
        if header.descriptor_length:
            self.descriptor = Descriptor.parse(read_at(self.file, *self._descriptor_at), self.path)
        else:
            line = ExtentLine("RW", header.capacity, "SPARSE", os.path.basename(self.path))
            self.descriptor = Descriptor("vmfsSparse" if header.magic == ESX else _SPARSE, [line], NO_PARENT)
        self.size = part.size
        self._add(part)

    def open_files(self, opener: Callable[[str], File]) -> None:
        if self._parts:
            return
        for line in self.descriptor.extents:
            if line.access == "NOACCESS" or (line.access == "RDONLY" and not self.read_only):
                raise ImageError(f"an extent of the VMDK is {line.access}", self.path, "say ro")
            if line.kind == "ZERO":
                self._add(ZeroExtent(line.sectors * SECTOR, self.path))
                continue
            if line.kind not in ("FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE"):
                raise ImageError(f"a VMDK extent of the kind {line.kind} is not supported", self.path)
            file = opener(line.name)
            try:
                self._add(self._open_part(line, file))
            except BaseException:
                file.close()
                raise

    def _open_part(self, line: ExtentLine, file: File) -> Part:
        size = line.sectors * SECTOR
        if line.kind in ("FLAT", "VMFS"):
            return FlatExtent(file, line.offset * SECTOR, size)
        start = self._starts[-1] + self._parts[-1].size if self._parts else 0
        part = (SeSparseExtent if line.kind == "SESPARSE" else SparseExtent)(file, Below(self, start))
        if part.size < size:
            raise ImageError("the sparse extent of the VMDK is shorter than its descriptor says", file.path)
        part.size = size
        return part

    def _add(self, part: Part) -> None:
        self._starts.append(self._starts[-1] + self._parts[-1].size if self._parts else 0)
        self._parts.append(part)

    # Transfers.

    def _split(self, offset: int, length: int) -> Iterator[tuple[Part, int, int]]:
        """The extents that these bytes lie in: where in each, and how many."""
        index = bisect.bisect_right(self._starts, offset) - 1
        while length:
            part, start = self._parts[index], offset - self._starts[index]
            n = min(length, part.size - start)
            if n:
                yield part, start, n
            offset += n
            length -= n
            index += 1

    def preadv(self, buffers: Buffers, offset: int) -> None:
        if len(self._parts) == 1:
            self._parts[0].preadv(buffers, offset)
            return
        for part, start, n in self._split(offset, sum(map(len, buffers))):
            piece, buffers = split(buffers, n)
            part.preadv(piece, start)

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        if not self._changed:
            self._change_cid()
        if len(self._parts) == 1:
            self._parts[0].pwritev(buffers, offset)
            return
        for part, start, n in self._split(offset, sum(map(len, buffers))):
            piece, buffers = split(buffers, n)
            part.pwritev(piece, start)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        length = sum(map(len, buffers))
        part, start, n = next(self._split(offset, length), (None, 0, 0))
        return part is not None and n == length and part.read_now(buffers, start)

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        length = sum(map(len, buffers))
        part, start, n = next(self._split(offset, length), (None, 0, 0))
        return self._changed and part is not None and n == length and part.write_now(buffers, start)

    def discard(self, offset: int, length: int) -> None:
        if not self._changed:
            self._change_cid()
        for part, start, n in self._split(offset, length):
            part.discard(start, n)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if not self._changed:
            self._change_cid()
        for part, start, n in self._split(offset, length):
            part.write_zeroes(start, n, unmap)

    def write_compressed(self, data: bytes | memoryview, offset: int, packed: bytes | None = None) -> None:
        if self.descriptor.create_type != _STREAM:
            raise self.cannot("has no compressed clusters, but for streamOptimized ones,")
        write_at(self, offset, data)

    def flush(self) -> None:
        for part in self._parts:
            part.flush()

    def _change_cid(self) -> None:
        """Overlays know by the content ID that what is below them changed. As many digits as it had: one sector."""
        text = read_at(self.file, *self._descriptor_at)
        place = cid_place(text)
        if place is not None and not self.read_only:
            at, digits = place
            cid = f"{int.from_bytes(os.urandom(4)) | 1:08x}"[-digits:]
            write_at(self.file, self._descriptor_at[0] + at, cid.encode())
            self.file.flush()
            self.descriptor.cid = int(cid, 16)
        self._changed = True

    def close(self) -> None:
        try:
            for part in self._parts:
                part.close()
        finally:
            super().close()

    # As a whole.

    def allocated(self) -> int:
        files = {id(self.file): self.file}
        files |= {id(part.file): part.file for part in self._parts if not isinstance(part, ZeroExtent)}
        return sum(file.allocated() or 0 for file in files.values())

    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        for part, start, n in self._split(offset, length):
            for extent in part.layer(start, n):
                elsewhere = None if isinstance(part, ZeroExtent) or part.file is self.file else part.file.path
                yield extent._replace(offset=offset + extent.offset - start, file=elsewhere)
            offset += n

    @property
    def cluster_size(self) -> int | None:
        sizes = [part.block_size for part in self._parts if isinstance(part, SparseImage)]
        return sizes[0] if sizes else None

    def info(self) -> dict[str, Any]:
        extents: list[dict[str, Any]] = []
        for line, part in zip(self.descriptor.extents, self._parts, strict=False):
            if isinstance(part, ZeroExtent):
                continue
            about: dict[str, Any] = {}
            if isinstance(part, SparseExtent) and part.header.compressed:
                about["compressed"] = True
            about |= {"virtual-size": part.size, "filename": part.file.path}
            if isinstance(part, SparseImage):
                about["cluster-size"] = part.block_size
            extents.append(about | {"format": "" if part.file is self.file else line.kind})
        cids = {"cid": self.descriptor.cid, "parent-cid": self.descriptor.parent_cid}
        return {**cids, "create-type": self.descriptor.create_type, "extents": extents}

    def backing_name(self) -> BackingName | None:
        parent = self.descriptor.parent
        return None if parent is None else BackingName(parent, "vmdk")

    def check_backing(self, backing: Image) -> None:
        if isinstance(backing, VmdkImage) and backing.descriptor.cid != self.descriptor.parent_cid:
            raise ImageError(f"its parent was changed since: {backing.path}", self.path)

    def check(self) -> CheckResult:
        return self._sum(part.check() for part in self._parts if isinstance(part, SparseImage))

    def repair(self, *, leaks_only: bool = False) -> CheckResult:
        parts = [part for part in self._parts if isinstance(part, SparseExtent)]
        return self._sum(part.repair(leaks_only=leaks_only) for part in parts)

    def _sum(self, results: Iterator[CheckResult]) -> CheckResult:
        total = CheckResult()
        for result in results:
            total.corruptions += result.corruptions
            total.leaks += result.leaks
            total.corruptions_fixed += result.corruptions_fixed
            total.leaks_fixed += result.leaks_fixed
            total.allocated += result.allocated
            total.end = max(total.end, result.end)
            for message in result.messages:
                total.say(message)
        return total

    # Creation.

    @classmethod
    def create(
        cls,
        path: str,
        size: int,
        options: Mapping[str, str],
        backing: BackingName | None = None,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        kind = choice(path, options, "subformat", _SPARSE, _FLAT, _SPLIT_SPARSE, _SPLIT_FLAT, _STREAM)
        adapter = choice(path, options, "adapter_type", *_ADAPTERS)
        zeroed = switch(path, options, "zeroed_grain")
        version = options.get("hwversion", "6" if switch(path, options, "compat6") else "4")
        tools = options.get("toolsversion", "2147483647")
        for name, value in (("hwversion", version), ("toolsversion", tools)):
            if not re.fullmatch(r"[0-9]{1,10}", value):
                raise ImageError(f"{name} is not a number: {value!r}", path)
        if backing is not None and kind in (_FLAT, _SPLIT_FLAT):
            raise ImageError("a flat VMDK image lies over no other", path)
        parent_cid = NO_PARENT if backing is None else _cid_of(path, backing)
        lines = list(_extent_lines(path, size, kind))
        heads = 16 if adapter == "ide" else 255
        database = {
            "ddb.virtualHWVersion": version,
            "ddb.geometry.cylinders": str(size // (63 * heads * SECTOR)),
            "ddb.geometry.heads": str(heads),
            "ddb.geometry.sectors": "63",
            "ddb.adapterType": adapter,
            "ddb.toolsVersion": tools,
        }
        cid = int.from_bytes(os.urandom(4)) | 1 << 31
        parent = None if backing is None else backing.name
        text = Descriptor(kind, lines, cid & ~1, parent_cid, parent, database).text()
        directory = os.path.dirname(path)
        if kind in (_SPARSE, _STREAM):
            with create_file(path) as file:
                make_sparse(file, size // SECTOR, text, zeroed=zeroed, compressed=kind == _STREAM)
            return
        for line in lines:
            with create_file(os.path.join(directory, line.name)) as file:
                if line.kind == "FLAT":
                    file.resize(line.sectors * SECTOR)
                else:
                    make_sparse(file, line.sectors, b"", zeroed=zeroed, compressed=False)
        with create_file(path) as file:
            write_at(file, 0, text)


def _extent_lines(path: str, size: int, kind: str) -> Iterator[ExtentLine]:
    """The extents of a new disk, named as QEMU and VMware do."""
    name = os.path.basename(path)
    stem = os.path.splitext(name)[0]
    if '"' in name or "\n" in name:
        raise ImageError("a VMDK cannot have such a name", path)
    if kind in (_SPARSE, _STREAM):
        yield ExtentLine("RW", size // SECTOR, "SPARSE", name)
    elif kind == _FLAT:
        yield ExtentLine("RW", size // SECTOR, "FLAT", f"{stem}-flat.vmdk")
    else:
        letter, part = ("s", "SPARSE") if kind == _SPLIT_SPARSE else ("f", "FLAT")
        for number, at in enumerate(range(0, size, _SPLIT), 1):
            yield ExtentLine("RW", min(_SPLIT, size - at) // SECTOR, part, f"{stem}-{letter}{number:03}.vmdk")


def _cid_of(path: str, backing: BackingName) -> int:
    """The content ID of the image that a new one is to lie over. Raises UserError."""
    if backing.format not in (None, "vmdk"):
        raise ImageError("a VMDK image lies over a VMDK image only", path)
    parent = os.path.join(os.path.dirname(path), backing.name)
    with open_file(parent, read_only=True) as file:
        magic = bytes(read_at(file, 0, 4))
        at, length = 0, min(file.size, MOST_BYTES)
        if magic == HOSTED:
            header = SparseHeader.read(file, parent)
            at, length = header.descriptor * SECTOR, min(header.descriptor_length * SECTOR, MOST_BYTES)
        return Descriptor.parse(read_at(file, at, length), parent).cid
