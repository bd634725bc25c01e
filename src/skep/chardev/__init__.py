"""What a guest's serial port is plugged into on the host."""

from __future__ import annotations

from collections.abc import Callable

from skep.chardev.console import Console
from skep.chardev.loop import Loop
from skep.chardev.null import Null
from skep.chardev.stdio import Stdio
from skep.contracts.chardev import CharBackend
from skep.errors import UserError

KINDS = ("stdio", "api", "none")
"""What ``lpc.com1.path`` may say: this process's standard input and output; ``vm.console``; nothing."""

__all__ = ["KINDS", "Console", "Loop", "Null", "Stdio", "open_backend"]


def open_backend(path: str, where: str, loop: Loop, stop: Callable[[], None]) -> CharBackend:
    """The backend that a tree's key ``where`` names. ``stop`` is what Ctrl-A x on a terminal calls."""
    if path == "stdio":
        return Stdio(loop, stop)
    if path == "api":
        return Console(loop)
    if path == "none":
        return Null()
    raise UserError(f"{path!r} is no console", where, f"known: {', '.join(KINDS)}")
