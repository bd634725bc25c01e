"""A text assembler for guest programs in tests, made of nothing but iced-x86's instruction tables.

It shares no code with the translator, and above all none with the translator's own assembler. A line is tried against
every encoding of its mnemonic; the shortest that fits is taken. Intel's operand order, one instruction a line::

    start:  mov rax, [rip + table]      ; [rip + X] addresses X, whatever it is
            lock add qword [rbx + rcx*8 + 16], 1
            jne short start
    table:  dq start, 0x1234

Directives: ``db dw dd dq``, ``align N``, ``space N`` (zeros). An expression is Python's, over labels and the names
given in ``symbols``. A jump to a label is a near jump unless ``short`` is said. A memory operand needs its size (``byte
word dword qword tbyte xmmword ymmword``) where no register tells it. An encoding can be asked for by the name of its
:class:`iced_x86.Code` (``RETFQ``, ``ADD_RM64_R64 rax, rbx``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from iced_x86 import (
    Code,
    Code_,
    Encoder,
    EncodingKind,
    Instruction,
    MemorySizeExt,
    Mnemonic,
    OpCodeInfo,
    OpCodeOperandKind,
    OpKind,
    Register,
    Register_,
    RegisterExt,
)


@dataclass(frozen=True, slots=True)
class Mem:
    """A memory operand. With ``base`` RIP, ``disp`` is the address meant, not the distance to it."""

    base: int = Register.NONE
    index: int = Register.NONE
    scale: int = 1
    disp: int = 0
    segment: int = Register.NONE
    size: int = 0
    """In bytes, as written; 0 where nothing was written."""


@dataclass(frozen=True, slots=True)
class Reg:
    number: int


@dataclass(frozen=True, slots=True)
class Imm:
    value: int
    short: bool = False


@dataclass(frozen=True, slots=True)
class Far:
    selector: int
    offset: int


Operand = Mem | Reg | Imm | Far

CODES: dict[str, Code_] = {k: cast(Code_, v) for k, v in vars(Code).items() if k.isupper() and isinstance(v, int)}
CODE_NAMES = {v: k for k, v in CODES.items()}
KIND_NAMES = {v: k for k, v in vars(OpCodeOperandKind).items() if k.isupper() and isinstance(v, int)}
REGISTERS: dict[str, int] = {k.lower(): v for k, v in vars(Register).items() if k.isupper() and isinstance(v, int)}
REGISTERS |= {f"r{i}b": REGISTERS[f"r{i}l"] for i in range(8, 16)}
SIZES = {"byte": 1, "word": 2, "dword": 4, "qword": 8, "tbyte": 10, "xmmword": 16, "ymmword": 32}
PREFIXES = ("lock", "rep", "repe", "repz", "repne", "repnz")

_FIXED = {
    name: getattr(Register, name)
    for name in ("AL", "CL", "AX", "DX", "EAX", "RAX", "ES", "CS", "SS", "DS", "FS", "GS", "ST0")
}
_CLASSES = {
    "R8": RegisterExt.is_gpr8, "R16": RegisterExt.is_gpr16, "R32": RegisterExt.is_gpr32, "R64": RegisterExt.is_gpr64,
    "XMM": RegisterExt.is_xmm, "YMM": RegisterExt.is_ymm, "MM": RegisterExt.is_mm, "STI": RegisterExt.is_st,
    "SEG": RegisterExt.is_segment_register, "CR": RegisterExt.is_cr, "DR": RegisterExt.is_dr,
}  # fmt: skip
_IMMEDIATES = {  # operand kind: (what the encoder calls it, bits encoded, bits after sign extension)
    "IMM8": (OpKind.IMMEDIATE8, 8, 8),
    "IMM16": (OpKind.IMMEDIATE16, 16, 16),
    "IMM32": (OpKind.IMMEDIATE32, 32, 32),
    "IMM64": (OpKind.IMMEDIATE64, 64, 64),
    "IMM8SEX16": (OpKind.IMMEDIATE8TO16, 8, 16),
    "IMM8SEX32": (OpKind.IMMEDIATE8TO32, 8, 32),
    "IMM8SEX64": (OpKind.IMMEDIATE8TO64, 8, 64),
    "IMM32SEX64": (OpKind.IMMEDIATE32TO64, 32, 64),
    "IMM8_CONST_1": (OpKind.IMMEDIATE8, 1, 1),
}
_STRING = {  # implicit memory operands, by address size in bits
    "SEG_RSI": {64: OpKind.MEMORY_SEG_RSI, 32: OpKind.MEMORY_SEG_ESI},
    "ES_RDI": {64: OpKind.MEMORY_ESRDI, 32: OpKind.MEMORY_ESEDI},
    "SEG_RDI": {64: OpKind.MEMORY_SEG_RDI, 32: OpKind.MEMORY_SEG_EDI},
}
IMPLICIT = (*_STRING, "SEG_RBX_AL")
_BRANCHES = {"BR32": OpKind.NEAR_BRANCH32, "BR64": OpKind.NEAR_BRANCH64}
_ODD_SIZE = re.compile(
    r"^(PUSHW_IMM8|PUSH_IMM16|RETNW|RETFW|ENTERW|LEAVEW|\w+_REL8_16|\w+_REL16|(F?N?SAVE|FRSTOR)_M94|(FN?STENV|FLDENV)_M14)"
)
"""Operand sizes that nobody means who does not ask for them by the Code's name."""
_CONDITION = re.compile(r"^(J|SET|CMOV)(C|NC|Z|NZ|NAE|NB|NBE|NA|NGE|NL|NG|NLE|PE|PO)$")
_CONDITIONS = {
    "C": "B", "NC": "AE", "Z": "E", "NZ": "NE", "NAE": "B", "NB": "AE", "NBE": "A", "NA": "BE", "NGE": "L", "NL": "GE",
    "NG": "LE", "NLE": "G", "PE": "P", "PO": "NP",
}  # fmt: skip


