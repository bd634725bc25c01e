"""The forms of instructions that were seen, by their bytes, so that each is classified and lowered once."""

from __future__ import annotations

from enum import Enum

from iced_x86 import Decoder, Instruction

from skep.engine.translate.forms import HOMES, NOTHING_OPEN, Form, Legality, Open, Template, near_branch
from skep.engine.translate.layout import Mode
from skep.engine.translate.lower import Lowering
from skep.engine.translate.narrow import Narrow
from skep.engine.translate.plain import Kinds, Plain, PlainForm
from skep.engine.translate.reading import RELATIVE

MAX_SHAPES = 1 << 15
"""Instructions with their constants blanked out that are remembered: what a guest can make us keep has a bound."""
MAX_MODES = 64
LONGEST = 15
"""Bytes of an instruction (SDM 2, 2.3.11)"""


class How(Enum):
    """What a template is for."""

    LIVE = "flags must survive its checks"
    DEAD = "they need not"
    PLACED = "its operand is in a range that was checked"


class Seen:
    """What is known of the instructions of one mode."""

    __slots__ = ("lowering", "shapes")

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self.shapes: dict[tuple[bytes, Open], Form] = {}
        """By an instruction's bytes with the constants that are left open blanked out."""


class Catalog:
    """What is known of instructions, and how each mode lowers them."""

    def __init__(self) -> None:
        self._modes: dict[int, Seen] = {}
        self._general: dict[tuple[tuple[bytes, Open], int], Form] = {}
        """Forms that no legality class changes."""
        self._kinds = Kinds()

    def mode(self, mode: int) -> Seen:
        mode &= ~Mode.PLAIN
        known = self._modes.get(mode)
        if known is None:
            if len(self._modes) >= MAX_MODES:
                self._modes.clear()
            known = self._modes[mode] = Seen(self._lowering(mode))
        return known

    def _lowering(self, mode: int) -> Lowering:
        if mode & Mode.NARROW:
            return Narrow(mode)
        if mode >> Mode.CLASS_SHIFT & Legality.ALIGNED:
            return Lowering(mode)
        return Plain(mode, self._kinds)

    def _make_room(self, seen: Seen) -> None:
        if max(len(seen.shapes), len(self._general)) >= MAX_SHAPES:
            for one in self._modes.values():
                one.shapes.clear()
            self._general.clear()

    def plain(self, seen: Seen, data: bytes) -> tuple[Form, int, int] | None:
        """The form of the plain instruction that 15 bytes begin with, how many of them decide that, and how many it
        has; None: it is not plain, or not one."""
        lowering = seen.lowering
        if not isinstance(lowering, Plain) or len(data) < LONGEST:
            return None
        found = lowering.plain(data)
        if found is None:
            return None
        self._make_room(seen)
        read, kind, open_, length = found
        disp, imm = read.disp, read.imm
        head = imm if open_.imm_size else length
        shape = data[:head]
        if open_.disp_size or read.where == RELATIVE:
            shape = shape[:disp] + shape[imm:]
            if head == imm:
                head = disp
        name = (shape, open_)
        form = seen.shapes.get(name)
        if form is None:
            general = (name, lowering.shape)
            form = self._general.get(general)
            if form is None:
                form = self._general[general] = lowering.plain_form(read, kind, open_, length)
            seen.shapes[name] = form
        return form, head, length

    def form(self, seen: Seen, key: bytes, ins: Instruction, decoder: Decoder) -> tuple[Form, int]:
        """The form of a valid instruction, just decoded from ``key``, and how many of its bytes decide that."""
        lowering = seen.lowering
        self._make_room(seen)
        where = decoder.get_constant_offsets(ins)
        target = near_branch(ins)
        relative = ins.is_ip_rel_memory_operand
        open_ = NOTHING_OPEN if target else lowering.opens(ins, where)
        shape = bytearray(key)
        if open_.disp_size:
            shape[open_.disp : open_.disp + open_.disp_size] = b"displace"[: open_.disp_size]
        if open_.imm_size:
            shape[open_.imm : open_.imm + open_.imm_size] = b"immediat"[: open_.imm_size]
        if relative:
            shape[where.displacement_offset : where.displacement_offset + 4] = b"rip!"
        elif target:
            shape[where.immediate_offset :] = b""
        name = (bytes(shape), open_)
        form = seen.shapes.get(name)
        if form is None:
            general = (name, lowering.shape)
            form = self._general.get(general)
            if form is None:
                form = lowering.form(ins, relative, open_)
                if not form.emulate:
                    form.wrap = target or (1 << lowering.bits - 1 if relative else 0)
                    form.behind = len(key) - where.displacement_offset - 4 if relative else 0
                    if lowering.is_general(ins):
                        self._general[general] = form
            seen.shapes[name] = form
        head = len(key)
        if target:
            head = where.immediate_offset
        else:
            if where.has_immediate:
                head = where.immediate_offset if open_.imm_size else 0
            if where.has_displacement and head:
                head = where.displacement_offset if open_.disp_size or relative else 0
            end = max(
                where.displacement_offset + where.displacement_size, where.immediate_offset + where.immediate_size
            )
            if not 0 < head < end == len(key):  # a register may stand behind them (VBLENDVPS)
                head = len(key)
        return form, head

    def template(
        self, form: Form, lowering: Lowering, instruction: bytes, at: int, how: How,
        homes: tuple[int | None, ...] = HOMES,
    ) -> Template:  # fmt: skip
        """The template of an instruction that has a form; guest registers are in the host registers ``homes``."""
        if form.emulate:
            return lowering.emulated_template
        if isinstance(form, PlainForm) and isinstance(lowering, Plain) and homes is HOMES:
            if how == How.PLACED:
                return lowering.plain_placed(form, instruction)
            plain = lowering.plain_template(form, instruction, how == How.LIVE)
            if plain is not None:
                return plain
        ins = Decoder(lowering.bits, instruction, ip=at).decode()
        lowering.homes = homes
        try:
            if how == How.PLACED:
                return lowering.placed(ins, instruction, form.open)
            return lowering.template(ins, instruction, how == How.LIVE, None, form.open)
        finally:
            lowering.homes = HOMES
