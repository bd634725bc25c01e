"""The descriptor ("The Descriptor File"): lines of text, in a file of its own or in the first extent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from skep.block.format import ImageError

MOST_BYTES = 1 << 17
MOST_EXTENTS = 1024
NO_PARENT = 0xFFFFFFFF
_MOST_SECTORS = 1 << 53

_EXTENT = re.compile(r'(RW|RDONLY|NOACCESS)\s+(\d{1,18})\s+([A-Z]+)(?:\s+"([^"]*)"(?:\s+(\d{1,18}))?)?')
_ENTRY = re.compile(r'([\w.]+)\s*=\s*(?:"([^"]*)"|(\S*))')


class ExtentLine(NamedTuple):
    access: str
    sectors: int
    kind: str
    """FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE, SESPARSE."""
    name: str
    offset: int = 0
    """Of a flat extent in its file, sectors."""

    def __str__(self) -> str:
        return f'{self.access} {self.sectors} {self.kind} "{self.name}"{" 0" if self.kind == "FLAT" else ""}'


@dataclass(slots=True)
class Descriptor:
    create_type: str
    extents: Sequence[ExtentLine]
    cid: int
    """Content ID: changes when the disk does."""
    parent_cid: int = NO_PARENT
    parent: str | None = None
    """The name of the image below."""
    database: Mapping[str, str] = field(default_factory=dict)
    """``ddb`` entries."""

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str) -> Self:
        """Raises ImageError."""
        entries: dict[str, str] = {}
        extents = []
        for line in bytes(data).split(b"\0", 1)[0].decode("utf-8", "replace").splitlines():
            line = line.strip()
            if match := _EXTENT.match(line):
                access, sectors, kind, name, offset = match.groups()
                extents.append(ExtentLine(access, int(sectors), kind, name or "", int(offset or 0)))
            elif match := _ENTRY.match(line):
                name, quoted, plain = match.groups()
                entries[name] = plain if quoted is None else quoted
        if entries.get("version") not in ("1", "2", "3", "4"):
            raise ImageError("a VMDK descriptor of a version that is not known", path)
        if not extents or len(extents) > MOST_EXTENTS:
            raise ImageError(f"a VMDK with {len(extents)} extents is not possible", path, f"1 to {MOST_EXTENTS} are")
        if not 0 < sum(extent.sectors for extent in extents) < _MOST_SECTORS:
            raise ImageError("a VMDK of that size is not possible", path)
        try:
            cid, parent_cid = (int(entries.get(name, "ffffffff"), 16) for name in ("CID", "parentCID"))
        except ValueError:
            raise ImageError("a content ID of the VMDK descriptor is no number", path) from None
        database = {name: value for name, value in entries.items() if name.startswith("ddb.")}
        parent = entries.get("parentFileNameHint") if parent_cid != NO_PARENT else None
        return cls(entries.get("createType", ""), extents, cid & NO_PARENT, parent_cid & NO_PARENT, parent, database)

    def text(self) -> bytes:
        lines = [
            "# Disk DescriptorFile",
            "version=1",
            f"CID={self.cid:08x}",
            f"parentCID={self.parent_cid:08x}",
            f'createType="{self.create_type}"',
            *([] if self.parent is None else [f'parentFileNameHint="{self.parent}"']),
            "",
            "# Extent description",
            *map(str, self.extents),
            "",
            "# The Disk Data Base",
            "#DDB",
            "",
            *(f'{name} = "{value}"' for name, value in self.database.items()),
            "",
        ]
        return "\n".join(lines).encode()


def cid_place(data: bytes | bytearray) -> tuple[int, int] | None:
    """Where in the text the content ID is, and how many digits it has: a new one is written over it."""
    match = re.search(rb"^CID=([0-9a-fA-F]{1,8})\s*$", data, re.MULTILINE)
    return None if match is None else (match.start(1), len(match[1]))
