"""Values of the options of creation, read. Their names and what they mean are each format's own."""

from __future__ import annotations

from collections.abc import Mapping

from skep.block.format import ImageError

_SUFFIXES = "kmgtpe"


def choice(path: str, options: Mapping[str, str], name: str, *values: str) -> str:
    """One of the values, the first where nothing is said. Raises ImageError."""
    value = options.get(name, values[0])
    if value not in values:
        raise ImageError(f"{name} is not {value!r}", path, f"it is one of {', '.join(values)}")
    return value


def switch(path: str, options: Mapping[str, str], name: str) -> bool:
    return choice(path, options, name, "off", "on", "false", "true", "no", "yes") in ("on", "true", "yes")


def byte_size(path: str, options: Mapping[str, str], name: str, default: int) -> int:
    """A number of bytes, with K, M, G, T, P or E behind it if wanted. Raises ImageError."""
    text = options.get(name)
    if text is None:
        return default
    digits, suffix = (text[:-1], text[-1].lower()) if text[-1:].lower() in (*_SUFFIXES, "b") else (text, "b")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
        raise ImageError(f"{name} is not a number of bytes: {text!r}", path)
    return int(digits) << 10 * (_SUFFIXES.find(suffix) + 1)


def number(path: str, options: Mapping[str, str], name: str, least: int, most: int) -> int | None:
    """None where nothing is said. Raises ImageError."""
    text = options.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise ImageError(f"{name} is not a number from {least} to {most}: {text!r}", path)
    return int(text)
