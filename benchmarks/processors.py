"""What a second processor is worth: a row by one process, and by two at once, in guests with two processors.

On a machine that others use as well the elapsed times tell how the host shared its CPUs out. What two processes cost
in CPU time beside twice what one costs is disturbed less, but knows nothing of waiting for each other.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.guest import SuiteGuest
from benchmarks.machine import Guest
from benchmarks.peers import Payload, qemu_command, skep_command
from benchmarks.suite import CMDLINE, READY_TIMEOUT

_TIMEOUT = 300.0
_LEAST = 1.0
"""Seconds that one process is to work for."""


def run(
    kernel: Path, guest: SuiteGuest, rows: Sequence[str], rounds: int, say: Callable[[str], None]
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By row and machine, for each round the seconds that one process and two took: ``one``, ``two``, and of the host's
    CPU time ``one_cpu``, ``two_cpu``."""
    payload = Payload(kernel, guest.initrd, CMDLINE)
    guests = {"skep": Guest(skep_command(payload, ("-o", "cpu.model=host"), cpus=2))}
    if shutil.which("qemu-system-x86_64"):
        guests["qemu"] = Guest(qemu_command(payload, cpus=2))
    try:
        for machine in guests.values():
            machine.wait_ready(READY_TIMEOUT)
        measured: dict[str, dict[str, list[dict[str, float]]]] = {row: {name: [] for name in guests} for row in rows}
        for row in rows:
            counts = {}
            for name, machine in guests.items():
                say(f"warming up: {row}, {name}")
                _timed(machine, row, 1, 2)
                counts[name] = max(1, round(_LEAST / _timed(machine, row, 1, 1)[0]))
            for number in range(rounds):
                say(f"round {number + 1} of {rounds}: {row}")
                for name, machine in guests.items():
                    one, one_cpu = _timed(machine, row, counts[name], 1)
                    two, two_cpu = _timed(machine, row, counts[name], 2)
                    measured[row][name].append({"one": one, "two": two, "one_cpu": one_cpu, "two_cpu": two_cpu})
    finally:
        for machine in guests.values():
            machine.close()
    return measured


def _timed(machine: Guest, row: str, count: int, copies: int) -> tuple[float, float]:
    cpu, start = machine.cpu(), time.monotonic()
    machine.run_copies(row, count, copies, _TIMEOUT)
    return time.monotonic() - start, machine.cpu() - cpu


def lines(measured: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> Iterator[str]:
    """The work of two processors beside that of one, as text: by elapsed time, and by CPU time."""
    yield "work of two processors beside that of one, median (by CPU time alone):"
    for row, machines in measured.items():
        text = f"  {row:<14}"
        for name, rounds in machines.items():
            elapsed = statistics.median(2 * each["one"] / each["two"] for each in rounds)
            cpu = statistics.median(4 * each["one_cpu"] / each["two_cpu"] for each in rounds)
            text += f"{name:>8} {elapsed:5.2f} ({cpu:.2f})"
        yield text
