"""Copying disks: what is zeros, what order, and what went wrong."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.block.backend import write_at
from skep.block.converting import Conversion, convert, zero_runs
from skep.block.file import copy_range
from skep.block.image import create_image, open_image, open_layers

MIB = 1 << 20


@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=12),
    st.sampled_from([512, 1024, 1536, 4096]),
    st.integers(0, 9),
    st.integers(0, 511),
)
def test_runs_are_all_of_it_and_zeros_are_zeros(
    pieces: list[tuple[int, bool]], least: int, first: int, tail: int
) -> None:
    data = b"".join((bytes(512) if zero else b"\1" + bytes(511)) * count for count, zero in pieces) + bytes(tail)
    first = min(first * 512, least - 512)
    at = 0
    for start, length, zero in zero_runs(bytearray(data) + b"beyond", least, len(data), first):
        assert start == at and length > 0
        at += length
        assert not zero or (not any(data[start:at]) and (start - first) % least == 0)
        if not zero:  # no whole unit of zeros is missed
            units = range(first + -(-(start - first) // least) * least, at - least + 1, least)
            assert all(any(data[unit : unit + least]) for unit in units if unit >= first)
    assert at == len(data)


@pytest.mark.parametrize(
    ("ordered", "compress", "options"),
    [
        (False, False, {}),
        (True, False, {}),
        (False, True, {}),
        (True, True, {}),
        (True, False, {"cluster_size": "2M"}),
        (True, False, {"cluster_size": "2M", "extended_l2": "on"}),  # of which two pieces have parts
    ],
)
def test_the_same_disk_makes_the_same_file_in_order(
    tmp_path: Path, ordered: bool, compress: bool, options: dict[str, str]
) -> None:
    chance = random.Random(6)
    content = bytearray(24 * MIB)
    for _ in range(60):
        at = chance.randrange(len(content) - MIB)
        content[at : at + 40960] = chance.randbytes(4096) * 10
    (tmp_path / "source").write_bytes(content)
    made = []
    for workers in (1, 4, 4):
        path = tmp_path / f"target{len(made)}"
        create_image(path, "qcow2", len(content), options=options)
        with (
            open_image(tmp_path / "source", format="raw", read_only=True) as source,
            open_image(path, format="qcow2") as target,
        ):
            how = Conversion(zero_target=True, workers=workers, ordered=ordered, compress=compress)
            told: list[float] = []
            assert convert([source], target, how, told.append) == 0
            assert told == sorted(told) and told[-1] == 1
        with open_image(path, format="qcow2", read_only=True) as target:
            back = bytearray(len(content))
            target.preadv([memoryview(back)], 0)
            assert back == content
            assert target.check().clean
        made.append(path.read_bytes())
    assert not ordered or made[0] == made[1] == made[2]


def test_what_the_host_copies_it_copies_zeros_and_all(tmp_path: Path) -> None:
    """So where space is taken, it was the host."""
    (tmp_path / "source").write_bytes(bytes(2 * MIB) + b"data" * MIB + bytes(3 * MIB))
    os.truncate(tmp_path / "source", 16 * MIB)
    for offload in (False, True):
        create_image(tmp_path / "target", "raw", 16 * MIB)
        with (
            open_image(tmp_path / "source", format="raw", read_only=True) as source,
            open_image(tmp_path / "target", format="raw") as target,
        ):
            assert convert([source], target, Conversion(zero_target=True, offload=offload)) == 0
            kept = [(one.offset, one.length) for one in target.extents() if one.data]
        assert kept == ([(0, 9 * MIB)] if offload else [(2 * MIB, 4 * MIB)])
        assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("kinds", [("qcow2", "raw"), ("raw", "qcow2"), ("qcow2", "qcow2")])
def test_what_the_host_cannot_copy_we_do(tmp_path: Path, kinds: tuple[str, str]) -> None:
    """Clusters that are made for it, and files that are none; in a qcow2 some of them are in a row, and others not."""
    chance, content = random.Random(9), bytearray(8 * MIB)
    create_image(tmp_path / "source", kinds[0], len(content))
    with open_image(tmp_path / "source", format=kinds[0]) as source:
        for _ in range(30):
            at = chance.randrange(len(content) // 512 - 400) * 512
            content[at : at + 204800] = chance.randbytes(204800)
            write_at(source, at, bytes(content[at : at + 204800]))
    create_image(tmp_path / "target", kinds[1], len(content))
    for _ in range(2):  # the second time all clusters are there
        with (
            open_image(tmp_path / "source", format=kinds[0], read_only=True) as source,
            open_image(tmp_path / "target", format=kinds[1]) as target,
        ):
            assert convert([source], target, Conversion(offload=True)) == 0
            back = bytearray(len(content))
            target.preadv([memoryview(back)], 0)
            assert back == content
            if kinds[1] == "qcow2":
                assert target.check().clean


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no other file system")
def test_the_host_copies_not_from_one_file_system_to_another(tmp_path: Path) -> None:
    content = random.Random(10).randbytes(3 * MIB)
    (tmp_path / "source").write_bytes(content)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as there:
        os.truncate(there.name, len(content))
        with (
            open_image(tmp_path / "source", format="raw", read_only=True) as source,
            open_image(there.name, format="raw") as target,
        ):
            ends = [image.locate(0, MIB, write) for image, write in ((source, False), (target, True))]
            assert ends[0] is not None and ends[1] is not None
            if copy_range(*ends, MIB):
                pytest.skip("this kernel copies between them")
            assert convert([source], target, Conversion(offload=True)) == 0
        assert Path(there.name).read_bytes() == content


def test_an_error_of_one_thread_ends_all_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(random.Random(7).randbytes(32 * MIB))
    create_image(tmp_path / "target", "raw", 32 * MIB)
    bad = f"driver=fault,what=read,start=15M,end={15 * MIB + 1024},file.driver=file,file.filename={tmp_path}/source"
    with (
        open_layers(bad, read_only=True) as source,
        open_image(tmp_path / "target", format="raw") as target,
    ):
        with pytest.raises(OSError, match="this read is to fail"):
            convert([source], target, Conversion())
        assert convert([source], target, Conversion(salvage=True)) == 2
    assert not [one for one in threading.enumerate() if one.name.startswith("convert")]
    content = bytearray((tmp_path / "source").read_bytes())
    content[15 * MIB : 15 * MIB + 1024] = bytes(1024)
    assert (tmp_path / "target").read_bytes() == content


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_target_that_fails_ends_all_and_is_told(tmp_path: Path, kind: str) -> None:
    """Whoever had a place then has none, so nobody waits for him."""
    (tmp_path / "source").write_bytes(random.Random(8).randbytes(32 * MIB))
    create_image(tmp_path / "target", kind, 32 * MIB)
    bad = f"driver=fault,what=write,after=2,times=1,file.driver=file,file.filename={tmp_path}/target"
    layers = bad if kind == "raw" else "driver=qcow2," + "".join(f"file.{one}," for one in bad.split(","))[:-1]
    with (
        open_image(tmp_path / "source", format="raw", read_only=True) as source,
        open_layers(layers) as target,
    ):
        with pytest.raises(OSError, match="this write is to fail"):
            convert([source], target, Conversion(sparse=0, workers=4))
        assert convert([source], target, Conversion(sparse=0, workers=4)) == 0
        back = bytearray(32 * MIB)
        target.preadv([memoryview(back)], 0)
        assert back == (tmp_path / "source").read_bytes()
    if kind == "qcow2":
        with open_image(tmp_path / "target", read_only=True) as target:
            assert target.check().clean


def test_zeros_of_whole_clusters_only_are_left_out_of_a_qcow2(tmp_path: Path) -> None:
    """Less saves nothing there, and costs a write for each piece between them."""
    create_image(tmp_path / "source", "raw", MIB)
    with open_image(tmp_path / "source", format="raw") as source:
        write_at(source, 4096, b"\1" * 57344 + bytes(8192) + b"\1" * 8192)
        create_image(tmp_path / "target", "qcow2", MIB)
        with open_image(tmp_path / "target", format="qcow2") as target:
            convert([source], target, Conversion(zero_target=True))
            assert [(one.offset, one.length) for one in target.extents() if one.data] == [(0, 2 << 16)]
