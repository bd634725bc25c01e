"""Every form the assembler can make, read back by iced-x86, is what was meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import iced_x86 as iced
import pytest
from hypothesis import given
from hypothesis import strategies as s

from skep.engine.translate.asm import RAX, RBP, RCX, RSP, Assembler, Cond, Mem, Reg, gs

BASE = 0x7000_0000_1000
LEGACY = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
NAMES = {
    64: [f"r{n}" for n in LEGACY] + [f"r{n}" for n in range(8, 16)],
    32: [f"e{n}" for n in LEGACY] + [f"r{n}d" for n in range(8, 16)],
    16: [*LEGACY] + [f"r{n}w" for n in range(8, 16)],
    8: ["al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil"] + [f"r{n}b" for n in range(8, 16)],
}

sizes = s.sampled_from([8, 16, 32, 64])
wide = s.sampled_from([32, 64])
regs = s.sampled_from(list(Reg))
disps = s.sampled_from([0, 1, -1, 127, 128, -128, -129, 0x7FFFFFFF]) | s.integers(-(1 << 31), (1 << 31) - 1)
mems = s.builds(
    Mem,
    base=s.none() | regs,
    index=s.none() | regs.filter(lambda r: r != RSP),
    scale=s.sampled_from([1, 2, 4, 8]),
    disp=disps,
    gs=s.booleans(),
)

formatter = iced.Formatter(iced.FormatterSyntax.INTEL)


def decode(code: bytes, ip: int = BASE) -> list[iced.Instruction]:
    return list(iced.Decoder(64, code, ip=ip))


def one(make: Callable[[Assembler], Any]) -> iced.Instruction:
    a = Assembler()
    make(a)
    instructions = decode(a.code(BASE))
    assert len(instructions) == 1
    return instructions[0]


def operands(i: iced.Instruction) -> list[Any]:
    """Registers as lower-case names, memory as (Mem, bits), immediates as numbers."""
    out: list[Any] = []
    for n in range(i.op_count):
        kind = i.op_kind(n)
        if kind == iced.OpKind.REGISTER:
            out.append(name(i.op_register(n)))
        elif kind == iced.OpKind.MEMORY:
            out.append(memory(i))
        else:
            out.append(i.immediate(n))
    return out


REGISTER_NAMES = {value: key.lower() for key, value in vars(iced.Register).items() if isinstance(value, int)}


def name(register: int) -> str:
    if register == iced.Register.NONE:
        return "none"
    text = REGISTER_NAMES[register]
    return {f"r{n}l": f"r{n}b" for n in range(8, 16)}.get(text, text)


def memory(i: iced.Instruction) -> Mem:
    def number(register: int) -> Reg | None:
        return None if register == iced.Register.NONE else Reg(NAMES[64].index(name(register)))

    disp = i.memory_displacement
    return Mem(
        number(i.memory_base),
        number(i.memory_index),
        i.memory_index_scale,
        disp - (1 << 64) if disp >> 63 else disp,
        i.segment_prefix == iced.Register.GS,
    )


def meant(m: Mem) -> Mem:
    """Without an index there is no scale."""
    return Mem(m.base, m.index, m.scale if m.index is not None else 1, m.disp, m.gs)


MNEMONICS = {value: key.lower() for key, value in vars(iced.Mnemonic).items() if isinstance(value, int)}


def mnemonic_of(i: iced.Instruction) -> str:
    return MNEMONICS[i.mnemonic]


def check(i: iced.Instruction, mnemonic: str, *ops: Any, bits: int | None = None) -> None:
    assert i.code != iced.Code.INVALID
    assert mnemonic_of(i) == mnemonic
    found = operands(i)
    width = iced.RegisterExt.size(i.op0_register) * 8 if isinstance(found[0], str) else bits or 64
    exact = [o & (1 << width) - 1 if type(o) is int else o for o in found]  # iced extends some immediates, some not
    assert exact == [meant(o) if isinstance(o, Mem) else o for o in ops]
    if bits is not None and any(isinstance(o, Mem) for o in ops):
        assert iced.MemorySizeExt.size(i.memory_size) * 8 == bits


ALU = {"add": "add", "or_": "or", "adc": "adc", "sbb": "sbb", "and_": "and", "sub": "sub", "xor": "xor", "cmp": "cmp"}
immediates = s.sampled_from([0, 1, -1, 127, 128, -128, -129]) | s.integers(-(1 << 31), (1 << 31) - 1)


def as_operand(value: int, size: int) -> int:
    """An immediate as ``check`` reads it: extended to the operand size, unsigned."""
    return value & (1 << size) - 1


@given(s.sampled_from(sorted(ALU)) | s.just("mov"), sizes, regs, regs, mems)
def test_two_operands(method: str, size: int, x: Reg, y: Reg, m: Mem) -> None:
    mnemonic = ALU.get(method, method)
    check(one(lambda a: getattr(a, method)(x, y, size)), mnemonic, NAMES[size][x], NAMES[size][y])
    check(one(lambda a: getattr(a, method)(x, m, size)), mnemonic, NAMES[size][x], m, bits=size)
    check(one(lambda a: getattr(a, method)(m, x, size)), mnemonic, m, NAMES[size][x], bits=size)


@given(s.sampled_from(sorted(ALU)), sizes, regs, mems, immediates)
def test_immediates(method: str, size: int, x: Reg, m: Mem, value: int) -> None:
    if size < 32:
        value = (value & (1 << size) - 1) - (1 << size - 1)
    for target, seen in ((x, NAMES[size][x]), (m, m)):
        i = one(lambda a, t=target: getattr(a, method)(t, value, size))
        check(i, ALU[method], seen, as_operand(value, size), bits=size)
        assert size == 8 or not -128 <= value < 128 or i.len <= 13 - 2 * (size > 16)
    check(one(lambda a: a.mov(m, value, size)), "mov", m, as_operand(value, size), bits=size)
    i = one(lambda a: a.test(m, value, size))
    check(i, "test", m, as_operand(value, size), bits=size)
    check(one(lambda a: a.test(x, value, size)), "test", NAMES[size][x], as_operand(value, size))


@given(regs, s.integers(0, (1 << 64) - 1) | immediates, sizes)
def test_mov_immediate_is_exact_and_short(x: Reg, value: int, size: int) -> None:
    if size < 64:
        value = value & (1 << size) - 1
    i = one(lambda a: a.mov(x, value, size))
    check(i, "mov", *operands(i))
    wanted, got = value & (1 << 64) - 1, i.immediate(1)
    bits = iced.RegisterExt.size(i.op_register(0)) * 8
    assert NAMES[bits].index(name(i.op_register(0))) == x
    assert got & (1 << bits) - 1 == wanted & (1 << bits) - 1
    assert bits == size or (size == 64 and bits == 32 and wanted < 1 << 32)
    if wanted < 1 << 32:
        assert i.len <= 6
    elif wanted >= (1 << 64) - (1 << 31):
        assert i.len == 7


def test_add_of_a_small_number_is_short() -> None:
    assert one(lambda a: a.add(RAX, 8)).len == 4
    assert one(lambda a: a.add(RAX, 8, 32)).len == 3
    assert one(lambda a: a.mov(RAX, Mem(RCX, disp=8))).len == 4


@given(regs, regs, mems, s.sampled_from([8, 16, 32]))
def test_extensions(x: Reg, y: Reg, m: Mem, size: int) -> None:
    zero = {8: "movzx", 16: "movzx", 32: "mov"}[size]
    sign = {8: "movsx", 16: "movsx", 32: "movsxd"}[size]
    check(one(lambda a: a.movzx(x, m, size)), zero, NAMES[32][x], m, bits=size)
    check(one(lambda a: a.movzx(x, y, size)), zero, NAMES[32][x], NAMES[size][y])
    check(one(lambda a: a.movsx(x, m, size)), sign, NAMES[64][x], m, bits=size)
    check(one(lambda a: a.movsx(x, y, size)), sign, NAMES[64][x], NAMES[size][y])


@given(regs, regs, mems, sizes)
def test_exchanges(x: Reg, y: Reg, m: Mem, size: int) -> None:
    names = NAMES[size]
    for method in ("xchg", "cmpxchg", "xadd", "test"):
        check(one(lambda a, n=method: getattr(a, n)(m, x, size)), method, m, names[x], bits=size)
        found = operands(one(lambda a, n=method: getattr(a, n)(x, y, size)))
        assert found in ([names[x], names[y]], [names[y], names[x]] if method == "xchg" else None)
    check(one(lambda a: a.test(x, m, size)), "test", m, names[x], bits=size)
    for method in ("cmpxchg", "xadd"):
        assert one(lambda a, n=method: getattr(a, n)(m, x, size, lock=True)).has_lock_prefix


@given(regs, mems, sizes)
def test_one_operand(x: Reg, m: Mem, size: int) -> None:
    for method, mnemonic in (("inc",) * 2, ("dec",) * 2, ("not_", "not"), ("neg",) * 2, ("mul",) * 2, ("div",) * 2):
        check(one(lambda a, n=method: getattr(a, n)(x, size)), mnemonic, NAMES[size][x])
        check(one(lambda a, n=method: getattr(a, n)(m, size)), mnemonic, m, bits=size)


@given(regs, regs, mems, s.sampled_from([16, 32, 64]), s.integers(-128, 127), s.integers(-(1 << 15), (1 << 15) - 1))
def test_imul(x: Reg, y: Reg, m: Mem, size: int, small: int, big: int) -> None:
    n = NAMES[size]
    check(one(lambda a: a.imul(x, y, size=size)), "imul", n[x], n[y])
    check(one(lambda a: a.imul(x, m, size=size)), "imul", n[x], m, bits=size)
    for value in (small, big):
        check(one(lambda a, v=value: a.imul(x, m, v, size)), "imul", n[x], m, as_operand(value, size), bits=size)
        check(one(lambda a, v=value: a.imul(x, v, size=size)), "imul", n[x], n[x], as_operand(value, size))


@given(regs, mems, sizes, s.integers(0, 63))
def test_shifts(x: Reg, m: Mem, size: int, count: int) -> None:
    for method in ("rol", "ror", "shl", "shr", "sar"):
        check(one(lambda a, n=method: getattr(a, n)(x, count, size)), method, NAMES[size][x], count)
        check(one(lambda a, n=method: getattr(a, n)(m, count, size)), method, m, count, bits=size)
        check(one(lambda a, n=method: getattr(a, n)(x, RCX, size)), method, NAMES[size][x], "cl")
    with pytest.raises(ValueError):
        one(lambda a: a.shl(x, RAX))


@given(regs, regs, regs, mems, wide, s.integers(0, 63))
def test_bmi(x: Reg, y: Reg, z: Reg, m: Mem, size: int, count: int) -> None:
    n = NAMES[size]
    for method in ("shlx", "sarx", "shrx"):
        check(one(lambda a, k=method: getattr(a, k)(x, y, z, size)), method, n[x], n[y], n[z])
        check(one(lambda a, k=method: getattr(a, k)(x, m, z, size)), method, n[x], m, n[z], bits=size)
    for method in ("pdep", "pext", "andn"):
        check(one(lambda a, k=method: getattr(a, k)(x, y, z, size)), method, n[x], n[y], n[z])
        check(one(lambda a, k=method: getattr(a, k)(x, y, m, size)), method, n[x], n[y], m, bits=size)
    check(one(lambda a: a.rorx(x, y, count, size)), "rorx", n[x], n[y], count)
    check(one(lambda a: a.rorx(x, m, count, size)), "rorx", n[x], m, count, bits=size)


@given(regs, regs, mems, s.sampled_from([16, 32, 64]), s.integers(0, 63))
def test_bits(x: Reg, y: Reg, m: Mem, size: int, bit: int) -> None:
    n = NAMES[size]
    for method in ("bt", "bts", "btr", "btc"):
        check(one(lambda a, k=method: getattr(a, k)(x, bit, size)), method, n[x], bit)
        check(one(lambda a, k=method: getattr(a, k)(m, bit, size)), method, m, bit, bits=size)
        check(one(lambda a, k=method: getattr(a, k)(x, y, size)), method, n[x], n[y])
        check(one(lambda a, k=method: getattr(a, k)(m, y, size)), method, m, n[y], bits=size)
    for method in ("bsf", "bsr", "tzcnt", "popcnt"):
        check(one(lambda a, k=method: getattr(a, k)(x, y, size)), method, n[x], n[y])
        check(one(lambda a, k=method: getattr(a, k)(x, m, size)), method, n[x], m, bits=size)


@given(s.sampled_from(list(Cond)), regs, regs, mems, s.sampled_from([16, 32, 64]))
def test_conditions(cond: Cond, x: Reg, y: Reg, m: Mem, size: int) -> None:
    for i, kind in (
        (one(lambda a: a.setcc(cond, x)), "set"),
        (one(lambda a: a.setcc(cond, m)), "set"),
        (one(lambda a: a.cmovcc(cond, x, y, size)), "cmov"),
        (one(lambda a: a.cmovcc(cond, x, m, size)), "cmov"),
    ):
        assert mnemonic_of(i).startswith(kind)
        assert i.condition_code == CONDITIONS[cond]
    check(one(lambda a: a.setcc(cond, x)), mnemonic_of(one(lambda a: a.setcc(cond, x))), NAMES[8][x])
    i = one(lambda a: a.cmovcc(cond, x, m, size))
    check(i, mnemonic_of(i), NAMES[size][x], m, bits=size)
    assert cond.inverse.inverse is cond and cond.inverse is not cond


CONDITIONS = {c: getattr(iced.ConditionCode, c.name) for c in Cond}


@given(regs, mems, s.sampled_from([16, 32, 64]))
def test_lea(x: Reg, m: Mem, size: int) -> None:
    check(one(lambda a: a.lea(x, m, size)), "lea", NAMES[size][x], m)


@given(regs, mems, immediates)
def test_stack_and_indirect_control(x: Reg, m: Mem, value: int) -> None:
    check(one(lambda a: a.push(x)), "push", NAMES[64][x])
    check(one(lambda a: a.pop(x)), "pop", NAMES[64][x])
    check(one(lambda a: a.push(m)), "push", m, bits=64)
    check(one(lambda a: a.pop(m)), "pop", m, bits=64)
    check(one(lambda a: a.push(value)), "push", value & (1 << 64) - 1)
    for method in ("jmp", "call"):
        check(one(lambda a, n=method: getattr(a, n)(x)), method, NAMES[64][x])
        check(one(lambda a, n=method: getattr(a, n)(m)), method, m, bits=64)


@given(mems, regs)
def test_state(m: Mem, x: Reg) -> None:
    for method in ("fxsave64", "fxrstor64", "xsave64", "xrstor64", "ldmxcsr", "stmxcsr"):
        check(one(lambda a, n=method: getattr(a, n)(m)), method, m)
    check(one(lambda a: a.rdgsbase(x)), "rdgsbase", NAMES[64][x])
    check(one(lambda a: a.wrgsbase(x)), "wrgsbase", NAMES[64][x])


PLAIN = (
    "ret", "ud2", "syscall", "pushfq", "popfq", "lahf", "sahf", "cld", "std", "mfence", "lfence", "rdtsc", "fninit",
    "vzeroupper", "int3",
)  # fmt: skip


@pytest.mark.parametrize("method", PLAIN)
def test_plain(method: str) -> None:
    assert formatter.format(one(lambda a: getattr(a, method)())) == method


@pytest.mark.parametrize(("size", "letter"), [(8, "b"), (16, "w"), (32, "d"), (64, "q")])
def test_strings(size: int, letter: str) -> None:
    for method, text in (("rep_movs", "movs"), ("rep_stos", "stos")):
        i = one(lambda a, n=method: getattr(a, n)(size))
        assert mnemonic_of(i) == text + letter and i.has_rep_prefix


@pytest.mark.parametrize("n", range(30))
def test_nop_is_n_bytes_of_nothing(n: int) -> None:
    a = Assembler()
    a.nop(n)
    assert len(a) == n
    assert all(i.mnemonic == iced.Mnemonic.NOP for i in decode(a.code(0)))


def test_lock_prefixes_the_next_instruction() -> None:
    a = Assembler()
    a.lock()
    a.bts(gs(0x90), 3, 64)
    (i,) = decode(a.code(BASE))
    assert i.has_lock_prefix and formatter.format(i).startswith("lock bts")


@given(s.integers(0, 120), s.integers(0, 120), s.integers(0, 1 << 40).map(lambda n: n * 16))
def test_labels_and_absolute_targets(before: int, after: int, base: int) -> None:
    a = Assembler()
    back = a.here()
    a.nop(before)
    forward = a.label()
    a.jcc(Cond.NE, forward)
    a.jmp(forward, short=True)
    a.call(back)
    a.lea_label(RBP, forward)
    a.jmp_abs(base + 0x1000)
    a.call_abs(base + 0x2000)
    a.jcc_abs(Cond.A, base + 0x3000)
    a.nop(min(after, 80))
    a.bind(forward)
    a.ret()
    code = decode(a.code(base), base)
    end = a.address_of(forward)
    jumps = [i for i in code if i.mnemonic != iced.Mnemonic.NOP and i.mnemonic != iced.Mnemonic.RET]
    assert [i.memory_displacement if i.is_ip_rel_memory_operand else i.near_branch_target for i in jumps] == [
        end,
        end,
        base,
        end,
        base + 0x1000,
        base + 0x2000,
        base + 0x3000,
    ]
    assert a.address_of(back) == base and end == base + len(a) - 1


def test_align() -> None:
    a = Assembler()
    a.ret()
    a.align(16)
    assert len(a) == 16


def test_what_cannot_be_encoded_is_refused() -> None:
    for make in (
        lambda a: a.mov(RAX, Mem(RAX, RSP)),
        lambda a: a.mov(RAX, Mem(RAX, disp=1 << 31)),
        lambda a: a.add(RAX, 1 << 40),
        lambda a: a.add(Mem(RAX), Mem(RCX)),
        lambda a: a.mov(Mem(RAX), Mem(RCX)),
        lambda a: a.mov(Mem(RAX), 1 << 31),
        lambda a: a.mov(RAX, 1 << 64),
        lambda a: a.jmp(a.label()),
        lambda a: (a.jmp_abs(BASE + (1 << 32))),
    ):
        with pytest.raises((ValueError, TypeError)):
            one(make)
    a = Assembler()
    end = a.label()
    a.jmp(end, short=True)
    a.nop(200)
    a.bind(end)
    with pytest.raises(ValueError):
        a.code(0)
    with pytest.raises(ValueError):
        a.bind(end)
