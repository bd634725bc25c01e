"""The forms of instructions that were seen, by their bytes, so that each is classified and lowered once."""

from __future__ import annotations

from iced_x86 import Code, Decoder, Instruction

from skep.engine.translate.forms import HOMES, NOTHING_OPEN, Form, Legality, Open, Template, near_branch
from skep.engine.translate.layout import Mode
from skep.engine.translate.lower import Lowering
from skep.engine.translate.narrow import Narrow
from skep.engine.translate.plain import Kind, Kinds, Plain, PlainForm
from skep.engine.translate.reading import RELATIVE, Read

MAX_FORMS = 1 << 16
"""Instructions whose bytes are remembered, by mode: what a guest can make us keep has a bound."""
MAX_SHAPES = 1 << 15
"""The same with their constants blanked out, each with its templates."""
MAX_MODES = 64
SHORT = 7
"""Bytes of the longest instruction that is remembered with its constants: longer ones seldom come again."""
_TAILS = (4, 1, 5, 8, 2, 3, 6)
"""Bytes of an instruction from its first constant on: one or two constants of 1, 2, 4 or 8 bytes, the usual first."""


class Seen:
    """What is known of the instructions of one mode."""

    __slots__ = ("forms", "heads", "lowering", "shapes")

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self.forms: dict[bytes, Form] = {}
        """By an instruction's bytes."""
        self.heads: dict[bytes, Form] = {}
        """By the bytes before its constants, where its form does not depend on any of these. No instruction's bytes
        begin another's, so what begins like one that was seen goes on like it, too."""
        self.shapes: dict[tuple[bytes, Open], Form] = {}
        """By its bytes with the constants that are left open blanked out."""

    def clear(self) -> None:
        self.forms.clear()
        self.heads.clear()
        self.shapes.clear()


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

    def form(self, seen: Seen, key: bytes, ins: Instruction, decoder: Decoder) -> Form:
        """The form of the instruction ``ins``, just decoded from ``key``, which ``seen.forms`` does not have."""
        if ins.code == Code.INVALID:
            return seen.lowering.emulated
        form, _ = self.known(seen, key, ins, decoder)
        if len(key) <= SHORT and not form.wrap:
            if len(seen.forms) >= MAX_FORMS:
                seen.forms.clear()
            seen.forms[key] = form
        return form

    def known(self, seen: Seen, key: bytes, ins: Instruction, decoder: Decoder) -> tuple[Form, int]:
        """The form of a valid instruction, just decoded from ``key``, and how many of its bytes decide that."""
        heads = seen.heads
        for tail in _TAILS:
            form = heads.get(key[:-tail])
            if form is not None:
                return form, len(key) - tail
        return self._shape(seen, key, ins, decoder)

    def _shape(self, seen: Seen, key: bytes, ins: Instruction, decoder: Decoder) -> tuple[Form, int]:
        """As known, of an instruction seen for the first time: the form is that of its bytes without the constants left
        open."""
        lowering = seen.lowering
        if max(len(seen.shapes), len(seen.heads), len(self._general)) >= MAX_SHAPES:
            for one in self._modes.values():
                one.clear()
            self._general.clear()
        if isinstance(lowering, Plain):
            plain = lowering.plain(key)
            if plain is not None:
                found, head = self._plain(seen, lowering, key, *plain)
                if head < len(key):
                    seen.heads[key[:head]] = found
                return found, head
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
        if head < len(key):
            seen.heads[key[:head]] = form
        return form, head

    def _plain(self, seen: Seen, lowering: Plain, key: bytes, read: Read, kind: Kind, open_: Open) -> tuple[Form, int]:
        """The same of a plain instruction, and how many of its bytes decide its form."""
        disp, imm = read.disp, read.imm
        shape = key[:imm] if open_.imm_size else key
        head = len(shape)
        if open_.disp_size or read.where == RELATIVE:
            if head == imm:
                head = disp
            shape = shape[:disp] + shape[imm:]
        elif disp < imm:
            head = len(key)
        name = (shape, open_)
        form = seen.shapes.get(name)
        if form is None:
            general = (name, lowering.shape)
            form = self._general.get(general)
            if form is None:
                form = self._general[general] = lowering.plain_form(read, kind, open_, len(key))
            seen.shapes[name] = form
        return form, head

    def template(
        self, form: Form, lowering: Lowering, data: bytes, index: int, at: int, n: int, live: bool
    ) -> Template:
        t: Template | None = None
        if form.emulate:
            t = lowering.emulated_template
        elif isinstance(form, PlainForm) and isinstance(lowering, Plain):
            t = lowering.plain_template(form, data[index : index + n], live)
        if t is None:
            ins = Decoder(lowering.bits, data[index : index + n], ip=at).decode()
            t = lowering.template(ins, data[index : index + n], live, None, form.open)
        if live:
            form.live = t
        else:
            form.dead = t
        return t

    def renamed(
        self, form: Form, lowering: Lowering, data: bytes, index: int, at: int, n: int, live: bool, placed: bool,
        homes: tuple[int | None, ...],
    ) -> Template:  # fmt: skip
        """As template or placed, with guest registers in the host registers ``homes``."""
        name = (live, placed, homes[9], homes[10], homes[11])
        t = form.renamed.get(name)
        if t is None:
            ins = Decoder(lowering.bits, data[index : index + n], ip=at).decode()
            instruction = data[index : index + n]
            lowering.homes = homes
            if placed:
                t = lowering.placed(ins, instruction, form.open)
            else:
                t = lowering.template(ins, instruction, live, None, form.open)
            lowering.homes = HOMES
            form.renamed[name] = t
        return t

    def placed(self, form: Form, lowering: Lowering, data: bytes, index: int, at: int, n: int) -> Template:
        """The instruction with its operand at r10 plus a hole."""
        if isinstance(form, PlainForm) and isinstance(lowering, Plain):
            t = lowering.plain_placed(form, data[index : index + n])
        else:
            ins = Decoder(lowering.bits, data[index : index + n], ip=at).decode()
            t = lowering.placed(ins, data[index : index + n], form.open)
        form.placed = t
        return t
