"""Compiled functions and the same functions simulated as Python agree: results, memory and state block."""

from __future__ import annotations

import itertools
import linecache
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as s

from skep.engine.translate import compiler
from skep.engine.translate.asm import R8, R9, R10, R11, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from skep.engine.translate.compiler import (
    CompileError,
    cas64,
    compile_functions,
    copy8,
    copy64,
    fence,
    inline,
    ld8,
    ld16,
    ld32,
    ld64,
    lts,
    rol,
    sar,
    set32,
    st,
    st8,
    st16,
    st32,
    st64,
)
from skep.engine.translate.layout import OFFSETS, TLB, Kind, StateBlock
from skep.engine.translate.simulate import Regions, simulate
from tests.engine.translate.native import Native

BIG = 0x8000_0000_0000_0001
SMALL = 40
NEGATIVE = -3
SCRATCH = TLB  # in the state block, a place for tests to load from and store to
CORNERS = [0, 1, 2, 63, 64, 0x7F, 0x80, 0xFF, 0xFFFF, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, BIG, 2**64 - 1]
words = s.sampled_from(CORNERS) | s.integers(0, 2**64 - 1)


@pytest.fixture
def states() -> Iterator[tuple[StateBlock, StateBlock]]:
    """Two state blocks with the same content; the second believes that it is the first."""
    real, twin = StateBlock(), StateBlock()
    twin.self_ = real.address
    yield real, twin
    real.close()
    twin.close()


class Both:
    """Functions in both forms, each with its own state block."""

    def __init__(self, functions: list[Callable[..., Any]], states: tuple[StateBlock, StateBlock]) -> None:
        self.real, self.twin = states
        self.native = Native(functions, self.real)
        self.python = simulate(functions, Regions({self.real.address: self.twin.bytes}), self.twin)

    def __call__(self, name: str, *args: int) -> int:
        got = getattr(self.native, name)(*args)
        expected = self.python[name](*args)
        assert got == (0 if expected is None else expected), (name, args)
        assert bytes(self.real.bytes[: SCRATCH + 4096]) == bytes(self.twin.bytes[: SCRATCH + 4096])
        return got

    def close(self) -> None:
        self.native.__exit__(None, None, None)


@pytest.fixture
def both(states: tuple[StateBlock, StateBlock]) -> Iterator[Both]:
    b = Both(LANGUAGE, states)
    yield b
    b.close()


# The whole language, a bit at a time


def arithmetic(a: int, b: int) -> int:
    return ((a + b * 3 - 7) ^ (a & 0xFF) ^ (b | BIG)) + (~a) - (-b) + NEGATIVE


def shifts(a: int, n: int) -> int:
    x = (a << n) ^ (a >> n) ^ sar(a, n) ^ rol(a, n)
    return x + (a << 3) + (a >> 63) + sar(a, 47) + rol(a, 13) + (1 << n) + a // 4096


def comparisons(a: int, b: int) -> int:
    bits = (a < b) | (a <= b) << 1 | (a > b) << 2 | (a >= b) << 3 | (a == b) << 4 | (a != b) << 5 | lts(a, b) << 6
    if a & 5 == 0:
        bits |= 0x100
    if a & BIG:
        bits |= 0x200
    if a & (1 << 63):
        bits |= 0x400
    if not (a < b or (b & 1 and a != 3)):
        bits |= 0x800
    bits = bits + (0x1000 if lts(b, a) else 0) + ((not a) << 13)
    return bits


def in_place(x: int, y: int) -> int:
    x = y - x
    x = x + x
    x = 5 - x
    y = (y << (x & 7)) - y
    x ^= y
    y -= x
    x = ld64(st.self_ + SCRATCH + (x & 0xFF8)) - x
    return x * y


def values(a: int, b: int) -> int:
    c = a and b
    d = (a or b) + (a if a > b else b)
    a = a and a + 1
    return c ^ d ^ a


def loop(n: int) -> int:
    total = 0
    i = 0
    while i != n & 63:
        i += 1
        if i & 1:
            continue
        j = i
        while True:
            if j == 0:
                break
            j = j - 1
            total = total + j * i
        if total > 20000:
            break
    return total


