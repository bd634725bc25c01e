"""``python -m benchmarks``: boot the same kernel, initramfs and command line under Skep and under QEMU, in turns.

Two noisy machines are never compared by absolute times from two runs: the boots are interleaved, the medians of one run
are set against each other, and everything measured is saved as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.console import BenchmarkError, Boot, boot

CMDLINE = "console=ttyS0 skep.poweroff"
MEMORY_MIB = 512


@dataclass(frozen=True, slots=True)
class Payload:
    kernel: Path
    initrd: Path
    cmdline: str


def skep_program() -> list[str]:
    """The installed command of this interpreter's environment, or the module."""
    script = Path(sys.executable).with_name("skep")
    return [str(script)] if script.exists() else [sys.executable, "-m", "skep.cli"]


def skep_command(payload: Payload) -> list[str]:
    return [
        *skep_program(), "run", "--kernel", str(payload.kernel), "--initrd", str(payload.initrd),
        "--cmdline", payload.cmdline, "--memory", f"{MEMORY_MIB}M", "--cpus", "1", "--engine", "translate",
        "--no-reboot",
    ]  # fmt: skip


def qemu_command(payload: Payload) -> list[str]:
    return [
        "qemu-system-x86_64", "-M", "q35", "-nodefaults", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY_MIB),
        "-smp", "1", "-nographic", "-serial", "stdio", "-no-reboot",
        "-kernel", str(payload.kernel), "-initrd", str(payload.initrd), "-append", payload.cmdline,
    ]  # fmt: skip


def boot_skep(payload: Payload, timeout: float, *, watch: bool = False) -> Boot:
    """With nothing cached: the caches are in a directory of this boot's own."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-") as cache:
        return boot(skep_command(payload), timeout, {**os.environ, "XDG_CACHE_HOME": cache}, watch)


def version_times(count: int) -> list[float]:
    """Seconds that ``skep --version`` takes."""
    times = []
    for _ in range(count):
        start = time.monotonic()
        subprocess.run([*skep_program(), "--version"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.monotonic() - start)
    return times


def measure(payload: Payload, count: int, timeout: float, qemu: bool) -> dict[str, Any]:
    boots: dict[str, list[Boot]] = {"skep": []}
    if qemu:
        boots["qemu"] = []
    for i in range(count):
        for name, done in boots.items():
            one = boot(qemu_command(payload), timeout) if name == "qemu" else boot_skep(payload, timeout)
            print(f"  {name:<5} {i + 1}/{count}: BOOT after {one.boot:6.2f} s, off after {one.off:6.2f} s", flush=True)
            done.append(one)
    watched = boot_skep(payload, 2 * timeout, watch=True)
    return {
        "boots": {name: [asdict(b) for b in done] for name, done in boots.items()},
        "median": {name: statistics.median(b.boot for b in done) for name, done in boots.items()},
        "cpu": {name: statistics.median(b.cpu for b in done) for name, done in boots.items()},
        "resident": watched.resident,
        "version": version_times(5),
    }


def guest() -> tuple[Path, Path]:
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


def report(result: dict[str, Any]) -> None:
    median = result["median"]
    line = ", ".join(f"{name} {value:.2f} s" for name, value in median.items())
    print(f"boot to /init, medians: {line}")
    if "qemu" in median:
        print(f"skep / qemu: {median['skep'] / median['qemu']:.2f}")
    line = ", ".join(f"{name} {value:.2f} s" for name, value in result["cpu"].items())
    print(f"CPU time to the end, medians: {line}")
    print(f"resident memory that is not the guest's, peak: {result['resident'] / 2**20:.0f} MiB")
    print(f"skep --version: {1000 * statistics.median(result['version']):.0f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("-n", type=int, default=5, metavar="N", help="boots of each (default %(default)s)")
    parser.add_argument("--kernel", type=Path, help="a bzImage (default: what `skep guest debian` gives)")
    parser.add_argument("--initrd", type=Path, help="an initramfs whose /init prints BOOT and powers off")
    parser.add_argument("--cmdline", default=CMDLINE, help="kernel command line (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one boot (default %(default)g)")
    parser.add_argument("--no-qemu", action="store_true", help="measure Skep alone")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="where to (default %(default)s)")
    options = parser.parse_args()
    if options.n < 1:
        parser.error("-n must be at least 1")
    if not options.no_qemu and shutil.which("qemu-system-x86_64") is None:
        parser.error("qemu-system-x86_64 is not installed (Debian: qemu-system-x86); --no-qemu measures Skep alone")
    if (options.kernel is None) != (options.initrd is None):
        parser.error("--kernel and --initrd go together")
    kernel, initrd = (options.kernel, options.initrd) if options.kernel else guest()
    payload = Payload(kernel, initrd, options.cmdline)
    try:
        result = {"host": host(), **measure(payload, options.n, options.timeout, not options.no_qemu)}
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
