"""The instruction forms that random sequences are drawn from, out of iced-x86's tables.

A form is one :class:`iced_x86.Code`, that is one encoding with its operand kinds. Left out are what only a kernel may
do, what gives another answer at each call or on each machine (time, random numbers, CPUID, XCR0), and what the
generator makes on purpose as a snippet of its own (branches, string instructions, gathers, saves of the FPU's state).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from iced_x86 import Code_, CpuidFeature, EncodingKind, Instruction, OpCodeInfo

from tests.engine.assemble import CODE_NAMES, op_kinds

_FEATURE_NAMES = {v: k for k, v in vars(CpuidFeature).items() if k.isupper() and isinstance(v, int)}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


INTEGER = _names(
    "INTEL8086 INTEL186 INTEL286 INTEL386 INTEL486 X64 CMOV CX8 CMPXCHG16B MOVBE POPCNT LZCNT BMI1 BMI2 ADX "
    "MULTIBYTENOP PAUSE PREFETCHW CLFSH"
)
X87 = _names("FPU FPU387")
SSE = _names("MMX SSE SSE2 SSE3 SSSE3 SSE4_1 SSE4_2 AES PCLMULQDQ SHA")
AVX = _names("AVX AVX2 FMA F16C AES PCLMULQDQ")
HOST = INTEGER | X87 | SSE | AVX | _names("FXSR XSAVE XSAVEOPT")
BASELINE = (INTEGER | X87 | SSE | _names("FXSR")) - _names("MOVBE LZCNT BMI1 BMI2 ADX PREFETCHW AES PCLMULQDQ SHA")
"""x86-64-v2: what the ``baseline`` CPU model has."""

_LEFT_OUT = re.compile(
    r"^(INT3|INT1|INT_|INTO|INT|IN_|OUT|INS[BWD]|OUTS[BWD]|IRET|SYS|HLT|CLI|STI|CLTS|INVD|WBINVD|LGDT|LIDT|SGDT|SIDT"
    r"|SLDT|STR|LLDT|LTR|SMSW|LMSW|LAR|LSL|VERR|VERW|LFS|LGS|LSS|MOV_SREG|POP[WQ]_[FG]S|MOV_(CR|DR|TR)|MOV_R\d+_(CR|DR)"
    r"|ARPL|RSM|RDMSR|WRMSR|RDPMC|RDTSC|CPUID|XGETBV"
    r"|CALL|JMP|J[A-Z]+_REL|LOOP|RET|ENTER|PUSHF|POPF|UD[012]|INVLPG|SWAPGS|MONITOR|MWAIT|RESERVEDNOP|F?N?SAVE|FN?STENV|FRSTOR|FLDENV"
    r"|F?XSAVE|F?XRSTOR|FNSAVE|MASKMOV|VEX_VMASKMOVDQU|LODS|STOS|MOVS[BWDQ]_M|CMPS[BWDQ]_M|SCAS"
    r"|STORE|LOADALL|ZERO_BYTES|CMPXCHG486|XBTS|IBTS|MOV_R(32|64)M16_SREG|FSTDW|FSTSG|FRINT2|FRINEAR|FRICHOP|FTSTP|FN?DISI|FN?ENI|F(CLEX|INIT|STCW|STSW)_?|FNSETPM|JMPE)"
)


_SEGMENTS = re.compile(r"^(L[DE]S|POP[WD]_[A-Z]S$|PUSHD_[A-Z]S$)")
"""Left out of 16- and 32-bit code: loads of segments, whose tables are not the same, and 32-bit pushes,
of which it is the CPU's own affair whether they store the upper half (SDM 2, PUSH)."""


@dataclass(frozen=True, slots=True)
class Form:
    code: Code_
    name: str
    kinds: tuple[str, ...]
    lockable: bool
    group: str


def features(code: Code_) -> frozenset[str]:
    """CPUID features that ``code`` needs, by iced's names."""
    instruction = Instruction()
    instruction.code = code
    return frozenset(_FEATURE_NAMES[f] for f in instruction.cpuid_features())


def _group(name: str, need: frozenset[str]) -> str:
    if name.startswith("VEX_"):
        return "vex integer" if need <= INTEGER else "avx"
    if need <= INTEGER:
        return "integer"
    return "x87" if need <= X87 else "sse"


@functools.cache
def forms(offered: frozenset[str], bits: int = 64) -> dict[str, tuple[Form, ...]]:
    """Forms that a CPU with these features has in code of this size at any privilege, by group."""
    found: dict[str, list[Form]] = {}
    for code, name in CODE_NAMES.items():
        info = OpCodeInfo(code)
        if not info.is_instruction or info.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX):
            continue
        if not info.is_available_in_mode(bits):
            continue
        if _LEFT_OUT.match(name) or info.is_privileged or (bits != 64 and _SEGMENTS.match(name)):
            continue
        need = features(code)
        kinds = op_kinds(code)
        if not need or not need <= offered or any(k.startswith(("BR", "K_", "MEM_VSIB", "XBEGIN")) for k in kinds):
            continue
        group = _group(name, need)
        found.setdefault(group, []).append(Form(code, name, kinds, info.can_use_lock_prefix, group))
    return {group: tuple(members) for group, members in found.items()}


@functools.cache
def gathers() -> tuple[Form, ...]:
    """AVX2 gathers: their index register decides where they read, so they are set up on purpose."""
    return tuple(
        Form(code, name, op_kinds(code), False, "gather")
        for code, name in CODE_NAMES.items()
        if name.startswith("VEX_") and "GATHER" in name and features(code) == frozenset({"AVX2"})
    )
