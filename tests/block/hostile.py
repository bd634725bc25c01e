"""Images that somebody damaged on purpose: opened, read, written, checked and repaired, thousands in one process.

``python -m tests.block.hostile FORMAT COUNT SEED`` ends with 0 where nothing but typed errors came out, and prints
what became of the images, the longest time that one took (seconds of CPU), and the memory that the process had at most
(KiB). Anything else is a traceback with the seed of the image.
"""

from __future__ import annotations

import faulthandler
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from skep.block import vhd
from skep.block.backend import read_at, write_at
from skep.block.crc32c import crc32c
from skep.block.format import Image
from skep.block.image import create_image, open_image
from skep.block.qcow2.image import Qcow2Image
from skep.block.vhdx import layout
from skep.errors import UserError

MIB = 1 << 20
VALUES = (0, 1, 2, 7, 0x7F, 0xFF, 512, 4096, *(1 << n for n in (16, 20, 31, 32, 40, 62, 63, 64)))

Pieces = tuple[int, list[tuple[int, bytes]]]
"""A file: its length, and what of it is not zeros."""


def pieces_of(path: Path) -> Pieces:
    data = path.read_bytes()
    parts: list[tuple[int, bytes]] = []
    for at in range(0, len(data), 4096):
        page = data[at : at + 4096]
        if any(page):
            if parts and parts[-1][0] + len(parts[-1][1]) == at:
                parts[-1] = (parts[-1][0], parts[-1][1] + page)
            else:
                parts.append((at, page))
    return len(data), parts


