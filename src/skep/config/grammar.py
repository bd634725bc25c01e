"""bhyve's grammar for the options of one device: ``first,flag,name=value``."""

from __future__ import annotations

from skep.errors import UserError


def parse_options(text: str, where: str, first: str | None = None) -> dict[str, str]:
    """The options of one command-line argument, in their order.

    A word alone is a flag and means ``word=true``. With ``first``, the text up to the first comma is that option's
    value, whatever it looks like. The grammar has no way to write a comma; a tree has (-o).
    """
    words = text.split(",")
    found: dict[str, str] = {}
    if first is not None:
        value = words.pop(0)
        if not value:
            raise UserError(f"{first} is missing", where)
        found[first] = value
    for word in words:
        name, equals, value = word.partition("=")
        if not name:
            raise UserError(f"an option without a name in {text!r}", where)
        if name in found:
            raise UserError(f"{name} is given twice in {text!r}", where)
        found[name] = value if equals else "true"
    return found
