"""One boot of one machine, with a clock on its console."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CUT = 64 << 10
"""So many of the console's last bytes are kept for the message of a failure."""


_BOOTED = re.compile(rb"(?:^|\r|\x1b\S*)BOOT\r?$", re.MULTILINE)
"""A BIOS clears the screen, with no end of line; what it said before may be in the same one."""


class BenchmarkError(Exception):
    """A machine did not do what is measured."""


@dataclass(frozen=True, slots=True)
class Boot:
    """Times in seconds from the start of the process; memory in bytes."""

    boot: float
    """To the line BOOT, which the guest's /init prints first of all."""
    off: float
    """To the end of the process, after the guest powered off."""
    cpu: float
    """CPU time of the process."""
    resident: int | None
    """Peak of the resident memory that is not the guest's, where it was watched."""


def boot(
    command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None, watch: bool = False
) -> Boot:
    """Run ``command`` until its guest printed BOOT and powered off.

    ``watch`` looks at the process's memory several times a second, which slows it down: such a boot is not timed.
    """
    before = os.times()
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    assert process.stdout is not None
    seen = b""
    booted: float | None = None
    peak = 0
    try:
        while True:
            left = start + timeout - time.monotonic()
            if left <= 0:
                raise BenchmarkError(f"no end after {timeout:g} s: {' '.join(command)}\n{_tail(seen)}")
            ready, _, _ = select.select([process.stdout], [], [], min(left, 0.2) if watch else left)
            if watch:
                peak = max(peak, resident(process.pid))
            if not ready:
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            now = time.monotonic() - start
            if not data:
                break
            seen = (seen + data)[-CUT:]
            if booted is None and _BOOTED.search(seen):
                booted = now
        status = process.wait(10)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
    off = time.monotonic() - start
    if booted is None or status:
        what = f"status {status}" if booted is not None else f"status {status}, and BOOT was not seen"
        raise BenchmarkError(f"{what}: {' '.join(command)}\n{_tail(seen)}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Boot(booted, off, cpu, peak if watch else None)


def _tail(seen: bytes) -> str:
    return "\n".join(seen.decode(errors="replace").splitlines()[-15:])


def resident(pid: int) -> int:
    """Resident bytes of a process, less those of the guest's memory (proc(5), smaps); 0 when it is gone."""
    total = 0
    counted = True
    try:
        with Path(f"/proc/{pid}/smaps").open() as file:
            for line in file:
                if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                    counted = "memfd:skep-guest" not in line
                elif counted and line.startswith("Rss:"):
                    total += int(line.split()[1]) << 10
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return total
