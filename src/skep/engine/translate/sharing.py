"""Sharing: one check for several operands of a block that lie near each other.

Operands that are reached from the same value of a register by constants, such as a function's stack frame or a
structure's fields, mostly lie on one page. The first of them checks the range that they all span and keeps its host
address in a slot of the state block; the others need no check. A block runs straight from its entry, so the first is
always executed first; what other vCPUs or devices do to the page waits until this vCPU leaves the block (world.py).

A range that is not plain RAM on one page - two pages, a device, code, a fault - is for the block's *plain* twin, which
is translated without sharing and entered at the same instruction (Mode.PLAIN, runtime.fill_range).
"""

from __future__ import annotations

from typing import Any

from skep.engine.translate.forms import Form
from skep.engine.translate.layout import SLOTS

REACH = 256
"""Bytes that a range may span at most: a longer one would lie on two pages too often."""


Lead = tuple[int, int, int, bool]
"""The check of a range, before the first instruction with an operand in it: a register, what to add to its value there
to get the range's start, the range's length, and whether it will be written."""
Share = tuple[int, int, Lead | None]
"""The range's slot, the operand's offset in the range, and the check if this is the first."""
_Range = list[Any]
"""Low, high, is it written, and the operands: (instruction's index, offset from the origin, base register, how far the
register is from the origin)"""


def shares(
    items: list[tuple[Form, int, int, int]], data: bytes, offset: int, slots: int = SLOTS
) -> list[Share | None]:
    """For each of ``items`` how its operand, if it has one, shares a check. ``data``, from ``offset`` of its
    page on, are the instructions' bytes; ``slots`` may be taken."""
    found: list[Share | None] = [None] * len(items)
    members = [i for i, item in enumerate(items) if item[0].reach is not None]
    if len(members) < 2:
        return found
    first = members[0]
    origins: dict[int, tuple[int, int]] = {}  # of registers that changed: whose first value, how far
    fresh = 16
    ranges: list[_Range] = []
    last: dict[int, _Range] = {}
    for i in range(first, members[-1] + 1):
        form, at, _, _ = items[i]
        reach = form.reach
        if reach is not None:
            base, disp, size, write, where, k = reach
            origin, far = origins.get(base) or (base, 0)
            if k:
                where += at - offset
                disp += int.from_bytes(data[where : where + k], "little", signed=True)
            low = far + disp
            high = low + size
            known = last.get(origin)
            if known is not None and (known[2] or not write):
                if low < known[0]:
                    if known[1] - low > REACH:
                        known = None
                    else:
                        known[0] = low
                elif high > known[1]:
                    if high - known[0] > REACH:
                        known = None
                    else:
                        known[1] = high
                if known is not None:
                    known[3].append((i, low, base, far))
            else:
                known = None
            if known is None:
                last[origin] = known = [low, high, write, [(i, low, base, far)]]
                ranges.append(known)
        step = form.step
        if step is not None:
            to, source, add, sign, where, k = step
            origin, far = origins.get(source) or (source, 0)
            if k:
                where += at - offset
                far += sign * int.from_bytes(data[where : where + k], "little", signed=True)
            origins[to] = (origin, far + add)
        for number in form.spoils:
            origins[number] = (fresh, 0)
            fresh += 1
    slot = 0
    for low, high, write, operands in ranges:
        if len(operands) > 1:
            if slot == slots:
                break
            i, at, base, far = operands[0]
            found[i] = (slot, at - low, (base, low - far, high - low, write))
            for i, at, _, _ in operands[1:]:
                found[i] = (slot, at - low, None)
            slot += 1
    return found
