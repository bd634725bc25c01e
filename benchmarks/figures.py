"""From samples to figures: medians, p99, ratios capped and their geometric means; and the table that shows them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import CAP, ROWS

MACHINES = ("native", "skep", "qemu")


@dataclass(frozen=True, slots=True)
class Figure:
    """What the repetitions of one row on one machine come to, in seconds."""

    median: float
    p99: float


@dataclass(frozen=True, slots=True)
class Row:
    group: str
    name: str
    what: str
    times: Mapping[str, Figure]
    """By machine; one that could not do the row is absent."""

    @property
    def speed(self) -> float | None:
        """How many times as fast as QEMU Skep is, capped."""
        if "skep" not in self.times or "qemu" not in self.times:
            return None
        return min(CAP, self.times["qemu"].median / self.times["skep"].median)

    @property
    def cost(self) -> float | None:
        """How many times as long as natively Skep takes."""
        if "skep" not in self.times or "native" not in self.times:
            return None
        return self.times["skep"].median / self.times["native"].median


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least ``part`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def rows(samples: Mapping[str, Any], clock: str) -> list[Row]:
    """The suite's rows from its JSON; ``clock`` is ``elapsed`` or ``cpu``."""
    found = []
    for group, names in ROWS.items():
        for name, what in names.items():
            if name in samples:
                times = {}
                for machine, batch in samples[name].items():
                    values = [one[clock] for one in batch]
                    if values:
                        times[machine] = Figure(statistics.median(values), percentile(values, 0.99))
                found.append(Row(group, name, what, times))
    return found


def means(table: Sequence[Row]) -> dict[str, float]:
    """Geometric means of the speeds, by group and over all rows."""
    groups: dict[str, list[float]] = {}
    for row in table:
        if row.speed is not None:
            groups.setdefault(row.group, []).append(row.speed)
            groups.setdefault("all", []).append(row.speed)
    return {group: statistics.geometric_mean(speeds) for group, speeds in groups.items()}


def table_lines(table: Sequence[Row]) -> Iterator[str]:
    """The rows as text: median and p99 in milliseconds, and the two ratios."""
    yield f"{'ms: median (p99)':<14}" + "".join(f"{m:>20}" for m in MACHINES) + f"{'qemu/skep':>11}{'skep/native':>12}"
    average = means(table)
    for group in dict.fromkeys(row.group for row in table):
        yield f"{group}:"
        for row in table:
            if row.group == group:
                yield f"  {row.name:<14}" + "".join(_time(row.times.get(m)) for m in MACHINES) + (
                    _ratio(row.speed, 11) + _ratio(row.cost, 12)
                )
        if group in average:
            yield f"  {'geometric mean':<74}{average[group]:>11.2f}"
    if "all" in average:
        yield f"{'all rows, geometric mean':<76}{average['all']:>11.2f}"


def _time(figure: Figure | None) -> str:
    return f"{'-':>20}" if figure is None else f"{1000 * figure.median:>10.1f} ({1000 * figure.p99:.0f})".rjust(20)


def _ratio(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.2f}"


def boot_lines(boots: Mapping[str, Any]) -> Iterator[str]:
    """The boots as text: seconds to /init, and to what part of QEMU's time."""
    times = {name: [one["boot"] for one in done] for name, done in boots["boots"].items()}
    cpus = {name: [one["cpu"] for one in done] for name, done in boots["boots"].items()}
    peer = statistics.median(times["qemu"]) if "qemu" in times else None
    yield "boot to /init:"
    for name, values in times.items():
        median = statistics.median(values)
        part = f", {median / peer:.2f} of QEMU's" if peer and name != "qemu" else ""
        yield (
            f"  {name:<14}{median:6.2f} s (p99 {percentile(values, 0.99):.2f}){part};"
            f" CPU time to the end {statistics.median(cpus[name]):.2f} s"
        )
    yield f"resident memory that is not the guest's, peak: {boots['resident'] / 2**20:.0f} MiB"
