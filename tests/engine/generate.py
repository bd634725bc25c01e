"""Random instruction sequences: ``Generator(seed).sequence()``.

The generator knows the value of every register that the sequence has not overwritten yet, and so aims its memory
operands: mostly inside the data area, at page ends, across pages, and sometimes at read-only or unmapped pages. Drawn
uniformly from iced's tables within a group, every instruction form comes up in the long run; what needs company (a
branch and its target, a string instruction and its count, a gather and its indices) is a snippet.

A sequence must end: backward branches are counted, and nothing else goes backwards but by a wild return address, whose
page holds nothing or another sequence of the same batch.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from iced_x86 import (
    Code,
    Code_,
    Instruction,
    InstructionInfoFactory,
    OpAccess,
    OpCodeInfo,
    OpKind,
    Register,
    RegisterExt,
)

from tests.engine.assemble import CODES, IMPLICIT, REGISTERS, Imm, Mem, Operand, Reg, build, encode, memory_size, named
from tests.engine.forms import HOST, Form, forms, gathers
from tests.engine.place import (
    AC,
    ARITHMETIC,
    CODE,
    DATA,
    DATA_SIZE,
    FIRST_DATA,
    GPRS,
    LAST_DATA,
    LOW_DATA,
    PAGE,
    READ_ONLY,
    SAVE,
    STACK,
    XSAVE_SIZE,
    code_start,
)
from tests.engine.sequence import Item, Label, RandomSequence

INDEX_TABLE = FIRST_DATA
"""Small signed dwords, and at 0x100 small signed qwords: gather indices."""
POINTER_TABLE = FIRST_DATA + 0x200
"""Pointers into the data area, for XLAT tables and loaded pointers."""

_GPR64: tuple[int, ...] = tuple(REGISTERS[name] for name in GPRS)
_RAX, _RCX, _RDX, _RBX, _RSP, _RBP, _RSI, _RDI = _GPR64[:8]
_EAX, _ECX, _EDX = Register.EAX, Register.ECX, Register.EDX
_GPR = {
    64: _GPR64,
    32: tuple(r - Register.RAX + Register.EAX for r in _GPR64),
    16: tuple(r - Register.RAX + Register.AX for r in _GPR64),
    8: tuple(range(Register.AL, Register.R15L + 1)),
}
_M64 = (1 << 64) - 1
_INTERESTING = (
    0, 1, 2, 7, 8, 0x1F, 0x20, 0x3F, 0x40, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
    0x100000000, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF80000000, 0x5555555555555555,
    0xAAAAAAAAAAAAAAAA, 0x00FF00FF00FF00FF, 0x123456789ABCDEF0, 0xFFFFFFFFFFFFFF80, 0xFFFFFFFFFFFF8000,
)  # fmt: skip
_DOUBLES = (
    0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e300, -1e300, 1e-300, 5e-324, -2.2250738585072014e-308, 1.7976931348623157e308,
    float("inf"), float("-inf"), float("nan"), 2147483647.0, -2147483648.0, 9.3e18, 65504.0, 0.1, 1e38, 1e-45,
)  # fmt: skip
CONDITIONS = ("O", "NO", "B", "AE", "E", "NE", "BE", "A", "S", "NS", "P", "NP", "L", "GE", "LE", "G")
_JCC = tuple(CODES[f"J{condition}_REL32_64"] for condition in CONDITIONS)
_JCC_SHORT = tuple(CODES[f"J{condition}_REL8_64"] for condition in CONDITIONS)
_LOOPS = (Code.LOOP_REL8_64_RCX, Code.LOOPNE_REL8_64_RCX, Code.LOOPE_REL8_64_RCX, Code.LOOP_REL8_64_ECX)
STRINGS = tuple(
    CODES[name]
    for name in (
        "MOVSB_M8_M8", "MOVSW_M16_M16", "MOVSD_M32_M32", "MOVSQ_M64_M64",
        "CMPSB_M8_M8", "CMPSW_M16_M16", "CMPSD_M32_M32", "CMPSQ_M64_M64",
        "STOSB_M8_AL", "STOSW_M16_AX", "STOSD_M32_EAX", "STOSQ_M64_RAX",
        "LODSB_AL_M8", "LODSW_AX_M16", "LODSD_EAX_M32", "LODSQ_RAX_M64",
        "SCASB_AL_M8", "SCASW_AX_M16", "SCASD_EAX_M32", "SCASQ_RAX_M64",
    )
)  # fmt: skip
_PREFIXES = (b"\x2e", b"\x3e", b"\x26", b"\x36")
"""CS, DS, ES and SS overrides: without meaning in 64-bit mode."""

_POOL = 2048
"""Values that one generator fills vector and x87 registers with."""
_WRITES = frozenset((OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))
_info = InstructionInfoFactory()


def data_image(rng: random.Random) -> bytes:
    """Initial contents of the data area: noise, floating point numbers, indices, pointers."""
    image = bytearray(rng.randbytes(DATA_SIZE))
    for _ in range(600):
        offset = rng.randrange(FIRST_DATA, DATA_SIZE - 32) & ~7
        kind = rng.randrange(4)
        if kind == 0:
            struct.pack_into("<d", image, offset, rng.choice(_DOUBLES))
        elif kind == 1:
            struct.pack_into("<2f", image, offset, *(_single(rng.choice(_DOUBLES)) for _ in range(2)))
        elif kind == 2:
            image[offset : offset + 10] = _extended(rng)
        else:
            struct.pack_into("<Q", image, offset, rng.choice(_INTERESTING))
    for i in range(64):
        struct.pack_into("<i", image, INDEX_TABLE + 4 * i, rng.randrange(-64, 256))
    for i in range(32):
        struct.pack_into("<q", image, INDEX_TABLE + 0x100 + 8 * i, rng.randrange(-64, 256))
        struct.pack_into("<Q", image, POINTER_TABLE + 8 * i, DATA + rng.randrange(FIRST_DATA + 0x400, LAST_DATA))
    image[SAVE : SAVE + PAGE] = bytes(PAGE)
    return bytes(image)


def _single(value: float) -> float:
    return value if abs(value) < 3e38 or value in (float("inf"), float("-inf")) or value != value else 3e38


def _extended(rng: random.Random) -> bytes:
    """An 80-bit number of any class, unnormal ones included."""
    mantissa = rng.choice((0, 1 << 63, 3 << 62, (1 << 64) - 1, rng.getrandbits(64) | 1 << 63, rng.getrandbits(64), 1))
    exponent = rng.choice((0, 1, 0x3FFF, 0x4000, 0x403E, 0x43FE, 0x7FFE, 0x7FFF, rng.randrange(0x3FC0, 0x4050)))
    return struct.pack("<QH", mantissa, exponent | rng.getrandbits(1) << 15)


class Generator:
    """Makes sequences; ``seed`` and the number of the sequence decide everything about each."""

    bits = 64

    def __init__(self, seed: str, offered: frozenset[str] = HOST, supervisor: bool = False) -> None:
        self.seed = seed
        self.offered = offered
        self.supervisor = supervisor
        """The sequence will run at CPL 0, where POPF reaches more and selectors differ from the host process's."""
        self.alignment = 0.04
        """How many of the user's sequences run with alignment checked."""
        self.groups = forms(offered, self.bits)
        self.rng = random.Random(seed)
        self._vectors = [self._vector() for _ in range(_POOL)]
        self._extendeds = [_extended(self.rng) for _ in range(_POOL)]
        self._count = 0

    # One sequence

    def sequence(self) -> RandomSequence:
        """The next sequence."""
        seed = f"{self.seed}/{self._count}"
        self._count += 1
        while True:
            self.rng = random.Random(seed)
            made = self._sequence(seed)
            self._repair(made)
            try:
                made.layout(code_start(self.bits))
            except ValueError:  # a short branch that does not reach
                seed += "'"
                continue
            return made

    def _sequence(self, seed: str) -> RandomSequence:
        rng = self.rng
        self.items: list[Item | Label] = []
        self.reserved: set[int] = set()
        self.budget = rng.randint(1, 12)
        self.known: dict[int, int] = {}
        for register in _GPR64:
            self.known[register] = self._initial(register)
        self.fs_base = DATA + rng.randrange(FIRST_DATA, FIRST_DATA + 0x800)
        self.gs_base = DATA + rng.randrange(FIRST_DATA, FIRST_DATA + 0x800) & ~7
        registers = tuple(self.known[r] for r in _GPR64)
        flags = 0x202 | rng.getrandbits(12) & ARITHMETIC | (0x400 if rng.random() < 0.05 else 0)
        if not self.supervisor and rng.random() < self.alignment:
            flags |= AC
        xsave = self._xsave()
        self.theme = rng.choices(("mixed", "integer", "sse", "avx", "x87"), (30, 40, 10, 10, 10))[0]
        while self.budget > 0:
            self._step()
        return RandomSequence(seed, self.items, registers, flags, self.fs_base, self.gs_base, xsave, self.bits)

    def _initial(self, register: int) -> int:
        rng = self.rng
        if register == _RSP:
            return DATA + STACK + PAGE + 8 * rng.randrange(-64, 64) + (rng.randrange(8) if rng.random() < 0.05 else 0)
        kind = rng.random()
        if kind < 0.35:
            return DATA + self._place(8, 0.6)
        if kind < 0.5:
            return LOW_DATA + self._place(8, 0.6)
        if kind < 0.65:
            return rng.randrange(-64, 256) & _M64
        if kind < 0.85:
            return rng.choice(_INTERESTING)
        return rng.getrandbits(64) >> rng.choice((0, 0, 1, 16, 32, 48))

    def _place(self, size: int, aligned: float) -> int:
        """An offset in the data area where an operand of ``size`` bytes shall lie."""
        rng = self.rng
        kind = rng.random()
        size = max(size, 1)
        if kind < 0.80:
            offset = rng.randrange(FIRST_DATA + 0x400, LAST_DATA - 1024)
        elif kind < 0.93:  # across two writable pages
            return rng.choice((2, 3, 4)) * PAGE - rng.randrange(0, size + 1)
        elif kind < 0.95:  # across, into the read-only page
            return READ_ONLY - rng.randrange(0, size + 1)
        elif kind < 0.97:
            offset = rng.randrange(READ_ONLY, READ_ONLY + PAGE)
        elif kind < 0.985:  # across the ends
            return rng.choice((READ_ONLY + PAGE, FIRST_DATA)) - rng.randrange(0, size + 1)
        else:
            offset = rng.randrange(READ_ONLY + PAGE, STACK)
        if rng.random() < aligned:
            offset &= -(1 << (size - 1).bit_length())
        return offset

    def _xsave(self) -> bytes:
        rng = self.rng
        image = bytearray(XSAVE_SIZE)
        control = 0x37F
        if rng.random() < 0.5:
            control = 0x40 | 0x3F | rng.choice((0, 0x200, 0x300)) | rng.randrange(4) << 10
        if rng.random() < 0.08:
            control &= ~rng.choice((1, 2, 4, 8, 0x10, 0x20, 0x3F))
        status = rng.choice((0, 0, rng.randrange(8) << 11 | rng.getrandbits(3) << 8))
        struct.pack_into("<HHB", image, 0, control, status, rng.choice((0, 0xFF, 0xFF, 0xF0, rng.getrandbits(8))))
        mxcsr = 0x1F80
        if rng.random() < 0.4:
            mxcsr |= rng.randrange(4) << 13 | rng.choice((0, 0x8000, 0x40, 0x8040))
        if rng.random() < 0.06:
            mxcsr &= ~rng.choice((0x80, 0x100, 0x200, 0x400, 0x800, 0x1000, 0x1F80))
        struct.pack_into("<I", image, 24, mxcsr)
        for i, extended in enumerate(rng.choices(self._extendeds, k=8)):
            image[32 + 16 * i : 42 + 16 * i] = extended
        image[160:416] = b"".join(rng.choices(self._vectors, k=16))
        avx = "AVX" in self.offered
        if avx:
            image[576:832] = b"".join(rng.choices(self._vectors, k=16))
        struct.pack_into("<Q", image, 512, 7 if avx else 3)
        return bytes(image)

    def _vector(self) -> bytes:
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            return struct.pack("<2d", rng.choice(_DOUBLES), rng.uniform(-100, 100))
        if kind == 1:
            return struct.pack("<4f", *(_single(rng.choice(_DOUBLES)) for _ in range(3)), rng.uniform(-100, 100))
        if kind == 2:
            return struct.pack("<4i", *(rng.randrange(-128, 128) for _ in range(4)))
        return rng.randbytes(16)

    def _repair(self, made: RandomSequence) -> None:
        """Let no instruction read a flag that is undefined: CMP defines them all again."""
        while (index := made.tainted_reader()) is not None:
            compare = build(Code.CMP_AL_IMM8, (Reg(Register.AL), Imm(self.rng.randrange(256))))
            assert compare is not None
            made.items.insert(index, Item(compare))

    # Pieces

    def _emit(self, ins: Instruction, target: Label | None = None) -> None:
        prefix = self.rng.choice(_PREFIXES) if self.rng.random() < 0.02 and not ins.segment_prefix else b""
        self.items.append(Item(ins, target, prefix))
        self.budget -= 1
        for used in _info.info(ins).used_registers():
            if used.access in _WRITES:
                self.known.pop(RegisterExt.full_register(used.register), None)

    def _make(self, code: Code_, *operands: Operand, target: Label | None = None) -> None:
        ins = build(code, operands)
        assert ins is not None, (code, operands)
        self._emit(ins, target)

    def _load(self, register: int, value: int) -> None:
        """Give a register a value that the generator goes on knowing."""
        value &= _M64
        if value < 1 << 32:
            self._make(Code.MOV_R32_IMM32, Reg(register - _RAX + _EAX), Imm(value))
        elif value >= (1 << 64) - (1 << 31):
            self._make(Code.MOV_RM64_IMM32, Reg(register), Imm(value))
        else:
            self._make(Code.MOV_R64_IMM64, Reg(register), Imm(value))
        self.known[register] = value

    @contextmanager
    def _reserve(self, *registers: int) -> Iterator[None]:
        """Registers that nothing inside may write; with RSP among them, nothing may push or pop."""
        before = self.reserved
        self.reserved = before | set(registers)
        yield
        self.reserved = before

    def _free(self) -> int:
        return self.rng.choice([r for r in _GPR64 if r != _RSP and r not in self.reserved])

    def _body(self, limit: int) -> None:
        for _ in range(self.rng.randint(0, limit)):
            self._plain()

    def _step(self) -> None:
        if self.rng.random() < 0.27 and self.theme in ("mixed", "integer"):
            snippets: tuple[tuple[Callable[[], None], int], ...] = (
                (self._branch, 20), (self._jump, 6), (self._call, 8), (self._table, 5), (self._loop, 10),
                (self._string, 16), (self._flags_on_stack, 8), (self._divide, 6), (self._exchange, 5), (self._shift, 8),
                (self._bit_string, 8),
                (self._frame, 4), (self._trap, 2), (self._vector_store, 4),
            )  # fmt: skip
            self.rng.choices([s for s, _ in snippets], [w for _, w in snippets])[0]()
        elif self.rng.random() < 0.06 and self.theme != "integer":
            choices: list[Callable[[], None]] = [self._save, self._x87_environment, self._vector_store]
            if "AVX2" in self.offered:
                choices += [self._gather, self._gather]
            self.rng.choice(choices)()
        else:
            self._plain()

    def _plain(self) -> None:
        """One instruction of the tables."""
        weights = {
            "mixed": {"integer": 50, "vex integer": 6, "x87": 12, "sse": 16, "avx": 16},
            "integer": {"integer": 88, "vex integer": 10, "sse": 2},
            "sse": {"sse": 80, "integer": 20},
            "avx": {"avx": 75, "sse": 10, "integer": 15},
            "x87": {"x87": 85, "integer": 10, "sse": 5},
        }[self.theme]
        names = [n for n in weights if n in self.groups]
        while True:
            group = self.rng.choices(names, [weights[n] for n in names])[0]
            ins = self._instance(self.rng.choice(self.groups[group]))
            if ins is not None:
                self._emit(ins)
                return

    def _instance(self, form: Form) -> Instruction | None:
        """The form with random operands; None where they do not go together or touch what is reserved."""
        rng = self.rng
        if self.supervisor and ("SREG" in form.name or form.name.endswith(("_FS", "_GS"))):
            return None
        operands: list[Operand] = []
        has_memory = False
        implicit = any(k in IMPLICIT for k in form.kinds)
        if implicit and form.name.startswith("XLAT") and not self._points(_RBX):
            return None
        for kind in form.kinds:
            if kind in IMPLICIT or implicit:
                continue
            operand = self._operand(kind, form)
            if operand is None:
                return None
            has_memory |= isinstance(operand, Mem)
            operands.append(operand)
        ins = build(form.code, tuple(operands), self.bits)
        if ins is None:
            return None
        if form.lockable and rng.random() < (0.3 if has_memory else 0.005):
            ins.has_lock_prefix = True
        try:
            encode(ins, code_start(self.bits), self.bits)
        except ValueError:
            return None
        for used in _info.info(ins).used_registers():
            if used.access in _WRITES:
                register = RegisterExt.full_register(used.register)
                if register in self.reserved or (
                    register == _RSP and not ins.is_stack_instruction and rng.random() > 0.01
                ):
                    return None
        return ins

    def _operand(self, kind: str, form: Form) -> Operand | None:
        rng = self.rng
        family = kind.split("_")[0]
        fixed = getattr(Register, kind, None)
        if fixed is not None:
            return Reg(fixed)
        if kind.startswith("IMM"):
            return Imm(1 if kind == "IMM8_CONST_1" else self._immediate(kind))
        if kind == "STI_OPCODE":
            return Reg(Register.ST0 + rng.randrange(8))
        if family == "SEG":
            return Reg(rng.choice((Register.ES, Register.CS, Register.SS, Register.DS, Register.FS, Register.GS)))
        if "MEM" in kind and (family == "MEM" or rng.random() < 0.55):
            return self._memory(form)
        if family in ("R8", "R16", "R32", "R64"):
            return Reg(rng.choice(_GPR[int(family[1:])]))
        if family in ("XMM", "YMM"):
            return Reg((Register.XMM0 if family == "XMM" else Register.YMM0) + rng.randrange(16))
        if family == "MM":
            return Reg(Register.MM0 + rng.randrange(8))
        return None

    def _immediate(self, kind: str) -> int:
        rng = self.rng
        bits = int(kind[3:].split("S")[0].split("_")[0])
        value = rng.choice((rng.getrandbits(bits), rng.choice(_INTERESTING) & ((1 << bits) - 1), rng.randrange(16)))
        if "SEX" in kind:
            value -= value >> (bits - 1) << bits
        return value

    # Memory operands

    def _points(self, register: int) -> bool:
        value = self.known.get(register)
        return value is not None and any(b + FIRST_DATA <= value < b + LAST_DATA - 256 for b in (DATA, LOW_DATA))

    def _memory(self, form: Form) -> Mem | None:
        size = memory_size(form.code) or 16
        if form.name.startswith("LEA") and self.rng.random() < 0.5:
            return self._anything()
        if form.kinds.count("MEM_OFFS"):
            base = self.rng.choice((DATA, DATA, LOW_DATA))
            return Mem(disp=base + self._place(size, 0.5))
        needs_alignment = size >= 16 and not form.name.startswith("VEX_")
        return self._aimed(self._place(size, 0.85 if needs_alignment else 0.5))

    def _anything(self) -> Mem:
        """Operands of LEA go anywhere."""
        rng = self.rng
        registers = _GPR[rng.choice((64, 64, 64, 32))]
        index = rng.choice(registers)
        none = Register.NONE
        index = none if index in (Register.RSP, Register.ESP) or rng.random() < 0.3 else index
        disp = rng.choice((0, rng.randrange(-128, 128), rng.getrandbits(31)))
        return Mem(rng.choice(registers), index, rng.choice((1, 2, 4, 8)), disp)

    def _aimed(self, offset: int) -> Mem | None:
        """An operand that addresses ``offset`` of the data area, through the registers that are known."""
        rng = self.rng
        if rng.random() < 0.01:  # non-canonical, or nothing there
            known = [r for r in self.known if r != _RSP]
            return Mem(rng.choice(known), disp=rng.choice((0, 0x7FFFFFFF, -0x80000000))) if known else None
        for _ in range(12):
            form = rng.randrange(9)
            if form == 0:
                return Mem(Register.RIP, disp=DATA + offset)
            if form == 1:
                return Mem(disp=LOW_DATA + offset)
            segment, base, width = Register.NONE, 0, 64
            if form == 2:
                segment, base = rng.choice(((Register.FS, self.fs_base), (Register.GS, self.gs_base)))
                if rng.random() < 0.4:
                    return Mem(disp=DATA + offset - base, segment=segment)
            elif form == 3:
                width = 32
            found = self._through_registers((DATA + offset - base) & _M64, width, segment)
            if found is not None:
                return found
        return Mem(Register.RIP, disp=DATA + offset)

    def _through_registers(self, address: int, width: int, segment: int) -> Mem | None:
        rng = self.rng
        if not self.known:
            return None
        mask = (1 << width) - 1
        if width == 32 or (segment == Register.NONE and rng.random() < 0.3):
            address = address - DATA + LOW_DATA
        base = rng.choice(list(self.known)) if rng.random() < 0.9 else Register.NONE
        index = rng.choice(list(self.known)) if rng.random() < 0.45 or base == Register.NONE else Register.NONE
        if index == _RSP:
            return None
        scale = rng.choice((1, 2, 4, 8)) if index != Register.NONE else 1
        have = self.known.get(base, 0) + self.known.get(index, 0) * scale
        disp = (address - have) & mask
        disp -= disp >> (width - 1) << width
        if not -(1 << 31) <= disp < 1 << 31:
            return None
        if width == 32:
            base = base - _RAX + _EAX if base != Register.NONE else base
            index = index - _RAX + _EAX if index != Register.NONE else index
        return Mem(base, index, scale, disp, segment)

    def _pointer(self, register: int, size: int = 8) -> None:
        """Make a register point into the data area."""
        if not self._points(register) or self.rng.random() < 0.5:
            base = self.rng.choice((DATA, LOW_DATA))
            self._load(register, base + self._place(size, 0.5))

    # Snippets

    def _branch(self) -> None:
        end = Label()
        self._emit(self._branch_to(self.rng.choice(_JCC if self.rng.random() < 0.6 else _JCC_SHORT)), end)
        before = dict(self.known)
        self._body(3)
        self._forget(before)
        self.items.append(end)

    @staticmethod
    def _branch_to(code: Code_) -> Instruction:
        return Instruction.create_branch(code, CODE)

    def _forget(self, before: dict[int, int]) -> None:
        """After code that may have been skipped, know only what holds either way."""
        self.known = {r: v for r, v in self.known.items() if before.get(r) == v}

    def _jump(self) -> None:
        over = Label()
        self._emit(self._branch_to(self.rng.choice((Code.JMP_REL32_64, Code.JMP_REL8_64))), over)
        before = dict(self.known)
        self._body(2)
        self.known = before
        self.items.append(over)

    def _call(self) -> None:
        """call f; jmp over; f: ...; ret; over:"""
        function, over = Label(), Label()
        how = self.rng.randrange(3)
        if how == 0:
            self._emit(self._branch_to(Code.CALL_REL32_64), function)
        else:
            register = self._free()
            self._make(Code.LEA_R64_M, Reg(register), Mem(Register.RIP, disp=CODE), target=function)
            if how == 1:
                self._make(Code.CALL_RM64, Reg(register))
            else:
                self._make(Code.PUSH_R64, Reg(register))
                self._make(Code.CALL_RM64, Mem(_RSP))
                self._make(Code.LEA_R64_M, Reg(_RSP), Mem(_RSP, disp=8))
        self._emit(self._branch_to(Code.JMP_REL32_64), over)
        self.items.append(function)
        self._body(3)
        if self.rng.random() < 0.2:
            self._make(Code.RETNQ_IMM16, Imm(8 * self.rng.randrange(4)))
        else:
            self._make(Code.RETNQ)
        self.items.append(over)

    def _table(self) -> None:
        """A jump through a table of two entries behind the jump."""
        pointer, index = self._free(), self._free()
        if pointer == index:
            return
        table, ends = Label(), (Label(), Label())
        self._load(index, self.rng.randrange(2))
        self._make(Code.LEA_R64_M, Reg(pointer), Mem(Register.RIP, disp=CODE), target=table)
        self._make(Code.JMP_RM64, Mem(pointer, index, 8))
        self.items += [table, Item(target=ends[0]), Item(target=ends[1]), ends[0]]
        before = dict(self.known)
        self._body(2)
        self.items.append(ends[1])
        self._forget(before)

    def _loop(self) -> None:
        """A body of a few instructions, some times over."""
        rng = self.rng
        kind = rng.randrange(3)
        counter = _RCX if kind == 0 else self._free()
        if counter in self.reserved:
            return
        top = Label()
        self._load(counter, rng.randint(1, 6))
        essential = [self.items[-1]]
        self.items.append(top)
        with self._reserve(counter):
            self._body(4)
        if kind == 0:
            self._emit(self._branch_to(rng.choice(_LOOPS)), top)
        else:
            if kind == 1:
                self._make(Code.DEC_RM64, Reg(counter))
            else:
                self._make(Code.SUB_RM64_IMM8, Reg(counter), Imm(1))
            essential.append(self.items[-1])
            self._emit(self._branch_to(Code.JNE_REL32_64), top)
        for item in essential:
            assert isinstance(item, Item)
            item.keep = True
        self.known.pop(counter, None)

    def _string(self) -> None:
        rng = self.rng
        code = rng.choice(STRINGS)
        if {_RSI, _RDI, _RCX, _RAX} & self.reserved:
            return
        wide = rng.random() < 0.85
        for register in (_RSI, _RDI):
            if wide:
                self._pointer(register, 64)
            else:
                self._load(register, LOW_DATA + self._place(64, 0.5))
        ins = build(code, (), 64 if wide else 32)
        assert ins is not None
        if rng.random() < 0.7:
            low = {register for register in (_RSI, _RDI) if self.known[register] < DATA}
            if "MOVS" in str(ins).upper() and len(low) == 1:
                # One page under two addresses: fast string operations see an overlap of addresses, not one of frames.
                (register,) = low
                self._load(register, self.known[register] - LOW_DATA + DATA)
            self._load(_RCX, rng.choice((0, 1, 2, 3, rng.randrange(64), rng.randrange(700))))
            ins.has_rep_prefix = True
            if "CMPS" in str(ins).upper() or "SCAS" in str(ins).upper():
                ins.has_rep_prefix = rng.random() < 0.5
                ins.has_repne_prefix = not ins.has_rep_prefix
        if rng.random() < 0.1 and "di" not in str(ins).split(",")[0]:
            ins.segment_prefix = rng.choice((Register.FS, Register.GS))
        if rng.random() < 0.2:
            self._make(Code.STD)
        self._emit(ins)
        if rng.random() < 0.5:
            self._make(Code.CLD)

    def _flags_on_stack(self) -> None:
        rng = self.rng
        kind = rng.randrange(3)
        if kind == 0:
            flags = 0x202 | rng.getrandbits(12) & (ARITHMETIC | 0x400) | (1 << 21 if rng.random() < 0.2 else 0)
            self._make(Code.PUSHQ_IMM32, Imm(flags))
            self._make(Code.POPFQ)
        elif kind == 1:
            self._make(Code.PUSHFQ)
            self._make(Code.POP_R64, Reg(self._free()))
        else:
            self._make(Code.PUSHFQ)
            with self._reserve(_RSP):
                self._body(2)
            self._make(Code.POPFQ)

    def _divide(self) -> None:
        """A division that mostly does not fault."""
        if {_RAX, _RDX} & self.reserved:
            return
        form = self.rng.choice([f for f in self.groups["integer"] if f.name.startswith(("DIV", "IDIV"))])
        if self.rng.random() < 0.6:
            self._make(Code.XOR_R32_RM32, Reg(_EDX), Reg(_EDX))
        else:
            self._make(self.rng.choice((Code.CQO, Code.CDQ, Code.CWD)))
        if self.rng.random() < 0.3:
            self._make(Code.CBW)
        ins = self._instance(form)
        if ins is not None:
            self._emit(ins)

    def _exchange(self) -> None:
        """A compare and exchange that succeeds as often as not."""
        if _RAX in self.reserved:
            return
        form = self.rng.choice([f for f in self.groups["integer"] if f.name.startswith("CMPXCHG")])
        ins = self._instance(form)
        if ins is None:
            return
        size = memory_size(form.code)
        if size <= 8 and ins.op0_kind == OpKind.MEMORY and self.rng.random() < 0.6 and ins.memory_base == Register.RIP:
            offset = ins.memory_displacement
            code, register = {
                1: (Code.MOV_R8_RM8, Register.AL), 2: (Code.MOV_R16_RM16, Register.AX),
                4: (Code.MOV_R32_RM32, Register.EAX), 8: (Code.MOV_R64_RM64, Register.RAX),
            }[size]  # fmt: skip
            self._make(code, Reg(register), Mem(Register.RIP, disp=offset))
        self._emit(ins)

    def _shift(self) -> None:
        """A shift by CL, zero among the counts."""
        if _RCX in self.reserved:
            return
        count = self.rng.choice((0, 1, 8, 31, 32, 63, 64, 0x80, self.rng.randrange(256)))
        self._make(Code.MOV_R8_IMM8, Reg(Register.CL), Imm(count))
        ins = self._instance(self.rng.choice([f for f in self.groups["integer"] if f.name.endswith("_CL")]))
        if ins is not None:
            self._emit(ins)

    def _bit_string(self) -> None:
        """BT and its family on memory with a register offset, which reaches far outside the operand."""
        register = self._free()
        rng = self.rng
        self._load(
            register, rng.choice((rng.randrange(-4096, 8192), rng.randrange(-80000, 160000), rng.getrandbits(64)))
        )
        bits = self.rng.choice((16, 32, 64))
        code = getattr(Code, f"{self.rng.choice(('BT', 'BTS', 'BTR', 'BTC'))}_RM{bits}_R{bits}")
        memory = self._aimed(self._place(8, 0.5))
        if memory is not None:
            ins = build(code, (memory, Reg(_GPR[bits][_GPR64.index(register)])))
            if ins is not None:
                ins.has_lock_prefix = OpCodeInfo(code).can_use_lock_prefix and rng.random() < 0.3
                self._emit(ins)

    def _frame(self) -> None:
        """ENTER ... LEAVE."""
        if _RBP in self.reserved:
            return
        self._make(Code.ENTERQ_IMM16_IMM8, Imm(8 * self.rng.randrange(16)), Imm(self.rng.choice((0, 0, 0, 1, 2, 5))))
        with self._reserve(_RBP):
            self._body(2)
        self._make(Code.LEAVEQ)

    def _trap(self) -> None:
        code = self.rng.choice((Code.INT3, Code.UD2, Code.INT_IMM8, Code.HLT, Code.CLI))
        if self.supervisor and code not in (Code.INT3, Code.UD2):
            return
        self._make(code, *((Imm(0x21),) if code == Code.INT_IMM8 else ()))

    def _save(self) -> None:
        """FXSAVE and XSAVE, what may come between, and the state back."""
        if {_RAX, _RDX} & self.reserved:
            return
        mask = self.rng.randrange(8)
        where = Mem(Register.RIP, disp=DATA + SAVE)
        saves = [(Code.FXSAVE_M512BYTE, Code.FXRSTOR_M512BYTE), (Code.FXSAVE64_M512BYTE, Code.FXRSTOR64_M512BYTE)]
        if "XSAVE" in self.offered:
            saves += [(Code.XSAVE_MEM, Code.XRSTOR_MEM), (Code.XSAVE64_MEM, Code.XRSTOR64_MEM)]
            saves += [(Code.XSAVEOPT64_MEM, Code.XRSTOR64_MEM)]
        save, restore = self.rng.choice(saves)
        self._load(_RDX, 0)
        self._load(_RAX, mask)
        self._make(save, where)
        with self._reserve(_RAX, _RDX):
            self._body(3)
        if self.rng.random() < 0.7:
            if self.rng.random() < 0.3:
                self._load(_RAX, self.rng.randrange(8))
            self._make(restore, where)

    def _x87_environment(self) -> None:
        where = Mem(Register.RIP, disp=DATA + SAVE)
        pairs = ((Code.FNSAVE_M108BYTE, Code.FRSTOR_M108BYTE), (Code.FNSTENV_M28BYTE, Code.FLDENV_M28BYTE))
        save, restore = self.rng.choice(pairs)
        self._make(save, where)
        self._body(2)
        if self.rng.random() < 0.7:
            self._make(restore, where)

    def _gather(self) -> None:
        form = self.rng.choice(gathers())
        wide = "VM64" in form.name
        index, mask, destination = self.rng.sample(range(16), 3)
        table = INDEX_TABLE + (0x100 + 8 * self.rng.randrange(28) if wide else 4 * self.rng.randrange(56))
        self._make(Code.VEX_VMOVDQU_YMM_YMMM256, Reg(Register.YMM0 + index), Mem(Register.RIP, disp=DATA + table))
        if self.rng.random() < 0.4:  # all ones: every element
            ymm = Reg(Register.YMM0 + mask)
            self._make(Code.VEX_VPCMPEQD_YMM_YMM_YMMM256, ymm, ymm, ymm)
        base = self._free()
        self._load(base, DATA + self._place(256, 0.5))
        family = Register.YMM0 if "32Y" in form.name or "64Y" in form.name else Register.XMM0
        kinds = [Register.YMM0 if k.startswith("YMM") else Register.XMM0 for k in form.kinds]
        vector = Mem(base, family + index, self.rng.choice((1, 2, 4, 8)), self.rng.choice((0, 8, -256)))
        self._make(form.code, Reg(kinds[0] + destination), vector, Reg(kinds[2] + mask))

    def _vector_store(self) -> None:
        """MASKMOVDQU and MASKMOVQ, which store at RDI what a mask chooses."""
        if _RDI in self.reserved:
            return
        self._load(_RDI, DATA + self._place(16, 0.3))
        if self.rng.random() < 0.5:
            base, width, make = Register.XMM0, 16, Instruction.create_maskmovdqu
        else:
            base, width, make = Register.MM0, 8, Instruction.create_maskmovq
        self._emit(make(64, *(named(base + self.rng.randrange(width)) for _ in range(2))))
