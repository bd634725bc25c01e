"""Hoisting: a loop's tables are checked once, before it.

A table here is what a loop's body (renaming.py) reads at a base register that the body does not change, plus a byte
from another register times a scale, plus a constant: all 256 places lie in one range. It is checked where the loop is
entered, and its host address kept in a slot of the state block, which stays good as long as the vCPU is in the block
(sharing_runtime.py): while it goes round in the body, too, for there is no way back into the body but from its end.

That a table could be reached as a whole says nothing about what the guest will read, so only reads are taken together,
and what fails is not reported: then the block's plain twin does each check when its access comes. A table on two pages
is seen through the window where they lie side by side (runtime.fill_table).
"""

from __future__ import annotations

from typing import NamedTuple

from skep.engine.translate.forms import Item

MOST = 2
"""Tables of a loop."""


class Table(NamedTuple):
    """A table, and where it is read."""

    base: int
    disp: int
    length: int
    """In bytes, a multiple of 8."""
    readers: list[int]
    """The indices of instructions."""


def tables(body: list[Item], data: bytes, offset: int) -> list[Table]:
    """The tables of a loop's body. ``data``, from ``offset`` of its page on, are the instructions' bytes."""
    found: list[Table] = []
    if all(form.table is None for form, _, _, _ in body):
        return found
    changed = {number for form, _, _, _ in body for number in form.spoils}
    changed.update(form.step[0] for form, _, _, _ in body if form.step is not None)
    known: set[int] = set()  # registers that hold a byte
    for i, (form, at, _, _) in enumerate(body):
        if form.table is not None:
            base, index, scale, size, disp, where, k = form.table
            if base not in changed and index in known:
                if k:
                    where += at - offset
                    disp += int.from_bytes(data[where : where + k], "little", signed=True)
                length = 255 * scale + size + 7 & ~7
                for table in found:
                    if table[:3] == (base, disp, length):
                        table.readers.append(i)
                        break
                else:
                    if len(found) < MOST:
                        found.append(Table(base, disp, length, [i]))
        known.difference_update(form.spoils)
        if form.step is not None:
            known.discard(form.step[0])
        if form.byte is not None:
            known.add(form.byte)
    return found
