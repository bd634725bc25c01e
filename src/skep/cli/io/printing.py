"""qemu-io's forms of numbers, times, sizes, and of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

_UNITS = ((60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB"))


class NotANumber(ValueError):
    """What was said instead of a number of bytes, as a line."""


def number(text: str) -> int:
    """Bytes: decimal, with a fraction and a unit if need be, or hexadecimal. Raises NotANumber."""
    from skep.block.qcow2.create import parse_size

    found = parse_size(text)
    if found is None:
        raise NotANumber(f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")
    if found >= 1 << 63:
        raise NotANumber(f"Parsing error: argument too large -- {text}")
    return found


def bytes_of(value: float) -> str:
    """Three digits behind the point, or none where they are zeros; bytes have six."""
    for shift, unit in _UNITS:
        if value >= 1 << shift:
            return f"{_plain(f'{value / (1 << shift):.3f}')} {unit}"
    return f"{_plain(f'{value:f}')} bytes"


def _plain(text: str) -> str:
    whole, _, fraction = text.partition(".")
    return text if fraction.strip("0") else whole


def duration(seconds: float, *, fixed: bool = False) -> str:
    """``SS.hh sec``, or ``H:MM:SS.hh`` from a minute on, or always."""
    hundredths = math.floor(seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    if not minutes and not fixed:
        return f"{rest // 100:02}.{rest % 100:02} sec"
    return f"{minutes // 60}:{minutes % 60:02}:{rest // 100:02}.{rest % 100:02}"


def report(what: str, offset: int, length: int, seconds: float, machine: bool) -> str:
    """What became of a request."""
    per_second = 1 / max(seconds, 1e-9)
    if machine:
        return f"{length},1,{duration(seconds, fixed=True)},{length * per_second:.3f},{per_second:.3f}"
    return (
        f"{what} {length}/{length} bytes at offset {offset}\n"
        f"{bytes_of(length)}, 1 ops; {duration(seconds)} ({bytes_of(length * per_second)}/sec and"
        f" {per_second:.4f} ops/sec)"
    )


def dump(data: memoryview, offset: int) -> Iterator[str]:
    """Sixteen bytes a line: where, in hexadecimal, and as characters."""
    for at in range(0, len(data), 16):
        line = bytes(data[at : at + 16])
        characters = "".join(chr(byte) if chr(byte).isalnum() and byte < 128 else "." for byte in line)
        yield f"{offset + at:08x}:  {line.hex(' ')}  {characters}"
