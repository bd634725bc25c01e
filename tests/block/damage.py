"""Damage to disk images, on purpose: where a format has its fields and tables, what is written there, and the checksums
mended afterwards, so that damage is not found out by those alone."""

from __future__ import annotations

import base64
import os
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

from skep.block import vhd
from skep.block.crc32c import crc32c
from skep.block.vhdx import layout

SECTOR = 512
VALUES = (0, 1, 2, 7, 0x7F, 0xFF, 512, 4096, *(1 << n for n in (16, 20, 31, 32, 40, 62, 63, 64)))
MOST = 1 << 40
"""Bytes of a file: tmpfs takes as many, sparse."""


class Sparse:
    """A file of which few sectors are not zeros."""

    def __init__(self, size: int, sectors: dict[int, bytes]) -> None:
        self.size = size
        self.sectors = sectors

    @classmethod
    def of(cls, path: Path) -> Self:
        data = path.read_bytes()
        found = ((at, data[at : at + SECTOR]) for at in range(0, len(data), SECTOR))
        return cls(len(data), {at // SECTOR: one.ljust(SECTOR, b"\0") for at, one in found if any(one)})

    def copy(self) -> Sparse:
        return Sparse(self.size, dict(self.sectors))

    def read(self, at: int, n: int) -> bytes:
        first, skip = divmod(at, SECTOR)
        nothing = bytes(SECTOR)
        pieces = (self.sectors.get(one, nothing) for one in range(first, (at + n + SECTOR - 1) // SECTOR))
        return b"".join(pieces)[skip : skip + n]

    def write(self, at: int, data: bytes) -> None:
        first, skip = divmod(at, SECTOR)
        whole = bytearray(self.read(first * SECTOR, -(-(skip + len(data)) // SECTOR) * SECTOR))
        whole[skip : skip + len(data)] = data
        for i in range(len(whole) // SECTOR):
            self.sectors[first + i] = bytes(whole[i * SECTOR : (i + 1) * SECTOR])

    def runs(self) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of what is not zeros, neighbours together."""
        start, pieces = 0, list[bytes]()
        for at in sorted(self.sectors):
            if pieces and at != start + len(pieces):
                yield start * SECTOR, b"".join(pieces)
                pieces = []
            if not pieces:
                start = at
            pieces.append(self.sectors[at])
        if pieces:
            yield start * SECTOR, b"".join(pieces)

    def put(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            os.ftruncate(fd, self.size)
            for offset, data in self.runs():
                os.pwrite(fd, data[: max(0, self.size - offset)], offset)
        finally:
            os.close(fd)


class Table(NamedTuple):
    """``count`` numbers of ``width`` bytes each."""

    at: int
    count: int
    width: int


def tables(format: str, image: Sparse) -> list[Table]:
    """Where a sound image has its fields and entries. Not all of them."""

    def big(at: int, n: int) -> int:
        return int.from_bytes(image.read(at, n), "big")

    def little(at: int, n: int) -> int:
        return int.from_bytes(image.read(at, n), "little")

    def each(fields: tuple[tuple[int, int], ...], base: int = 0) -> list[Table]:
        return [Table(base + at, 1, width) for at, width in fields]

    def luks(base: int) -> list[Table]:
        slots = [Table(base + 208 + 48 * i + at, 1, 4) for i in range(8) for at in (0, 4, 40, 44)]
        return [*each(((6, 2), (104, 4), (108, 4), (164, 4)), base), Table(base + 8, 24, 4), *slots]

    match format:
        case "qcow2":
            fields = [(8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8)]
            fields += [(72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1), (4, 4)]
            cluster = 1 << min(big(20, 4), 21)
            found = [*each(tuple(fields)), Table(112, 40, 4), Table(big(64, 8), 40, 2), Table(big(64, 8), 20, 4)]
            l1, refcounts = Table(big(40, 8), min(big(36, 4), 64), 8), Table(big(48, 8), 8, 8)
            at = [big(l1.at + 8 * i, 8) & 0x00FF_FFFF_FFFF_FE00 for i in range(l1.count)]
            found += [l1, l1, refcounts, refcounts]
            found += [Table(one, min(cluster // 8, 128), 8) for one in at if one]
            if block := big(refcounts.at, 8):
                found += [Table(block, 64, 2), Table(block, min(cluster // 8, 64), 8)]
            for at_luks in encryption_headers(image.read(0, 4096)):
                found += luks(at_luks)
            return found
        case "qcow":
            l1 = Table(big(40, 8), 8, 8)
            fields = [(4, 4), (8, 8), (16, 4), (24, 8), (32, 1), (33, 1), (36, 4), (40, 8)]
            at = [big(l1.at + 8 * i, 8) for i in range(8)]
            return [*each(tuple(fields)), l1, l1, *(Table(one, 128, 8) for one in at if one)]
        case "vhdx":
            found = []
            for at in layout.HEADER_AT:
                found += each(((8, 8), (64, 2), (66, 2), (68, 4), (72, 8)), at)
            for at in layout.REGIONS_AT:
                found += [Table(at + 8, 18, 4)]
                for entry in (at + 16, at + 48):
                    found += each(((16, 8), (24, 4), (28, 4)), entry)
            for entry in (layout.REGIONS_AT[0] + 16, layout.REGIONS_AT[0] + 48):
                at = little(entry + 16, 8)
                if image.read(entry, 16) == layout.BAT:
                    found += [Table(at, 8, 8)] * 4
                else:
                    found += [Table(at + 8, 2, 2), Table(at + 32, 40, 4), Table(at + 65536, 16, 4)] * 2
            log = little(layout.HEADER_AT[0] + 72, 8)
            return [*found, Table(log, 16, 4), Table(log, 24, 8)]
        case "vmdk":
            fields = [(4, 4), (8, 4), (12, 8), (20, 8), (28, 8), (36, 8), (44, 4), (48, 8), (56, 8), (64, 8), (77, 2)]
            found = each(tuple(fields)) if image.read(0, 4) == b"KDMV" else []
            for field in (48, 56):
                at = little(field, 8) * SECTOR
                if found and at < image.size:
                    found += [Table(at, 4, 4), Table(little(at, 4) * SECTOR, 64, 4)] * 2
            if found and little(56, 8) == 1 << 64 - 1:  # a stream, whose footer says where the directory is
                found += each(tuple(fields), image.size - 1024)
            return found
        case "vpc":
            footer = ((8, 4), (12, 4), (16, 8), (40, 8), (48, 8), (56, 2), (58, 1), (59, 1), (60, 4))
            found = each(footer, image.size - 512)
            if image.read(0, 8) == b"conectix":
                at = big(16, 8)
                found += each(footer) + each(((8, 8), (16, 8), (24, 4), (28, 4), (32, 4)), at)
                found += [Table(at + 576, 48, 4)] + [Table(big(at + 16, 8), 4, 4)] * 4
            return found
        case "vdi":
            return [Table(0x40, 4, 4), Table(0x154, 16, 4), Table(0x170, 1, 8), *[Table(little(0x154, 4), 4, 4)] * 3]
        case "parallels":
            fields = [(16, 4), (20, 4), (24, 4), (28, 4), (32, 4), (36, 8), (44, 4), (48, 4), (52, 4), (56, 8)]
            return [*each(tuple(fields)), *[Table(64, 16, 4)] * 3]
        case "luks":
            return luks(0)
        case "dmg":
            at = image.size - 512
            return [*each(((8, 4), (24, 8), (32, 8), (40, 8), (48, 8)), at), *each(((216, 8), (224, 8), (492, 8)), at)]
    return []


def encryption_headers(head: bytes) -> list[int]:
    """Where a qcow2 image, which begins so, may have a LUKS header: what its extensions say, in order."""
    found = re.finditer(rb"\x05\x37\xbe\x77.{4}(.{8})", head, re.DOTALL)  # type, length, offset
    return [int.from_bytes(one[1], "big") for one in found]


def mutate(image: Sparse, format: str, rng: random.Random, known: list[Table]) -> Sparse:
    """A copy with something wrong in it; ``known`` are the tables of the image it came from."""
    image = image.copy()
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if format == "dmg" and rng.random() < 0.4 and _mutate_encoded(image, rng):
            continue
        if known and rng.random() < 0.6:
            _mutate_entry(image, rng.choice(known), rng)
        elif image.sectors:
            _mutate_bytes(image, rng)
    if rng.random() < 0.8:
        mend_checksums(format, image)
    return image


def _mutate_entry(image: Sparse, table: Table, rng: random.Random) -> None:
    at = table.at + rng.randrange(table.count) * table.width
    order = rng.choice(("little", "big"))
    old = int.from_bytes(image.read(at, table.width), order)
    match rng.randrange(6):
        case 0:
            new = old ^ 1 << rng.randrange(8 * table.width)
        case 1:
            new = old + rng.choice((-65536, -4096, -512, -1, 1, 2, 512, 4096, 65536))
        case 2:
            other = table.at + rng.randrange(table.count) * table.width
            new = int.from_bytes(image.read(other, table.width), order)
        case 3:
            # Something of the file's: a place in it, another table's beginning, its end.
            place = rng.choice(
                (rng.choice(sorted(image.sectors) or [0]) * SECTOR, table.at, image.size, image.size - 512)
            )
            new = place // rng.choice((1, 1, 512, 4096, 65536))
        case _:
            new = rng.choice(VALUES) + rng.choice((-1, 0, 0, 1))
    image.write(at, (new % (1 << 8 * table.width)).to_bytes(table.width, order))


def _mutate_bytes(image: Sparse, rng: random.Random) -> None:
    sectors = sorted(image.sectors)
    # Tables are at the beginning more often than not.
    sector = rng.choice(sectors[: rng.choice((1, 4, 16, len(sectors)))])
    data = bytearray(image.sectors[sector])
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(SECTOR // width) * width
    match rng.randrange(6):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            data[at : at + width] = rng.randbytes(width)
        case 2 | 3:
            value = (rng.choice(VALUES) + rng.choice((-1, 0, 0, 1))) % (1 << 8 * width)
            data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
        case 4:
            other = image.sectors[rng.choice(sectors)]
            if rng.random() < 0.2:
                data[:] = other
            else:
                data[at : at + width] = other[at : at + width]
        case _:
            if rng.random() < 0.3:
                size = image.size
                size = rng.choice((0, 1, 511, size // 2, size - 512, size - 1, size + 12345, MOST))
                image.size = max(0, size)
            else:
                n = min(rng.randrange(1, 64), SECTOR - at)
                data[at : at + n] = bytes(n)
    image.sectors[sector] = bytes(data)


def _mutate_encoded(image: Sparse, rng: random.Random) -> bool:
    """A number in a table that a property list has as base64."""
    for offset, data in image.runs():
        if lists := list(re.finditer(rb"<data>([A-Za-z0-9+/=\s]*)</data>", data)):
            found = rng.choice(lists)
            try:
                table = Sparse(0, {})
                table.write(0, base64.b64decode(found[1]))
            except ValueError:
                return False
            count = len(base64.b64decode(found[1])) // 8
            if not count:
                return False
            _mutate_entry(table, rng.choice((Table(0, count, 8), Table(0, 2 * count, 4))), rng)
            mended = base64.b64encode(table.read(0, len(base64.b64decode(found[1]))))
            text = "".join(found[1].decode().split())
            if len(mended) != len(text):
                return False
            image.write(offset + found.start(1), mended.ljust(len(found[1]), b"\n"))
            return True
    return False


def mend_checksums(format: str, image: Sparse) -> None:
    if format == "vhdx":

        def crc(at: int, length: int) -> None:
            data = bytearray(image.read(at, length))
            data[4:8] = bytes(4)
            image.write(at + 4, _crc32c(bytes(data)).to_bytes(4, "little"))

        for at in layout.HEADER_AT:
            crc(at, 4096)
        for at in layout.REGIONS_AT:
            crc(at, 65536)
        for sector in [one for one, data in image.sectors.items() if one % 8 == 0 and data[:4] == b"loge"]:
            length = int.from_bytes(image.sectors[sector][8:12], "little")
            if length <= 65536:
                crc(sector * SECTOR, length)
    elif format == "vpc":
        for sector, data in list(image.sectors.items()):
            for cookie, length, where in ((b"conectix", 512, 64), (b"cxsparse", 1024, 36)):
                if data.startswith(cookie):
                    sum_ = vhd._checksum(image.read(sector * SECTOR, length), where)
                    image.write(sector * SECTOR + where, sum_.to_bytes(4, "big"))


@lru_cache(maxsize=64)
def _crc32c(data: bytes) -> int:
    """Most of the tables of one image are those of the one before."""
    return crc32c(data)
