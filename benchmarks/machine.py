"""One machine that does rows on request: a guest at its serial console, or the host itself."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.console import CUT, BenchmarkError

_LINE = re.compile(rb"BENCH (\S+) \d+ (\d+) (\d+) (\d+) ([0-9a-f]{16})")
_LACKING = 3
"""Status of ``bench`` where the CPU lacks what a row needs."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """One repetition of a row; times in seconds."""

    elapsed: float
    """By the clock of the machine that did it."""
    cpu: float
    """CPU time it took on the host: of the whole hypervisor, or of the program."""
    check: str
    """What the row's work came to."""


class Guest:
    """A hypervisor's process, up from the line READY to :meth:`close`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = command
        self._seen = b""
        self._last: deque[bytes] = deque(maxlen=15)
        self._clocks: list[tuple[float, float]] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        self._clock = (~self._process.pid << 3) | 2  # its CPU-time clock, as clock_getcpuclockid(3) makes it

    def wait_ready(self, timeout: float) -> None:
        """Until the guest reads commands."""
        deadline = time.monotonic() + timeout
        while not self._line(deadline).endswith(b"READY"):  # behind what the firmware left on the line
            pass

    def run(self, row: str, count: int, timeout: float) -> list[Repetition]:
        """Do a row ``count`` times; empty where this guest's CPU lacks what it needs."""
        deadline = time.monotonic() + timeout
        command = f"{row} {count}\n"
        done: list[Repetition] = []
        cpu = self._type(command)
        while True:
            line = self._line(deadline)
            if (found := _LINE.fullmatch(line)) and found[1].decode() == row:
                self._clocks.append((time.monotonic(), int(found[4]) / 1e9))
                done.append(Repetition(int(found[2]) / 1e9, self.cpu() - cpu, found[5].decode()))
                cpu = self._type("\n") if len(done) < count else cpu
            elif line.startswith(b"DONE "):
                status = int(line.split()[1])
                if status not in (0, _LACKING) or len(done) != (0 if status else count):
                    raise self._failed(f"{row} ended with status {status}")
                return done

    def run_copies(self, row: str, count: int, copies: int, timeout: float) -> None:
        """Do a row ``count`` times in each of several processes at once, which wait for nobody."""
        deadline = time.monotonic() + timeout
        self._type(f"{row} {count} {copies}\n")
        done = 0
        while not (line := self._line(deadline)).startswith(b"DONE "):
            done += len(_LINE.findall(line))
        if done != count * copies:
            raise self._failed(f"{row} was done {done} times, not {count * copies}")

    def clock(self) -> float:
        """How the guest's clock has gone beside the host's, over all that was run: 1 where they agree."""
        (host, guest), (host_end, guest_end) = self._clocks[0], self._clocks[-1]
        return (guest_end - guest) / (host_end - host)

    def _type(self, text: str) -> float:
        """Send to the guest's console; returns the CPU time used so far."""
        assert self._process.stdin is not None
        cpu = self.cpu()
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()
        return cpu

    def cpu(self) -> float:
        """Seconds of CPU time that the process has used."""
        return time.clock_gettime(self._clock)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _line(self, deadline: float) -> bytes:
        """The console's next line."""
        assert self._process.stdout is not None
        while b"\n" not in self._seen:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._process.stdout], [], [], left)[0]
            if not ready:
                raise self._failed("nothing more came from the guest in time")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise self._failed("the machine ended")
            self._seen = (self._seen + data)[-CUT:]
        line, self._seen = self._seen.split(b"\n", 1)
        self._last.append(line.strip())
        return self._last[-1]

    def _failed(self, what: str) -> BenchmarkError:
        said = b"\n".join([*self._last, self._seen]).decode(errors="replace")
        return BenchmarkError(f"{what}: {' '.join(self._command)}\n{said}")


class Host:
    """The same programs, run natively: the limit."""

    def __init__(self, root: Path, directory: Path) -> None:
        self._program = root / "bench" / "bench"
        self._environment = {**os.environ, "BENCH_ROOT": str(root)}
        self._directory = directory

    def run(self, row: str, count: int, timeout: float) -> list[Repetition]:
        """As :meth:`Guest.run`."""
        done = subprocess.run(
            [self._program, row, str(count)],
            check=False,
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
        )
        if done.returncode not in (0, _LACKING):
            raise BenchmarkError(f"{row}, natively: status {done.returncode}: {done.stderr.decode(errors='replace')}")
        found = (_LINE.fullmatch(line) for line in done.stdout.splitlines())
        return [Repetition(int(m[2]) / 1e9, int(m[3]) / 1e9, m[5].decode()) for m in found if m]
