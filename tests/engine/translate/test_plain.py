"""Plain instructions get the forms and templates that lower.py makes of one instruction at a time."""

from __future__ import annotations

import dataclasses
import random

import pytest
from iced_x86 import Code, Decoder

from skep.engine.translate.forms import Form, Legality
from skep.engine.translate.layout import Mode
from skep.engine.translate.lower import Lowering
from skep.engine.translate.plain import Kinds, Plain
from skep.engine.translate.reading import ABSOLUTE, OPCODES, RELATIVE, SCALED, read

MODES = (
    (Legality.X87 | Legality.TSC) << Mode.CLASS_SHIFT, (Legality.SSE | Legality.X87) << Mode.CLASS_SHIFT | Mode.USER,
    Mode.AC,
)  # fmt: skip
_PREFIXES = (b"", b"", b"", b"\x66", b"\xf0", b"\x3e", b"\x64", b"\x65", b"\xf3", b"\x66\x65")


def _fields(form: Form) -> dict[str, object]:
    fields = {f.name: getattr(form, f.name) for f in dataclasses.fields(Form)}
    fields["spoils"] = frozenset(form.spoils)
    return fields


def _instruction(source: random.Random, opcode: int) -> bytes:
    rex = b"" if source.random() < 0.3 else bytes((source.randrange(0x40, 0x50),))
    code = bytes((opcode,)) if opcode < 0x100 else bytes((0x0F, opcode & 0xFF))
    return (source.choice(_PREFIXES) + rex + code + source.randbytes(13))[:15]


@pytest.mark.parametrize("mode", MODES)
def test_the_same_as_one_at_a_time(mode: int) -> None:
    source = random.Random(mode)
    plain, lowering = Plain(mode, Kinds()), Lowering(mode)
    templates = placed = 0
    for opcode in sorted(OPCODES) * 40:
        data = _instruction(source, opcode)
        found = plain.plain(data)
        if found is None:
            continue
        decoder = Decoder(64, data)
        ins = decoder.decode()
        read, kind, plain_open, length = found
        assert ins.code != Code.INVALID, data.hex()
        assert ins.len == length, (ins, data.hex())
        data = data[:length]
        where = decoder.get_constant_offsets(ins)
        open_ = lowering.opens(ins, where)
        form = lowering.form(ins, ins.is_ip_rel_memory_operand, open_)
        if form.relative:
            form.wrap = 1 << 63  # the catalog's
            form.behind = len(data) - where.displacement_offset - 4
        fast = plain.plain_form(read, kind, plain_open, length)
        assert _fields(fast) == _fields(form), (ins, data.hex())
        for live in (False, True):
            template = plain.plain_template(fast, data, live)
            if template is not None:
                assert template == lowering.template(ins, data, live, None, open_), (ins, data.hex())
                templates += 1
        if form.reach is not None or form.table is not None:
            assert plain.plain_placed(fast, data) == lowering.placed(ins, data, open_), (ins, data.hex())
            placed += 1
    assert templates > 3000
    assert placed > 600


def test_kinds_are_those_of_every_mode() -> None:
    """They are kept once for all modes of 64-bit code."""
    source = random.Random(1)
    lowerings = [Plain(mode, Kinds()) for mode in MODES]
    found = 0
    for opcode in sorted(OPCODES) * 20:
        data = _instruction(source, opcode)
        first, *others = (lowering.plain(data) for lowering in lowerings)
        assert all(other == first for other in others), data.hex()
        found += first is not None
    assert found > 800


@pytest.mark.parametrize(
    "code",
    [
        "88e0",  # mov al, ah
        "660fb6e4",  # movzx sp, ah
        "6688c8",  # mov al, cl with a prefix that changes nothing
        "66488bc1",  # mov rax, rcx with one
        "648bc1",  # mov eax, ecx with one
        "8ed8",  # mov ds, eax
        "0f20d8",  # mov rax, cr3
        "ff20",  # jmp [rax]
        "f3480fb8c1",  # popcnt rax, rcx
        "90",  # nop
    ],
)
def test_what_is_not_plain(code: str) -> None:
    assert Plain(0, Kinds()).plain(bytes.fromhex(code).ljust(15, b"\0")) is None


@pytest.mark.parametrize(
    ("code", "where"), [("488b04c500000000", SCALED), ("65488b042500000000", ABSOLUTE), ("488b0500000000", RELATIVE)]
)
def test_where_there_is_no_base(code: str, where: int) -> None:
    said = read(bytes.fromhex(code))
    assert said is not None
    assert (said.where, said.disp_size, said.imm) == (where, 4, len(code) // 2)
