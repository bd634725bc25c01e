"""The compiler for the subset of Python that :mod:`language` describes: registers and machine code.

:mod:`lowering` gives three-address instructions over any number of variables. Here liveness decides which
variables interfere, each gets a register (the busiest first) or else a stack slot, and each instruction becomes one to
four machine instructions. The convention is System V's: arguments in rdi, rsi, rdx, rcx, r8, r9, the result in rax, DF
clear; GS is the state block, and no vector or x87 register is touched. A :class:`CompiledUnit` tells besides which
registers each function really changes, so that stubs need not save them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType

from skep.engine.translate.asm import (
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RSI,
    RSP,
    Assembler,
    Cond,
    Label,
    Mem,
    Reg,
    fits,
    signed,
)  # fmt: skip
from skep.engine.translate.language import (
    MASK,
    CompileError,
    Sources,
    cas64,
    copy8,
    copy16,
    copy32,
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
    set8,
    set16,
    set32,
    set64,
    st,
    st8,
    st16,
    st32,
    st64,
)
from skep.engine.translate.lowering import COMMUTE, EVALUATE, Addr, Ins, Load, Lowering, Operand, Value, Var

__all__ = [
    "MASK",
    "CompileError",
    "CompiledUnit",
    "cas64",
    "compile_functions",
    "copy8",
    "copy16",
    "copy32",
    "copy64",
    "fence",
    "inline",
    "ld8",
    "ld16",
    "ld32",
    "ld64",
    "lts",
    "rol",
    "sar",
    "set8",
    "set16",
    "set32",
    "set64",
    "st",
    "st8",
    "st16",
    "st32",
    "st64",
]  # fmt: skip

_ARGS = (RDI, RSI, RDX, RCX, R8, R9)
_OPERANDS = {"call": _ARGS, "copy": (RDI, RSI, RCX), "fill": (RDI, RAX, RCX)}  # what needs its operands where
_TEMPS = (R11, R10, RAX)  # never hold a variable; RAX last, because cas needs it
_CALLER_SAVED = (R9, R8, RCX, RDX, RSI, RDI)
_CALLEE_SAVED = (RBX, RBP, R12, R13, R14, R15)
_DROPPABLE = {"mov", "lea", "not", "neg", "set", *EVALUATE}
_Place = Reg | Mem


_Step = tuple[Ins, list[Var]]
"""An instruction, and the variables that it reads."""


def _liveness(code: list[_Step]) -> tuple[list[int], int]:
    """For each instruction the set (as bits) of variables wanted after it, and the set wanted at the start."""
    position = {ins.target: i for i, (ins, _) in enumerate(code) if ins.op == "label"}
    steps = []  # from the last to the first: where, what it leaves wanted, what it wants, whether it goes on, elsewhere
    for i in range(len(code) - 1, -1, -1):
        ins, uses = code[i]
        wants = 0
        for v in uses:
            wants |= 1 << v.index
        kept = -1 if ins.dst is None else ~(1 << ins.dst.index)
        to = position[ins.target] if ins.op in ("jump", "branch") else -1
        steps.append((i, kept, wants, ins.op not in ("jump", "return"), to))
    backward = {to for i, _, _, _, to in steps if 0 <= to <= i}  # only what these want is asked before it is known
    into = [0] * (len(code) + 1)
    out = [0] * len(code)
    changed = True
    while changed:
        changed = False
        for i, kept, wants, goes_on, to in steps:
            after = into[i + 1] if goes_on else 0
            if to >= 0:
                after |= into[to]
            out[i] = after
            before = after & kept | wants
            if before != into[i]:
                into[i] = before
                changed = changed or i in backward
    return out, into[0]


def _drop_dead(code: list[_Step]) -> tuple[list[int], int]:
    """Remove what computes a value nobody reads; gives the liveness of the rest."""
    while True:
        out, start = _liveness(code)
        kept: list[_Step] = []
        for step, after in zip(code, out, strict=True):
            ins = step[0]
            if ins.dst is not None and not after >> ins.dst.index & 1:
                if ins.op in _DROPPABLE:
                    continue
                if ins.op == "call":
                    ins.dst = None
            kept.append(step)
        if len(kept) == len(code):
            return out, start
        code[:] = kept


def _allocate(low: Lowering, clobbers: dict[str, set[Reg]]) -> tuple[dict[Var, _Place], int, int]:
    """A place for every variable, the number of stack slots, and the variables (bits) wanted at the start.

    ``clobbers`` says which registers each called function changes.
    """
    n = len(low.vars)
    code = [(ins, list(ins.uses())) for ins in low.code]
    after, start = _drop_dead(code)
    low.code = [ins for ins, _ in code]
    params = sum(1 << p.index for p in low.params)
    if start & ~params:
        var = low.vars[(start & ~params).bit_length() - 1]
        low.scope.source.fail(low.scope.source.node, f"{var.name!r} may be used before it is set")
    conflicts = [0] * n
    forbidden: list[set[Reg]] = [set() for _ in range(n)]
    weight = [0] * n
    wishes: list[list[Var | Reg]] = [[] for _ in range(n)]

    def conflict(v: int, others: int) -> None:
        others &= ~(1 << v)
        conflicts[v] |= others
        while others:
            bit = others & -others
            conflicts[bit.bit_length() - 1] |= 1 << v
            others ^= bit

    for i, p in enumerate(low.params):
        wishes[p.index].append(_ARGS[i])
        weight[p.index] += 1
        if start >> p.index & 1:
            conflict(p.index, start)
    for (ins, uses), live in zip(code, after, strict=True):
        for v in uses:
            weight[v.index] += ins.weight
        if ins.op in _OPERANDS:
            operands = _OPERANDS[ins.op][: len(ins.args)]
            across = live & ~(1 << ins.dst.index) if ins.dst is not None else live
            changed = clobbers[ins.name].union(operands) if ins.op == "call" else set(operands)
            while across:
                bit = across & -across
                forbidden[bit.bit_length() - 1] |= changed
                across ^= bit
            for place, arg in zip(operands, ins.args, strict=True):
                if isinstance(arg, Var):
                    wishes[arg.index].append(place)
        if ins.dst is not None:
            d = ins.dst.index
            weight[d] += ins.weight
            # a copy may share its original's register
            conflict(d, live & ~(1 << ins.a.index) if ins.op == "mov" and isinstance(ins.a, Var) else live)
            for v in uses:
                wishes[d].append(v)
                wishes[v.index].append(ins.dst)
    places: dict[Var, _Place] = {}
    order = (*_CALLER_SAVED, *_CALLEE_SAVED)
    held = dict.fromkeys(order, 0)
    """The variables (bits) in each register."""
    slots = 0
    for var in sorted((v for v in low.vars if weight[v.index]), key=lambda v: -weight[v.index]):
        i = var.index
        # a register that must be saved first is worth it for more than two uses
        free = [
            r for r in order
            if not conflicts[i] & held[r] and r not in forbidden[i]
            and (weight[i] > 2 or held[r] or r not in _CALLEE_SAVED)
        ]  # fmt: skip
        wanted = [places.get(w) if isinstance(w, Var) else w for w in wishes[i]]
        choice = next((r for r in wanted if r in free), None) or next(iter(free), None)
        if isinstance(choice, Reg):
            places[var] = choice
            held[choice] |= 1 << i
        else:
            places[var] = Mem(RSP, disp=8 * slots)
            slots += 1
    return places, slots, start


# Machine code


class _Emitter:
    """Turns one function's instructions into machine code."""

    def __init__(self, a: Assembler, places: dict[Var, _Place], slots: int, functions: dict[str, Label]) -> None:
        self._a = a
        self._places = places
        self._slots = slots
        self._functions = functions
        self._end = a.label()
        self._top = 0  # of _TEMPS, those in use
        self._saved = [r for r in _CALLEE_SAVED if r in places.values()]
        self.changed: set[Reg] = {*_TEMPS, *(p for p in places.values() if isinstance(p, Reg))} - set(_CALLEE_SAVED)

    def function(self, low: Lowering, start: int) -> None:
        for r in self._saved:
            self._a.push(r)
        if self._slots:
            self._a.sub(RSP, 8 * self._slots)
        self._parallel([(self._places[p], _ARGS[i]) for i, p in enumerate(low.params) if start >> p.index & 1])
        *most, last = low.code
        for ins in most:
            self._top = 0
            getattr(self, f"_do_{ins.op}", self._do_binary)(ins)
        self._top = 0
        if last.op == "return" and last.a is not None:  # it needs no jump to the end
            self._move(RAX, last.a)
        else:
            getattr(self, f"_do_{last.op}")(last)
        self._epilogue()

    # Operands

    def _temp(self) -> Reg:
        self._top += 1
        return _TEMPS[self._top - 1]

    def _place(self, v: Var) -> _Place:
        return self._places[v]

    def _reg(self, x: Operand) -> Reg:
        """A register that holds ``x``."""
        if isinstance(x, Var):
            place = self._place(x)
            if isinstance(place, Reg):
                return place
        if not isinstance(x, Load):
            temp = self._temp()
            self._move(temp, x)
            return temp
        mark = self._top
        mem = self._mem(x.addr)
        self._top = mark  # the first register of the address may take the value
        temp = self._temp()
        self._load(temp, mem, x.size)
        return temp

    def _load(self, dst: Reg, mem: Mem, size: int) -> None:
        if size == 64:
            self._a.mov(dst, mem)
        else:
            self._a.movzx(dst, mem, size)

    def _mem(self, addr: Addr) -> Mem:
        base = None if addr.base is None else self._reg(addr.base)
        index = None if addr.index is None else self._reg(addr.index)
        return Mem(base, index, addr.scale, addr.disp, addr.gs)

    def _source(self, x: Operand) -> Reg | Mem | int:
        """``x`` as the second operand of an instruction."""
        if isinstance(x, Load):
            return self._mem(x.addr) if x.size == 64 else self._reg(x)
        if isinstance(x, int):
            return signed(x, 64) if fits(signed(x, 64), 32) else self._reg(x)
        return self._place(x)

    def _move(self, dst: Reg, x: Operand) -> None:
        a = self._a
        if isinstance(x, Load):
            mark = self._top
            mem = self._mem(x.addr)
            self._top = mark
            self._load(dst, mem, x.size)
        elif isinstance(x, int):
            self._constant(dst, x)
        elif self._place(x) != dst:
            a.mov(dst, self._place(x))

    def _constant(self, dst: _Place, n: int) -> None:
        """The flags carry nothing from one instruction of ours to the next."""
        if n == 0 and isinstance(dst, Reg):
            self._a.xor(dst, dst, 32)
        else:
            self._a.mov(dst, n)

    def _touches(self, x: Operand | None, r: Reg) -> bool:
        """Whether reading ``x`` reads register ``r``."""
        vs = (x.addr.base, x.addr.index) if isinstance(x, Load) else (x,)
        return any(isinstance(v, Var) and self._places[v] == r for v in vs)

    @contextmanager
    def _target(self, ins: Ins) -> Iterator[Reg]:
        """A register to compute ``ins.dst`` in; afterwards it is put where it belongs."""
        assert ins.dst is not None
        place = self._places[ins.dst]
        if isinstance(place, Reg):
            yield place
        else:
            temp = self._temp()
            yield temp
            self._a.mov(place, temp)

    def _parallel(self, moves: Sequence[tuple[_Place, Value | Reg]]) -> None:
        """Several moves as if at once: first those whose target nobody still reads; a circle goes by way of R11."""
        pending: list[tuple[_Place, _Place]] = []
        constants: list[tuple[_Place, int]] = []
        for to, x in moves:
            if isinstance(x, Reg | Var):
                source = x if isinstance(x, Reg) else self._place(x)
                if source != to:
                    pending.append((to, source))
            else:
                constants.append((to, x))
        while pending:
            ready = [m for m in pending if all(m[0] != other[1] for other in pending if other is not m)]
            for m in ready:
                self._a.mov(*m)
                pending.remove(m)
            if not ready:
                to, source = pending.pop()
                self._a.mov(R11, source)
                pending.append((to, R11))
        for to, n in constants:
            self._constant(to, n)

    # Instructions

    def _do_mov(self, ins: Ins) -> None:
        assert ins.dst is not None and ins.a is not None
        place = self._places[ins.dst]
        if isinstance(place, Mem) and isinstance(ins.a, int) and fits(signed(ins.a, 64), 32):
            self._a.mov(place, signed(ins.a, 64))
        elif not (isinstance(ins.a, Var) and self._place(ins.a) == place):
            with self._target(ins) as d:
                self._move(d, ins.a)

    def _do_lea(self, ins: Ins) -> None:
        a = self._a
        assert ins.addr is not None
        with self._target(ins) as d:
            m = self._mem(ins.addr)
            if m.index is None and m.base == d:
                a.add(d, m.disp)
            elif m.base is None and m.index == d and m.disp == 0:
                a.shl(d, m.scale.bit_length() - 1)
            elif m.disp == 0 and m.scale == 1 and m.base == d and m.index is not None:
                a.add(d, Reg(m.index))
            elif m.disp == 0 and m.scale == 1 and m.index == d and m.base is not None:
                a.add(d, Reg(m.base))
            else:
                a.lea(d, m)

    def _do_binary(self, ins: Ins) -> None:
        name, x, y = ins.op, ins.a, ins.b
        assert x is not None and y is not None
        with self._target(ins) as d:
            if name in ("shl", "shr", "sar") and not isinstance(y, int):
                shift = {"shl": self._a.shlx, "shr": self._a.shrx, "sar": self._a.sarx}[name]
                count = self._reg(y)
                shift(d, self._place(x) if isinstance(x, Var) else self._reg(x), count)
                return
            out = d
            if self._touches(y, d) and not self._touches(x, d):
                if name in COMMUTE:
                    x, y = y, x
                else:
                    d = self._temp()
            self._apply(name, d, x, y)
            if d is not out:
                self._a.mov(out, d)

    def _apply(self, name: str, d: Reg, x: Operand, y: Operand) -> None:
        """``d = x name y``, where writing ``d`` does not disturb ``y`` (unless ``x`` is in ``d`` already)."""
        a = self._a
        if isinstance(y, int):
            source = self._place(x) if isinstance(x, Var) else None
            if name == "and" and y in (0xFF, 0xFFFF, 0xFFFFFFFF) and source is not None:
                a.movzx(d, source, y.bit_length())
                return
            if name == "mul" and source is not None and fits(signed(y, 64), 32):
                a.imul(d, source, signed(y, 64))
                return
            self._move(d, x)
            if name in ("shl", "shr", "sar", "rol"):
                getattr(a, name)(d, y)
            elif name == "and" and y < 1 << 32:
                a.and_(d, y, 32)  # zeroes the upper half, as it must
            elif name in ("or", "xor") and y >= 1 << 31 and y & (y - 1) == 0:
                (a.bts if name == "or" else a.btc)(d, y.bit_length() - 1)
            elif name == "and" and not fits(signed(y, 64), 32) and (hole := y ^ MASK) & (hole - 1) == 0:
                a.btr(d, hole.bit_length() - 1)
            else:
                self._alu(name, d, self._source(y))
            return
        self._move(d, x)
        self._alu(name, d, self._source(y))

    def _alu(self, name: str, d: Reg | Mem, y: Reg | Mem | int, size: int = 64) -> None:
        a = self._a
        if name == "mul":
            assert isinstance(d, Reg)
            a.imul(d, y)
        else:
            {"add": a.add, "sub": a.sub, "and": a.and_, "or": a.or_, "xor": a.xor}[name](d, y, size)

    def _do_not(self, ins: Ins) -> None:
        assert ins.a is not None
        with self._target(ins) as d:
            self._move(d, ins.a)
            if ins.op == "not":
                self._a.not_(d)
            else:
                self._a.neg(d)

    _do_neg = _do_not

    def _do_store(self, ins: Ins) -> None:
        assert ins.addr is not None and ins.a is not None
        m = self._mem(ins.addr)
        x = ins.a
        if isinstance(x, int):
            low = signed(x & (1 << ins.size) - 1, ins.size)
            if fits(low, 32):
                self._a.mov(m, low, ins.size)
                return
        self._a.mov(m, self._reg(x), ins.size)

    def _do_modify(self, ins: Ins) -> None:
        assert ins.addr is not None and ins.a is not None
        m = self._mem(ins.addr)
        x = ins.a
        if isinstance(x, int):
            low = signed(x & (1 << ins.size) - 1, ins.size)
            if fits(low, 32):
                self._alu(ins.name, m, low, ins.size)
                return
        self._alu(ins.name, m, self._reg(x), ins.size)

    def _do_cas(self, ins: Ins) -> None:
        assert ins.addr is not None and ins.a is not None and ins.b is not None
        m = self._mem(ins.addr)
        if self._top == 2:  # one is needed for the new value
            self._a.lea(R11, Mem(m.base, m.index, m.scale, m.disp))
            m = Mem(R11, gs=m.gs)
            self._top = 1
        new = self._reg(ins.b)
        self._move(RAX, ins.a)
        self._a.cmpxchg(m, new, lock=True)
        self._a.setcc(Cond.E, RAX)
        self._a.movzx(RAX, RAX)
        assert ins.dst is not None
        self._a.mov(self._places[ins.dst], RAX)

    def _do_call(self, ins: Ins) -> None:
        self._parallel(list(zip(_ARGS, ins.args, strict=False)))
        self._a.call(self._functions[ins.name])
        if ins.dst is not None:
            self._a.mov(self._places[ins.dst], RAX)

    def _do_copy(self, ins: Ins) -> None:
        self._parallel(list(zip(_OPERANDS[ins.op], ins.args, strict=True)))
        if ins.op == "copy":
            self._a.rep_movs(ins.size)
        else:
            self._a.rep_stos(ins.size)

    _do_fill = _do_copy

    def _do_fence(self, ins: Ins) -> None:
        self._a.mfence()

    def _do_label(self, ins: Ins) -> None:
        assert ins.target is not None
        self._a.bind(ins.target)

    def _do_jump(self, ins: Ins) -> None:
        assert ins.target is not None
        self._a.jmp(ins.target)

    def _do_return(self, ins: Ins) -> None:
        assert ins.a is not None
        self._move(RAX, ins.a)
        if self._saved or self._slots:
            self._a.jmp(self._end)
        else:
            self._a.ret()

    def _epilogue(self) -> None:
        self._a.bind(self._end)
        if self._slots:
            self._a.add(RSP, 8 * self._slots)
        for r in reversed(self._saved):
            self._a.pop(r)
        self._a.ret()

    # Conditions

    def _do_branch(self, ins: Ins) -> None:
        assert ins.target is not None
        self._a.jcc(self._test(ins) if ins.test else self._compare(ins), ins.target)

    def _do_set(self, ins: Ins) -> None:
        cond = self._test(ins) if ins.test else self._compare(ins)
        self._a.setcc(cond, RAX)
        self._top = 0
        with self._target(ins) as d:
            self._a.movzx(d, RAX)

    def _compare(self, ins: Ins) -> Cond:
        """Set the flags for ``a`` against ``b``."""
        x, y, a = ins.a, ins.b, self._a
        assert x is not None and y is not None
        if y == 0 and isinstance(x, Var) and isinstance(self._place(x), Reg):
            r = self._reg(x)
            a.test(r, r)
        elif isinstance(x, Load) and isinstance(y, int) and self._narrow(x, y, ins.cond):
            a.cmp(self._mem(x.addr), signed(y, x.size), x.size)
        else:
            left: Reg | Mem
            if isinstance(x, Load) and x.size == 64 and not isinstance(y, Load):
                left = self._mem(x.addr)
                right = self._source(y)
                right = self._reg(y) if isinstance(right, Mem) else right
            else:
                left, right = self._reg(x), self._source(y)
            a.cmp(left, right)
        return ins.cond

    @staticmethod
    def _narrow(x: Load, y: int, cond: Cond) -> bool:
        """Whether the loaded value can be compared in its own size: the constant fits, and no sign matters.

        Not 16 bits: an operand-size prefix that changes an immediate's length stalls the decoder."""
        return cond not in (Cond.L, Cond.GE, Cond.LE, Cond.G) and x.size in (8, 32) and y < 1 << x.size

    def _test(self, ins: Ins) -> Cond:
        """Set the flags for ``a & b`` against 0. One high bit goes to the carry."""
        x, y, a = ins.a, ins.b, self._a
        assert x is not None and y is not None
        if isinstance(y, int) and isinstance(x, Load):
            skipped = ((y & -y).bit_length() - 1) // 8  # bytes below the mask's lowest bit
            if y and y >> 8 * skipped < 256 and 8 * skipped < x.size:
                m = self._mem(x.addr)
                a.test(Mem(m.base, m.index, m.scale, m.disp + skipped, m.gs), y >> 8 * skipped, 8)
                return ins.cond
        if isinstance(y, int) and (y < 1 << 32 or fits(signed(y, 64), 32)):
            size = 8 if y < 1 << 8 else 32 if y < 1 << 32 else 64
            a.test(self._reg(x), y, size)
        elif isinstance(y, int) and y & (y - 1) == 0:
            a.bt(self._reg(x), y.bit_length() - 1)
            return Cond.B if ins.cond == Cond.NE else Cond.AE
        else:
            r = self._reg(x)
            a.test(r, self._reg(y))
        return ins.cond