def named(register: int) -> Register_:
    """A register's number with the type that iced-x86's annotations want; in truth both are ints."""
    return cast(Register_, register)


def is_vector(register: int) -> bool:
    return register != Register.NONE and RegisterExt.is_vector_register(named(register))


class AssemblyError(Exception):
    """A line that means nothing, or that no encoding fits."""


@functools.cache
def op_kinds(code: Code_) -> tuple[str, ...]:
    """Names of the :class:`iced_x86.OpCodeOperandKind` of each operand of ``code``."""
    return tuple(KIND_NAMES[k] for k in OpCodeInfo(code).op_kinds())


@functools.cache
def memory_size(code: Code_) -> int:
    """Bytes that the memory operand of ``code`` has, 0 where iced knows no one number."""
    instruction = Instruction()
    instruction.code = code
    for i, kind in enumerate(op_kinds(code)):
        if "MEM" in kind:
            instruction.set_op_kind(i, OpKind.MEMORY)
    return MemorySizeExt.size(instruction.memory_size)


@functools.cache
def _candidates(mnemonic: str, bits: int) -> tuple[Code_, ...]:
    """Legacy and VEX encodings of a mnemonic (or of one Code's name) that exist in this mode."""
    if mnemonic in CODES:
        return (CODES[mnemonic],)
    number = getattr(Mnemonic, mnemonic, None)
    found = []
    for name, code in CODES.items():
        info = OpCodeInfo(code)
        if info.mnemonic != number or not info.is_instruction or not info.is_available_in_mode(bits):
            continue
        if info.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX) or _ODD_SIZE.match(name):
            continue
        found.append(code)
    return tuple(found)


def _set_immediate(ins: Instruction, i: int, kind: str, value: int) -> bool:
    op_kind, bits, extended = _IMMEDIATES[kind]
    if kind == "IMM8_CONST_1":
        if value != 1:
            return False
    elif bits != extended:
        value &= (1 << extended) - 1
        if not (value < 1 << bits - 1 or value >= (1 << extended) - (1 << bits - 1)):
            return False
    elif not -(1 << bits - 1) <= value < 1 << bits:
        return False
    else:
        value &= (1 << bits) - 1
    if kind == "IMM8" and any(ins.op_kind(j) == OpKind.IMMEDIATE8 for j in range(i)):
        op_kind = OpKind.IMMEDIATE8_2ND
    elif kind == "IMM8" and i and ins.op_kind(i - 1) == OpKind.IMMEDIATE16:
        op_kind = OpKind.IMMEDIATE8_2ND  # ENTER
    ins.set_op_kind(i, op_kind)
    ins.set_immediate_u64(i, value)
    return True


def _set_memory(ins: Instruction, i: int, op: Mem, bits: int) -> None:
    ins.set_op_kind(i, OpKind.MEMORY)
    ins.memory_base, ins.memory_index, ins.memory_index_scale = named(op.base), named(op.index), op.scale
    ins.segment_prefix = named(op.segment)
    if op.base == Register.RIP:
        ins.memory_displacement, ins.memory_displ_size = op.disp, 8
        return
    registers = [r for r in (op.base, op.index) if r != Register.NONE]
    if is_vector(op.index):
        registers.remove(op.index)
    width = 8 * RegisterExt.size(named(registers[0])) if registers else bits
    ins.memory_displacement = op.disp & ((1 << width) - 1)
    if op.base == Register.NONE:
        ins.memory_displ_size = width // 8
    else:
        ins.memory_displ_size = 1 if op.disp else 0


