"""``skep top``: a line for each virtual processor of the VMs that run."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence

from skep.control.top import Row, Top
from skep.errors import UserError

_CAUSES = 3
"""So many are named; JSON has all."""
_CLEAR = "\x1b[H\x1b[J"
_HEADS = ("VM", "VCPU", "STATE", "HOST CPU", "BUSY", "STEAL", "EXITS/S", "FOR")


def top(times: int | None, interval: float, cpu: int | None, as_json: bool) -> int:
    """Print what is to be seen every ``interval`` seconds, ``times`` times; None: until Ctrl-C on a terminal, once
    elsewhere. ``cpu``: only what runs on that CPU of the host."""
    if not interval > 0:
        raise UserError(f"{interval:g} seconds are no time", "--delay", "give a number above 0")
    screen = sys.stdout.isatty() and not as_json
    left = times if times is not None or screen else 1
    looks = Top()
    looks.look()
    try:
        while left is None or left > 0:
            time.sleep(interval)
            rows = looks.look()
            if cpu is not None:
                rows = [row for row in rows if row.host_cpu == cpu and row.state == "guest"]
            if as_json:
                print(json.dumps([row._asdict() for row in rows], indent=2))
            else:
                _show([*_table(rows), *(f"{name}: {said}" for name, said in looks.errors.items())], screen)
            left = None if left is None else left - 1
    except KeyboardInterrupt:
        if not screen:
            raise
    return 0


def _show(lines: Sequence[str], screen: bool) -> None:
    if screen:
        columns, height = shutil.get_terminal_size()
        lines = [line[:columns] for line in lines[: height - 1]]
        sys.stdout.write(_CLEAR)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [_HEADS, *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cells(row: Row) -> tuple[str, ...]:
    causes = ", ".join(f"{cause} {rate:.0f}" for cause, rate in list(row.causes.items())[:_CAUSES])
    return (
        row.vm,
        str(row.cpu),
        row.state,
        "-" if row.host_cpu is None else str(row.host_cpu),
        f"{row.busy:.0%}",
        f"{row.steal:.0%}",
        f"{row.exits:.0f}",
        causes,
    )
