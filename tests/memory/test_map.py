"""Overlays, huge pages and wired memory, as the host shows them."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import skep
from skep.errors import HostError
from skep.memory import PAGE, GuestMemory, MemoryFault, Overlay, Region, Rights

MIB = 1 << 20
_POOL = 12
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 64 * PAGE)
    for page in range(64):
        os.pwrite(fd, bytes((0x80 | page,)), page * PAGE)
    yield fd
    os.close(fd)


def test_an_overlay_cuts_ram_and_goes(file: int) -> None:
    memory = GuestMemory(16 * PAGE, reach=32 * PAGE)
    memory.write(5 * PAGE, b"ram")
    over = Overlay(4 * PAGE, 2 * PAGE, Rights.READ, file, 8 * PAGE)
    beside = Overlay(20 * PAGE, PAGE, Rights.WRITE, file)
    memory.change(add=[over, beside])
    assert [(r.gpa // PAGE, r.size // PAGE, r.rights) for r in memory.regions] == [
        (0, 4, Rights.WRITE), (4, 2, Rights.READ), (6, 10, Rights.WRITE), (20, 1, Rights.WRITE),
    ]  # fmt: skip
    assert memory.behind(5 * PAGE, 1)[0] == 0x89 and memory.behind(20 * PAGE, 1)[0] == 0x80
    assert memory.allows(4 * PAGE, 8, Rights.READ) and not memory.allows(4 * PAGE, 8, Rights.WRITE)
    for gpa, n in ((4 * PAGE, 1), (6 * PAGE - 1, 1), (4 * PAGE - 1, 2), (3 * PAGE, 4 * PAGE), (20 * PAGE, 1)):
        with pytest.raises(MemoryFault):
            memory.view(gpa, n)
    assert memory.read(4 * PAGE - 1, 1) == memory.read(6 * PAGE, 1) == b"\0"
    memory.change(remove=[over, beside])
    assert memory.regions == memory.ram and memory.read(5 * PAGE, 3) == b"ram"
    assert memory.region_at(20 * PAGE) is None
    with pytest.raises(MemoryFault):
        memory.behind(20 * PAGE, 1)
    memory.close()


def test_what_cannot_be_is_refused(file: int) -> None:
    memory = GuestMemory(16 * PAGE, reach=32 * PAGE)
    over = Overlay(0, PAGE, Rights.WRITE, file)
    with pytest.raises(ValueError, match="not there"):
        memory.change(remove=[over])
    for wrong in (
        Overlay(1, PAGE, Rights.READ, file), Overlay(0, 100, Rights.READ, file), Overlay(0, 0, Rights.NONE),
        Overlay(31 * PAGE, 2 * PAGE, Rights.READ, file), Overlay(-PAGE, PAGE, Rights.NONE),
        Overlay(0, PAGE, Rights.READ, file, 5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no place"):
            memory.change(add=[wrong])
    assert memory.regions == memory.ram
    memory.close()


class Follower:
    """Whose change is refused, if it is to be."""

    def __init__(self, memory: GuestMemory, *, refuses: bool = False) -> None:
        self.memory = memory
        self.refuses = refuses
        self.told: list[object] = []

    @contextmanager
    def changing(
        self, before: Sequence[Region], after: Sequence[Region], where: Sequence[tuple[int, int]]
    ) -> Iterator[None]:
        if self.refuses:
            raise HostError("no")
        assert self.memory.regions == tuple(before)
        yield
        self.told.append((tuple(after), tuple(where)))


def test_listeners_follow_or_nothing_changes(file: int) -> None:
    memory = GuestMemory(16 * PAGE)
    follower = Follower(memory)
    memory.add_map_listener(follower)
    over = Overlay(0, PAGE, Rights.READ, file)
    memory.change(add=[over])
    assert follower.told == [(memory.regions, ((0, PAGE),))]
    refuses = Follower(memory, refuses=True)
    memory.add_map_listener(refuses)
    regions = memory.regions
    with pytest.raises(HostError):
        memory.change(remove=[over])
    assert memory.regions == regions and memory.behind(0, 1)[0] == 0x80
    memory.remove_map_listener(refuses)
    memory.change(remove=[over])
    assert memory.regions == memory.ram
    memory.close()


places = st.tuples(st.integers(0, 30), st.integers(1, 12), st.sampled_from(Rights), st.integers(0, 40))


@given(st.lists(places, max_size=5), st.data())
def test_regions_are_what_lies_on_top(some: list[tuple[int, int, Rights, int]], data: st.DataObject) -> None:
    """Against a model with an entry for each page."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 64 * PAGE)
    memory = GuestMemory(16 * PAGE, low_limit=8 * PAGE, high_base=12 * PAGE, reach=42 * PAGE)
    try:
        there: list[Overlay] = []
        for gpa, n, rights, offset in some:
            overlay = Overlay(gpa * PAGE, n * PAGE, rights, fd, offset * PAGE)
            gone = [one for one in there if data.draw(st.booleans())]
            memory.change(gone, [overlay])
            there = [*(one for one in there if one not in gone), overlay]
            model: dict[int, tuple[Rights, int, int] | None] = {}
            for page in range(42):
                ram = 0 <= page < 8 or 12 <= page < 20
                model[page] = (Rights.WRITE, memory.fd, page if page < 8 else page - 4) if ram else None
                for one in there:
                    if one.gpa <= page * PAGE < one.end:
                        at = one.offset // PAGE + page - one.gpa // PAGE
                        model[page] = (one.rights, one.fd, at) if one.rights else None
                region = memory.region_at(page * PAGE)
                found = region and (region.rights, region.fd, (region.offset + page * PAGE - region.gpa) // PAGE)
                assert found == model[page]
                plain = ram and not any(one.gpa <= page * PAGE < one.end for one in there)
                assert memory.is_ram(page * PAGE, PAGE) == plain
        ends = [(r.gpa, r.end) for r in memory.regions]
        assert all(a[1] <= b[0] for a, b in pairwise(ends))
    finally:
        memory.close()
        os.close(fd)


# Pages


def smaps(memory: GuestMemory) -> dict[str, int]:
    """Of the mapping at its window's start: names to KiB."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            inside = int(line.partition("-")[0], 16) == memory.base
        elif inside and line.endswith("kB"):
            name, value, _ = line.split()
            found[name.rstrip(":")] = int(value)
        elif inside and line.startswith("VmFlags"):
            found |= dict.fromkeys(line.split()[1:], 1)
    return found


@pytest.fixture
def pool() -> Iterator[int]:
    """Twelve huge pages more than there were."""
    count = POOL / "nr_hugepages"
    try:
        before = int(count.read_text())
        count.write_text(str(before + _POOL))
    except OSError as error:
        pytest.skip(f"no huge pages can be had: {error.strerror}")
    try:
        if int((POOL / "free_hugepages").read_text()) < _POOL:
            pytest.skip("the host has no memory in pieces of 2 MiB")
        yield _POOL
    finally:
        count.write_text(str(before))


def test_huge_pages(pool: int) -> None:
    free = int((POOL / "free_hugepages").read_text())
    memory = GuestMemory(6 * MIB, low_limit=4 * MIB, high_base=8 * MIB, huge=2 * MIB)
    assert memory.base % (2 * MIB) == 0 and smaps(memory)["KernelPageSize"] == 2048
    assert int((POOL / "free_hugepages").read_text()) == free, "nothing is used before it is touched"
    memory.write(5, b"low")
    memory.write(9 * MIB, b"high")
    assert smaps(memory)["Shared_Hugetlb"] + smaps(memory)["Private_Hugetlb"] == 2048
    memory.clear()
    assert memory.read(5, 3) == memory.read(9 * MIB, 4)[:3] == bytes(3)
    with pytest.raises(HostError, match=r"needs \d+ pages of 2 MiB, and this host has \d+ free.*nr_hugepages"):
        GuestMemory((free + 1) * 2 * MIB, huge=2 * MIB)
    memory.close()
    assert int((POOL / "free_hugepages").read_text()) == free


@pytest.mark.parametrize("huge", [1, None])
def test_transparent_huge_pages(huge: int | None) -> None:
    """Whatever the host's ``shmem_enabled`` says, where we may have a file system of our own."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    memory = GuestMemory(64 * MIB, low_limit=32 * MIB, high_base=64 * MIB, huge=huge)
    assert "hg" in smaps(memory) and memory.kind == "transparent huge pages"
    for gpa in (5, 30 * MIB, 90 * MIB):
        memory.write(gpa, b"text")
    found = smaps(memory)
    if found["ShmemPmdMapped"] == 0:
        pytest.skip("the host has no memory in pieces of 2 MiB")
    assert found["ShmemPmdMapped"] == found["Rss"] == 4 << 10
    assert [(gpa, data.count(b"text")) for gpa, data in memory.written()] == [
        (0, 1), (30 * MIB, 1), (90 * MIB, 1)
    ]  # fmt: skip
    memory.clear()
    assert list(memory.written()) == [] and memory.read(30 * MIB, 4) == bytes(4)
    memory.close()


def test_transparent_huge_pages_that_are_refused() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(skep.__file__ or "").parent.parent)}
    command = [sys.executable, "-c", NOBODY]
    said = subprocess.run(command, check=True, timeout=60, env=environment, capture_output=True, text=True).stdout
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text():
        assert "no transparent huge pages" in said and "be root" in said
    assert said.splitlines()[-1] == "done"