def build(code: Code_, operands: tuple[Operand, ...], bits: int = 64) -> Instruction | None:
    """The instruction ``code`` with these operands, which string operands are not among. None if they do not fit."""
    ins = Instruction()
    ins.code = code
    given = iter(operands)
    for i, kind in enumerate(op_kinds(code)):
        if kind in _STRING:
            ins.set_op_kind(i, _STRING[kind][bits])
            continue
        if kind == "SEG_RBX_AL":
            ins.set_op_kind(i, OpKind.MEMORY)
            ins.memory_base = Register.RBX if bits == 64 else Register.EBX
            ins.memory_index = Register.AL
            continue
        op = next(given, None)
        if op is None:
            if kind in _FIXED and any(k in IMPLICIT for k in op_kinds(code)):
                ins.set_op_register(i, _FIXED[kind])
                continue
            return None
        if not _set_operand(ins, i, kind, op, bits):
            return None
    return ins if next(given, None) is None else None


def _set_operand(ins: Instruction, i: int, kind: str, op: Operand, bits: int) -> bool:
    if isinstance(op, Far):
        if not kind.startswith("FARBR"):
            return False
        ins.set_op_kind(i, OpKind.FAR_BRANCH32)
        ins.far_branch_selector, ins.far_branch32 = op.selector, op.offset
        return True
    if isinstance(op, Imm):
        family = kind.split("_")[0]
        if family in _BRANCHES:
            if op.short != kind.endswith("_1") and _has_near_form(ins.code):
                return False
            ins.set_op_kind(i, _BRANCHES[family])
            if family == "BR64":
                ins.near_branch64 = op.value & ((1 << 64) - 1)
            else:
                ins.near_branch32 = op.value & 0xFFFFFFFF
            return True
        return kind in _IMMEDIATES and _set_immediate(ins, i, kind, op.value)
    if isinstance(op, Reg):
        if kind in _FIXED:
            fits: bool = _FIXED[kind] == op.number
        else:
            family = re.split(r"(?<=\d)P3_|_", kind)[0]
            fits = family in _CLASSES and not kind.endswith("_MPX") and _CLASSES[family](named(op.number))
        if fits:
            ins.set_op_kind(i, OpKind.REGISTER)
            ins.set_op_register(i, named(op.number))
        return fits
    if "MEM" not in kind or kind.endswith(("_MPX", "_REG_MEM")):
        return False
    if ("VSIB" in kind) != is_vector(op.index):
        return False
    if kind == "MEM_OFFS" and (op.base, op.index) != (Register.NONE, Register.NONE):
        return False
    _set_memory(ins, i, op, bits)
    return True


@functools.cache
def _has_near_form(code: Code_) -> bool:
    """Whether a rel8 branch has a rel32 twin, so that ``short`` has a meaning (LOOP and JRCXZ have none)."""
    return OpCodeInfo(code).mnemonic not in (
        Mnemonic.LOOP, Mnemonic.LOOPE, Mnemonic.LOOPNE, Mnemonic.JRCXZ, Mnemonic.JECXZ, Mnemonic.JCXZ,
    )  # fmt: skip


def encode(ins: Instruction, ip: int, bits: int = 64) -> bytes:
    """Machine code of ``ins`` at ``ip``. Raises ValueError where there is none."""
    encoder = Encoder(bits)
    encoder.encode(ins, ip)
    return encoder.take_buffer()


class _Symbols(dict[str, int]):
    """Labels and names; in the first pass an unknown label stands for the line it is named in."""

    def __init__(self, known: Mapping[str, int], guess: int | None) -> None:
        super().__init__(known)
        self.guess = guess

    def __missing__(self, name: str) -> int:
        if self.guess is None:
            raise AssemblyError(f"unknown name {name!r}")
        return self.guess


def _evaluate(text: str, symbols: _Symbols) -> int:
    try:
        value = eval(text, {"__builtins__": {}}, symbols)
    except (SyntaxError, TypeError) as error:
        raise AssemblyError(f"cannot read {text!r}") from error
    if not isinstance(value, int):
        raise AssemblyError(f"{text!r} is not a number")
    return value


def _parse_memory(text: str, segment: int, size: int, symbols: _Symbols) -> Mem:
    base: int = Register.NONE
    index: int = Register.NONE
    scale = 1
    rest = ""
    for term in re.findall(r"[+-]?[^+-]+", text.replace(" ", "")):
        name, _, factor = term.lstrip("+").partition("*")
        if name.lower() not in REGISTERS:
            rest += term
        elif factor or base != Register.NONE:
            index, scale = REGISTERS[name.lower()], int(factor or 1)
        else:
            base = REGISTERS[name.lower()]
    if is_vector(base):
        base, index = index, base
    return Mem(base, index, scale, _evaluate(rest.lstrip("+"), symbols) if rest else 0, segment, size)


