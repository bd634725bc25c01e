"""The disk library's rows: `skep image` beside `qemu-img`, on the same files.

Each row is one command of each, in turns, several rounds; the first round warms up and is not counted, and compares
what was made. The times are whole processes', so an interpreter's start is in them.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.console import BenchmarkError
from benchmarks.peers import skep_program

MIB = 1 << 20
_STEP = 3014 * 4096
"""From one request to the next: all over the disk, and no request is near the one before it."""
_DEPTH = 32
_COPIES = (
    ("raw", "qcow2", "raw.img"),
    ("qcow2", "raw", "disk.qcow2"),
    ("vmdk", "qcow2", "disk.vmdk"),
    ("raw", "qcow2", "root.img"),
)


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    words: tuple[str, ...]
    """Of `qemu-img`, and of `skep image` too."""
    peer_words: tuple[str, ...] = ()
    """Of the first alone."""
    makes: str | None = None
    """The file that the last word is, which has to be the same disk as the word before it."""
    wanted: float | None = None
    """How many times as fast as the peer Skep is to be."""


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    cpu: float
    """Seconds, in user mode and in the kernel."""
    rss: int
    """At its peak, KiB."""


def rows(count: int, direct: bool) -> list[Row]:
    found = []
    for source, kind, file in _COPIES:
        words: tuple[str, ...] = ("convert", "-f", source, "-O", kind, file, "new")
        what = ", of a system" if file == "root.img" else ""
        found.append(Row(f"convert {source} to {kind}{what}", words, makes=kind, wanted=1.0))
    for method in ("zlib", "zstd"):
        words = ("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={method}", "root.img", "new")
        found.append(Row(f"convert to compressed qcow2, {method}", words, makes="qcow2", wanted=0.8))
    load = ("-c", str(count), "-d", str(_DEPTH), "-s", "4k", "-S", str(_STEP))
    for cache, (kind, file), what, (engine, wanted) in itertools.product(
        ("writeback", "none") if direct else ("writeback",),
        (("raw", "raw.img"), ("qcow2", "full.qcow2")),
        ("read", "write"),
        (("threads", 1.0), ("io_uring", 0.5)),
    ):
        words = ("bench", "-q", "-f", kind, "-t", cache, *load, *(("-w",) if what == "write" else ()), file)
        found.append(Row(f"{what} 4 KiB, {kind}, -t {cache}, beside {engine}", words, ("-i", engine), wanted=wanted))
    found.append(Row("info of 1 TB", ("info", "large.qcow2")))
    return found


def run(
    directories: Sequence[Path],
    root: Path | None,
    size: int,
    count: int,
    rounds: int,
    chosen: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the rows whose names contain ``chosen``; the result is what is saved as JSON. ``root`` is the image of a
    system, for what compresses. Raises BenchmarkError where a command fails, or makes another disk than its peer."""
    if shutil.which("qemu-img") is None:
        raise BenchmarkError("there is no qemu-img")
    result = {}
    for directory in directories:
        with tempfile.TemporaryDirectory(prefix="skep-disks-", dir=directory) as made:
            place = Path(made)
            say(f"{directory}: making images")
            prepare(place, root, size)
            direct = _has_direct(place / "raw.img")
            measured: dict[str, Any] = {}
            for row in rows(count, direct):
                if chosen in row.name and ((place / "root.img").exists() or "root.img" not in row.words):
                    say(f"{directory}: {row.name}")
                    measured[row.name] = {"wanted": row.wanted, **measure(place, row, rounds)}
            result[str(directory)] = measured
    return result


def prepare(place: Path, root: Path | None, size: int) -> None:
    """The files that rows name: a disk of which a quarter are holes, in three formats, and others."""
    chance = random.Random(1)
    some = chance.randbytes(MIB)
    with (place / "raw.img").open("wb") as file:
        for number in range(size // MIB):
            if number % 4 != 3:
                file.seek(number * MIB)
                file.write(number.to_bytes(8, "little") + some[8:])
        file.truncate(size)
    for kind, name in (("qcow2", "disk.qcow2"), ("vmdk", "disk.vmdk")):
        _do(place, ["qemu-img", "convert", "-q", "-f", "raw", "-O", kind, "raw.img", name])
    _do(place, ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=full", "full.qcow2", str(size)])
    _do(place, ["qemu-img", "create", "-q", "-f", "qcow2", "large.qcow2", "1T"])
    if root is not None:
        _do(place, ["cp", "--sparse=always", str(root), "root.img"])


def measure(place: Path, row: Row, rounds: int) -> dict[str, Any]:
    samples: dict[str, list[Sample]] = {"qemu": [], "skep": []}
    programs = {"qemu": ["qemu-img"], "skep": [*skep_program(), "image"]}
    for number in range(rounds + 1):
        for who, program in programs.items():
            command, *rest = row.words
            (place / "new").unlink(missing_ok=True)
            sample = _do(place, [*program, command, *(row.peer_words if who == "qemu" else ()), *rest])
            if number:
                samples[who].append(sample)
            elif row.makes is not None and who == "skep":
                same = ["qemu-img", "compare", "-q", "-f", row.words[row.words.index("-f") + 1], "-F", row.makes]
                _do(place, [*same, *row.words[-2:]])
    return {who: [[one.seconds, one.cpu, one.rss] for one in those] for who, those in samples.items()}


def lines(result: dict[str, Any]) -> list[str]:
    """A table: how many times as fast as QEMU Skep is, by elapsed time and by CPU time, medians of one run."""
    found = []
    for directory, measured in result.items():
        found.append(f"{directory}: qemu-img's time / skep image's")
        found.append(f"  {'':52} {'elapsed':>8} {'CPU':>6} {'wanted':>7} {'MiB':>5}")
        for name, row in measured.items():
            ratios = [_median(row["qemu"], which) / _median(row["skep"], which) for which in (0, 1)]
            wanted = "" if row["wanted"] is None else f"{row['wanted']:.1f}"
            memory = max(one[2] for one in row["skep"]) / 1024
            found.append(f"  {name:52} {ratios[0]:8.2f} {ratios[1]:6.2f} {wanted:>7} {memory:5.0f}")
    return found


def _median(samples: list[list[float]], which: int) -> float:
    return max(statistics.median(one[which] for one in samples), 0.001)


def _do(place: Path, command: list[str]) -> Sample:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),  # the program starts in another directory
        "PYTHONPYCACHEPREFIX": str(place / "compiled"),  # an installed package is not compiled each time
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    begun = time.monotonic()
    child = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise BenchmarkError(f"{' '.join(command)}: status {child.returncode}")
    return Sample(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def _has_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
