"""Which virtual processor of this user's VMs runs on which CPU of the host, what it does there, and how often it leaves
guest code: two looks, some time apart, and what changed between them.

The VM tells what it does and counts; the kernel where its thread is and how it fares (proc(5), stat and schedstat).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from skep.control import directory
from skep.control.client import Client
from skep.errors import UserError

_PATIENCE = 2.0
"""Seconds for an answer, which takes no lock of the VM's."""
_STATE, _PROCESSOR = 3 - 3, 39 - 3
"""Fields of proc(5)'s stat, of which the third is the first behind the name."""


class Row(NamedTuple):
    """One virtual processor, now and since the look before."""

    vm: str
    cpu: int
    engine: str
    pid: int
    tid: int | None
    state: str
    """guest: it runs, in guest code or for it; blocked: so it would, but its thread sleeps; halted; frozen; waiting: to
    be started."""
    host_cpu: int | None
    """Where its thread runs, or ran last; None: it has none."""
    busy: float
    """Of a host CPU's time, what its thread took."""
    steal: float
    """Of the same, what it waited while others had the CPU."""
    exits: float
    """From guest code, a second."""
    causes: dict[str, float]
    """Of them; the most frequent first."""


class Top:
    """Looks again and again. ``errors`` has what those VMs said, or what was said of them, that did not answer the last
    one."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}
        self._before: dict[tuple[str, int, int], _Seen] = {}

    def look(self) -> list[Row]:
        """The busiest first. Rates are 0 for who was not seen before."""
        self.errors = {}
        rows, before, self._before = [], self._before, {}
        for name in directory.names():
            try:
                with Client(name, _PATIENCE) as client:
                    told = client.request("exits")
            except UserError as error:
                if name in directory.names():
                    self.errors[name] = error.what
                continue
            for one in told["processors"]:
                tid = one["tid"]
                thread = _Thread.of(told["pid"], tid)
                seen = _Seen(time.monotonic(), thread, one["exits"])
                key = name, one["cpu"], tid or 0
                self._before[key] = seen
                identity = name, one["cpu"], told["engine"], told["pid"], tid
                rows.append(Row(*identity, _state(one["doing"], thread), thread.cpu, *_rates(before.get(key), seen)))
        return sorted(rows, key=lambda row: (-row.busy, -row.exits, row.vm, row.cpu))


class _Thread(NamedTuple):
    """What the kernel tells of one."""

    state: str
    cpu: int | None
    ran: int
    """Nanoseconds."""
    waited: int
    """Nanoseconds, for a CPU."""

    @classmethod
    def of(cls, pid: int, tid: int | None) -> _Thread:
        try:
            home = Path(f"/proc/{pid}/task/{tid}")
            stat = (home / "stat").read_text().rpartition(")")[2].split()
            ran, waited, *_ = map(int, (home / "schedstat").read_text().split())
        except OSError:
            return cls("", None, 0, 0)  # there is none; or it has just ended
        return cls(stat[_STATE], int(stat[_PROCESSOR]), ran, waited)


class _Seen(NamedTuple):
    at: float
    """Seconds."""
    thread: _Thread
    exits: dict[str, int]


def _state(doing: str, thread: _Thread) -> str:
    if doing == "running":
        return "guest" if thread.state == "R" else "blocked"
    return "waiting" if doing == "waiting to be started" else doing


def _rates(before: _Seen | None, now: _Seen) -> tuple[float, float, float, dict[str, float]]:
    """(busy, steal, exits, causes) of a row."""
    if before is None or now.at <= before.at:
        return 0.0, 0.0, 0.0, {}
    seconds = now.at - before.at
    counted = {cause: count - before.exits.get(cause, 0) for cause, count in now.exits.items()}
    causes = {cause: count / seconds for cause, count in counted.items() if count > 0}  # a reset begins anew
    busy = min(max(now.thread.ran - before.thread.ran, 0) / 1e9 / seconds, 1.0)
    # Linux counts a wait when it is over, all of it: there may be more than fits.
    steal = min(max(now.thread.waited - before.thread.waited, 0) / 1e9 / seconds, 1.0 - busy)
    ordered = dict(sorted(causes.items(), key=lambda item: -item[1]))
    return busy, steal, sum(causes.values()), ordered
