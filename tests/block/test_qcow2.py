"""qcow2: the conformance of every variant, and what only this format has."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest

from skep.block.backend import read_at, write_at
from skep.block.format import BackingName, DamagedImage, Image, ImageError
from skep.block.image import create_image, open_image, open_layers
from skep.block.qcow2 import check
from skep.block.qcow2.header import Incompatible
from skep.block.qcow2.image import Qcow2Image
from skep.errors import UserError
from tests.block.conformance import ImageConformance, run

MIB = 1 << 20


class TestConformance(ImageConformance):
    format = "qcow2"
    qemu_checks = True
    variants = (
        {},
        {"compat": "0.10"},
        {"cluster_size": "512"},
        {"cluster_size": "512", "refcount_bits": "64"},
        {"cluster_size": "4096", "refcount_bits": "1"},
        {"cluster_size": "2M", "refcount_bits": "8"},
        {"extended_l2": "on", "cluster_size": "16k"},
        {"extended_l2": "on"},
        {"preallocation": "metadata", "lazy_refcounts": "on"},
    )


class TestWithSnapshots(ImageConformance):
    """The same while snapshots are taken, applied and deleted."""

    format = "qcow2"
    qemu_checks = True
    variants = ({"cluster_size": "4096"}, {"extended_l2": "on", "cluster_size": "16k"})

    def make(self, options: Mapping[str, str], path: Path | None = None) -> Path:
        self.kept: dict[str, bytes] = {}
        return super().make(options, path)

    def traffic(self, image: Image, model: bytearray, rng: random.Random, steps: int) -> None:
        for _ in range(steps):
            if rng.random() < 0.7:  # one change at a time: a power cut may come between two
                super().traffic(image, model, rng, 1)
                continue
            names = sorted(self.kept)
            what = rng.choice(("take", "apply", "delete")) if names else "take"
            if what == "take":
                name = f"s{rng.randrange(10**9)}"
                image.snapshot_create(name)
                self.kept[name] = bytes(model)
            elif what == "apply":
                name = rng.choice(names)
                image.snapshot_apply(name)
                model[:] = self.kept[name]
            else:
                name = rng.choice(names)
                image.snapshot_delete(name)
                del self.kept[name]
            assert {one.name for one in image.snapshots()} == set(self.kept)

    def test_resize(self) -> None:
        pytest.skip("a disk has its snapshots' sizes")

    def test_what_a_snapshot_keeps(self) -> None:
        for options in self.each():
            self.make(options)
            model = bytearray(self.size)
            with self.open() as image:
                self.traffic(image, model, random.Random(11), 40)
                image.flush()
            for name, disk in self.kept.items():
                with self.open(read_only=True) as image:
                    image.show_snapshot(name)
                    self.same(image, disk)
                run("qemu-img", "convert", "-l", name, "-O", "raw", self.path, self.path.with_suffix(".then"))
                assert self.path.with_suffix(".then").read_bytes() == disk
            self.judge(model)


@pytest.mark.parametrize("how", ["no_cache", "synchronous", "no_cache synchronous"])
def test_direct_and_synchronous(tmp_path: Path, how: str) -> None:
    traffic = TestConformance()
    path, model, rng = tmp_path / "disk", bytearray(MIB), random.Random(1)
    create_image(path, "qcow2", MIB, options={"cluster_size": "4096"})
    try:
        image = open_image(path, **dict.fromkeys(how.split(), True))  # type: ignore[arg-type]
    except UserError as error:
        pytest.skip(str(error))
    with image:
        assert image.write_cache == ("synchronous" not in how)
        traffic.traffic(image, model, rng, 40)
        traffic.same(image, model)
        if not image.write_cache:
            with open_image(path, read_only=True, lock=False) as seen:
                traffic.same(seen, model)
    run("qemu-img", "check", path)


def test_a_dirty_image_is_counted_anew(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_image(path, "qcow2", MIB, options={"lazy_refcounts": "on"})
    # QEMU leaves refcounts for later, and dies.
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 192k", "-c", "flush", "-c", "abort", str(path)]
    subprocess.run(command, check=False, capture_output=True, timeout=60)
    with open_image(path, read_only=True) as image:
        assert image.dirty
    with open_image(path) as image:
        assert not image.dirty and image.check().clean
        assert read_at(image, 0, 192 << 10) == b"\7" * (192 << 10)
    run("qemu-img", "check", path)


def test_a_corrupt_image_is_only_read_before_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_image(path, "qcow2", MIB)
    with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        write_at(image, 0, b"x" * 4096)
        image.flush()
        image.header.incompatible |= Incompatible.CORRUPT
        image.write_header()
    with open_image(path) as image:
        assert image.corrupted and read_at(image, 0, 4096) == b"x" * 4096
        with pytest.raises(OSError, match="corrupt"):
            write_at(image, 0, bytes(512))
        image.repair()
        write_at(image, 0, b"y" * 512)
    run("qemu-img", "check", path)


@pytest.mark.parametrize("part", ["refcount table", "refcount block", "L2 entry", "COPIED"])
def test_repair(tmp_path: Path, part: str) -> None:
    path = tmp_path / "disk"
    create_image(path, "qcow2", MIB, options={"cluster_size": "4096"})
    data = random.Random(2).randbytes(MIB // 2)
    with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        write_at(image, 0, data)
        image.flush()
        table = image.header.refcount_table_offset
        l2 = image.l1()[0] & 0xFFFF_FFFF_FE00
        counts = int.from_bytes(read_at(image.file, table, 8), "big")
    with path.open("r+b") as file:
        where = {"refcount table": table, "refcount block": counts + 40, "L2 entry": l2 + 8 * 200, "COPIED": l2 + 8}
        file.seek(where[part])
        before = file.read(8)
        file.seek(where[part])
        values = {"refcount table": 1 << 50, "refcount block": 0, "L2 entry": 1 << 63 | 1 << 40}
        file.write(values.get(part, int.from_bytes(before, "big") ^ 1 << 63).to_bytes(8, "big"))
    with open_image(path, read_only=True) as image:
        assert image.check().corruptions
    with open_image(path) as image:
        assert image.repair().corruptions_fixed
        assert image.check().clean
        assert read_at(image, 0, MIB // 2) == data
        write_at(image, 0, data[::-1])
    run("qemu-img", "check", path)
    with open_image(path) as image:
        assert read_at(image, 0, MIB // 2) == data[::-1]


def test_what_nobody_knows_is_kept(tmp_path: Path) -> None:
    """Header extensions of others, through everything that writes the header."""
    path = tmp_path / "disk"
    create_image(path, "qcow2", MIB)
    with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        image.header.extensions[0x12345678] = b"somebody's own"
        image.write_header()
    with open_image(path) as image:
        image.snapshot_create("one")
        image.resize(300 << 20)
        image.set_backing(BackingName("below", "raw"))
    with open_image(path, backing=False, read_only=True) as image:
        assert isinstance(image, Qcow2Image)
        assert image.header.extensions[0x12345678] == b"somebody's own"
    assert "below" in run("qemu-img", "info", "-U", path)


def test_a_terabyte_takes_little(tmp_path: Path) -> None:
    """Memory, with tables all over the disk."""
    path = tmp_path / "disk"
    create_image(path, "qcow2", 1 << 40)
    program = (
        "import re, sys\n"
        "from skep.block.backend import read_at, write_at\n"
        "from skep.block.image import open_image\n"
        "with open_image(sys.argv[1]) as image:\n"
        "    for i in range(2000):\n"
        "        write_at(image, i * (image.size // 2000) // 512 * 512, b'x' * 512)\n"
        "    image.flush()\n"
        "    for i in range(2000):\n"
        "        assert read_at(image, i * (image.size // 2000) // 512 * 512, 512) == b'x' * 512\n"
        "with open_image(sys.argv[1], read_only=True) as image:\n"
        "    assert image.check().clean\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 << 10, f"{done.stdout} KiB"


def test_a_chain_of_fifty(tmp_path: Path) -> None:
    create_image(tmp_path / "0", "raw", MIB)
    (tmp_path / "0").write_bytes(b"a" * MIB)
    for i in range(1, 51):
        below = BackingName(str(i - 1), "qcow2" if i > 1 else "raw")
        options = {"cluster_size": "4096"}
        create_image(tmp_path / str(i), "qcow2", MIB, options=options, backing=below, check_backing=False)
        with open_image(tmp_path / str(i), backing=False) as image:
            write_at(image, i * 8192, bytes([i]) * 4096)
    with open_image(tmp_path / "50", read_only=True) as image:
        for i in range(1, 51):
            assert read_at(image, i * 8192, 4096) == bytes([i]) * 4096
        assert read_at(image, 0, 512) == b"a" * 512
        assert {extent.depth for extent in image.extents()} >= {0, 50}


@pytest.mark.parametrize("size", [1 << 40, 1 << 43])
def test_counts_that_cannot_be_made_anew_stay_as_they_are(tmp_path: Path, size: int) -> None:
    """Of a file too long for that (it was found by fuzzing): the repair is refused, and the image goes on to work."""
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", 3 << 20, options={"cluster_size": "512", "refcount_bits": "64"})
    with open_image(path) as image:
        write_at(image, 0, b"x" * 65536)
    with path.open("r+b") as file:
        table = int.from_bytes(file.read(56)[48:56], "big")
        file.seek(table + 8)
        file.write((1 << 41).to_bytes(8, "big"))  # a block of counts behind the end
        file.truncate(size)
    with open_image(path) as image:
        tracemalloc.start()
        with pytest.raises(ImageError, match="too large"):
            image.repair()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 3 * MIB, most
        for offset in (0, 1 << 20):
            with contextlib.suppress(OSError):  # counts are damaged still
                write_at(image, offset, b"y" * 512)
        with contextlib.suppress(OSError):
            image.flush()
        assert read_at(image, 512, 512) == b"x" * 512


def with_three_snapshots(path: Path) -> int:
    """Each of its own data; returns where the table of snapshots is."""
    create_image(path, "qcow2", 8 * MIB, options={"cluster_size": "4096"})
    with open_image(path) as image:
        for number in range(3):
            write_at(image, number * MIB, bytes([number + 1]) * 8192)
            image.snapshot_create(f"s{number}")
        write_at(image, 3 * MIB, b"now" * 1024)
        assert isinstance(image, Qcow2Image)
        return image.header.snapshots_offset


@pytest.mark.parametrize(
    "entry, field, value, left",
    [
        (1, 14, b"\xff\xff", ["s0"]),  # the length of its name
        (1, 0, (1 << 40).to_bytes(8, "big"), ["s0", "s2"]),  # where its L1 table is
        (2, 0, (1 << 40).to_bytes(8, "big"), ["s0", "s1"]),
        (0, 36, b"\xff\xff\xff\xff", []),  # the length of its extra data
    ],
)
def test_snapshots_that_are_lost_are_given_up(
    tmp_path: Path, entry: int, field: int, value: bytes, left: list[str]
) -> None:
    path = tmp_path / "disk.qcow2"
    table = with_three_snapshots(path)
    with path.open("r+b") as file:
        file.seek(table + entry * 72 + field)  # 40 bytes, 24 of extra data, an id of 1, a name of 2; whole words
        file.write(value)
    with open_image(path, read_only=True) as image:
        assert image.check().corruptions
    with open_image(path) as image:
        image.repair()
        assert image.check().clean
        assert [one.name for one in image.snapshots()] == left
        assert read_at(image, MIB, 8192) == b"\2" * 8192 and read_at(image, 3 * MIB, 3072) == b"now" * 1024
    run("qemu-img", "check", path)
    for number, name in ((0, "s0"), (1, "s1"), (2, "s2")):
        if name in left:
            with open_image(path, read_only=True) as image:
                image.show_snapshot(name)
                assert [read_at(image, at * MIB, 1)[0] for at in range(3)] == [
                    at + 1 if at <= number else 0 for at in range(3)
                ]


@pytest.mark.parametrize("where", ["all of it", "its end"])
def test_an_l1_table_behind_the_end_of_the_file_is_made_anew(tmp_path: Path, where: str) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", 64 * MIB, options={"cluster_size": "512"})
    with open_image(path) as image:
        write_at(image, 0, b"x" * 65536)
        assert isinstance(image, Qcow2Image)
        image.settle()
        image.replace_l1([image.l1()], len(image.l1()), image.size)  # behind the data
        offset = image.header.l1_table_offset
    if where == "its end":
        os.truncate(path, offset + 512)
    else:
        with path.open("r+b") as file:
            file.seek(40)
            file.write((1 << 30).to_bytes(8, "big"))
    with open_image(path, read_only=True) as image:
        assert image.check().corruptions
    with open_image(path) as image:
        image.repair()
        assert image.check().clean
        assert read_at(image, 0, 65536) == (b"x" if where == "its end" else b"\0") * 65536
        write_at(image, 32 * MIB, b"new" * 512)
    run("qemu-img", "check", path)


def damaged(path: Path, where: int, data: bytes) -> Path:
    """A disk of 1 MiB, all of it data but for its end, with other bytes at an offset of the file."""
    create_image(path, "qcow2", MIB, options={"cluster_size": "4096"})
    with open_image(path) as image:
        write_at(image, 0, b"data" * (MIB // 8))
        image.snapshot_create("first")
    with path.open("r+b") as file:
        file.seek(where)
        file.write(data)
    return path


def place_of(path: Path, field: int) -> int:
    return int.from_bytes(path.read_bytes()[field : field + 8], "big")


REFCOUNT_TABLE = 48
"""Where the header has its offset."""


@pytest.mark.parametrize("far", [False, True])
def test_counts_that_are_gone_cost_no_data(tmp_path: Path, far: bool) -> None:
    """Everything counts as free then, the header too: to mend that takes nothing, and no write does."""
    path = damaged(tmp_path / "disk", 0, b"QFI")
    if far:
        damaged(path, REFCOUNT_TABLE, (1 << 24).to_bytes(8, "big"))
    else:
        damaged(path, place_of(path, REFCOUNT_TABLE), bytes(8))
    with open_image(path) as image, pytest.raises(OSError):
        for at in range(MIB // 2, MIB, 65536):
            write_at(image, at, b"x" * 4096)
            image.flush()
    assert path.read_bytes()[:4] == b"QFI\xfb"
    with open_image(path) as image:
        found = image.repair()
        assert found.corruptions_fixed == found.corruptions > 0
        assert not image.check().corruptions
    run("qemu-img", "check", "-q", path)
    with open_image(path) as image:
        assert read_at(image, 0, MIB // 2) == b"data" * (MIB // 8)


def test_a_file_of_512_tib_is_too_large_for_new_counts(tmp_path: Path) -> None:
    """And that is found out before a list of them is made (it was found by damaging images at random)."""
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", 3 << 20, options={"cluster_size": "512", "refcount_bits": "64"})
    with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        at = -(-image.file.size // 512) * 512
        image.file.size = 1 << 49  # no host's file system need have such files
        tracemalloc.start()
        try:
            with pytest.raises(ImageError, match="too large"):
                check.change_refcounts(image, 4)
            assert tracemalloc.get_traced_memory()[1] < 16 * MIB
        finally:
            tracemalloc.stop()
            image.file.size = at


def test_a_bitmap_is_as_long_as_the_disk_of_a_snapshot_that_is_applied(tmp_path: Path) -> None:
    """It was found by damaging images at random: the disk grew, and a write beyond the bitmap's end raised."""
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", 16 * MIB)
    with open_image(path) as image:
        image.snapshot_create("long")
    with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        image.snapshot_delete("long")
        image.resize(MIB)
        image.snapshot_create("short")
        image.resize(16 * MIB)
        image.snapshot_create("long")
        image.snapshot_apply("short")
        assert image.size == MIB
        image._tracked.add("marks", 4096)
        write_at(image, 0, b"x" * 4096)
        image.snapshot_apply("long")
        assert image.size == 16 * MIB
        write_at(image, 15 * MIB, b"y" * 4096)
    run("qemu-img", "check", "-q", path)
    with open_image(path, read_only=True) as image:
        assert image.check().clean and read_at(image, 15 * MIB, 4) == b"yyyy"


