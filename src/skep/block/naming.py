"""What the names of other files inside an image mean, and which of them may be opened."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from skep.block.format import ImageError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)")
REMOTE = ("nbd", "nbd+unix")
"""What may be before the ``:`` of a name that is no file's."""


def scheme_of(name: str) -> str | None:
    """``nbd`` of ``nbd://host``, ``json`` of ``json:{...}``; None: it is a file's name."""
    found = _SCHEME.match(name)
    return None if found is None or found[0] == "file" else found[0]


def backing_path(overlay: str, name: str) -> str:
    """The file that ``name`` in the image ``overlay`` means. Raises UserError for what is not a file's name."""
    name = name.removeprefix("file:")
    if scheme_of(name) is not None or not _is_path(name):
        raise ImageError(f"its backing file is not a file: {name[:100]!r}", overlay)
    if scheme_of(overlay) in REMOTE and not os.path.isabs(name):
        raise ImageError(f"it is on another machine, so {name[:100]!r} means nothing here", overlay)
    return os.path.join(os.path.dirname(overlay), name)


def _is_path(name: str) -> bool:
    """An image may say anything: what has zeros in it, or no bytes that stand for it, is no file's name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def place_of(overlay: str, name: str, inside: Sequence[str] | None) -> str:
    """What is to be opened for ``name`` in the image ``overlay``: a file's path, or where everything is allowed, the
    address of an NBD export or ``json:{...}``. Raises UserError."""
    if inside is None:
        return name if scheme_of(name) in (*REMOTE, "json") else backing_path(overlay, name)
    path = backing_path(overlay, name)
    real = os.path.realpath(path)
    for one in map(os.path.realpath, inside):
        if real == one or (os.path.isdir(one) and os.path.commonpath([real, one]) == one):
            return path
    raise ImageError(f"it needs {path}, which is not allowed to be opened", overlay, f"say backing={path}")