@dataclass(frozen=True, slots=True)
class CompiledUnit:
    """Machine code for one address."""

    code: bytes
    entry: dict[str, int]  # offset of each function in the code
    changes: dict[str, frozenset[Reg]]  # registers that each function may change; never the callee-saved ones


def compile_functions(functions: Sequence[object], base_address: int) -> CompiledUnit:
    """Machine code of ``functions``, to stand at ``base_address`` (a multiple of 16). They may call each other."""
    sources = Sources()
    known: dict[FunctionType, str] = {}
    for f in functions:
        source = sources(f)
        if source.name in known.values():
            source.fail(source.node, "two functions have this name")
        known[source.function] = source.name
    a = Assembler()
    labels = {name: a.label() for name in known.values()}
    lowered = {name: Lowering(sources(f), sources, known) for f, name in known.items()}
    changes: dict[str, set[Reg]] = {}
    for name in _callees_first(lowered):
        low = lowered[name]
        a.align(16)
        a.bind(labels[name])
        called = {ins.name for ins in low.code if ins.op == "call"}
        everything = {*_TEMPS, *_CALLER_SAVED}
        clobbers = {c: changes.get(c, everything) for c in called}  # one that calls us back is not known yet
        places, slots, start = _allocate(low, clobbers)
        emitter = _Emitter(a, places, slots, labels)
        emitter.function(low, start)
        changes[name] = emitter.changed.union(*clobbers.values())
        for ins in low.code:
            changes[name].update(_OPERANDS.get(ins.op, ())[: len(ins.args)])
    code = a.code(base_address)
    entry = {name: a.address_of(label) - base_address for name, label in labels.items()}
    return CompiledUnit(code, entry, {name: frozenset(regs) for name, regs in changes.items()})


def _callees_first(lowered: dict[str, Lowering]) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for ins in lowered[name].code:
                if ins.op == "call":
                    visit(ins.name)
            order.append(name)

    for name in lowered:
        visit(name)
    return order
