"""What a guest's own words say is wrong, and what to do about it here.

A table of patterns over the end of the consoles' output and the kernel's log. Each knows what the machine has, so that
"cannot open root device" becomes "the machine has no disk".
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from skep.config import Tree
from skep.explain.subject import PANIC

_A_DISK = re.compile(r"^(?:\[.*\] )?[0-9a-f]{4} +\d+ vd[a-z]|\[vd[a-z]\] \d+ .*blocks|\bvd[a-z]: vd[a-z]", re.MULTILINE)
"""The kernel's words for a virtio disk that it has found."""


class Finding(NamedTuple):
    """One thing that is probably wrong: ``what`` it is, and ``todo``, the way out where one is known."""

    what: str
    todo: str | None = None

    def __str__(self) -> str:
        return self.what if self.todo is None else f"{self.what}; {self.todo}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What of the machine's configuration a guest may miss."""

    cmdline: str
    initrd: bool
    disks: int
    connected: frozenset[str]
    """Linux's names of the consoles that lead somewhere: ttyS0, hvc0."""
    memory: int
    """In bytes."""

    @classmethod
    def of(cls, tree: Tree, memory: int) -> Machine:
        """From a frozen configuration."""
        kinds = [tree[key] for key in tree if key.startswith("pci.") and key.endswith(".device")]
        ports = {f"ttyS{number - 1}": tree.get(f"lpc.com{number}.path") for number in range(1, 5)}
        connected = {name for name, path in ports.items() if path not in (None, "", "none")}
        if "virtio-console" in kinds:
            connected.add("hvc0")
        return cls(
            cmdline=tree.get("boot.cmdline") or "",
            initrd=bool(tree.get("boot.initrd")),
            disks=kinds.count("virtio-blk"),
            connected=frozenset(connected),
            memory=memory,
        )

    def parameters(self, name: str) -> list[str]:
        """The values of a kernel parameter, in the order in which they stand."""
        return [word.partition("=")[2] for word in self.cmdline.split() if word.startswith(f"{name}=")]


_Say = Callable[[re.Match[str], Machine, str], Finding]


def find(machine: Machine, said: str, log: str) -> Iterator[Finding]:
    """What ``said``, the end of the consoles' output, and ``log``, the kernel's, tell; the most telling first."""
    seen: set[Finding] = set()
    if not said.strip():
        yield from _consoles(machine)
    for pattern, say in _PATTERNS:
        for text in (said, log):
            found = pattern.search(text)
            finding = None if found is None else say(found, machine, text)
            if finding is not None and finding not in seen:
                seen.add(finding)
                yield finding


def panic(text: str) -> str | None:
    """What the kernel panicked of, the last time; None where it did not."""
    found = re.findall(rf"{PANIC}([^\r\n]*)", text)
    return found[-1].removesuffix("]---").strip() if found else None


def panicked_cpu(text: str) -> int | None:
    """Which processor said so."""
    found = re.search(rf"{PANIC}.*?CPU: (\d{{1,4}}) PID: ", text, re.DOTALL)
    return int(found[1]) if found else None


def _consoles(machine: Machine) -> Iterator[Finding]:
    """The kernel said nothing: where was it to say it?"""
    named = list(dict.fromkeys(value.split(",")[0] for value in machine.parameters("console")))
    here = ", ".join(sorted(machine.connected))
    if not machine.connected:
        yield Finding("no console of the machine leads anywhere", "use --console stdio, or a port of your choice")
    elif not named:
        yield Finding("the kernel was told of no console", f"add console={here} to --cmdline")
    elif not machine.connected & set(named):
        wanted = " and ".join(named)
        yield Finding(f"the kernel was told to talk on {wanted}, which is connected to nothing", f"use console={here}")


# Root file systems


def _root(name: str, machine: Machine, text: str) -> Finding:
    """The kernel or its initramfs did not find the file system ``name``."""
    named = machine.parameters("root")
    wanted = named[-1] if named else name
    if wanted in ("", "(null)"):
        if machine.initrd:
            return Finding("no root file system was named", "add root=/dev/vda, or what it is, to --cmdline")
        return Finding(
            "there is no initramfs, and no root file system was named",
            "give --initrd FILE, or --disk IMAGE and root=/dev/vda in --cmdline",
        )
    if not machine.disks:
        return Finding(f"the root device {wanted} was not found: the machine has no disk", "add --disk IMAGE")
    if _A_DISK.search(text):
        return Finding(f"the root device {wanted} was not found, though the kernel found a disk", "see what it holds")
    if not machine.initrd:
        return Finding(
            f"the root device {wanted} was not found: this kernel has no driver for virtio disks built in",
            "give the initramfs that loads it, with --initrd",
        )
    return Finding(
        f"the root device {wanted} was not found: nobody has loaded the driver of virtio disks",
        "see that the initramfs has virtio_pci and virtio_blk",
    )


