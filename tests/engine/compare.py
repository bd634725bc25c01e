"""Two outcomes of one case: where they differ, and the smallest sequence that still shows it."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tests.engine.assemble import CODE_NAMES
from tests.engine.generate import Generator, data_image
from tests.engine.native import OWN
from tests.engine.oracle import OracleError
from tests.engine.place import (
    ARITHMETIC,
    CODE_SIZE,
    DATA,
    GPRS,
    PAGE,
    RF,
    SAVE,
    Batch,
    Outcome,
    code_start,
    fpu_field,
    status_word,
)
from tests.engine.sequence import RandomSequence
from tests.engine.tiny import TinyError

SLOT = 0x800
"""Each case of a batch has so much room, and starts somewhere in it, so that some straddle pages."""
BATCH = CODE_SIZE // SLOT
_LONGEST = 0x100
_ES = 0x80
_OWN_AFFAIR: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    # which of its pushes are in memory when a later one faults
    (re.compile(r"ENTER|PUSHA"), ("page", "memory")),
    # ten bytes, which some CPUs store in two pieces: the first may be there when the second faults
    (re.compile(r"FB?STP_M80"), ("page", "memory")),
    # whether the conversion's exceptions are noted before its store
    (re.compile(r"VEX_VCVTPS2PH"), ("mxcsr",)),
    # whether the x87 registers are MMX registers already (SDM 1, 9.5.1)
    (re.compile(r".*_MMM?(\d|_|$)"), ("st", "fsw", "ftw")),
)
"""What an instruction that faults on its operand leaves to the CPU: which instruction, and what then does not count."""
_X87_STORE = re.compile(r"(FISTT?P?|FSTP?|FBSTP)_M")
WIDE = re.compile(r"^(VEX_)?(VP?MASKMOV|MASKMOV|F?X(SAVE|RSTOR)|FN?SAVE|FN?STENV|FRSTOR|FLDENV)")


class Runner(Protocol):
    """The host CPU (:mod:`tests.engine.oracle`) or an engine (:mod:`tests.engine.guestcpu`)."""

    def run(self, batch: Batch) -> list[Outcome]: ...


def _branched_to_nowhere(host: Outcome, guest: Outcome) -> bool:
    """A branch to an address that is not canonical. Intel's CPUs fault at the branch, which then has done nothing;
    AMD's and the translator at its target."""
    return host.vector == guest.vector == 13 and host.rip < 1 << 47 <= guest.rip < (1 << 64) - (1 << 47)


