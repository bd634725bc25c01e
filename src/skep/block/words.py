"""QEMU's option strings, `NAME=VALUE,...`: `-o`, `--object`, `--image-opts`."""

from __future__ import annotations


def words(text: str, implied: str | None = None) -> dict[str, str]:
    """By name; two commas stand for one in a value, and the later of two of a name counts. A first word without ``=``
    is the value of ``implied``; any other is a name that is
    ``on``."""
    found: dict[str, str] = {}
    for i, word in enumerate(text.replace(",,", "\0").split(",")):
        name, equals, value = word.replace("\0", ",").partition("=")
        if equals:
            found[name] = value
        elif i == 0 and implied is not None:
            found[implied] = name
        elif name:
            found[name] = "on"
    return found