def test_places_are_in_the_order_in_which_they_were_given(tmp_path: Path) -> None:
    """Whatever the order of the writes; one that fails gives its clusters back."""
    create_image(tmp_path / "image", "qcow2", 8 * MIB)
    what = "driver=qcow2,file.driver=fault,file.what=write,file.after=3,file.times=1"
    with open_layers(f"{what},file.file.driver=file,file.file.filename={tmp_path}/image") as image:
        writes = [image.placed(number * MIB, MIB) for number in range(4)]
        for number, write in reversed(list(enumerate(writes))):
            assert write is not None
            with pytest.raises(OSError, match="is to fail") if number == 0 else contextlib.nullcontext():
                write([memoryview(bytes([number + 1]) * (MIB // 2))] * 2)
        found = [one for one in image.extents() if one.data]
        assert [(one.offset, one.length) for one in found] == [(MIB, 3 * MIB)]  # in a row in the file
        for number in range(4):
            assert read_at(image, number * MIB, MIB) == bytes([number and number + 1]) * MIB
        write_at(image, 0, b"again" * 1000 + bytes(120))
    with open_image(tmp_path / "image", read_only=True) as image:
        assert read_at(image, 0, 5) == b"again" and image.check().clean


def test_bitmaps_that_memory_has_no_room_for(tmp_path: Path) -> None:
    """A disk's size costs nothing to claim, and a bitmap has a bit for each piece of it."""
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", 1 << 20)
    with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        image.tracker.add("fine", 512)
        image.tracker.add("coarse", 1 << 20)
        write_at(image, 0, bytes(4096))  # which loads them
        image.resize(1 << 40)
        assert [one.name for one in image.bitmaps()] == ["coarse"]
        with pytest.raises(ImageError, match="would take 268435456 bytes"):
            image.tracker.add("fine", 512)
        for number in range(8):  # 32 MiB each, but for "coarse"
            image.tracker.add(str(number), 4096)
        with pytest.raises(OSError, match="bitmap '7', and there is no memory"):
            image.tracker.load_all()


def test_a_repair_finds_what_waits_to_be_written(tmp_path: Path) -> None:
    """A cluster that counts as free, and that the refcount table claims, is given to the disk."""
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", MIB, options={"cluster_size": "4096"})
    with open_image(path) as image:
        write_at(image, 0, b"x" * 4096)
    data = bytearray(path.read_bytes())
    entry = int.from_bytes(data[48:56], "big") + 10 * 8
    data[entry : entry + 8] = (-(-len(data) // 4096) * 4096).to_bytes(8, "big")
    path.write_bytes(data)
    with open_image(path) as image:
        write_at(image, 4096, b"y" * 4096)
        found = image.repair()
        assert found.corruptions and found.corruptions == found.corruptions_fixed
        assert image.check().clean
        assert read_at(image, 0, 8192) == b"x" * 4096 + b"y" * 4096


@pytest.mark.parametrize("look", ["extents", "make_empty", "shrink"])
def test_one_l2_table_for_many(tmp_path: Path, look: str) -> None:
    """A small file that seems to have a lot in it: whoever looked at all of that would take minutes."""
    path, tables = tmp_path / "disk.qcow2", 8192
    create_image(path, "qcow2", tables << 29)
    with open_image(path) as image:
        write_at(image, 0, b"x" * 65536)
    with path.open("r+b") as file:
        l1 = int.from_bytes(file.read(48)[40:48], "big")
        file.seek(l1)
        entry = file.read(8)
        file.seek(l1)
        file.write(entry * tables)
    with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        assert read_at(image, 5 << 29, 65536) == b"x" * 65536
        work = {
            "extents": lambda: list(image.extents()),
            "make_empty": image.make_empty,
            "shrink": lambda: image.resize(MIB),
        }
        with pytest.raises(DamagedImage, match=f"{tables} tables"):
            work[look]()
        assert image.check().corruptions


@pytest.mark.parametrize("size", [0, 1 << 16])
def test_what_is_beyond_the_disk_is_not_compressed(tmp_path: Path, size: int) -> None:
    """Found by fuzzing: the end of a disk of no bytes has no place in the tables."""
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", size)
    with open_image(path) as image:
        image.write_compressed(b"", size)
        with pytest.raises(ImageError, match="whole clusters"):
            image.write_compressed(b"x" * 65536, size)
        assert image.check().clean
