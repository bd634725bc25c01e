"""What all commands' parsers have in common."""

from __future__ import annotations

import argparse
import os
from typing import Any, NoReturn

from skep.errors import UserError


class _Formatter(argparse.HelpFormatter):
    """Made for each option, and asks the terminal's width itself: by shutil, that takes longer than all options do."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


class Parser(argparse.ArgumentParser):
    """A mistake is one line, like every other mistake of the user."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=_Formatter, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, None, f"see `{self.prog} --help`")
