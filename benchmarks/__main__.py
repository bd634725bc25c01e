"""``python -m benchmarks``: the suite's rows and boots under Skep, under QEMU's TCG, and natively.

A noisy machine is never compared by absolute times from two runs: what is compared is interleaved, the medians of one
run are set against each other, and everything measured is saved as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import boots, disks, figures, guest, picture, processors, start, suite
from benchmarks.console import BenchmarkError
from benchmarks.peers import Payload, skep_program
from benchmarks.rows import NAMES

BOOT_CMDLINE = "console=ttyS0 skep.poweroff"


def debian_guest() -> tuple[Path, Path]:
    """Kernel and initramfs as ``skep guest debian`` has them."""
    done = subprocess.run([*skep_program(), "guest", "debian"], check=True, capture_output=True, text=True)
    paths = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return Path(paths["kernel"]), Path(paths["initrd"])


def host() -> dict[str, Any]:
    """What the figures belong to."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), "")
    qemu = shutil.which("qemu-system-x86_64")
    text = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout if qemu else ""
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": text.splitlines()[0] if text else None,
        "load": os.getloadavg()[0],
    }


def say(what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"host": host()}
    if options.starts:
        result["start"] = start.run(options.starts)
    if options.disks:
        size, root = options.disk_size << 20, options.disk_root
        count, rows = options.disk_requests, options.disk_rows
        result["disks"] = disks.run(options.disks, root, size, count, options.rounds, rows, say)
        return result
    kernel, initrd = debian_guest()
    if options.rows:
        result["suite"] = suite.run(kernel, guest.obtain(), options.rows, options.rounds, options.repetitions, say)
    if options.processors:
        result["processors"] = processors.run(kernel, guest.obtain(), options.processors, options.rounds, say)
    if options.boots:
        payload = Payload(kernel, initrd, options.boot_cmdline, options.boot_engine, tuple(options.boot_option))
        qemu = result["host"]["qemu"] is not None
        result["boot"] = boots.run(payload, options.boots, options.boot_timeout, qemu, say)
    return result


def report(result: dict[str, Any], clock: str) -> None:
    for line in disks.lines(result.get("disks", {})):
        print(line)
    if "suite" in result:
        measured = result["suite"]
        for line in figures.table_lines(figures.rows(measured["rows"], clock)):
            print(line)
        for name, share in measured["idle"].items():
            clock_ratio = measured["clock"][name]
            print(f"{name}: {100 * share:.1f} % of a CPU when idle; its clock goes at {clock_ratio:.3f} of the host's")
    if "processors" in result:
        for line in processors.lines(result["processors"]):
            print(line)
    if "boot" in result:
        for line in figures.boot_lines(result["boot"]):
            print(line)
    for line in start.lines(result["start"]) if "start" in result else ():
        print(line)


def row_names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"no row {name!r}; there are {', '.join(NAMES)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", type=row_names, default=list(NAMES), metavar="ROW,...", help="only these ('': none)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times over all rows (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="in a round (default %(default)s)")
    parser.add_argument(
        "--processors", type=row_names, default=[], metavar="ROW,...", help="these rows by two processes at once, too"
    )
    parser.add_argument(
        "--starts", type=int, default=5, metavar="N", help="of a VM that is over at once (default %(default)s; 0: none)"
    )
    parser.add_argument("--boots", type=int, default=9, metavar="N", help="of each (default %(default)s; 0: none)")
    parser.add_argument("--boot-cmdline", default=BOOT_CMDLINE, metavar="TEXT", help="default: %(default)s")
    parser.add_argument(
        "--boot-engine", choices=["translate", "kvm"], default="translate", help="kvm: QEMU with -accel kvm, too"
    )
    parser.add_argument(
        "--boot-option", action="append", default=[], metavar="KEY=VALUE", help="Skep's; may be given several times"
    )
    parser.add_argument("--boot-timeout", type=float, default=120, metavar="S", help="for one (default %(default)g)")
    parser.add_argument(
        "--disks", type=lambda text: [Path(name) for name in text.split(",")], default=[], metavar="DIRECTORY,...",
        help="instead of all that: the disk library beside qemu-img, on files in each of these directories",
    )  # fmt: skip
    parser.add_argument("--disk-root", type=Path, metavar="IMAGE", help="a system's raw image, to compress")
    parser.add_argument("--disk-size", type=int, default=1024, metavar="MIB", help="of the disks (default %(default)s)")
    parser.add_argument("--disk-rows", default="", metavar="TEXT", help="only rows with that in their names")
    parser.add_argument("--disk-requests", type=int, default=100_000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--clock", choices=["elapsed", "cpu"], default="elapsed",
        help="what the table shows: time, or CPU time on the host, which neighbours disturb less (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="where to (default %(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the rows as SVG, too")
    options = parser.parse_args()
    if options.rounds < 1 or options.repetitions < 1 or min(options.boots, options.starts) < 0:
        parser.error("--rounds and --repetitions must be at least 1, and --boots and --starts at least 0")
    try:
        result = measure(options)
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    report(result, options.clock)
    if options.picture and "suite" in result:
        options.picture.write_text(picture.draw(figures.rows(result["suite"]["rows"], options.clock)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