def test_wired_memory_is_there_from_the_beginning_and_stays() -> None:
    memory = GuestMemory(2 * MIB, wired=True)
    assert smaps(memory)["Locked"] == smaps(memory)["Rss"] == 2048
    memory.write(0, b"x")
    memory.clear()
    assert memory.load_u8(0) == 0 and smaps(memory)["Locked"] == smaps(memory)["Rss"] == 2048
    memory.close()


NOBODY = """
import os
from skep.errors import HostError
from skep.memory import GuestMemory
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    GuestMemory(4 << 20, huge=1).close()
except HostError as error:
    print(error)
GuestMemory(4 << 20, huge=None).close()
print("done")
"""

UNPRIVILEGED = """
import resource, os
from skep.errors import HostError
from skep.memory import GuestMemory
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    GuestMemory(4 << 20, wired=True)
except HostError as error:
    print(error)
"""


def test_a_limit_on_wired_memory_is_named() -> None:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if 0 <= soft < MIB:
        pytest.skip("the limit here is lower")
    environment = {**os.environ, "PYTHONPATH": str(Path(skep.__file__ or "").parent.parent)}
    command = [sys.executable, "-c", UNPRIVILEGED]
    said = subprocess.run(command, check=True, timeout=60, env=environment, capture_output=True, text=True).stdout
    assert "4 MiB cannot be wired: RLIMIT_MEMLOCK is 1024 KiB" in said and "memory.wired" in said