def memory(a: int, b: int) -> int:
    me = st.self_ + SCRATCH
    i = a & 63
    st64(me + i * 8, b)
    st8(st.self_ + SCRATCH + 3 + (b & 63), a)
    st16(me + (b & 31) * 4 + 16, a + b)
    st32(me + ((a + b) & 31) * 2, 0x89ABCDEF)
    st64(me + 64, ld64(me + 64) + a)
    st8(me, ld8(me) ^ 0xFF)
    copy8(me + 1, me, 100)
    copy64(me + 1024, me, b & 15)
    set32(me + 2048, a, 9)
    total = ld8(me + i) + ld16(me + i * 2) + ld32(me + i * 4) + ld64(me + i * 8)
    if ld8(me + i) == 7 or ld32(me) & 0x80000000 or ld64(me + i * 8) > ld64(me):
        total += 1
    return total


def fields(a: int) -> int:
    st.rax = a
    st.rbx = st.rax + 5
    st.rcx += a
    st.rdx |= 1
    st.n_fill = st.n_fill + 1
    st.kind = Kind.MEM
    st.rsi = BIG
    if st.rax & 0x10000 or st.rbx & BIG:
        st.rdi ^= st.rbx
    return st.rcx & st.rbx


def swap(a: int, b: int) -> int:
    slot = st.self_ + SCRATCH
    st64(slot, a)
    first = cas64(slot, b, b + 1)
    fence()
    second = 0
    if cas64(slot + (a & 7) * 8 - (a & 7) * 8, a, b):
        second = 2
    return first + second + ld64(slot)


@inline
def small(a: int, b: int) -> int:
    return a < b and b < 1000


@inline
def clamp(a: int, limit: int) -> int:
    """Changes its parameter, and has more than one return."""
    if a > limit:
        return limit
    a += 1
    while a & 3:
        a += 1
    return a


@inline
def note(a: int) -> None:
    if a == 0:
        return
    st.info = a


def bump(a: int) -> int:
    st.t0 += a
    return st.t0


def many(a: int, b: int, c: int, d: int, e: int, f: int) -> int:
    return a + b * 2 + c * 4 + (d << 3) - e + bump(f)


def calls(a: int, b: int) -> int:
    if small(a, b):
        a = clamp(a, b) + clamp(b, 5)
    note(a)
    x = st.t0 + bump(a) + st.t0  # operands are read from left to right
    st.t0 = st.t0 - bump(1)
    return x + many(b, a, 1, x, b + a, many(6, 5, 4, 3, 2, a)) + recursive(a & 15)


def recursive(n: int) -> int:
    return 1 if n < 2 else recursive(n - 1) + recursive(n - 2)


def pressure(a: int, b: int, c: int, d: int, e: int, f: int) -> int:
    """More variables alive at once than there are registers, across calls too."""
    g = a + b
    h = b * c
    i = c - d
    j = d ^ e
    k = e | f
    m = f & a
    n = a << 3
    o = b >> 2
    p = ~c
    q = -d
    r = bump(g)
    o = (p << (q & 63)) - o
    st64(st.self_ + SCRATCH + (k & 63) * 8 + (m & 7), q)
    cas64(st.self_ + SCRATCH + (k & 63) * 8 + (m & 7), q, o)
    p = ld64(st.self_ + SCRATCH + (k & 63) * 8) - p
    n -= ld32(st.self_ + SCRATCH + (k & 63) * 8)
    if ld64(st.self_ + SCRATCH + (j & 63) * 8) < q or o & BIG:
        o += 1
    many(p, q, a, b, o, n)
    return (a ^ b ^ c ^ d ^ e ^ f) + (g ^ h ^ i ^ j ^ k ^ m) + (n ^ o ^ p ^ q ^ r)


def rotate_arguments(a: int, b: int, c: int, d: int, e: int, f: int) -> int:
    return digits(b, c, a, e, d, 7) + digits(f, e, d, c, b, a)


def digits(a: int, b: int, c: int, d: int, e: int, f: int) -> int:
    return a + b * 10 + c * 100 + d * 1000 + e * 10000 + f * 100000


LANGUAGE: list[Callable[..., Any]] = [
    arithmetic, shifts, comparisons, in_place, values, loop, memory, fields, swap, bump, many, calls, recursive,
    pressure, rotate_arguments, digits, clamp, note,
]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(a=words, b=words, c=words, d=words, e=words, f=words)
def test_both_forms_agree(both: Both, a: int, b: int, c: int, d: int, e: int, f: int) -> None:
    for name in ("arithmetic", "shifts", "comparisons", "in_place", "values", "memory", "swap", "calls", "clamp"):
        both(name, a, b)
    for name in ("loop", "fields", "note"):
        both(name, a)
    for name in ("pressure", "many", "rotate_arguments"):
        both(name, a, b, c, d, e, f)


