"""Runs KVM-unit-tests, built elsewhere, under Skep's translator and under QEMU's TCG, or both on KVM, side by side.

    python3 -m tests.kvm_unit_tests --x86-64 DIR --i386 DIR [--engine kvm] [--only PATTERN] [--who skep,qemu]

DIR is a source tree of theirs after ``./configure --arch=x86_64 && make`` (or ``--arch=i386``). What is run, with how
many processors and with which words, is what their ``x86/unittests.cfg`` says; a processor that QEMU's TCG cannot have
(``-cpu host``) becomes its ``max``. A test ends by the test device's exit port, or breaks off. Of DIR, the files
``x86/unittests.cfg`` and ``x86/*.flat`` are enough.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ARCHITECTURES = ("x86_64", "i386")
PASSED, SKIPPED, FAILED, SILENT, BROKEN = "passed", "skipped", "failed", "timed out", "broke off"
_STATUS = {0 << 1 | 1: PASSED, 1 << 1 | 1: FAILED, 77: SKIPPED}
"""Of the process; 127 is theirs for an exception that nobody expected."""
_SPOKE = re.compile(r"^(enabling apic|PASS|FAIL|SKIP)", re.MULTILINE)
"""What their library or a test without it says; a status without that is the hypervisor's own."""
MEMORY = 256
PATIENCE = 3.0
"""Their time limits are for KVM, on a machine of one's own."""


@dataclass(frozen=True)
class Case:
    """A section of unittests.cfg, for one architecture."""

    name: str
    arch: str
    kernel: Path
    cpus: int
    words: str
    qemu: str
    """Its parameters for QEMU."""
    timeout: float
    needs: str
    """What only KVM could give it, or nothing."""


@dataclass(frozen=True)
class Result:
    case: str
    arch: str
    who: str
    verdict: str
    status: int | None
    seconds: float
    counts: str
    output: str


def cases(tree: Path, arch: str) -> Iterator[Case]:
    text = (tree / "x86" / "unittests.cfg").read_text()
    for section in re.split(r"^\[", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)[1:]:
        name, _, body = section.partition("]")
        keys = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", body, re.MULTILINE))
        if keys.get("arch", arch) != arch:
            continue
        words = keys.get("test_args", "").strip("'\"").replace("`date +%s`", str(int(time.time())))
        yield Case(
            name=name,
            arch=arch,
            kernel=tree / "x86" / keys["file"],
            cpus=int(keys.get("smp", "1")),
            words=words,
            qemu=keys.get("qemu_params", ""),
            timeout=float(keys.get("timeout", "90")),
            needs="KVM" if keys.get("accel") == "kvm" or "check" in keys else "",
        )


def _memory(case: Case) -> int:
    """In MiB."""
    found = re.search(r"-m (\d+)(g?)", case.qemu)
    return MEMORY if found is None else int(found[1]) << (10 if found[2] else 0)


def skep(case: Case, scratch: Path, model: str, engine: str) -> list[str]:
    """What a loader has to tell, the number of processors above all, stands in the environment: the module."""
    environment = scratch / "environment"
    environment.write_text(f"NR_CPUS={case.cpus}\nMEMLIMIT={_memory(case)}\nTEST_DEVICE=1\nBOOTLOADER=0\n")
    return [
        sys.executable, "-m", "skep.cli", "run", "--multiboot", str(case.kernel), "--initrd", str(environment),
        "--cmdline", case.words, "--cpus", str(case.cpus), "--memory", f"{_memory(case)}M", "--no-reboot",
        "--engine", engine, "-o", "lpc.pc-testdev=on", "-o", "control=off", "-o", f"cpu.model={model}",
    ]  # fmt: skip


def qemu(case: Case, program: str, engine: str) -> list[str]:
    of_kvm = "-enable-kvm" if engine == "kvm" else "-enable-kvm|,kernel-irqchip=split"
    words = shlex.split(re.sub(of_kvm, "", case.qemu))
    for i, word in enumerate(words):
        if engine != "kvm" and words[i - 1] == "-cpu" and word.startswith("host"):
            words[i] = "max"
    if "-cpu" not in words:
        words += ["-cpu", "max"]
    if "-m" not in words:
        words += ["-m", str(MEMORY)]
    return [
        program, "--no-reboot", "-nodefaults", "-device", "pc-testdev", "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4", "-display", "none", "-serial", "stdio", "-device", "pci-testdev",
        "-accel", "kvm" if engine == "kvm" else "tcg,thread=multi", "-kernel", str(case.kernel), "-smp",
        str(case.cpus), *words, *(["-append", case.words] if case.words else []),
    ]  # fmt: skip


def run(case: Case, who: str, command: list[str], limit: float) -> Result:
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=limit,
        )  # fmt: skip
        output, status, verdict = done.stdout, done.returncode, _STATUS.get(done.returncode, BROKEN)
    except subprocess.TimeoutExpired as expired:
        output, status, verdict = expired.stdout or b"", None, SILENT
    text = output.decode(errors="replace")
    if verdict in _STATUS.values() and not _SPOKE.search(text):
        verdict = BROKEN
    summary = re.findall(r"^SUMMARY: (.*?)\s*$", text, re.MULTILINE)
    return Result(
        case=case.name, arch=case.arch, who=who, verdict=verdict, status=status, seconds=time.monotonic() - began,
        counts=summary[-1] if summary else "", output=text[-4000:],
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.kvm_unit_tests", description=__doc__)
    for arch in ARCHITECTURES:
        parser.add_argument(f"--{arch.replace('_', '-')}", type=Path, metavar="DIR", help="a built tree")
    parser.add_argument("--only", default="*", metavar="PATTERNS", help="tests whose name matches one of them")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="how many times their limits are waited")
    parser.add_argument("--who", default="skep,qemu", help="which of the two")
    parser.add_argument("--engine", choices=("translate", "kvm"), default="translate", help="kvm: QEMU's too")
    parser.add_argument("--peer", default="qemu-system-x86_64", metavar="PROGRAM", help="the QEMU")
    parser.add_argument("--model", default="host", help="Skep's cpu.model")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all results, with their output, as JSON")
    options = parser.parse_args(arguments)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        for arch in ARCHITECTURES:
            tree = getattr(options, arch)
            for case in cases(tree, arch) if tree else ():
                if not any(fnmatch.fnmatch(case.name, pattern) for pattern in options.only.split(",")):
                    continue
                commands = {
                    "skep": skep(case, Path(scratch), options.model, options.engine),
                    "qemu": qemu(case, options.peer, options.engine),
                }
                row = [run(case, who, commands[who], case.timeout * options.patience) for who in options.who.split(",")]
                results += row
                words = [f"{it.who} {it.verdict} ({it.counts or 'no summary'}), {it.seconds:.0f} s" for it in row]
                print(f"{case.arch} {case.name}: {'; '.join(words)}", flush=True)
                if options.save:
                    options.save.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
