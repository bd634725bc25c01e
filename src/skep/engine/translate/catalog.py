"""The forms of instructions that were seen, by their bytes, so that each is classified and lowered once."""

from __future__ import annotations

from iced_x86 import Decoder, Instruction

from skep.engine.translate.forms import Form, Open, Template
from skep.engine.translate.layout import Mode
from skep.engine.translate.lower import Lowering
from skep.engine.translate.narrow import Narrow

MAX_FORMS = 1 << 17
"""Instructions whose bytes are remembered, by mode: what a guest can make us keep has a bound."""


class Catalog:
    """What is known of instructions, and how each mode lowers them."""

    def __init__(self) -> None:
        self._modes: dict[int, tuple[Lowering, dict[bytes, Form]]] = {}
        self._shapes: dict[int, dict[tuple[bytes, Open], Form]] = {}
        self._general: dict[tuple[tuple[bytes, Open], int], Form] = {}
        """Forms that no legality class changes."""

    def mode(self, mode: int) -> tuple[Lowering, dict[bytes, Form]]:
        mode &= ~Mode.PLAIN
        known = self._modes.get(mode)
        if known is None:
            known = self._modes[mode] = (Narrow(mode) if mode & Mode.NARROW else Lowering(mode), {})
            self._shapes[mode] = {}
        return known

    def shape(self, lowering: Lowering, key: bytes, ins: Instruction, decoder: Decoder, relative: bool) -> Form:
        """The form of an instruction seen for the first time: that of its bytes without the constants left open."""
        open_ = lowering.opens(ins, decoder)
        shape = bytearray(key)
        if open_.disp_size:
            shape[open_.disp : open_.disp + open_.disp_size] = b"displace"[: open_.disp_size]
        if open_.imm_size:
            shape[open_.imm : open_.imm + open_.imm_size] = b"immediat"[: open_.imm_size]
        if relative:
            where = decoder.get_constant_offsets(ins)
            shape[where.displacement_offset : where.displacement_offset + 4] = b"rip!"
        shapes = self._shapes[lowering.mode]
        forms = self._modes[lowering.mode][1]
        if len(forms) >= MAX_FORMS or len(shapes) >= MAX_FORMS or len(self._general) >= MAX_FORMS:
            forms.clear()
            shapes.clear()
            self._general.clear()
        name = (bytes(shape), open_)
        form = shapes.get(name)
        if form is None:
            general = (name, lowering.shape)
            form = self._general.get(general)
            if form is None:
                form = lowering.form(ins, relative, open_)
                if not form.emulate:
                    form.plain = relative and not where.has_immediate
                    if lowering.is_general(ins):
                        self._general[general] = form
            shapes[name] = form
        return form

    def template(
        self, form: Form, lowering: Lowering, data: bytes, index: int, at: int, n: int, live: bool
    ) -> Template:
        decoder = Decoder(lowering.bits, data[index : index + n], ip=at)
        ins = decoder.decode()
        if form.emulate:
            t = lowering.emulated_template
        else:
            t = lowering.template(ins, data[index : index + n], live, None, form.open)
        form.templates[1 if live else 0] = t
        return t

    def placed(self, form: Form, lowering: Lowering, data: bytes, index: int, at: int, n: int) -> Template:
        """The instruction with its operand at r10 plus a hole."""
        ins = Decoder(lowering.bits, data[index : index + n], ip=at).decode()
        t = form.placed = lowering.placed(ins, data[index : index + n], form.open)
        return t
