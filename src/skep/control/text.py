"""Results for people to read: the lines that `skep ctl` and the monitor print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16)))
_CONTROL = ("rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer")
_TABLES = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldtr", "gdtr", "idtr")


def lines(action: str, result: dict[str, Any]) -> Iterator[str]:
    """What ``action`` answered, an encoded result."""
    match action:
        case "status":
            yield from _status(result)
        case "registers":
            yield from _registers(result)
        case "threads":
            yield from _threads(result)
        case "explain":
            yield from result["report"]
        case "dump":
            yield f"{result['file']}: {result['bytes'] >> 20} MiB"
        case _:
            yield result["state"]


def size(count: int) -> str:
    """Bytes, for people."""
    for shift, letter in ((30, "G"), (20, "M"), (10, "K")):
        if count >= 1 << shift and count % (1 << shift) == 0:
            return f"{count >> shift}{letter}"
    return str(count)


def _status(status: dict[str, Any]) -> Iterator[str]:
    yield f"{status['name']}: {status['end'] or status['state']}, process {status['pid']}"
    yield f"engine {status['engine']}, memory {size(status['memory'])}, guest time {status['guest_seconds']:.3f} s"
    for number, doing in enumerate(status["processors"]):
        yield f"processor {number}: {doing}"
    for port in status["ports"]:
        words = [port["where"]]
        if not port["present"] and port["where"] != "none":
            words.append("nobody there")
        for what in ("waiting", "dropped"):
            if port[what]:
                words.append(f"{port[what]} bytes {what}")
        yield f"{port['name']}: {', '.join(words)}"
    yield from status["complaints"]


def _registers(result: dict[str, Any]) -> Iterator[str]:
    for processor in result["processors"]:
        yield f"processor {processor['cpu']}: {processor['doing']}"
        for line in register_lines(processor["registers"]):
            yield f"  {line}"


def register_lines(registers: dict[str, Any]) -> Iterator[str]:
    """Four to a line; MSRs and vectors are left to those who read JSON."""
    plain = [f"{name}={int(registers[name], 16):016x}" for name in (*_CONTROL, *_GENERAL) if name in registers]
    for at in range(0, len(plain), 4):
        yield " ".join(plain[at : at + 4])
    for name in _TABLES:
        if name in registers:
            yield f"{name}: " + " ".join(f"{part}={value[2:]}" for part, value in registers[name].items())


def _threads(result: dict[str, Any]) -> Iterator[str]:
    for thread in result["threads"]:
        words = [f"{thread['name']} ({thread['tid']}, {thread['state']})"]
        words += [f"holds {lock}" for lock in thread["holds"]]
        words += [f"waits for {lock}" for lock in thread["waits_for"]]
        yield ", ".join(words)
        for frame in thread["stack"]:
            yield f"  {frame['file']}:{frame['line']} {frame['function']}: {frame['text']}"