def _parse_operand(text: str, symbols: _Symbols) -> Operand:
    text = text.strip()
    lowered = text.lower()
    if lowered in REGISTERS:
        return Reg(REGISTERS[lowered])
    if m := re.fullmatch(r"(?i)(?:(\w+)\s+)?(?:(\w\w):)?\[(.*)\]", text):
        word, segment, inside = m.groups()
        if word and word.lower() not in SIZES:
            raise AssemblyError(f"unknown size {word!r}")
        return _parse_memory(
            inside,
            REGISTERS[segment.lower()] if segment else Register.NONE,
            SIZES[word.lower()] if word else 0,
            symbols,
        )
    if lowered.startswith("far "):
        selector, offset = text[4:].split(":")
        return Far(_evaluate(selector, symbols), _evaluate(offset, symbols))
    short = lowered.startswith("short ")
    return Imm(_evaluate(text[6:] if short else text, symbols), short)


def _split(text: str) -> list[str]:
    """Operands, at the commas outside brackets and parentheses."""
    return [p for p in re.split(r",(?![^\[(]*[\])])", text) if p.strip()] if text.strip() else []


def _instruction(text: str, symbols: _Symbols, ip: int, bits: int, code: Code_ | None) -> tuple[bytes, Code_]:
    """Bytes and Code of one line. ``code`` pins the encoding chosen in the first pass."""
    words = text.split(None, 1)
    prefixes = []
    while words and words[0].lower() in PREFIXES and len(words) > 1:
        prefixes.append(words[0].lower())
        words = words[1].split(None, 1)
    mnemonic = _CONDITION.sub(lambda m: m[1] + _CONDITIONS[m[2]], words[0].upper())
    operands = tuple(_parse_operand(t, symbols) for t in _split(words[1] if len(words) > 1 else ""))
    best: tuple[bytes, Code_] | None = None
    sizes = set()
    unsized = any(isinstance(o, Mem) and not o.size for o in operands) and not any(isinstance(o, Reg) for o in operands)
    for candidate in _candidates(mnemonic, bits) if code is None else (code,):
        size = memory_size(candidate)
        if any(isinstance(o, Mem) and o.size and size and o.size != size for o in operands):
            continue
        ins = build(candidate, operands, bits)
        if ins is None:
            continue
        ins.has_lock_prefix = "lock" in prefixes
        ins.has_rep_prefix = any(p in ("rep", "repe", "repz") for p in prefixes)
        ins.has_repne_prefix = any(p in ("repne", "repnz") for p in prefixes)
        try:
            machine = encode(ins, ip, bits)
        except ValueError:
            continue
        sizes.add(size)
        if best is None or len(machine) < len(best[0]):
            best = machine, candidate
    if best is None:
        raise AssemblyError(f"no encoding fits {text!r}")
    if unsized and len(sizes) > 1:
        raise AssemblyError(f"say the size of the memory operand: {text!r}")
    return best


_DATA = {"db": 1, "dw": 2, "dd": 4, "dq": 8}


@dataclass
class Program:
    """Machine code and where its labels are."""

    address: int
    code: bytes
    labels: dict[str, int]

    def __getitem__(self, label: str) -> int:
        return self.labels[label]


def assemble(text: str, address: int, symbols: Mapping[str, int] | None = None, bits: int = 64) -> Program:
    """Assemble ``text`` to run at ``address`` in a code segment of ``bits`` bits."""
    labels: dict[str, int] = {}
    chosen: list[Code_ | None] = []
    out = bytearray()
    for final in (False, True):
        known = _Symbols({**(symbols or {}), **labels}, None if final else address)
        out.clear()
        codes = iter(chosen.copy())
        chosen.clear()
        for number, raw in enumerate(text.splitlines(), 1):
            line = raw.split(";")[0].strip()
            while m := re.match(r"(\w+):(?!\[)\s*", line):
                labels[m[1]] = address + len(out)
                line = line[m.end() :]
            if not line:
                continue
            try:
                if not final:
                    known.guess = address + len(out)
                word, _, rest = line.partition(" ")
                if word in _DATA:
                    size = _DATA[word]
                    for part in _split(rest):
                        out += (_evaluate(part, known) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
                elif word == "align":
                    out += bytes(-(address + len(out)) % _evaluate(rest, known))
                elif word == "space":
                    out += bytes(_evaluate(rest, known))
                else:
                    machine, code = _instruction(line, known, address + len(out), bits, next(codes) if final else None)
                    chosen.append(code)
                    out += machine
            except AssemblyError as error:
                raise AssemblyError(f"line {number}: {error}") from None
    return Program(address, bytes(out), labels)
