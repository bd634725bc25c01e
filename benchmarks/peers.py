"""The command lines of Skep and of its peer, for one payload."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MEMORY_MIB = 512


@dataclass(frozen=True, slots=True)
class Payload:
    """What a guest is made of, the same for both."""

    kernel: Path
    initrd: Path
    cmdline: str
    engine: str = "translate"
    """Or "kvm", beside which QEMU runs with -accel kvm."""
    options: tuple[str, ...] = ()
    """Of Skep alone: KEY=VALUE."""


def skep_program() -> list[str]:
    """The installed command of this interpreter's environment, or the module."""
    script = Path(sys.executable).with_name("skep")
    return [str(script)] if script.exists() else [sys.executable, "-m", "skep.cli"]


def skep_command(payload: Payload, options: Sequence[str] = (), cpus: int = 1) -> list[str]:
    return [
        *skep_program(), "run", "--kernel", str(payload.kernel), "--initrd", str(payload.initrd),
        "--cmdline", payload.cmdline, "--memory", f"{MEMORY_MIB}M", "--cpus", str(cpus), "--engine", payload.engine,
        "--no-reboot", *(word for option in payload.options for word in ("-o", option)), *options,
    ]  # fmt: skip


def qemu_command(payload: Payload, cpus: int = 1) -> list[str]:
    accelerator = "kvm" if payload.engine == "kvm" else "tcg,thread=multi"
    return [
        "qemu-system-x86_64", "-M", "q35", "-nodefaults", "-accel", accelerator, "-cpu", "max",
        "-m", str(MEMORY_MIB), "-smp", str(cpus), "-nographic", "-serial", "stdio", "-no-reboot",
        "-kernel", str(payload.kernel), "-initrd", str(payload.initrd), "-append", payload.cmdline,
    ]  # fmt: skip
