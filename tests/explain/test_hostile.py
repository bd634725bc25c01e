"""Whatever a guest has in its registers, its memory and its output: an explanation comes, soon, and moves no cursor."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.config import Tree
from skep.engine.amd64.registers import GENERAL, Cr0, Cr4, Efer, Pte
from skep.engine.exits import ExitRecord
from skep.explain import Activity, Cause, Seen, Subject, explain
from skep.memory import GuestMemory

SIZE = 4 << 20
WORD = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, SIZE + 4096),
    st.integers((1 << 64) - (1 << 31), (1 << 64) - 1),
    st.sampled_from([0, 1, (1 << 64) - 1, 1 << 47, (1 << 47) - 1, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_8000_0000]),
)
SEGMENT = st.fixed_dictionaries(
    {"selector": st.integers(0, 0xFFFF), "base": WORD, "limit": WORD, "attributes": st.integers(0, 0xFFFF)}
)
TABLE = st.fixed_dictionaries({"base": WORD, "limit": st.integers(0, 0xFFFF)})
CONTROL = {
    "cr0": st.sampled_from([0, Cr0.PE, Cr0.PE | Cr0.PG, Cr0.PE | Cr0.PG | Cr0.WP]),
    "cr4": st.sampled_from([0, Cr4.PAE, Cr4.PAE | Cr4.LA57, Cr4.PSE]),
    "efer": st.sampled_from([0, Efer.LME | Efer.LMA, Efer.LME | Efer.LMA | Efer.NXE]),
    "cr3": st.one_of(st.just(0x1000), WORD),
}
STATE = st.fixed_dictionaries(
    {
        **dict.fromkeys((*GENERAL, "rip", "rflags", "cr2"), WORD),
        **dict.fromkeys(("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldtr"), SEGMENT),
        "gdtr": TABLE,
        "idtr": TABLE,
        **CONTROL,
        "msrs": st.dictionaries(st.sampled_from([0xC0000082]), WORD),
    }
)
TREE = Tree({"boot.cmdline": "console=ttyS0", "lpc.com1.path": "stdio"}).freeze()


def fill(memory: GuestMemory, seed: int) -> None:
    """Page tables that lead to themselves and to each other, among noise."""
    choose = random.Random(seed)
    memory.write(0, choose.randbytes(1 << 20))
    for table in range(0x1000, 0x6000, 0x1000):
        for slot in range(512):
            leads = choose.choice((table, 0x1000 * choose.randrange(1, 6), choose.getrandbits(52)))
            for flag in (Pte.P, Pte.PS, Pte.RW | Pte.US, Pte.NX):
                leads = leads & ~flag | choose.choice((0, flag, flag if flag == Pte.P else 0))
            memory.store_u64(table + 8 * slot, leads)


@pytest.fixture(scope="module", params=range(3))
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    memory = GuestMemory(SIZE)
    fill(memory, request.param)
    yield memory
    memory.close()


def subject(memory: GuestMemory, state: dict[str, Any], said: str) -> Subject:
    exits = (ExitRecord("out", 0x10000, 3, 4, None, 1), ExitRecord("fault", 300, 1, 0, 1 << 70, None))
    return Subject(
        cause=Cause.TRIPLE_FAULT,
        tree=TREE,
        memory=memory,
        processors=[Seen(0, Activity.FAULTED, state, (), exits, {("rdmsr", 1 << 32): 1})],
        unanswered={("port", 0x10000): 1, ("mmio", 1 << 60): 2},
        owners={},
        said=said,
    )


@settings(deadline=None, max_examples=60)
@given(state=STATE, said=st.text(max_size=300))
def test_any_state_is_explained(memory: GuestMemory, state: dict[str, Any], said: str) -> None:
    text = str(explain(subject(memory, state, said)))
    lines = text.split("\n")
    assert len(lines) <= 40 and all(line.isprintable() and len(line) <= 160 for line in lines), text


def test_a_kernel_made_to_take_long_does_not() -> None:
    """A gigabyte of mappings of the same few megabytes, full of what is searched for."""
    memory = GuestMemory(64 << 20)
    for slot in range(512):
        memory.store_u64(0x1000 + 8 * slot, 0x2000 | Pte.P)
        memory.store_u64(0x2000 + 8 * slot, 0x3000 | Pte.P)
        memory.store_u64(0x3000 + 8 * slot, min(slot, 31) << 21 | Pte.P | Pte.PS)
    digits = b"".join(b"%d\0" % digit for digit in range(10))
    bait = (b"Linux version " + bytes(2) + digits * 12).ljust(256, b"\1")
    memory.write(2 << 20, bait * ((60 << 20) // len(bait)))
    state = {
        "cr0": Cr0.PE | Cr0.PG, "cr4": Cr4.PAE, "efer": Efer.LME | Efer.LMA, "cr3": 0x1000,
        "rip": 0x2000, "rsp": 0x3000, "cs": {"attributes": 0x2000},
    }  # fmt: skip
    before = time.process_time()
    explain(subject(memory, state, ""))
    assert time.process_time() - before < 20
    memory.close()