def _root_named(found: re.Match[str], machine: Machine, text: str) -> Finding:
    return _root(found[1], machine, text)


def _root_not_named(found: re.Match[str], machine: Machine, text: str) -> Finding:
    return _root("", machine, text)


def _device(found: re.Match[str], machine: Machine, text: str) -> Finding:
    if machine.disks:
        return Finding(f"the guest waited for {found[1]}, which did not come")
    return Finding(f"the guest waited for {found[1]}: the machine has no disk", "add --disk IMAGE")


# Programs


def _exit_code(found: re.Match[str], machine: Machine, text: str) -> Finding:
    """Linux's wait status of process 1 (wait(2))."""
    code = int(found[1], 16)
    started = re.findall(r"Run (\S+) as init process", text)
    init = f", {started[-1]}," if started else ""
    number = code & 0x7F
    if not number:
        how = f"ended with status {code >> 8 & 0xFF}"
    elif number in {one.value for one in signal.Signals}:
        how = f"was killed by {signal.Signals(number).name}"
    else:
        how = f"was killed by signal {number}"
    return Finding(f"the guest's first program{init} {how}; it must never end")


def _not_run(found: re.Match[str], machine: Machine, text: str) -> Finding:
    number = int(found[2])
    why = os.strerror(number).lower() if number in errno.errorcode else f"error {number}"
    todo = {
        errno.ENOEXEC: "it is no program for this kernel, or its first line is not #!/bin/sh",
        errno.ENOENT: "it, its interpreter or its dynamic loader is not there",
        errno.EACCES: "its mode does not let it run",
    }
    return Finding(f"the kernel could not run {found[1]}: {why}", todo.get(number))


def _no_memory(found: re.Match[str], machine: Machine, text: str) -> Finding:
    return Finding(f"the guest's memory, {machine.memory >> 20} MiB, is too small", "give more with --memory")


def _say(what: str, todo: str | None = None) -> _Say:
    """A finding that is the same for all machines; ``\\1`` is the pattern's first group."""
    return lambda found, machine, text: Finding(found.expand(what), todo)


def _table(*rows: tuple[str, _Say]) -> tuple[tuple[re.Pattern[str], _Say], ...]:
    return tuple((re.compile(pattern, re.MULTILINE), say) for pattern, say in rows)


_PATTERNS = _table(
    (
        r"Initramfs unpacking failed: ([^\r\n]+)",
        _say(r"the initramfs could not be unpacked: \1", "see that it is whole and the kernel knows its compression"),
    ),
    (r'VFS: Cannot open root device "([^"]*)"', _root_named),
    (r"VFS: Unable to mount root fs on unknown-block\(0,0\)", _root_not_named),
    (
        r"No filesystem could mount root, tried: ([^\r\n]*)",
        _say(r"the root device holds no file system that the kernel knows; it tried: \1"),
    ),
    (r"Waiting for root device ([^\s.]+)", _root_named),
    (r"ALERT! +(\S+) does not exist", _root_named),
    (r"Gave up waiting for (?:root|suspend/resume)(?: file system)? device", _root_not_named),
    (r"Timed out waiting for device (\S+?)\.?\s*$", _device),
    (r"A start job is running for (/dev/\S+)", _device),
    (r"[Ww]arning: (/dev/\S+) does not exist", _device),
    (r"[Ww]aiting for (/dev/\S+?)(?: to appear)?(?:\.\.\.|\s*$)", _device),
    (r"(?:Requested init|Starting init:) (\S+) (?:failed|exists but couldn't execute it) \(error -(\d+)\)", _not_run),
    (r"Failed to execute (\S+) \(error -(\d+)\)", _not_run),
    (
        r"No working init found",
        _say("the root file system has no /sbin/init, /etc/init, /bin/init or /bin/sh", "or name a program with init="),
    ),
    (r"Attempted to kill init! exitcode=0x([0-9a-f]+)", _exit_code),
    (r"System is deadlocked on memory|Out of memory and no killable processes|Out of memory: Killed", _no_memory),
    (
        r"unable to open an initial console",
        _say("the initramfs has no /dev/console, so its programs' output is lost"),
    ),
    (r"You are in (emergency|rescue) mode", _say(r"systemd went into \1 mode", "journalctl -xb in the guest says why")),
    (
        r"(BUG: (?:unable to handle|kernel NULL|Bad page)[^\r\n]*|general protection fault[^\r\n]*|Oops: [^\r\n]*)",
        _say(r"the kernel had an error before: \1"),
    ),
    (r"hard LOCKUP|soft lockup - CPU#\d+", _say("the kernel says that a processor makes no progress")),
)
