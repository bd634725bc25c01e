"""The start of a VM: until a guest of some instructions has said its first byte, and until it is over; and what there
is of that without a VM."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import skep_program
from tests.tiny_kernel import printing, tiny_kernel


def run(rounds: int) -> dict[str, Any]:
    """By turns, after a round that warms up. Each has the seconds ``first`` (to the first byte of output), ``life`` and
    ``cpu``, as lists."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-") as scratch:
        kernel = Path(scratch, "kernel")
        kernel.write_bytes(tiny_kernel(printing(1)))
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(Path(scratch, "code"))}
        ways = {"python": [sys.executable, "-c", "print()"], "skep --version": [*skep_program(), "--version"]}
        for engine in ("kvm", "translate") if os.access("/dev/kvm", os.R_OK | os.W_OK) else ("translate",):
            ways[engine] = [*skep_program(), "run", "--kernel", str(kernel), "--engine", engine]
        measured: dict[str, Any] = {name: {"first": [], "life": [], "cpu": []} for name in ways}
        for number in range(rounds + 1):
            for name, command in ways.items():
                for what, seconds in _one(command, environment).items():
                    if number:
                        measured[name][what].append(seconds)
    return measured


def _one(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, float]:
    start = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    with process.stdout as output:
        output.read(1)
        first = time.monotonic() - start
        output.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"first": first, "life": time.monotonic() - start, "cpu": usage.ru_utime + usage.ru_stime}


def lines(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    yield "milliseconds: to the first byte, to the end, of CPU time"
    for name, each in measured.items():
        yield f"  {name:<16}" + "".join(f"{1000 * statistics.median(each[what]):8.1f}" for what in each)
