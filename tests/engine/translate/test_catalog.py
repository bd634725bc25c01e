"""Forms that are found by an instruction's first bytes are those that its whole would have got."""

from __future__ import annotations

import random

import pytest
from iced_x86 import Code, Decoder

from skep.engine.translate.catalog import Catalog
from skep.engine.translate.forms import Form, Legality
from skep.engine.translate.layout import Mode

_ALL = Legality.X87 | Legality.SSE | Legality.AVX | Legality.TSC | Legality.OSXSAVE
MODES = (_ALL << Mode.CLASS_SHIFT, _ALL << Mode.CLASS_SHIFT | Mode.CODE32, Mode.CODE16 | Mode.SEGMENTED | Mode.REAL)


def _form(catalog: Catalog, mode: int, data: bytes) -> tuple[Form, bytes]:
    seen = catalog.mode(mode)
    decoder = Decoder(seen.lowering.bits, data, ip=0x100)
    ins = decoder.decode()
    key = data[: ins.len]
    form = seen.forms.get(key)
    return (catalog.form(seen, key, ins, decoder) if form is None else form), key


@pytest.mark.parametrize("mode", MODES)
def test_what_begins_alike_is_alike(mode: int) -> None:
    source = random.Random(mode)
    catalog = Catalog()
    found = 0
    for _ in range(4000):
        data = bytearray(source.randbytes(15))
        data[0] = source.choice((data[0], 0x48, 0x0F, 0x81, 0x8B, 0xC7, 0xE8, 0x83, 0x89))
        seen = catalog.mode(mode)
        decoder = Decoder(seen.lowering.bits, bytes(data), ip=0x100)
        ins = decoder.decode()
        if ins.code == Code.INVALID:
            continue
        where = decoder.get_constant_offsets(ins)
        _form(catalog, mode, bytes(data))
        for offset, size in (
            (where.displacement_offset, where.displacement_size), (where.immediate_offset, where.immediate_size)
        ):  # fmt: skip
            data[offset : offset + size] = source.randbytes(size)
        before = len(seen.shapes)
        form, key = _form(catalog, mode, bytes(data))
        found += len(seen.shapes) == before
        other, again = _form(Catalog(), mode, bytes(data))
        assert (form, key) == (other, again), ins
    assert found > 1500


def test_an_instruction_that_is_cut_off_is_not_taken_for_one_that_is_not() -> None:
    catalog = Catalog()
    mode = MODES[0]
    whole = bytes.fromhex("e900000000")
    assert _form(catalog, mode, whole)[0] is not catalog.mode(mode).lowering.emulated
    for n in range(1, len(whole)):
        assert _form(catalog, mode, whole[:n])[0] is catalog.mode(mode).lowering.emulated


@pytest.mark.parametrize("place", ["1c2588130000", "5588"])
def test_a_register_behind_the_displacement_is_no_constant(place: str) -> None:
    """VBLENDVPS ymm3, ymm2, [m], ymm1 and the same with ymm9."""
    catalog = Catalog()
    forms = []
    for last in ("10", "90"):
        data = bytes.fromhex(f"c4e36d4a{place}{last}")
        form, key = _form(catalog, MODES[0], data)
        assert len(key) == len(data)
        forms.append(form)
    assert forms[0] is not forms[1]
