"""Images that somebody damaged on purpose: opened, read, written, changed, checked and mended, thousands in a process.

``python -m tests.block.hostile FORMAT COUNT SEED`` ends with 0 where nothing but typed errors came out, and prints
what became of the images, the longest time that one took (seconds of CPU), and the memory that the process had at most
(KiB). Anything else is a traceback with the seed of the image.
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from skep.block.backend import read_at, write_at
from skep.block.format import BackingName, Image
from skep.block.image import create_image, open_image
from skep.block.qcow2.image import Qcow2Image
from skep.errors import UserError
from tests.block.damage import MOST, Sparse, encryption_headers, mutate, tables

MIB = 1 << 20
LONGEST = 10
"""Seconds of CPU for one image."""
MEMORY = 64 * MIB
"""Of address space, more than the process has before it sees the first image."""


LUKS: dict[str, Any] = {"options": {"key-secret": "it"}, "secrets": {"it": b"password"}}
"""How such an image is made and opened."""
SMALLEST_KEY = {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "plain64", "iter-time": "1"}
"""Each slot has it 4000 times."""
MOST_ITERATIONS = 1 << 20
"""Of a hash. To try a password costs what the image says, and we have little time: beyond, nobody tries."""


class TooLong(BaseException):
    """Somebody does not come to an end. Nobody is to take it for a typed error."""


def written(path: Path, format: str, options: Mapping[str, str]) -> None:
    """A disk of 3 MiB with data here and there."""
    create_image(path, format, 3 * MIB, options=options)
    with open_image(path, format=format) as image:
        for at in (0, 70000 // 512 * 512, MIB, 2 * MIB + 65536):
            write_at(image, at, b"data" * 256)


def overlay(path: Path, format: str, options: Mapping[str, str]) -> None:
    """A disk that has some of its data from another image beside it."""
    below = path.with_name(f"below.{format}")
    written(below, format, options)
    create_image(path, format, options=options, backing=BackingName(below.name, format))
    with open_image(path, format=format) as image:
        write_at(image, 70000 // 512 * 512 + 1024, b"over" * 256)


def small_disk() -> bytes:
    """Mostly zeros: what is done to data tells little."""
    return (b"data" * 300).ljust(700_000, b"\0") + (b"more" * 300).ljust(MIB - 700_000, b"\0")


def by_qemu(path: Path, format: str, *options: str) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(small_disk())
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
            add(encrypted)
            add(lambda path: overlay(path, format, {"cluster_size": "4096"}))
        case "vhdx":
            for options in ({"block_size": "1M"}, {"block_size": "1M", "subformat": "fixed"}):
                add(lambda path, options=options: written(path, format, options))
            with_log(made[0], directory / "log.vhdx")
            made.append(directory / "log.vhdx")
            add(lambda path: overlay(path, format, {"block_size": "1M"}))
        case "vmdk":
            for kind in ("monolithicSparse", "streamOptimized", "monolithicFlat"):
                add(lambda path, kind=kind: written(path, format, {"subformat": kind}))
            add(lambda path: overlay(path, format, {}))
        case "vpc":
            for kind in ("dynamic", "fixed"):
                add(lambda path, kind=kind: written(path, format, {"subformat": kind}))
            add(lambda path: overlay(path, format, {"force_size": "on"}))
        case "vdi":
            add(lambda path: written(path, format, {}))
        case "luks":
            options = LUKS["options"] | SMALLEST_KEY
            add(lambda path: create_image(path, "luks", MIB, options=options, secrets=LUKS["secrets"]))
        case "qcow":
            add(lambda path: by_qemu(path, format))
            add(lambda path: by_qemu(path, format, "-c"))
        case "parallels":
            add(lambda path: by_qemu(path, format))
        case "dmg":
            from tests.block.test_read_only_formats import dmg

            kinds = (0x80000005, 1, 0x80000004, 0x80000006, 0x80000008)
            add(lambda path: path.write_bytes(dmg(small_disk(), kinds)) and None)
            add(lambda path: path.write_bytes(dmg(small_disk(), kinds, plist=False)) and None)
    return made


def encrypted(path: Path) -> None:
    """A qcow2 image with LUKS, and the smallest key."""
    how = {f"encrypt.{name}": value for name, value in (LUKS["options"] | SMALLEST_KEY).items()}
    options = {"cluster_size": "4096", "encrypt.format": "luks", **how}
    create_image(path, "qcow2", MIB, options=options, secrets=LUKS["secrets"])
    with opened(path, "qcow2") as image:
        write_at(image, 0, b"data" * 256)
        image.snapshot_create("first")
        write_at(image, 4096, b"more" * 256)


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


def opened(path: Path, format: str, *, read_only: bool = False) -> Image:
    how: dict[str, Any] = {}
    if format in ("luks", "qcow2"):
        cheap = sum(iterations(path, at) for at in luks_headers(path, format)) < MOST_ITERATIONS
        how = LUKS if cheap else {"may_stay_locked": True}
        if cheap and format == "qcow2":
            how = {**LUKS, "options": {"encrypt.key-secret": "it"}}
    return open_image(path, format=format, read_only=read_only, inside=(str(path.parent),), **how)


def luks_headers(path: Path, format: str) -> list[int]:
    """Where in the file one may be."""
    if format == "luks":
        return [0]
    with path.open("rb") as file:
        return [min(at, MOST) for at in encryption_headers(file.read(4096))]


def iterations(path: Path, at: int) -> int:
    """All that the header there says."""
    with path.open("rb") as file:
        file.seek(at)
        head = file.read(1024).ljust(1024, b"\0")
    return sum(int.from_bytes(head[at : at + 4], "big") for at in (164, *range(212, 592, 48)))


def use(path: Path, format: str, rng: random.Random) -> str:
    """What became of it."""
    try:
        with opened(path, format, read_only=True) as image:
            exercise(image, rng, False)
    except UserError:
        return "refused"
    except OSError:
        return "failed"
    if format in ("qcow", "parallels", "dmg"):
        return "read"
    try:
        with opened(path, format) as image:
            exercise(image, rng, True)
            if rng.random() < 0.5:
                tinker(image, rng)
            attempt(lambda: mend(image))
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


def tinker(image: Image, rng: random.Random) -> None:
    """What devices do seldom, and tools to an image that somebody gave them."""
    unit = image.cluster_size or 512
    count = max(1, image.size // unit)
    at = min(rng.choice((0, 1, 24, rng.randrange(count))), count - 1) * unit
    length = min(rng.choice((1, 2, 50)) * unit, MIB, max(0, image.size - at) // 512 * 512)
    room = [memoryview(bytearray(length))]

    def in_place(write: bool) -> None:
        if (place := image.locate(at, length, write)) is not None:
            place.ended()

    def in_turn() -> None:
        write = image.placed(at, length)
        if write is not None:
            write(room)

    things: list[Callable[[], object]] = [
        lambda: image.discard(at, length),
        lambda: image.write_zeroes(at, length, False),
        lambda: image.write_compressed((b"pq" * (unit // 2))[: image.size - at], at) if unit <= MIB else None,
        lambda: image.read_now(room, at),
        lambda: image.write_now(room, at),
        lambda: in_place(False),
        lambda: in_place(True),
        in_turn,
        lambda: image.resize(max(512, image.size + rng.choice((-5, -1, 1, 200)) * unit)),
        lambda: image.set_backing(None),
        image.make_empty,
        lambda: image.write_vm_state([memoryview(b"s" * 4096)], 0),
        lambda: image.read_vm_state([memoryview(bytearray(4096))], 512),
        lambda: image.amend({"compat": rng.choice(("0.10", "1.1"))}),
        lambda: image.amend({"refcount_bits": rng.choice(("1", "8", "16", "64"))}),
        lambda: image.amend({"lazy_refcounts": "on"}),
    ]
    if isinstance(image, Qcow2Image):
        marks = image.tracker
        things += [
            lambda: marks.add("new", None),
            lambda: marks.change("marks", enable=rng.random() < 0.5, clear=rng.random() < 0.5),
            lambda: marks.remove("marks"),
            lambda: marks.merge("marks", 16, b"\x81" * 7),
        ]
    for thing in rng.sample(things, 3):
        attempt(thing)


def mend(image: Image) -> None:
    found = image.repair()
    if not found.errors and found.corruptions_fixed >= found.corruptions:
        left = image.check()
        assert not left.corruptions and not left.errors, ("it said that it is mended", found, left)


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raises TooLong after so many seconds of CPU."""

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def value_of(name: str) -> int:
    """A line of /proc/self/status, KiB."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


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
        pristine = [Sparse.of(path) for path in sound]
        known = [tables(format, image) for image in pristine]
        address_space = value_of("VmSize") * 1024 + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        for i in range(count):
            rng = random.Random(f"{format} {seed} {i}")
            which = rng.randrange(len(sound))
            path = sound[which]
            mutate(pristine[which], format, rng, known[which]).put(path)
            begun = time.process_time()
            try:
                with bounded(LONGEST):
                    outcomes[use(path, format, rng)] += 1
            except BaseException:
                print(f"{format} seed {seed} image {i}", file=sys.stderr)
                raise
            longest = max(longest, time.process_time() - begun)
    assert not os.listdir("/proc/self/fd")[8:], os.listdir("/proc/self/fd")
    print(dict(outcomes), f"{longest:.2f}", value_of("VmHWM"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