def put(path: Path, pieces: Pieces) -> None:
    size, parts = pieces
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.ftruncate(fd, size)
        for offset, data in parts:
            os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def written(path: Path, format: str, options: Mapping[str, str]) -> None:
    """A disk of 3 MiB with data here and there."""
    create_image(path, format, 3 * MIB, options=options)
    with open_image(path, format=format) as image:
        for at in (0, 70000 // 512 * 512, MIB, 2 * MIB + 65536):
            write_at(image, at, b"data" * 256)


def by_qemu(path: Path, format: str, *options: str) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes((b"data" * 4096 + bytes(100000)).ljust(MIB, b"x"))
    command = ("qemu-img", "convert", *options, "-f", "raw", "-O", format, str(raw), str(path))
    os.spawnvp(os.P_WAIT, command[0], command)
    raw.unlink()


def seeds(format: str, directory: Path) -> list[Path]:
    """Sound images of the format, of all its kinds."""
    made = []

    def add(make: Callable[[Path], None]) -> None:
        made.append(directory / f"seed{len(made)}.{format}")
        make(made[-1])

    match format:
        case "qcow2":
            for options in (
                {"cluster_size": "4096"},
                {"compat": "0.10"},
                {"cluster_size": "512", "refcount_bits": "64"},
                {"cluster_size": "16k", "extended_l2": "on"},
            ):
                add(lambda path, options=options: with_snapshot(path, options))
        case "vhdx":
            for options in ({"block_size": "1M"}, {"block_size": "1M", "subformat": "fixed"}):
                add(lambda path, options=options: written(path, format, options))
            with_log(made[0], directory / "log.vhdx")
            made.append(directory / "log.vhdx")
        case "vmdk":
            for kind in ("monolithicSparse", "streamOptimized", "monolithicFlat"):
                add(lambda path, kind=kind: written(path, format, {"subformat": kind}))
        case "vpc":
            for kind in ("dynamic", "fixed"):
                add(lambda path, kind=kind: written(path, format, {"subformat": kind}))
        case "vdi":
            add(lambda path: written(path, format, {}))
        case "qcow":
            add(lambda path: by_qemu(path, format))
            add(lambda path: by_qemu(path, format, "-c"))
        case "parallels":
            add(lambda path: by_qemu(path, format))
        case "dmg":
            from tests.block.test_read_only_formats import dmg

            model = (b"data" * 4096 + bytes(200000)).ljust(MIB, b"x")
            kinds = (0x80000005, 1, 0x80000004, 0x80000006, 0x80000008)
            add(lambda path: path.write_bytes(dmg(model, kinds)) and None)
            add(lambda path: path.write_bytes(dmg(model, kinds, plist=False)) and None)
    return made


def with_snapshot(path: Path, options: Mapping[str, str]) -> None:
    """A qcow2 image with compressed clusters, a snapshot, and a bitmap where it can have one."""
    written(path, "qcow2", options)
    with open_image(path, format="qcow2") as image:
        assert isinstance(image, Qcow2Image)
        image.write_compressed(b"ab" * (image.cluster_size // 2), MIB + MIB // 2)
        image.snapshot_create("first")
        if image.header.version > 2:
            image.tracker.add("marks", None)
        write_at(image, 0, b"newer" * 512)


def with_log(source: Path, path: Path) -> None:
    """A VHDX whose log has an entry to replay."""
    path.write_bytes(source.read_bytes())
    image = open_image(path)
    write_at(image, 2 * MIB + MIB // 2, b"logged" * 256)
    image.flush()
    data = path.read_bytes()
    image.close()
    path.write_bytes(data)


def mutate(pieces: Pieces, format: str, rng: random.Random) -> Pieces:
    size, parts = pieces[0], [(offset, bytearray(data)) for offset, data in pieces[1]]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        # Small parts, and the beginnings of large ones, are tables more often than not.
        offset, data = rng.choice(parts)
        near = min(len(data), rng.choice((64, 512, 2048, 8192, len(data))))
        at = rng.randrange(near) if rng.random() < 0.8 else len(data) - 1 - rng.randrange(min(near, 512))
        width = rng.choice((1, 2, 4, 8))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + width] = rng.randbytes(len(data[at : at + width]))
            case 2 | 3:
                at = at // width * width
                value = (rng.choice(VALUES) + rng.choice((-1, 0, 0, 1))) % (1 << 8 * width)
                data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))[: len(data) - at]
            case 4:
                other = rng.randrange(len(data)) // width * width
                data[at : at + width] = data[other : other + width].ljust(len(data[at : at + width]), b"\0")
            case _:
                if rng.random() < 0.3:
                    size = rng.choice((0, 1, 511, size // 2, size - 512, size - 1, size + 12345, 1 << 40))
                else:
                    n = rng.randrange(1, 64)
                    data[at : at + n] = bytes(len(data[at : at + n]))
        parts = [(offset, data) for offset, data in parts if data]
    if rng.random() < 0.8:
        for offset, data in parts:
            mend_checksums(format, offset, data)
    size = max(0, size)
    return size, [(offset, bytes(data[: max(0, size - offset)])) for offset, data in parts]


def mend_checksums(format: str, base: int, data: bytearray) -> None:
    """So that damage is not found out by its checksum alone."""

    def crc(at: int, length: int) -> None:
        if base <= at <= base + len(data) - length:
            at -= base
            data[at + 4 : at + 8] = bytes(4)
            data[at + 4 : at + 8] = crc32c(data[at : at + length]).to_bytes(4, "little")

    if format == "vhdx":
        for at in layout.HEADER_AT:
            crc(at, 4096)
        for at in layout.REGIONS_AT:
            crc(at, 65536)
        for at in range(-base % 4096, len(data) - 4096, 4096):
            length = int.from_bytes(data[at + 8 : at + 12], "little")
            if data[at : at + 4] == b"loge" and length <= 65536:
                crc(base + at, length)
    elif format == "vpc":
        for cookie, length, where in ((b"conectix", 512, 64), (b"cxsparse", 1024, 36)):
            at = data.find(cookie)
            while 0 <= at <= len(data) - length:
                sum_ = vhd._checksum(data[at : at + length], where)
                data[at + where : at + where + 4] = sum_.to_bytes(4, "big")
                at = data.find(cookie, at + length)


def use(path: Path, format: str, rng: random.Random) -> str:
    """What became of it."""
    try:
        with open_image(path, format=format, read_only=True) as image:
            exercise(image, rng, False)
    except UserError:
        return "refused"
    except OSError:
        return "failed"
    if format in ("qcow", "parallels", "dmg"):
        return "read"
    try:
        with open_image(path, format=format, inside=(str(path.parent),)) as image:
            exercise(image, rng, True)
            attempt(image.repair)
            exercise(image, rng, True)
    except UserError:
        return "refused for writing"
    except OSError:
        return "failed to close"
    return "used"


def exercise(image: Image, rng: random.Random, write: bool) -> None:
    sectors = max(1, image.size // 512)
    for _ in range(6):
        if not image.size:
            break
        at = min(rng.choice((0, 128, 2048, 4096, rng.randrange(sectors))), sectors - 1)
        n = min(rng.choice((1, 8, 200)), sectors - at)
        attempt(lambda at=at, n=n: read_at(image, at * 512, n * 512))
        if write:
            attempt(lambda at=at, n=n: write_at(image, at * 512, b"w" * n * 512))
            attempt(lambda at=at, n=n: image.write_zeroes(at * 512, n * 512, True))
    if write:
        attempt(image.flush)
    attempt(lambda: list(islice(image.extents(), 1000)))
    attempt(image.check)
    attempt(image.snapshots)
    if write and rng.random() < 0.3:
        do = rng.choice((image.snapshot_delete, image.snapshot_apply, image.snapshot_create))
        attempt(lambda: do("first"))
    image.info()


def attempt(job: Callable[[], object]) -> None:
    try:
        job()
    except (OSError, UserError):
        pass


def main(format: str, count: int, seed: int) -> None:
    outcomes: Counter[str] = Counter()
    longest = 0.0
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        directory = Path(name)
        sound = seeds(format, directory)
        pristine = [pieces_of(path) for path in sound]
        for i in range(count):
            rng = random.Random(f"{format} {seed} {i}")
            which = rng.randrange(len(sound))
            path = sound[which]
            put(path, mutate(pristine[which], format, rng))
            begun = time.process_time()
            faulthandler.dump_traceback_later(60, exit=True)
            try:
                outcomes[use(path, format, rng)] += 1
            except BaseException:
                print(f"{format} seed {seed} image {i}", file=sys.stderr)
                raise
            longest = max(longest, time.process_time() - begun)
        faulthandler.cancel_dump_traceback_later()
    assert not os.listdir("/proc/self/fd")[8:], os.listdir("/proc/self/fd")
    memory_most = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert memory_most is not None
    print(dict(outcomes), f"{longest:.2f}", memory_most[1])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
