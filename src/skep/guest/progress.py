"""What is being done, for a user who watches: nothing is said where standard error is no terminal."""

from __future__ import annotations

import shutil
import sys
from types import TracebackType


def say(text: str) -> None:
    """One line."""
    if sys.stderr.isatty():
        print(f"skep: {text} ...", file=sys.stderr, flush=True)


class Ticker:
    """Steps that follow each other quickly, on one line of the terminal, which is cleared at the end."""

    def __enter__(self) -> Ticker:
        return self

    def tell(self, text: str) -> None:
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{f'skep: {text}'[:width]}", end="", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
