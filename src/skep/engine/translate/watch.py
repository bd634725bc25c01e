"""What ``skep run --stats`` tells of the translator, and the names that Linux perf asks for.

Counters are always kept; what costs time at every exit, clocks and the rare instructions' names, only where asked for.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from iced_x86 import Mnemonic

from skep.engine.translate.layout import Kind, Mode
from skep.errors import UserError

if TYPE_CHECKING:
    from skep.engine.translate.blocks import Block, Cache
    from skep.engine.translate.vcpu import TranslateVcpu

EXITS = {
    Kind.JUMP: "no translation yet",
    Kind.PORT: "ports",
    Kind.MEM: "devices' memory, stores into code",
    Kind.EMULATE: "rare instructions",
    Kind.BREAK: "asked for",
    Kind.EXCEPTION: "exceptions that Python delivers",
    Kind.FAULT: "faults of the host's CPU",
    Kind.SEGMENT: "accesses outside their segment",
    Kind.SPAN: "blocks on two pages",
    Kind.PAIR: "operands on two pages",
    Kind.STOPPED: "another vCPU's work on translations",
    Kind.DELIVER: "interrupts that Python delivers",
}
WITHOUT_EXIT = {
    "n_fill": "TLB misses",
    "n_miss": "jump-cache misses",
    "n_link": "jumps patched",
    "n_pf": "page faults",
    "n_irq": "interrupts",
    "n_iret": "IRET",
    "n_syscall": "SYSCALL",
    "n_cr3": "CR3 loads",
    "n_span": "second pages of blocks looked up",
}
"""What machine code did by itself; the state block counts."""

_MNEMONICS = {value: name.lower() for name, value in vars(Mnemonic).items() if isinstance(value, int)}


class Watch:
    """Where one vCPU's time goes, in nanoseconds, and which rare instructions it meets."""

    def __init__(self) -> None:
        self.running = 0
        """In ``run``: all but halts."""
        self.guest = 0
        """Of that, in guest code and what it calls in machine code."""
        self.rare: Counter[int] = Counter()
        """By mnemonic."""

    def entering(self, enter: Callable[[], Any]) -> Callable[[], None]:
        """``enter``, with a clock."""

        def timed() -> None:
            start = perf_counter_ns()
            enter()
            self.guest += perf_counter_ns() - start

        return timed

    def run(self, body: Callable[[], Any]) -> Any:
        start = perf_counter_ns()
        try:
            return body()
        finally:
            self.running += perf_counter_ns() - start


def statistics(cache: Cache, vcpus: Iterable[TranslateVcpu]) -> dict[str, int | float]:
    """What the translator did since its VM was made, in the order in which it is to be read."""
    vcpus = list(vcpus)
    told: dict[str, int | float] = {
        "blocks translated": cache.made,
        "blocks forgotten one by one": cache.killed,
        "times that all were forgotten": cache.generation,
        "instructions translated": cache.instructions,
        "bytes of host code": cache.pos - cache.first,
    }
    for kind, name in EXITS.items():
        told[f"exits: {name}"] = sum(vcpu.counts[kind] for vcpu in vcpus)
    for field, name in WITHOUT_EXIT.items():
        told[f"without an exit: {name}"] = sum(getattr(vcpu.st, field) for vcpu in vcpus)
    watches = [vcpu.watch for vcpu in vcpus if vcpu.watch is not None]
    rare: Counter[int] = Counter()
    for watch in watches:
        rare.update(watch.rare)
    for mnemonic, count in rare.most_common():
        told[f"rare instruction: {_MNEMONICS[mnemonic]}"] = count
    if watches:
        running, guest = (sum(getattr(watch, name) for watch in watches) for name in ("running", "guest"))
        told["seconds in guest code"] = guest / 1e9
        told["seconds in Python"] = (running - guest) / 1e9
    told["seconds translating"] = cache.translating / 1e9
    if cache.instructions:
        told["microseconds a translated instruction"] = cache.translating / 1e3 / cache.instructions
    return told


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

    def block(self, block: Block, rx: int, va: int) -> None:
        level = "user" if block.mode & Mode.USER else "kernel"
        self._file.write(f"{rx + block.start:x} {block.end - block.start:x} {level}:{va:x}\n")

    def close(self) -> None:
        self._file.close()
