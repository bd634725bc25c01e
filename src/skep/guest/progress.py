"""What is being done, for a user who watches: nothing is said where standard error is no terminal."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One line."""
    if sys.stderr.isatty():
        print(f"skep: {text} ...", file=sys.stderr, flush=True)
