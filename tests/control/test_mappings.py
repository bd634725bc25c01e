"""Page tables as runs of addresses."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.control.mappings import Run, runs
from skep.engine.amd64.registers import Cr0, Cr4, Efer, Pte
from skep.memory import GuestMemory

ROOT = 0x1000
STATE = {"cr0": Cr0.PG | Cr0.PE, "cr4": Cr4.PAE, "efer": Efer.LMA, "cr3": ROOT | 0x18}
MAPS = Pte.P | Pte.RW


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(16 << 20)
    yield memory
    memory.close()


def put(memory: GuestMemory, table: int, index: int, entry: int) -> None:
    memory.store_u64(table + 8 * index, entry)


def test_pages_of_all_sizes_become_runs(memory: GuestMemory) -> None:
    put(memory, ROOT, 0, 0x2000 | MAPS)
    put(memory, ROOT, 511, 0x3000 | MAPS)
    put(memory, 0x2000, 0, 0x4000 | MAPS)
    for index in range(4):
        put(memory, 0x4000, index, index << 21 | MAPS | Pte.PS | Pte.NX)
    put(memory, 0x4000, 5, 3 << 21 | MAPS | Pte.PS)
    put(memory, 0x4000, 6, 0x6000 | MAPS)
    put(memory, 0x6000, 1, 0x9000 | MAPS)
    put(memory, 0x6000, 2, 0xA000 | MAPS | Pte.NX)
    put(memory, 0x6000, 3, 0xC000 | MAPS)
    put(memory, 0x6000, 4, 0xD000 | MAPS & ~Pte.P)
    put(memory, 0x3000, 510, 0x5000 | MAPS)
    put(memory, 0x5000, 0, 1 << 21 | MAPS | Pte.PS)
    assert runs(memory, STATE, 100) == [
        Run(0xFFFF_FFFF_8000_0000, 2 << 20, 2 << 20),
        Run(0, 0, 8 << 20),
        Run(0xA0_0000, 6 << 20, 2 << 20),
        Run(0xC0_1000, 0x9000, 0x2000),
        Run(0xC0_3000, 0xC000, 0x1000),
    ]
    assert len(runs(memory, STATE, 3)) == 3


def test_what_is_not_ram_is_left_out(memory: GuestMemory) -> None:
    put(memory, ROOT, 0, 0x2000 | MAPS)
    put(memory, ROOT, 1, 0x4_0000_0000 | MAPS)
    put(memory, 0x2000, 0, 0 | MAPS | Pte.PS)  # a GiB, of which we have 16 MiB
    put(memory, 0x2000, 1, 0xE000_0000 | MAPS | Pte.PS)
    put(memory, 0x2000, 2, 0xFFC000 | MAPS)
    put(memory, 0xFFC000, 7, 0xE00000 | MAPS | Pte.PS)
    assert runs(memory, STATE, 100) == [Run((2 << 30) + (7 << 21), 0xE00000, 2 << 20)]


def test_five_levels(memory: GuestMemory) -> None:
    put(memory, ROOT, 256, 0x2000 | MAPS)
    put(memory, 0x2000, 0, 0x3000 | MAPS)
    put(memory, 0x3000, 0, 0x4000 | MAPS)
    put(memory, 0x4000, 1, 0 | MAPS | Pte.PS)
    state = {**STATE, "cr4": Cr4.PAE | Cr4.LA57}
    assert runs(memory, state, 100) == [Run(0xFF00_0000_0020_0000, 0, 2 << 20)]


@pytest.mark.parametrize("missing", ["cr0", "efer"])
def test_other_modes_map_nothing(memory: GuestMemory, missing: str) -> None:
    put(memory, ROOT, 0, 0x2000 | MAPS)
    assert runs(memory, {**STATE, missing: 0}, 100) == []


def test_a_root_that_is_not_ram(memory: GuestMemory) -> None:
    assert runs(memory, {**STATE, "cr3": 0xE000_0000}, 100) == []


def test_tables_that_lead_in_circles_end(memory: GuestMemory) -> None:
    for index in range(512):
        put(memory, ROOT, index, ROOT | MAPS | Pte.PS & 0)
    began = time.monotonic()
    assert len(runs(memory, STATE, 60_000)) <= 60_000
    assert time.monotonic() - began < 60


@given(st.integers(0, 1 << 32))
def test_any_memory_is_a_page_table(seed: int) -> None:
    rng = random.Random(seed)
    memory = GuestMemory(2 << 20)
    try:
        for table in range(ROOT, ROOT + 0x8000, 0x1000):
            for _ in range(6):
                entry = rng.randrange(1, 256) << 12 | rng.choice((1, 3, 0x81, 0, 1 << 63))
                put(memory, table, rng.randrange(512), entry)
        found = runs(memory, STATE, 1000)
        assert len(found) <= 1000
        assert all(run.size > 0 and memory.is_ram(run.gpa, run.size) and run.va < 1 << 64 for run in found)
    finally:
        memory.close()
