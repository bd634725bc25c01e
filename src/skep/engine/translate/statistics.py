"""What ``skep run --stats`` tells of the translator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from iced_x86 import Mnemonic

from skep.engine.translate.blocks import Cache
from skep.engine.translate.layout import Kind

if TYPE_CHECKING:
    from skep.engine.translate.vcpu import TranslateVcpu

EXITS = {
    Kind.JUMP: "no translation yet",
    Kind.PORT: "ports",
    Kind.MEM: "devices' memory, stores into code",
    Kind.EMULATE: "rare instructions",
    Kind.MSR: "model-specific registers",
    Kind.HALT: "HLT",
    Kind.BREAK: "asked for",
    Kind.EXCEPTION: "exceptions that Python delivers",
    Kind.FAULT: "faults of the host's CPU",
    Kind.SEGMENT: "accesses outside their segment",
    Kind.SPAN: "blocks on two pages",
    Kind.PAIR: "operands on two pages",
    Kind.PLAIN: "checks that cannot be shared",
    Kind.STOPPED: "single instructions that had to wait",
    Kind.DELIVER: "interrupts that Python delivers",
}
WITHOUT_EXIT = {
    "n_fill": "TLB misses",
    "n_miss": "jump-cache misses",
    "n_link": "jumps patched",
    "n_pf": "page faults",
    "n_irq": "interrupts",
    "n_tick": "of them the timer's, from machine code",
    "n_ipi": "interrupts to other vCPUs",
    "n_halt": "HLT",
    "n_iret": "IRET",
    "n_syscall": "SYSCALL",
    "n_cr3": "CR3 loads",
    "n_port": "reads of ports that were known",
    "n_span": "second pages of blocks looked up",
}
"""What machine code did by itself; the state block counts."""

_MNEMONICS = {value: name.lower() for name, value in vars(Mnemonic).items() if isinstance(value, int)}


def statistics(cache: Cache, vcpus: Iterable[TranslateVcpu]) -> dict[str, int | float]:
    """What the translator did since its VM was made, in the order in which it is to be read."""
    vcpus = list(vcpus)
    told: dict[str, int | float] = {
        "blocks translated": cache.made,
        "blocks taken from the code cache": cache.store.adopted,
        "blocks forgotten": cache.killed,
        "pieces of the code buffer used again": cache.again,
        "instructions translated": cache.instructions,
        "times that all vCPUs were stopped": cache.world.stops,
        "bytes of host code": cache.used,
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
        told["seconds in guest code"] = sum(watch.guest for watch in watches) / 1e9
        told["seconds in Python"] = sum(watch.python for watch in watches) / 1e9
    if cache.stalls:
        most = sorted(cache.stalls)[len(cache.stalls) * 99 // 100]
        told["milliseconds that making room took, 99 %"] = most / 1e6
    told["seconds translating"] = cache.translating / 1e9
    if cache.instructions:
        told["microseconds a translated instruction"] = cache.translating / 1e3 / cache.instructions
    return told
