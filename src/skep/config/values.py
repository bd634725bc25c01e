"""What the strings of the tree may mean. A parser raises ValueError with the rule that was broken."""

from __future__ import annotations

import re
from collections.abc import Callable

# Compiled when one is first used: few of them are.
_VM_NAME = r"(?a)[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"
_TRUE = frozenset({"true", "on", "yes", "1"})
_FALSE = frozenset({"false", "off", "no", "0"})
_NUMBER = r"(?ai)[0-9]{1,20}|0x[0-9a-f]{1,16}"
_SIZE = r"(?ai)([0-9]{1,20})([kmgt]?)(i?b)?"
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_UUID = r"(?ai)[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}"

MIB = 1 << 20


def text(value: str) -> str:
    """Any text but none."""
    if not value:
        raise ValueError("must not be empty")
    return value


def vm_name(value: str) -> str:
    """What a file may be called too, everywhere."""
    if not re.fullmatch(_VM_NAME, value):
        raise ValueError(f"{value!r} is not 1 to 64 of A-Z a-z 0-9 . _ + -, a letter or digit first")
    return value


def any_text(value: str) -> str:
    return value


def label(value: str) -> str:
    """What firmware tables have room for: 1 to 64 printable ASCII characters."""
    if not 1 <= len(value) <= 64 or not value.isascii() or not value.isprintable():
        raise ValueError(f"{value!r} is not 1 to 64 printable ASCII characters")
    return value


def boolean(value: str) -> bool:
    """As bhyve_config(5): true, on, yes, 1, and their opposites."""
    lower = value.lower()
    if lower in _TRUE:
        return True
    if lower in _FALSE:
        return False
    raise ValueError(f"{value!r} is neither true (on, yes, 1) nor false (off, no, 0)")


def integer(low: int, high: int) -> Callable[[str], int]:
    """A decimal number, or hexadecimal after 0x, in ``low`` to ``high`` inclusive."""

    def parse(value: str) -> int:
        if not re.fullmatch(_NUMBER, value):
            raise ValueError(f"{value!r} is not a number")
        number = int(value, 16 if value[:2].lower() == "0x" else 10)
        if not low <= number <= high:
            raise ValueError(f"{value} is not in {low} to {high}")
        return number

    return parse


def size(value: str) -> int:
    """Bytes from a number with K, M, G or T (powers of 1024), as everywhere in bhyve."""
    found = re.fullmatch(_SIZE, value)
    if not found:
        raise ValueError(f"{value!r} is not a size; write 512M or 4G")
    return int(found[1]) << _SHIFT[found[2].lower()]


def code_size(value: str) -> int:
    """What a block's jumps reach, and enough for the largest blocks."""
    number = size(value)
    if not 8 * MIB <= number <= 1024 * MIB:
        raise ValueError(f"{value} is not between 8M and 1G")
    return number


def memory_size(value: str) -> int:
    """A size; as in bhyve a bare number below 1048576 counts MiB, and any other counts bytes."""
    number = size(value)
    return number * MIB if value[-1:].isdecimal() and number < MIB else number


def choice(*names: str) -> Callable[[str], str]:
    """One of a few words."""

    def parse(value: str) -> str:
        if value not in names:
            raise ValueError(f"{value!r} is not one of {', '.join(names)}")
        return value

    return parse


def uuid(value: str) -> str:
    """RFC 9562's text form, in lower case."""
    if not re.fullmatch(_UUID, value):
        raise ValueError(f"{value!r} is not a UUID")
    return value.lower()
