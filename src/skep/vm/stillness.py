"""When to look whether a guest sleeps for good, where it is the host's kernel in which it sleeps.

An engine that has the local APICs does not return for a halt, so nobody tells of one that nothing will end. To look
costs each processor a return from guest code. So it is looked only after the threads of all of them have used no
processor time for a while, and more seldom as long as that leads to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

INTERVAL = 1.0
"""Seconds between two calls of :meth:`Stillness.is_time`."""
_LONGEST = 64
"""Intervals that a guest at rest is left alone, at most."""
_LOOK_NS = 10_000_000
"""A look costs the processors' threads less; who used more was at work."""


class Stillness:
    """Of one VM, from one power-on to the next."""

    def __init__(self) -> None:
        self._used = 0
        self._still = 0
        """Intervals without any use."""
        self._patience = 1
        """Intervals after which it is time."""

    def is_time(self, clocks: Sequence[int]) -> bool:
        """Whether to look now. ``clocks`` are those of the processors' threads, for :func:`time.clock_gettime_ns`."""
        used = sum(_read(clock) for clock in clocks)
        newly, self._used = used - self._used, used
        if newly > _LOOK_NS:
            self._patience = 1
        self._still = 0 if newly else self._still + 1
        if self._still < self._patience:
            return False
        self._still = 0
        self._patience = min(2 * self._patience, _LONGEST)
        return True


def _read(clock: int) -> int:
    try:
        return time.clock_gettime_ns(clock)
    except OSError:  # the thread is over
        return 0