def stored_nothing(name: str, host: Outcome, guest: Outcome) -> bool:
    """A store with an unmasked floating-point exception of its own does not store: the host has not looked at the page
    that the translator faults on, nor at the address's alignment; after an x87 store it has gone on. The order is not
    defined (SDM 3, table 6-2), and a guest that maps the page and comes back gets the same."""
    if name.startswith("VEX_VCVTPS2PH"):
        return (guest.vector, host.vector) == (14, 19) and host.rip == guest.rip
    if guest.vector not in (12, 13, 14, 17) or not _X87_STORE.match(name):
        return False
    saved = host.pages.get(SAVE // PAGE, bytes(6))[4:6]  # FNSAVE puts the status there, and clears it
    status = status_word(host.fpu) | int.from_bytes(saved, "little")
    return bool(status & ~status_word(guest.fpu) & _ES)


def _in_the_worker(guest: Outcome) -> bool:
    """A wild access that faults in the guest, and on the host reaches what the worker has there for itself."""
    return guest.vector == 14 and any(0 <= guest.cr2 - start < size for start, size in OWN)


def _registers(host: Outcome, guest: Outcome) -> Iterator[str]:
    for name, ours, theirs in zip(GPRS, guest.registers, host.registers, strict=True):
        if ours != theirs:
            yield f"{name} is {ours:#x}, host {theirs:#x}"


def _fpu(host: Outcome, guest: Outcome) -> Iterator[str]:
    if host.fpu != guest.fpu:
        first = {fpu_field(i): i for i in reversed(range(len(host.fpu))) if host.fpu[i] != guest.fpu[i]}
        for name, i in first.items():
            yield f"{name} differs: {guest.fpu[i : i + 16].hex()}, host {host.fpu[i : i + 16].hex()}"


def _memory(host: Outcome, guest: Outcome) -> Iterator[str]:
    for page in sorted((host.pages.keys() | guest.pages.keys()) - {SAVE // PAGE}):
        ours, theirs = guest.pages.get(page), host.pages.get(page)
        if ours is None or theirs is None:
            where = "guest" if theirs is None else "host"
            yield f"page {DATA + page * PAGE:#x} changed in the {where} only"
        elif ours != theirs:
            i = next(i for i in range(PAGE) if ours[i] != theirs[i])
            yield f"memory at {DATA + page * PAGE + i:#x} is {ours[i : i + 16].hex()}, host {theirs[i : i + 16].hex()}"


def _exception(host: Outcome, guest: Outcome, wide: bool) -> Iterator[str]:
    for name in ("vector", "rip"):
        ours, theirs = getattr(guest, name), getattr(host, name)
        if ours != theirs:
            yield f"{name} is {ours:#x}, host {theirs:#x}"
    if wide and host.vector == guest.vector == 14 and abs(guest.cr2 - host.cr2) < PAGE:
        return
    if guest.cr2 != host.cr2:
        yield f"cr2 is {guest.cr2:#x}, host {host.cr2:#x}"
    if host.vector == guest.vector:
        ignore = 0
        if host.vector == 14:  # U says who asked; what is mapped from the last user page on is the kernel's affair
            ignore = 4 | (1 if host.cr2 >= (1 << 47) - PAGE else 0)
        if (host.error ^ guest.error) & ~ignore:
            yield f"error code is {guest.error:#x}, host {host.error:#x}"


def differences(host: Outcome, guest: Outcome, flags: int, wide: bool = False) -> list[str]:
    """What differs, in words. ``flags`` are the arithmetic flags that count; ``wide`` says that the last instruction's
    operand is one of which CPUs touch the bytes in an order of their own (a masked move, an image of the FPU's state),
    so that which of them a page fault names does not count.

    Left out: RF (test_exceptions.py looks at it), bits of a page fault's error code that tell of the address space
    rather than of the access, and the page that holds FXSAVE's and XSAVE's images.
    """
    if _branched_to_nowhere(host, guest):
        return [line for line in _registers(host, guest) if not line.startswith("rsp")]
    found = list(_registers(host, guest))
    count = ~(ARITHMETIC | RF) & 0xFFFFFFFF | flags
    if (host.rflags ^ guest.rflags) & count:
        found.append(f"rflags is {guest.rflags & count:#x}, host {host.rflags & count:#x} (of {count:#x})")
    found += _exception(host, guest, wide)
    found += _fpu(host, guest)
    found += _memory(host, guest)
    return found


@dataclass(frozen=True)
class Mismatch:
    sequence: RandomSequence
    address: int
    data: bytes
    found: list[str]

    @property
    def kind(self) -> frozenset[str]:
        """What differs, roughly: smaller sequences that differ in other things are other mismatches."""
        return frozenset(line.split()[0] for line in self.found)

    def __str__(self) -> str:
        return "\n".join([self.sequence.listing(self.address), *(f"  -> {line}" for line in self.found)])


def _compare(sequence: RandomSequence, address: int, host: Outcome, guest: Outcome) -> list[str]:
    last = sequence.at(address, guest.rip)
    name = "" if last is None else CODE_NAMES[last.code]
    if stored_nothing(name, host, guest) or _in_the_worker(guest):
        return []
    if (guest.vector, host.vector) == (12, 13) and host.rip == guest.rip and sequence.bits != 64:
        return []  # outside the stack's segment and misaligned: which comes first is the CPU's own affair
    wide = WIDE.match(name) is not None
    found = differences(host, guest, sequence.comparable_flags(address).get(host.rip, 0), wide)
    if host.rip == guest.rip and host.vector == guest.vector and host.vector in (12, 13, 14, 17):
        for pattern, lines in _OWN_AFFAIR:
            if pattern.match(name):
                found = [line for line in found if not line.startswith(lines)]
    return found


def run_sequences(generator: Generator, count: int, host: Runner, guest: Runner) -> Iterator[Mismatch]:
    """Run ``count`` sequences on both and give those that differ."""
    placing = random.Random(generator.seed)
    start_of_code = code_start(generator.bits)
    batch_size = min(BATCH, (1 << generator.bits) // SLOT)
    for start in range(0, count, batch_size):
        data = data_image(placing)
        placed: list[tuple[RandomSequence, int]] = []
        for slot in range(min(batch_size, count - start)):
            last = SLOT - (_LONGEST if slot == batch_size - 1 else 1)
            address = start_of_code + slot * SLOT + placing.randrange(_LONGEST, last)
            placed.append((generator.sequence(), address))
        placed, theirs_all = _finite(data, placed, host)
        batch = Batch(data, tuple(sequence.case(address) for sequence, address in placed))
        outcomes = zip(placed, theirs_all, guest.run(batch), strict=True)
        for (sequence, address), theirs, ours in outcomes:
            if found := _compare(sequence, address, theirs, ours):
                yield Mismatch(sequence, address, data, found)


def _finite(
    data: bytes, placed: list[tuple[RandomSequence, int]], host: Runner
) -> tuple[list[tuple[RandomSequence, int]], list[Outcome]]:
    """Run a batch on the host without the sequences that go on for ever there: rarely, a jump lands on bytes that
    happen to be a loop. There may be one in a batch."""
    try:
        return placed, host.run(Batch(data, tuple(sequence.case(address) for sequence, address in placed)))
    except OracleError:
        ended: list[tuple[RandomSequence, int]] = []
        outcomes: list[Outcome] = []
        for sequence, address in placed:
            try:
                outcomes += host.run(Batch(data, (sequence.case(address),)))
                ended.append((sequence, address))
            except OracleError as error:
                print(f"left out, it does not end: seed {sequence.seed}: {error}")
        if len(ended) < len(placed) - 1:
            raise
        return ended, outcomes


def minimize(mismatch: Mismatch, host: Runner, guest: Runner) -> Mismatch:
    """Drop instructions, one at a time, as long as the two still differ in the same things."""
    best = mismatch
    index = 0
    while index < len(best.sequence.items):
        smaller = best.sequence.without(index)
        if smaller is not None:
            candidate = dataclasses.replace(best, sequence=smaller, found=_still(smaller, best, host, guest))
            if candidate.kind == mismatch.kind:
                best = candidate
                continue
        index += 1
    return best


def _still(sequence: RandomSequence, was: Mismatch, host: Runner, guest: Runner) -> list[str]:
    if sequence.tainted_reader() is not None:
        return []
    try:
        batch = Batch(was.data, (sequence.case(was.address),))
    except ValueError:
        return []
    try:
        (theirs,), (ours,) = host.run(batch), guest.run(batch)
    except (OracleError, TinyError):  # a wild jump may go on for ever when what stood before it is gone
        return []
    return _compare(sequence, was.address, theirs, ours)
