"""Where a vCPU's time goes, and the names that Linux perf asks for. What costs time at every exit, clocks and the rare
instructions' names, is kept only where asked for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from skep.engine.amd64.tsc import tsc_hz
from skep.errors import UserError


class Watch:
    """Where one vCPU's time goes, in nanoseconds, and which rare instructions it meets."""

    def __init__(self, slept: Callable[[], int]) -> None:
        """``slept``: ticks of the host's counter that the vCPU has slept in machine code after HLT."""
        self._slept = slept
        self._nanoseconds = 1e9 / tsc_hz()
        """In a tick."""
        self.python = 0
        """In ``run``, but for guest code; halts are not in it."""
        self.guest = 0
        """In guest code and what it calls in machine code, but for halts; a stay counts when it ends."""
        self._since = 0
        """When it came to Python."""
        self.rare: Counter[int] = Counter()
        """By mnemonic."""

    def entering(self, enter: Callable[[], Any]) -> Callable[[], None]:
        """``enter``, with a clock."""

        def timed() -> None:
            start, slept = perf_counter_ns(), self._slept()
            self.python += start - self._since
            enter()
            self._since = perf_counter_ns()
            halted = (self._slept() - slept) * self._nanoseconds
            self.guest += max(self._since - start - int(halted), 0)

        return timed

    def run(self, body: Callable[[], Any]) -> Any:
        self._since = perf_counter_ns()
        try:
            return body()
        finally:
            self.python += perf_counter_ns() - self._since


class PerfMap:
    """``/tmp/perf-PID.map``: perf-report(1) reads there what code that no file holds is called.

    A block is ``kernel:ADDRESS`` or ``user:ADDRESS``, by the guest's address at which it was first met. Lines are only
    ever added: where code was forgotten and its place used again, perf takes one of the names.
    """

    def __init__(self) -> None:
        self.path = f"/tmp/perf-{os.getpid()}.map"
        # No link, which anyone may put there; what a process of this number left goes.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise UserError(f"the map for perf cannot be written: {error.strerror}", self.path, "remove it") from None
        self._file = os.fdopen(fd, "w", buffering=1)

    def fixed(self, places: dict[str, int], end: int) -> None:
        """The stubs and routines, by host address."""
        ordered = sorted((address, name) for name, address in places.items())
        for (address, name), (following, _) in zip(ordered, [*ordered[1:], (end, "")], strict=True):
            self._file.write(f"{address:x} {following - address:x} skep:{name}\n")

    def block(self, address: int, size: int, user: bool, va: int) -> None:
        """A block's host code, and the guest's address."""
        self._file.write(f"{address:x} {size:x} {'user' if user else 'kernel'}:{va:x}\n")

    def close(self) -> None:
        self._file.close()
