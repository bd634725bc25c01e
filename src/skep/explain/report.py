"""An explanation as text, for a terminal: what is most telling first, at most 40 lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from skep.engine.amd64 import msrs
from skep.engine.exits import ExitRecord
from skep.explain.amd64 import EXCEPTIONS
from skep.explain.subject import Cause

if TYPE_CHECKING:
    from skep.explain.explanation import Explanation, Processor

MOST = 40
_WIDTH = 160
_LINE = 110
_FINDINGS = 4
_PROCESSORS = 4
_FRAMES = 8
_EXITS = 6
_SAID = 5

_ON_A_PC = (
    (0x80, 1, "POST codes, delays"), (0x1F0, 8, "IDE"), (0x170, 8, "IDE"), (0x3F6, 1, "IDE"),
    (0x278, 4, "parallel port"), (0x378, 4, "parallel port"), (0x3F8, 8, "COM1"), (0x2F8, 8, "COM2"),
    (0x3E8, 8, "COM3"), (0x2E8, 8, "COM4"), (0x3B0, 48, "VGA"), (0x1CE, 3, "VBE"), (0x402, 1, "debug console"),
    (0x510, 12, "fw_cfg"), (0x2E, 2, "super I/O"), (0x4E, 2, "super I/O"), (0xB2, 2, "SMI"), (0x3F0, 8, "floppy"),
    (0xCF8, 8, "PCI configuration"), (0, 16, "DMA"), (0x279, 1, "ISA PnP"), (0xA79, 1, "ISA PnP"),
    (0x60, 5, "keyboard"), (0x70, 2, "RTC"), (0x40, 4, "PIT"),
)  # fmt: skip
"""What guests look for at ports where there may be nobody here."""
_MSRS = {
    getattr(msrs, name): name
    for name in vars(msrs)
    if name.startswith(("IA32_", "AMD_", "KVM_")) and isinstance(getattr(msrs, name), int)
} | {msrs.EFER: "EFER", msrs.STAR: "STAR", msrs.LSTAR: "LSTAR", msrs.FS_BASE: "FS_BASE", msrs.GS_BASE: "GS_BASE"}
_CONTROL = ("rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer", "rsp")
_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{number}" for number in range(8, 16)))
_TABLES = ("cs", "ss", "ds", "tr", "gdtr", "idtr")
_WITH_TABLES = (Cause.TRIPLE_FAULT, Cause.ENGINE_FAILED)


def lines(explanation: Explanation) -> list[str]:
    """The report: its first line stands for itself, the others are indented."""
    told = [explanation.summary, *("  " + line for line in islice(_body(explanation), MOST - 1))]
    return [line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..." for line in told]


def _body(explanation: Explanation) -> Iterator[str]:
    for finding in explanation.findings[:_FINDINGS]:
        yield f"probably: {finding}"
    shown = next((one for one in explanation.processors if one.index == explanation.culprit and one.registers), None)
    if shown is not None:
        yield from _processor(explanation, shown)
    others = [one for one in explanation.processors if one is not shown]
    for one in others[:_PROCESSORS]:
        yield f"cpu{one.index} {_doing(one)}"
    if len(others) > _PROCESSORS:
        yield f"and {len(others) - _PROCESSORS} more processors"
    if explanation.unanswered:
        yield "no device answered: " + _counted(explanation.unanswered, _place)
    if explanation.symbols:
        yield explanation.symbols
    # What a console showed is before the user's eyes already, unless there is none.
    if explanation.log and not explanation.said:
        yield "the kernel's log ends:"
        yield from (f"  {line}" for line in explanation.log[-_SAID:])


def _doing(one: Processor) -> str:
    if not one.registers:
        return one.activity.value
    on = "on" if one.interrupts_on else "off"
    return f"{one.activity.value} at {one.at} ({one.mode}, interrupts {on})"


def _processor(explanation: Explanation, one: Processor) -> Iterator[str]:
    yield f"cpu{one.index} {_doing(one)}"
    if len(one.places) > 1:
        yield f"seen in {', '.join(one.places)}"
    for line in one.broken:
        yield f"cannot deliver exceptions: {line}"
    if one.code:
        yield f"code: {' | '.join(one.code)}"
    if one.stack:
        yield from _stack(one)
    yield from registers(one.registers, _TABLES if explanation.cause in _WITH_TABLES else ())
    told = one.exits[-_EXITS:]
    if told:
        yield "what it last asked for, the last one last:"
        for record in told:
            yield "  " + _exit(record, explanation)
    if one.refused:
        yield "MSRs it was refused: " + _counted(one.refused, lambda key: f"{key[0]} {_msr(key[1])}")


def _stack(one: Processor) -> Iterator[str]:
    names = [frame.name or f"{frame.address:#x}" for frame in one.stack[:_FRAMES]]
    if len(one.stack) > _FRAMES:
        names.append("...")
    line = "called from " if one.stack_is_sure else "called, as the stack looks, from "
    for at, name in enumerate(names):
        if len(line) + len(name) > _LINE:
            yield line
            line = "  "
        line += name if at == len(names) - 1 else f"{name}, "
    yield line


def registers(state: Mapping[str, Any], tables: Iterable[str]) -> Iterator[str]:
    """Four to a line, and ``tables``, segments and descriptor tables, one to a line."""
    plain = [f"{name}={state[name]:016x}" for name in (*_CONTROL, *_GENERAL) if name in state]
    for at in range(0, len(plain), 4):
        yield " ".join(plain[at : at + 4])
    for name in tables:
        if name in state:
            yield f"{name}: " + " ".join(f"{part}={value:x}" for part, value in state[name].items())


def _exit(record: ExitRecord, explanation: Explanation) -> str:
    times = f", {record.times} times" if record.times > 1 else ""
    rip = "" if record.rip is None else f", at {explanation.functions.get(record.rip, f'{record.rip:#x}')}"
    value = "" if record.value is None else f"{record.value:#x}"
    where = record.where
    match record.what:
        case "in" | "out" | "read" | "write":
            space = "port" if record.what in ("in", "out") else "mmio"
            owner = explanation.owners.get((space, where)) or _nobody(space, where)
            text = f"{record.what} {where:#x} ({owner}) {value}"
        case "fault":
            text = f"{EXCEPTIONS.get(where, f'exception {where}')}{f' {value}' if value else ''}"
        case "cpuid":
            text = f"cpuid {where:#x} {value}"
        case _:
            text = f"{record.what} {_msr(where)} {value}"
    return f"{text}{rip}{times}"


def _msr(index: int) -> str:
    name = "x2APIC" if msrs.X2APIC_FIRST <= index <= msrs.X2APIC_LAST else _MSRS.get(index)
    return f"{index:#x}" if name is None else f"{name} ({index:#x})"


def _nobody(space: str, where: int) -> str:
    usual = _usual(space, where)
    return f"nobody; on a PC {usual}" if usual else "nobody"


def _usual(space: str, where: int) -> str | None:
    if space == "port":
        return next((name for first, count, name in _ON_A_PC if first <= where < first + count), None)
    return None


def _place(key: tuple[str, int]) -> str:
    usual = _usual(*key)
    return f"{key[0]} {key[1]:#x}" + (f" ({usual})" if usual else "")


def _counted(counts: Mapping[tuple[str, int], int], name: Any) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name(key)} x{times}" for key, times in most[:_EXITS])
    return text + (f" and {len(most) - _EXITS} more" if len(most) > _EXITS else "")
