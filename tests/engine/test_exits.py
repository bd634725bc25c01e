"""What is remembered of a vCPU's exits: the last different ones, and every MSR that was refused, within bounds."""

from __future__ import annotations

import random

from skep.engine.exits import KEPT, ExitRecord, Exits


def test_one_entry_for_each_different_thing_the_most_recent_last() -> None:
    exits = Exits()
    exits.note("in", 0x60, 1, 0x1C, 0x1000)
    for value in range(1000):
        exits.note("out", 0x3F8, 1, value & 0xFF, 0x2000)
        exits.note("in", 0x3FD, 1, 0x60, 0x2010)
    assert exits.last() == [
        ExitRecord("in", 0x60, 1, 1, 0x1C, 0x1000),
        ExitRecord("out", 0x3F8, 1000, 1, 231, 0x2000),
        ExitRecord("in", 0x3FD, 1000, 1, 0x60, 0x2010),
    ]


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    exits, choose = Exits(), random.Random(1)
    used: list[int] = []
    for _ in range(5000):
        port = choose.randrange(300)
        exits.note("out", port, 1, 0)
        used = [*(one for one in used if one != port), port]
    kept = [record.where for record in exits.last()]
    assert kept == used[-KEPT:]


def test_a_guest_that_scans_every_msr_does_not_fill_our_memory() -> None:
    exits = Exits()
    for index in range(10_000):
        exits.note("rdmsr", index)
        exits.note_refused("rdmsr", index)
    exits.note_refused("rdmsr", 7)
    assert len(exits.last()) == len(exits.refused()) == KEPT
    assert exits.refused()["rdmsr", 7] == 2