def test_the_state_block_is_where_layout_says(both: Both) -> None:
    both("fields", 0x1234)
    assert both.real.rax == 0x1234 and both.real.rsi == BIG and both.real.kind == Kind.MEM
    assert both.real.q[OFFSETS["rbx"] // 8] == 0x1239


def test_arithmetic_wraps(both: Both) -> None:
    assert both("shifts", 1, 64) == both("shifts", 1, 0)
    assert both("digits", 2**64 - 1, 0, 0, 0, 0, 1) == 99999


def test_changed_registers_are_told() -> None:
    unit = compile_functions([bump, swap, calls, many, recursive], 0x1000)
    assert RAX in unit.changes["bump"] and not unit.changes["bump"] & {RDX, RCX, RBX, RBP, RSI}
    assert unit.changes["bump"] < unit.changes["many"] <= unit.changes["calls"]
    assert unit.changes["calls"] == {RAX, RCX, RDX, RSI, RDI, R8, R9, R10, R11}


# Random programs


class Program:
    """Source text of a random function ``f(a, b, c)`` that ends."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines = ["def f(a: int, b: int, c: int) -> int:"]
        self.names = ["a", "b", "c"]
        self.fresh = 0
        self.block(1, 3)
        self.lines.append(f"    return {self.expression(2)}")

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def address(self) -> str:
        form = self.random.choice(("st.self_ + SCRATCH + ({} & 255) * 8", "({} & 2047) + (st.self_ + SCRATCH)"))
        return form.format(self.expression(1))

    def expression(self, depth: int) -> str:
        r = self.random
        if depth == 0 or r.random() < 0.15:
            constant = r.choice(
                ("0", "1", "8", "255", "4096", "BIG", "NEGATIVE", "0xFFFFFFFF", "0x7FFFFFFF", "1 << 63")
            )
            return r.choice((*self.names, *self.names, f"({constant})", "st.rax", "st.r15"))
        x = self.expression(depth - 1)
        y = self.expression(depth - 1)
        kind = r.randrange(10)
        if kind < 5:
            return f"({x} {r.choice(('+', '-', '*', '&', '|', '^', '<<', '>>', '+'))} {y})"
        if kind == 5:
            return r.choice(
                (f"(~{x})", f"(-{x})", f"sar({x}, {y})", f"rol({x}, {y})", f"({x} * 8 + {y})", f"({x} // 64)")
            )
        if kind == 6:
            return f"ld{r.choice((8, 16, 32, 64))}({self.address()})"
        if kind == 7:
            return f"({x} if {self.condition(1)} else {y})"
        if kind == 8:
            return f"({x} {r.choice(('==', '<', '>=', 'and', 'or'))} {y})"
        return r.choice((f"bump({x})", f"clamp({x}, {y})", f"small({x}, {y})", f"digits({x}, {y}, 1, {x}, 2, {y})"))

    def condition(self, depth: int) -> str:
        r = self.random
        x, y = self.expression(1), self.expression(1)
        if depth and r.random() < 0.4:
            pair = f"({self.condition(depth - 1)} {r.choice(('and', 'or'))} {self.condition(depth - 1)})"
            return r.choice((pair, f"not {pair}"))
        return r.choice((f"{x} {r.choice(('==', '!=', '<', '<=', '>', '>='))} {y}", f"lts({x}, {y})", f"{x} & {y}",
                         f"{x} & {y} == 0", f"({x} >> 63)", f"small({x}, {y})", x))  # fmt: skip

    def block(self, indent: int, budget: int) -> None:
        r = self.random
        pad = "    " * indent
        for _ in range(r.randrange(2, 5)):
            kind = r.randrange(8)
            if kind < 3 or budget == 0:
                name = r.choice(self.names) if indent > 1 or r.random() < 0.5 else self.new_name()
                value = self.expression(3)
                if name not in self.names:
                    self.names.append(name)
                    self.lines.append(f"{pad}{name} = {value}")
                else:
                    self.lines.append(f"{pad}{name} {r.choice(('=', '=', '+=', '^=', '-='))} {value}")
            elif kind == 3:
                target = r.choice(("st.rax", "st.rbx", "st.r15"))
                self.lines.append(f"{pad}{target} {r.choice(('=', '+=', '&='))} {self.expression(2)}")
            elif kind == 4:
                size = r.choice((8, 16, 32, 64))
                self.lines.append(f"{pad}st{size}({self.address()}, {self.expression(2)})")
            elif kind < 7:
                self.lines.append(f"{pad}if {self.condition(2)}:")
                self.block(indent + 1, budget - 1)
                if r.random() < 0.5:
                    self.lines.append(f"{pad}else:")
                    self.block(indent + 1, budget - 1)
            else:
                self.loop(indent, budget)

    def new_name(self) -> str:
        self.fresh += 1
        return f"v{self.fresh}"

    def loop(self, indent: int, budget: int) -> None:
        pad = "    " * indent
        counter = self.new_name()  # never among the names that a statement may change
        self.lines.append(f"{pad}{counter} = {self.random.randrange(1, 4)}")
        self.lines.append(f"{pad}while {counter} != 0:")
        self.lines.append(f"{pad}    {counter} = {counter} - 1")
        self.block(indent + 1, budget - 1)
        if self.random.random() < 0.5:
            self.lines.append(f"{pad}    if {self.condition(0)}:")
            self.lines.append(f"{pad}        {self.random.choice(('break', 'continue', f'return {counter}'))}")


_serial = itertools.count()


def define(text: str) -> Callable[..., Any]:
    """The function that ``text`` defines, with its source where the compiler finds it."""
    file = f"<test {next(_serial)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace = dict(globals())
    exec(compile(text, file, "exec"), namespace)
    function: Callable[..., Any] = namespace["f"]
    return function


@pytest.mark.parametrize("registers", ["all", "two", "none"])
def test_random_programs(
    registers: str, states: tuple[StateBlock, StateBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where variables must share few registers, or live on the stack altogether."""
    if registers != "all":
        monkeypatch.setattr(compiler, "_CALLER_SAVED", (RSI,) if registers == "two" else ())
        monkeypatch.setattr(compiler, "_CALLEE_SAVED", (RBX,) if registers == "two" else ())
    for seed in range(25):
        text = Program(seed).text
        both = Both([define(text), bump, digits], states)
        r = random.Random(seed)
        try:
            for _ in range(6):
                both("f", *(r.choice((r.getrandbits(64), r.getrandbits(6), BIG)) for _ in range(3)))
        except AssertionError as e:
            raise AssertionError(text) from e
        finally:
            both.close()


# What is not in the language


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("def f(a: int) -> int:\n    return a / 2\n", 2, "Div"),
        ("def f(a: int) -> int:\n    return a // 3\n", 2, "power of two"),
        ("def f(a: int) -> int:\n    for i in a:\n        pass\n    return 0\n", 2, "For"),
        ("def f(a: int) -> int:\n    return len(a)\n", 2, "len"),
        ("def f(a: int) -> int:\n    return 'x'\n", 2, "not an integer"),
        ("def f(a: int) -> int:\n    return nowhere\n", 2, "nowhere"),
        ("def f(a: int) -> int:\n    return st.nothing\n", 2, "no field 'nothing'"),
        ("def f(a: int) -> int:\n    a\n    return 1\n", 2, "without effect"),
        ("def f(a: int) -> int:\n    if a:\n        return 1\n", 1, "without a return"),
        ("def f(a: int) -> int:\n    if a:\n        b = 1\n    return b\n", 1, "'b' may be used before it is set"),
        ("def f(a: int) -> int:\n    c = b\n    b = 1\n    return c\n", 2, "'b' is used before it is set"),
        ("def f(a: int) -> int:\n    return 1 < a < 3\n", 2, "two operands"),
        ("def f(a: int) -> None:\n    return a\n", 2, "annotation"),
        ("def f(a: int) -> int:\n    return bump(a, a)\n", 2, "takes 1 arguments, not 2"),
        ("def f(a: int) -> int:\n    return bump(1)\n", 2, "neither compiled"),
        ("def f(a: int) -> int:\n    return note(1)\n", 2, "has no value"),
        ("def f(a: int) -> int:\n    return st8(a, 1)\n", 2, "has no value"),
        ("def f(a: int, *b: int) -> int:\n    return 1\n", 1, "plain parameters"),
        ("def f(a: int) -> int:\n    a.b = 3\n    return a\n", 2, "assignment"),
        ("def f(a, b, c, d, e, g, h):\n    return a\n", 1, "more than 6"),
    ],
)
def test_what_is_refused_names_file_and_line(text: str, line: int, message: str) -> None:
    function = define(text)
    with pytest.raises(CompileError) as e:
        compile_functions([function], 0)
    assert f"{function.__code__.co_filename}:{line}: f: " in str(e.value) and message in str(e.value)


def test_names_of_the_language_do_nothing_by_themselves() -> None:
    with pytest.raises(RuntimeError):
        compiler.ld64(0)


def test_a_stray_simulated_access_is_found(states: tuple[StateBlock, StateBlock]) -> None:
    python = simulate(LANGUAGE, Regions({}), states[1])
    with pytest.raises(IndexError):
        python["memory"](1, 2)
