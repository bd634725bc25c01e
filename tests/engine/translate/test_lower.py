"""Lowering takes any bytes: what a guest executes becomes a template, or Python's, and never an exception of ours."""

from __future__ import annotations

import random

import pytest
from iced_x86 import Decoder

from skep.engine.translate.forms import Ends
from skep.engine.translate.layout import Mode
from skep.engine.translate.lower import Lowering

EVERYTHING = 31 << Mode.CLASS_SHIFT  # all of x87, SSE, AVX, RDTSC and XSAVE is allowed
_LEADING = bytes.fromhex("0f4866f2f365 67c4c54c62f02e82")
_SECOND = bytes.fromhex("383ac7ae01ba")
_RELATIVE = (Ends.JCC, Ends.JMP, Ends.LOOP)


@pytest.mark.parametrize("mode", [0, Mode.USER, Mode.AC, Mode.CODE32, Mode.CODE32 | Mode.USER])
@pytest.mark.parametrize("legality", [0, EVERYTHING])
def test_random_bytes(mode: int, legality: int) -> None:
    lowering = Lowering(legality | mode)
    source = random.Random(f"{mode} {legality}")
    for _ in range(4000):
        data = bytearray(source.randbytes(15))
        if source.random() < 0.5:
            data[0] = source.choice(_LEADING)
        if data[0] == 0x0F and source.random() < 0.3:
            data[1] = source.choice(_SECOND)
        decoder = Decoder(64 if lowering.wide else 32, bytes(data), ip=0x123)
        ins = decoder.decode()
        if ins.is_invalid:
            continue
        raw = bytes(data[: ins.len])
        form = lowering.form(ins, ins.is_ip_rel_memory_operand)
        if form.ends in _RELATIVE:
            continue
        whole = lowering.template(ins, raw, True)
        assert whole.code or not whole.open, ins
        assert len(lowering.template(ins, raw, True, {0: 5}).checks) == max(len(whole.checks) - 1, 0), ins
        if not form.emulate:
            open_ = lowering.template(ins, raw, True, None, lowering.opens(ins, decoder.get_constant_offsets(ins)))
            assert len(open_.checks) == len(whole.checks), ins
