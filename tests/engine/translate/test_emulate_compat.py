"""Instructions that 64-bit mode has not, against the host CPU in compatibility mode."""

from __future__ import annotations

import random

import pytest

from skep.engine.amd64.registers import Rflags
from tests.engine.translate import compat
from tests.engine.translate.plain import DATA, PlainCpu

STATUS = Rflags.STATUS
# instruction -> flags that SDM 2 defines
DECIMAL = {
    "27": STATUS & ~Rflags.OF,  # daa
    "2f": STATUS & ~Rflags.OF,  # das
    "37": Rflags.AF | Rflags.CF,  # aaa
    "3f": Rflags.AF | Rflags.CF,  # aas
    "d40a": Rflags.SF | Rflags.ZF | Rflags.PF,  # aam
    "d407": Rflags.SF | Rflags.ZF | Rflags.PF,
    "d50a": Rflags.SF | Rflags.ZF | Rflags.PF,  # aad
    "d510": Rflags.SF | Rflags.ZF | Rflags.PF,
    "d6": STATUS,  # salc
    "9f": STATUS,  # lahf
    "9e": STATUS,  # sahf
    "63d0": Rflags.ZF,  # arpl ax, dx
}


def test_decimal_arithmetic_and_arpl() -> None:
    rng = random.Random(1)
    cases = []
    for text in DECIMAL:
        for _ in range(150):
            flags = 2 | rng.getrandbits(12) & STATUS
            eax = rng.choice((rng.getrandbits(32), rng.choice((0, 0x99, 0x9A, 0xF9, 0xFF, 0x105, 0xFFFF, 6, 0x0A))))
            cases.append((bytes.fromhex(text), eax, rng.getrandbits(32), flags))
    results = compat.run(cases)
    if results is None:
        pytest.skip("the host runs no 32-bit code")
    cpu = PlainCpu()
    for (code, eax, edx, flags), (host_eax, host_edx, host_flags) in zip(cases, results, strict=True):
        cpu.set_up(-32, cpl=3)
        st = cpu.st
        st.rax, st.rdx, st.rbx, st.rflags = eax, edx, DATA, flags
        cpu.step(code)
        defined = DECIMAL[code.hex()]
        got = (st.rax, st.rdx, st.rflags & defined)
        assert got == (host_eax, host_edx, host_flags & defined), (code.hex(), hex(eax), hex(flags))
    cpu.close()
