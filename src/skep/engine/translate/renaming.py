"""Renaming: guest registers without a host register get one for the length of a loop.

A loop here is a block that jumps back to its own start; its *body* ends with the last such jump. A guest register that
the body does not use, and the guest's stack pointer if nothing is pushed there, leaves its host register to one of r9,
r10, r11, and waits in the state block (``swap0`` to ``swap2``).

That lasts from behind the block's plain entry to the body's end, and nobody else can see it: whatever leaves the body -
a jump to elsewhere, the look for somebody who wants the vCPU, a check's slow path, which comes back - first puts the
registers where they belong (:attr:`Renaming.undo`). The host cannot fault in a body: only integer instructions that do
not divide are in one, with operands that have passed their checks.
"""

from __future__ import annotations

from typing import NamedTuple

from skep.engine.translate.asm import Assembler, Reg, gs
from skep.engine.translate.forms import FIXED, HOMES, HOST_RSP, IN_STATE, Item
from skep.engine.translate.stubs import field as state

_LENDERS = (15, 14, 13, 12, 8, 7, 6, 3, 5, 2, 1)
"""Whose host registers are lent, best first. Not rax, where flags are saved."""
_RSP = 1 << 4


class Renaming(NamedTuple):
    """Where guest registers are in a loop's body."""

    homes: tuple[int | None, ...]
    """The host registers of guest registers, as forms.HOMES."""
    do: bytes
    undo: bytes
    """No flag changes, nor do r10 and r11."""


def _worth(body: list[Item], number: int) -> int:
    """How often a register is read or changed."""
    times = 0
    for form, _, _, _ in body:
        if form.uses >> number & 1:
            times += 2 if number in form.spoils or (form.step is not None and form.step[0] == number) else 1
    return times


def rename(body: list[Item]) -> Renaming | None:
    """The renaming for a loop's body, None where there is none or it is not worth it."""
    used = 0
    for form, _, _, _ in body:
        used |= form.uses
    if used & (FIXED | _RSP):
        return None
    wanted = [n for n in IN_STATE if used >> n & 1 and _worth(body, n) > 1]
    if not wanted:
        return None
    homes = list(HOMES)
    do, undo = Assembler(), Assembler()
    lenders = [HOST_RSP, *(n for n in _LENDERS if not used >> n & 1)]
    for i, (number, host) in enumerate(zip(wanted, lenders, strict=False)):
        homes[number] = host
        swap = state(f"swap{i}")
        do.mov(swap, Reg(host))
        do.mov(host, gs(number * 8))
        undo.mov(gs(number * 8), Reg(host))
        undo.mov(host, swap)
    return Renaming(tuple(homes), do.code(0), undo.code(0))
