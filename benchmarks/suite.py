"""The rows, in turns: Skep, QEMU and the host do each row one after the other, and all rows several times over.

Both guests stay up for the whole run. The one whose turn it is not waits for a key at its console and is idle, so at
any time the host does one thing. A batch's first repetition, and the whole first round, warm up and are not counted:
memory that a host has not touched yet is slow, and code that a translator has not seen is translated.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.console import BenchmarkError
from benchmarks.guest import SuiteGuest
from benchmarks.machine import Guest, Host, Repetition
from benchmarks.peers import Payload, qemu_command, skep_command

CMDLINE = "console=ttyS0 quiet"
READY_TIMEOUT = 120.0
BATCH_TIMEOUT = 600.0
SETTLE_SECONDS, IDLE_SECONDS = 3.0, 10.0

Samples = dict[str, dict[str, list[Repetition]]]
"""By row, by machine."""


def run(
    kernel: Path, guest: SuiteGuest, rows: Sequence[str], rounds: int, repetitions: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure; the result is what is saved as JSON. Raises BenchmarkError where a machine fails, or miscomputes."""
    payload = Payload(kernel, guest.initrd, CMDLINE)
    guests = {"skep": Guest(skep_command(payload, ("-o", "cpu.model=host")))}
    if shutil.which("qemu-system-x86_64"):
        guests["qemu"] = Guest(qemu_command(payload))
    try:
        for one in guests.values():
            one.wait_ready(READY_TIMEOUT)
        with tempfile.TemporaryDirectory(prefix="skep-bench-") as directory:
            machines: dict[str, Guest | Host] = {"native": Host(guest.root, Path(directory)), **guests}
            batches(machines, rows, 1, "warming up: ", say)
            samples: Samples = {row: {name: [] for name in machines} for row in rows}
            for number in range(rounds):
                begin = f"round {number + 1} of {rounds}: "
                for row, done in batches(machines, rows, 1 + repetitions, begin, say).items():
                    for name, batch in done.items():
                        samples[row][name] += batch[1:]
            idle = _idle(guests)
    finally:
        for one in guests.values():
            one.close()
    return {
        "idle": idle,
        "clock": {name: one.clock() for name, one in guests.items()},
        "rows": {
            row: {name: [asdict(r) for r in batch] for name, batch in done.items()} for row, done in samples.items()
        },
    }


def batches(
    machines: dict[str, Guest | Host], rows: Sequence[str], count: int, begin: str, say: Callable[[str], None]
) -> dict[str, dict[str, list[Repetition]]]:
    """Each row once on each machine, in turns."""
    results: dict[str, dict[str, list[Repetition]]] = {}
    for row in rows:
        say(begin + row)
        done = results[row] = {name: machine.run(row, count, BATCH_TIMEOUT) for name, machine in machines.items()}
        checks = {r.check for batch in done.values() for r in batch}
        if len(checks) > 1:
            each = ", ".join(f"{name} {sorted({r.check for r in batch})}" for name, batch in done.items())
            raise BenchmarkError(f"{row}: the machines do not agree about the result: {each}")
    return results


def _idle(guests: dict[str, Guest]) -> dict[str, float]:
    """The part of a CPU that each waiting guest takes, when it has done what its kernel put off."""
    time.sleep(SETTLE_SECONDS)
    before = {name: guest.cpu() for name, guest in guests.items()}
    time.sleep(IDLE_SECONDS)
    return {name: (guest.cpu() - before[name]) / IDLE_SECONDS for name, guest in guests.items()}
