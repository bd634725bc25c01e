"""Two outcomes of one case: where they differ, and the smallest sequence that still shows it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tests.engine.generate import Generator, data_image
from tests.engine.place import (
    ARITHMETIC,
    CODE,
    CODE_SIZE,
    DATA,
    GPRS,
    PAGE,
    RF,
    SAVE,
    Batch,
    Outcome,
    fpu_field,
)
from tests.engine.sequence import RandomSequence

SLOT = 0x800
"""Each case of a batch has so much room, and starts somewhere in it, so that some straddle pages."""
BATCH = CODE_SIZE // SLOT
_LONGEST = 0x100


class Runner(Protocol):
    """The host CPU (:class:`tests.engine.oracle.Oracle`) or an engine (:class:`tests.engine.guestcpu.GuestCpu`)."""

    def run(self, batch: Batch) -> list[Outcome]: ...


def differences(host: Outcome, guest: Outcome, flags: int) -> list[str]:
    """What differs, in words. ``flags`` are the arithmetic flags that count.

    Left out: RF (tests/engine/test_named_cases.py looks at it), bits of a page fault's error code that tell of the address space rather
    than of the access, and the page that holds FXSAVE's and XSAVE's images.
    """
    found = []
    for name, ours, theirs in zip(GPRS, guest.registers, host.registers, strict=True):
        if ours != theirs:
            found.append(f"{name} is {ours:#x}, host {theirs:#x}")
    count = ~(ARITHMETIC | RF) & 0xFFFFFFFF | flags
    if (host.rflags ^ guest.rflags) & count:
        found.append(f"rflags is {guest.rflags & count:#x}, host {host.rflags & count:#x} (of {count:#x})")
    for name in ("vector", "rip", "cr2"):
        ours, theirs = getattr(guest, name), getattr(host, name)
        if ours != theirs:
            found.append(f"{name} is {ours:#x}, host {theirs:#x}")
    if host.vector == guest.vector:
        ignore = 0
        if host.vector == 14:  # U says who asked; whether the kernel's half is mapped is the kernel's affair
            ignore = 4 | (1 if host.cr2 >> 63 else 0)
        if (host.error ^ guest.error) & ~ignore:
            found.append(f"error code is {guest.error:#x}, host {host.error:#x}")
    if host.fpu != guest.fpu:
        where = {fpu_field(i): i for i in reversed(range(len(host.fpu))) if host.fpu[i] != guest.fpu[i]}
        for name, i in where.items():
            found.append(f"{name} differs: {guest.fpu[i : i + 16].hex()}, host {host.fpu[i : i + 16].hex()}")
    for page in sorted((host.pages.keys() | guest.pages.keys()) - {SAVE // PAGE}):
        ours, theirs = guest.pages.get(page), host.pages.get(page)
        if ours is None or theirs is None:
            found.append(f"page {DATA + page * PAGE:#x} changed in {'the guest' if theirs is None else 'the host'} only")
        elif ours != theirs:
            i = next(i for i in range(PAGE) if ours[i] != theirs[i])
            where_ = DATA + page * PAGE + i
            found.append(f"memory at {where_:#x} is {ours[i : i + 16].hex()}, host {theirs[i : i + 16].hex()}")
    return found


@dataclass(frozen=True)
class Mismatch:
    sequence: RandomSequence
    address: int
    data: bytes
    found: list[str]

    def __str__(self) -> str:
        return "\n".join([self.sequence.listing(self.address), *(f"  -> {line}" for line in self.found)])


def _compare(sequence: RandomSequence, address: int, host: Outcome, guest: Outcome) -> list[str]:
    return differences(host, guest, sequence.comparable_flags(address).get(host.rip, 0))


def run_sequences(generator: Generator, count: int, host: Runner, guest: Runner) -> Iterator[Mismatch]:
    """Run ``count`` sequences on both and give those that differ."""
    placing = random.Random(generator.seed)
    for start in range(0, count, BATCH):
        data = data_image(placing)
        placed: list[tuple[RandomSequence, int]] = []
        for slot in range(min(BATCH, count - start)):
            address = CODE + slot * SLOT + placing.randrange(_LONGEST, SLOT - (_LONGEST if slot == BATCH - 1 else 1))
            placed.append((generator.sequence(), address))
        batch = Batch(data, tuple(sequence.case(address) for sequence, address in placed))
        outcomes = zip(placed, host.run(batch), guest.run(batch), strict=True)
        for (sequence, address), theirs, ours in outcomes:
            if found := _compare(sequence, address, theirs, ours):
                yield Mismatch(sequence, address, data, found)


def minimize(mismatch: Mismatch, host: Runner, guest: Runner) -> Mismatch:
    """Drop instructions, one at a time, as long as the two still differ."""
    best = mismatch
    index = 0
    while index < len(best.sequence.items):
        smaller = best.sequence.without(index)
        if smaller is None or not (found := _still(smaller, best, host, guest)):
            index += 1
        else:
            best = dataclasses.replace(best, sequence=smaller, found=found)
    return best


def _still(sequence: RandomSequence, was: Mismatch, host: Runner, guest: Runner) -> list[str]:
    if sequence.tainted_reader() is not None:
        return []
    try:
        batch = Batch(was.data, (sequence.case(was.address),))
    except ValueError:
        return []
    (theirs,), (ours,) = host.run(batch), guest.run(batch)
    return _compare(sequence, was.address, theirs, ours)
