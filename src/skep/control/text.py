"""Results for people to read: the lines that `skep ctl` and the monitor print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_TABLES = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldtr", "gdtr", "idtr")


def lines(action: str, result: dict[str, Any]) -> Iterator[str]:
    """What ``action`` answered, an encoded result."""
    match action:
        case "status":
            yield from _status(result)
        case "registers":
            yield from _registers(result)
        case "exits":
            yield from _exits(result)
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
    """MSRs and vectors are left to those who read JSON."""
    from skep.explain.report import registers

    for processor in result["processors"]:
        yield f"processor {processor['cpu']}: {processor['doing']}"
        state = {name: _number(value) for name, value in processor["registers"].items()}
        for line in registers(state, _TABLES):
            yield f"  {line}"


def _exits(result: dict[str, Any]) -> Iterator[str]:
    for processor in result["processors"]:
        yield f"processor {processor['cpu']}: {processor['doing']}"
        for cause, count in sorted(processor["exits"].items(), key=lambda item: -item[1]):
            yield f"  {count:>15,}  {cause}"


def _number(value: Any) -> Any:
    """Of hexadecimal, also inside a segment register; what is none stays as it is."""
    if isinstance(value, dict):
        return {name: _number(part) for name, part in value.items()}
    return int(value, 16) if isinstance(value, str) and value.startswith("0x") else value


def _threads(result: dict[str, Any]) -> Iterator[str]:
    for thread in result["threads"]:
        words = [f"{thread['name']} ({thread['tid']}, {thread['state']})"]
        words += [f"holds {lock}" for lock in thread["holds"]]
        words += [f"waits for {lock}" for lock in thread["waits_for"]]
        yield ", ".join(words)
        for frame in thread["stack"]:
            yield f"  {frame['file']}:{frame['line']} {frame['function']}: {frame['text']}"
