"""From the source of a compiled function to three-address instructions over any number of variables.

Sums become addresses (base + index * scale + displacement), comparisons become branches, constants are folded, inline
functions are expanded, so that the code generator has one simple step left for each instruction.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple, NoReturn

from skep.engine.translate.asm import Cond, Label, fits, signed
from skep.engine.translate.language import (
    MASK,
    Source,
    Sources,
    cas64,
    copy8,
    copy16,
    copy32,
    copy64,
    fence,
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
    st8,
    st16,
    st32,
    st64,
)
from skep.engine.translate.layout import OFFSETS


@dataclass(eq=False, slots=True)
class Var:
    name: str
    index: int


Value = Var | int  # an int is a constant, 0 <= n <= MASK


@dataclass(frozen=True, slots=True)
class Addr:
    """``[base + index * scale + disp]``, relative to the state block if ``gs``; also a sum that LEA can make."""

    base: Var | None = None
    index: Var | None = None
    scale: int = 1
    disp: int = 0
    gs: bool = False


class Load(NamedTuple):
    addr: Addr
    size: int


Operand = Var | int | Load


@dataclass(slots=True)
class Ins:
    """One instruction; ``op`` says which of the fields count.

    mov dst a · lea dst addr · _BINARY dst a b · not, neg dst a · set dst cond a b (``test`` instead of comparison)
    store addr size a · modify name addr size a · cas dst addr a b · call dst name args · copy, fill size args · fence
    label target · jump target · branch target cond a b · return a
    """

    op: str
    dst: Var | None = None
    a: Operand | None = None
    b: Operand | None = None
    addr: Addr | None = None
    size: int = 64
    name: str = ""
    cond: Cond = Cond.E
    test: bool = False
    target: Label | None = None
    args: tuple[Value, ...] = ()
    weight: int = 1  # how often it runs, by a guess: 8 to the power of the loops around it

    def uses(self) -> Iterator[Var]:
        for x in (self.a, self.b, self.addr, *self.args):
            if isinstance(x, Load):
                x = x.addr
            if isinstance(x, Addr):
                if x.base is not None:
                    yield x.base
                x = x.index
            if isinstance(x, Var):
                yield x


_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor",
    ast.LShift: "shl", ast.RShift: "shr",
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], Cond] = {
    ast.Eq: Cond.E, ast.NotEq: Cond.NE, ast.Lt: Cond.B, ast.LtE: Cond.BE, ast.Gt: Cond.A, ast.GtE: Cond.AE,
}  # fmt: skip
_SWAPPED = {Cond.E: Cond.E, Cond.NE: Cond.NE, Cond.B: Cond.A, Cond.A: Cond.B, Cond.BE: Cond.AE, Cond.AE: Cond.BE,
            Cond.L: Cond.G, Cond.G: Cond.L, Cond.LE: Cond.GE, Cond.GE: Cond.LE}  # fmt: skip
EVALUATE: dict[str, Callable[[int, int], int]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "shl": lambda a, n: a << (n & 63), "shr": lambda a, n: a >> (n & 63),
    "sar": lambda a, n: signed(a, 64) >> (n & 63), "rol": lambda a, n: a << (n & 63) | a >> (-n & 63),
}  # fmt: skip
_HOLDS: dict[Cond, Callable[[int, int], bool]] = {
    Cond.E: operator.eq, Cond.NE: operator.ne, Cond.B: operator.lt, Cond.BE: operator.le, Cond.A: operator.gt,
    Cond.AE: operator.ge, Cond.L: lambda a, b: signed(a, 64) < signed(b, 64),
    Cond.GE: lambda a, b: signed(a, 64) >= signed(b, 64),
}  # fmt: skip
COMMUTE = ("add", "mul", "and", "or", "xor")
_SHIFTS = ("shl", "shr", "sar", "rol")
_MODIFY = ("add", "sub", "and", "or", "xor")  # what the CPU does on memory directly
_LOADS: dict[Any, int] = {ld8: 8, ld16: 16, ld32: 32, ld64: 64}
_STORES: dict[Any, int] = {st8: 8, st16: 16, st32: 32, st64: 64}
_STRINGS: dict[Any, tuple[str, int]] = {
    copy8: ("copy", 8), copy16: ("copy", 16), copy32: ("copy", 32), copy64: ("copy", 64),
    set8: ("fill", 8), set16: ("fill", 16), set32: ("fill", 32), set64: ("fill", 64),
}  # fmt: skip
_PURE = (*_LOADS, lts, sar, rol)
_INTRINSICS = (*_PURE, *_STORES, *_STRINGS, cas64, fence)
_MAX_PARAMS = 6  # those that System V passes in registers
_MAX_INLINE_DEPTH = 16


@dataclass(eq=False, slots=True)
class _Scope:
    """A function being lowered: the one compiled, or one expanded inside it."""

    source: Source
    names: dict[str, Value]
    result: Var | None = None  # where an expanded function's value goes
    end: Label | None = None  # and where its return jumps
    loops: list[tuple[Label, Label]] = field(default_factory=list)  # continue, break
    depth: int = 0


class Lowering:
    """Lowers one function to instructions."""

    def __init__(self, source: Source, sources: Sources, known: dict[FunctionType, str]) -> None:
        self.code: list[Ins] = []
        self.vars: list[Var] = []
        self._sources = sources
        self._known = known
        self._weight = 1
        self.params = [self._var(name) for name in source.params]
        if len(self.params) > _MAX_PARAMS:
            source.fail(source.node, f"more than {_MAX_PARAMS} parameters")
        self.scope = _Scope(source, dict(zip(source.params, self.params, strict=True)))
        self._function_body(source)
        self._emit("return", a=0)
        clean(self.code)

    # Small tools

    def _fail(self, node: ast.AST, message: str) -> NoReturn:
        self.scope.source.fail(node, message)

    def _var(self, name: str = "") -> Var:
        var = Var(name, len(self.vars))
        self.vars.append(var)
        return var

    def _emit(self, op: str, dst: Var | None = None, **fields: Any) -> None:
        self.code.append(Ins(op, dst, weight=self._weight, **fields))

    def _label(self, label: Label) -> None:
        self._emit("label", target=label)

    def _jump(self, label: Label) -> None:
        self._emit("jump", target=label)

    def _set(self, dst: Var | None, op: str, **fields: Any) -> Var:
        dst = dst or self._var()
        self._emit(op, dst, **fields)
        return dst

    def _value(self, x: Operand, dst: Var | None = None) -> Value:
        """``x`` as a variable or constant; in ``dst`` if that is given."""
        if dst is None and not isinstance(x, Load):
            return x
        return x if x is dst and dst is not None else self._set(dst, "mov", a=x)

    def _as_var(self, x: Operand) -> Var:
        value = self._value(x)
        return value if isinstance(value, Var) else self._set(None, "mov", a=value)

    # Statements

    def _function_body(self, source: Source) -> None:
        if source.returns_value and _ends(source.body):
            source.fail(source.node, "may end without a return")
        self._body(source.body)

    def _body(self, body: list[ast.stmt]) -> None:
        for node in body:
            handler: Callable[[Any], None] | None = getattr(self, f"_do_{type(node).__name__}", None)
            if handler is None:
                self._fail(node, f"{type(node).__name__} is not in the language")
            handler(node)

    def _do_Pass(self, node: ast.Pass) -> None:
        pass

    def _do_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Call):
            self._fail(node, "an expression without effect")
        self._call(node.value, None, wanted=False)

    def _do_Assign(self, node: ast.Assign) -> None:
        first, *others = node.targets
        self._assign(first, node.value)
        for target in others:
            self._assign(target, first)

    def _do_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assign(node.target, node.value)

    def _do_AugAssign(self, node: ast.AugAssign) -> None:
        value = ast.copy_location(ast.BinOp(node.target, node.op, node.value), node)
        self._assign(node.target, value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        scope = self.scope
        if isinstance(target, ast.Name):
            dst = scope.names.get(target.id)
            if not isinstance(dst, Var):
                dst = scope.names[target.id] = self._var(target.id)
            self._value(self._expr(value, dst), dst)
            return
        offset = scope.source.state_field(target)
        if offset is None:
            self._fail(target, "assignment is to a name or to st.NAME")
        self._store(Addr(disp=offset, gs=True), 64, value)

    def _store(self, addr: Addr, size: int, value: ast.expr) -> None:
        """Also in the form ``[addr] = [addr] op value``, one instruction."""
        name = _BINARY.get(type(value.op), "") if isinstance(value, ast.BinOp) and not self._effects(value) else ""
        if name in _MODIFY and isinstance(value, ast.BinOp) and self._as_load(value.left) == Load(addr, size):
            self._emit("modify", name=name, addr=addr, size=size, a=self._value(self._expr(value.right)))
            return
        self._emit("store", addr=addr, size=size, a=self._value(self._expr(value)))

    def _as_load(self, node: ast.expr) -> Load | None:
        """A load whose address needs no code: ``st.NAME``, or of a variable plus a constant."""
        source = self.scope.source
        offset = source.state_field(node)
        if offset is not None:
            return Load(Addr(disp=offset, gs=True), 64)
        if isinstance(node, ast.Call) and len(node.args) == 1:
            size = _LOADS.get(source.resolve(node.func))
            if size is not None and isinstance(node.args[0], ast.Name):
                base = self.scope.names.get(node.args[0].id)
                return Load(Addr(base), size) if isinstance(base, Var) else None
        return None

    def _do_If(self, node: ast.If) -> None:
        otherwise, end = Label(), Label()
        self._branch(node.test, False, otherwise)
        self._body(node.body)
        if node.orelse:
            self._jump(end)
        self._label(otherwise)
        self._body(node.orelse)
        self._label(end)

    def _do_While(self, node: ast.While) -> None:
        """The condition stands before the loop and again at its end: one jump a turn."""
        if node.orelse:
            self._fail(node, "while with else is not in the language")
        top, again, end = Label(), Label(), Label()
        self._branch(node.test, False, end)
        self._weight *= 8
        self.scope.loops.append((again, end))
        self._label(top)
        self._body(node.body)
        self._label(again)
        self._branch(node.test, True, top)
        self.scope.loops.pop()
        self._weight //= 8
        self._label(end)

    def _do_Break(self, node: ast.Break) -> None:
        self._jump(self.scope.loops[-1][1])

    def _do_Continue(self, node: ast.Continue) -> None:
        self._jump(self.scope.loops[-1][0])

    def _do_Return(self, node: ast.Return) -> None:
        scope = self.scope
        if (node.value is not None) != scope.source.returns_value:
            self._fail(node, "return does not agree with the annotation")
        if scope.end is None:
            self._emit("return", a=0 if node.value is None else self._value(self._expr(node.value)))
            return
        if node.value is not None:
            if scope.result is None:
                self._expr(node.value)
            else:
                self._value(self._expr(node.value, scope.result), scope.result)
        self._jump(scope.end)

    # Conditions

    def _branch(self, node: ast.expr, sense: bool, target: Label) -> None:
        """Go to ``target`` if the truth of ``node`` is ``sense``, else fall through."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._branch(node.operand, not sense, target)
        elif isinstance(node, ast.BoolOp):
            # `and` leaves at its first false operand, `or` at its first true one
            early = isinstance(node.op, ast.Or)
            skip = target if sense == early else Label()
            for value in node.values[:-1]:
                self._branch(value, early, skip)
            self._branch(node.values[-1], sense, target)
            if skip is not target:
                self._label(skip)
        elif (call := self._expression_function(node)) is not None:
            with self._expanded(*call) as value:
                self._branch(value, sense, target)
        else:
            cond, a, b, test = self._condition(node)
            if isinstance(a, int) and isinstance(b, int):
                if _HOLDS[cond](a & b if test else a, 0 if test else b) == sense:
                    self._jump(target)
            else:
                self._emit("branch", target=target, cond=cond if sense else cond.inverse, a=a, b=b, test=test)

    def _condition(self, node: ast.expr) -> tuple[Cond, Operand, Operand, bool]:
        """What makes ``node`` true: a comparison of two operands, or (the last is True) of ``a & b`` with 0."""
        cond, left, right = Cond.NE, node, None
        if isinstance(node, ast.Compare):
            if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARE:
                self._fail(node, "a comparison is one of == != < <= > >=, of two operands")
            cond, left, right = _COMPARE[type(node.ops[0])], node.left, node.comparators[0]
        elif isinstance(node, ast.Call) and self.scope.source.resolve(node.func) is lts:
            self._count(node, 2)
            cond, left, right = Cond.L, node.args[0], node.args[1]
        zero = right is None or (isinstance(right, ast.Constant) and right.value == 0)
        if zero and cond in (Cond.E, Cond.NE) and isinstance(left, ast.BinOp) and isinstance(left.op, ast.BitAnd):
            a, b = self._operands(left.left, left.right)
            if isinstance(a, int) or isinstance(b, Load):
                a, b = b, a
            return cond, a, self._value(b), True
        if zero and cond in (Cond.E, Cond.NE) and isinstance(left, ast.BinOp) and isinstance(left.op, ast.RShift):
            count = self.scope.source.constant(left.right)
            if count is not None and (0 <= count < 32 or count == 63):
                return cond, self._expr(left.left), MASK << count & MASK, True
        a, b = self._operands(left, right) if right is not None else (self._expr(left), 0)
        if isinstance(a, int) or (isinstance(b, Load) and isinstance(a, Load)):
            a = self._value(a)
            if isinstance(a, int) and not isinstance(b, int):
                a, b, cond = b, a, _SWAPPED[cond]
        return cond, a, b, False

    # Expressions

    def _effects(self, node: ast.AST) -> bool:
        """Whether evaluating ``node`` may change memory or the state block."""
        if isinstance(node, ast.Name | ast.Constant | ast.Attribute):
            return False
        if isinstance(node, ast.Call) and self.scope.source.resolve(node.func) not in _PURE:
            return True
        return any(self._effects(n) for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr))

    def _operands(self, *nodes: ast.expr) -> list[Operand]:
        """Several expressions, as if from left to right: what is read before an effect is kept."""
        out: list[Operand] = []
        for i, node in enumerate(nodes):
            x = self._expr(node)
            out.append(self._value(x) if any(self._effects(n) for n in nodes[i + 1 :]) else x)
        return out

    def _expr(self, node: ast.expr, dst: Var | None = None) -> Operand:
        """The value of ``node``. A *new* value may be put in ``dst``; nothing is read after that is written."""
        source = self.scope.source
        if isinstance(node, ast.Constant):
            if not isinstance(node.value, int):
                self._fail(node, f"{node.value!r} is not an integer")
            return node.value & MASK
        if isinstance(node, ast.Name) and node.id in self.scope.names:
            return self.scope.names[node.id]
        if isinstance(node, ast.Name) and node.id in source.assigned:
            self._fail(node, f"{node.id!r} is used before it is set")
        if isinstance(node, ast.Name | ast.Attribute):
            offset = source.state_field(node)
            if offset is not None:
                return Load(Addr(disp=offset, gs=True), 64)
            constant = source.resolve(node)
            if not isinstance(constant, int):
                self._fail(node, f"{ast.unparse(node)} is not a variable or an integer constant")
            return int(constant) & MASK
        if isinstance(node, ast.BinOp):
            return self._binary(node, dst)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert | ast.USub):
            return self._unary("not" if isinstance(node.op, ast.Invert) else "neg", self._expr(node.operand), dst)
        if isinstance(node, ast.IfExp):
            return self._choice(node, dst)
        if isinstance(node, ast.BoolOp):
            return self._bool(node)
        if isinstance(node, ast.Call):
            return self._call(node, dst)
        if isinstance(node, ast.Compare | ast.UnaryOp):
            return self._truth(node, dst)
        self._fail(node, f"{type(node).__name__} is not in the language")

    def _unary(self, op: str, a: Operand, dst: Var | None) -> Value:
        value = self._value(a)
        if isinstance(value, int):
            return (~value if op == "not" else -value) & MASK
        return self._set(dst, op, a=value)

    def _truth(self, node: ast.expr, dst: Var | None) -> Value:
        """A comparison or ``not`` as a value: 0 or 1."""
        negate = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
        if isinstance(node, ast.UnaryOp):
            if not negate:
                self._fail(node, "unary + is not in the language")
            node = node.operand
        cond, a, b, test = self._condition(node)
        if negate:
            cond = cond.inverse
        if isinstance(a, int) and isinstance(b, int):
            return int(_HOLDS[cond](a & b if test else a, 0 if test else b))
        return self._set(dst, "set", cond=cond, a=a, b=b, test=test)

    def _choice(self, node: ast.IfExp, dst: Var | None) -> Var:
        dst = dst or self._var()
        otherwise, end = Label(), Label()
        self._branch(node.test, False, otherwise)
        self._value(self._expr(node.body, dst), dst)
        self._jump(end)
        self._label(otherwise)
        self._value(self._expr(node.orelse, dst), dst)
        self._label(end)
        return dst

    def _bool(self, node: ast.BoolOp) -> Var:
        """The value of the operand that decided. Never in the caller's variable: later operands may read that."""
        dst, end = self._var(), Label()
        for i, operand in enumerate(node.values):
            self._value(self._expr(operand), dst)
            if i < len(node.values) - 1:
                cond = Cond.NE if isinstance(node.op, ast.Or) else Cond.E
                self._emit("branch", target=end, cond=cond, a=dst, b=0)
        self._label(end)
        return dst

    def _binary(self, node: ast.BinOp, dst: Var | None) -> Operand:
        name = _BINARY.get(type(node.op))
        if isinstance(node.op, ast.FloorDiv):
            divisor = self.scope.source.constant(node.right) or 0
            if divisor & (divisor - 1) or divisor < 1:
                self._fail(node, "// is by a constant power of two")
            return self._arithmetic("shr", self._expr(node.left), divisor.bit_length() - 1, dst)
        if name is None:
            self._fail(node, f"the operator {type(node.op).__name__} is not in the language")
        if name == "add":
            return self._sum(node, dst)
        a, b = self._operands(node.left, node.right)
        return self._arithmetic(name, a, b, dst)

    def _arithmetic(self, name: str, a: Operand, b: Operand, dst: Var | None = None) -> Operand:
        """``a name b``, folded and reduced where constants allow it."""
        if name in COMMUTE and isinstance(a, int | Load) and not isinstance(b, int):
            a, b = b, a
        if isinstance(a, int) and isinstance(b, int):
            return EVALUATE[name](a, b) & MASK
        if isinstance(b, int):
            if name in _SHIFTS:
                b &= 63
            if name == "mul" and b and b & (b - 1) == 0:
                name, b = "shl", b.bit_length() - 1
            if (name, b) in (("and", 0), ("mul", 0)):
                return 0
            if b == (MASK if name == "and" else 0) and name != "mul":
                return a
            if name == "sub":
                return self._lea(dst, [(self._as_var(a), 1)], -b)
        a = self._value(a)
        if name in _SHIFTS:
            b = self._value(b)
            if name == "rol" and isinstance(b, Var):  # there is no rotation by a register without CL
                left = self._as_var(self._arithmetic("shl", a, b))
                right = self._arithmetic("shr", a, self._unary("neg", b, None))
                return self._arithmetic("or", left, right, dst)
        return self._set(dst, name, a=a, b=b)

    # Sums and addresses: base + index * scale + displacement

    def _terms(self, node: ast.expr) -> tuple[list[tuple[ast.expr, int]], int]:
        """``node`` as a sum of expressions, each times a scale, plus a constant."""
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.Add):
                left, m = self._terms(node.left)
                right, n = self._terms(node.right)
                return left + right, m + n
            right_constant = self.scope.source.constant(node.right)
            if isinstance(node.op, ast.Sub) and right_constant is not None:
                left, m = self._terms(node.left)
                return left, m - right_constant
            if right_constant is not None and (
                (isinstance(node.op, ast.Mult) and right_constant in (2, 4, 8))
                or (isinstance(node.op, ast.LShift) and right_constant in (1, 2, 3))
            ):
                scale = right_constant if isinstance(node.op, ast.Mult) else 1 << right_constant
                return [(node.left, scale)], 0
        constant = self.scope.source.constant(node)
        return ([(node, 1)], 0) if constant is None else ([], constant)

    def _sum(self, node: ast.BinOp, dst: Var | None) -> Operand:
        terms, constant = self._terms(node)
        operands = self._operands(*(n for n, _ in terms))
        scaled = [(x, s) for x, (_, s) in zip(operands, terms, strict=True)]
        for x, s in scaled:
            if isinstance(x, int):
                constant += x * s
        scaled = [(x, s) for x, s in scaled if not isinstance(x, int)]
        if not scaled:
            return constant & MASK
        if len(scaled) == 2 and constant & MASK == 0 and all(s == 1 for _, s in scaled):
            (x, _), (y, _) = scaled
            if isinstance(x, Load) or isinstance(y, Load):
                return self._arithmetic("add", x, y, dst)  # one of them as the operand in memory
        return self._lea(dst, [(self._as_var(x), s) for x, s in scaled], constant)

    def _lea(self, dst: Var | None, terms: list[tuple[Var, int]], constant: int) -> Operand:
        addr = self._reduce(terms, constant, False)
        if addr.index is None and addr.disp == 0:
            assert addr.base is not None
            return addr.base
        return self._set(dst, "lea", addr=addr)

    def _reduce(self, terms: list[tuple[Var, int]], constant: int, gs: bool) -> Addr:
        """Add up what one address cannot hold: it has two variables, one of them scaled, and 32 bits."""
        terms = sorted(terms, key=lambda t: t[1])
        disp = signed(constant & MASK, 64)
        if not fits(disp, 32):
            terms.insert(0, (self._as_var(constant & MASK), 1))
            disp = 0
        while len(terms) > 2:
            (x, one), (y, scale), *rest = terms
            if one != 1:
                terms = [(self._set(None, "lea", addr=Addr(None, x, one)), 1), (y, scale), *rest]
            else:
                terms = sorted([(self._set(None, "lea", addr=Addr(x, y, scale)), 1), *rest], key=lambda t: t[1])
        if not terms:
            return Addr(disp=disp, gs=gs)
        (x, one), (y, scale) = terms[0], terms[-1]
        if len(terms) == 1:
            return Addr(x, None, 1, disp, gs) if one == 1 else Addr(None, x, one, disp, gs)
        if one != 1:
            x = self._set(None, "lea", addr=Addr(None, x, one))
        return Addr(x, y, scale, disp, gs)

    def _address(self, node: ast.expr) -> Addr:
        """An address to load from or store to. One in the state block becomes relative to GS."""
        terms, constant = self._terms(node)
        own = [t for t in terms if t[1] == 1 and self.scope.source.state_field(t[0]) == OFFSETS["self_"]]
        if own:
            terms.remove(own[0])
        out: list[tuple[Var, int]] = []
        for x, (_, scale) in zip(self._operands(*(n for n, _ in terms)), terms, strict=True):
            if isinstance(x, int):
                constant += x * scale
            else:
                out.append((self._as_var(x), scale))
        return self._reduce(out, constant, bool(own))

    # Calls

    def _count(self, node: ast.Call, n: int) -> None:
        if len(node.args) != n or node.keywords:
            self._fail(node, f"{ast.unparse(node.func)} takes {n} arguments, not {len(node.args)}")

    def _call(self, node: ast.Call, dst: Var | None, wanted: bool = True) -> Operand:
        function = self.scope.source.resolve(node.func)
        if function in _LOADS:
            self._count(node, 1)
            return Load(self._address(node.args[0]), _LOADS[function])
        if function in (sar, rol):
            self._count(node, 2)
            a, b = self._operands(*node.args)
            return self._arithmetic(function.__name__, a, b, dst)
        if function is lts:
            return self._truth(node, dst)
        if function is cas64:
            self._count(node, 3)
            addr = self._address(node.args[0])
            old, new = (self._value(x) for x in self._operands(*node.args[1:]))
            return self._set(dst, "cas", addr=addr, a=old, b=new)
        if function in _STORES or function in _STRINGS or function is fence:
            if wanted:
                self._fail(node, f"{ast.unparse(node.func)} has no value")
            if function is fence:
                self._count(node, 0)
                self._emit("fence")
            elif function in _STRINGS:
                self._count(node, 3)
                op, size = _STRINGS[function]
                self._emit(op, size=size, args=tuple(self._value(x) for x in self._operands(*node.args)))
            else:
                self._count(node, 2)
                self._store(self._address(node.args[0]), _STORES[function], node.args[1])
            return 0
        if not isinstance(function, FunctionType):
            self._fail(node, f"{ast.unparse(node.func)} is not a function of the language")
        return self._call_function(node, function, dst, wanted)

    def _call_function(self, node: ast.Call, function: FunctionType, dst: Var | None, wanted: bool) -> Operand:
        source = self._sources(function)
        self._count(node, len(source.params))
        if wanted and not source.returns_value:
            self._fail(node, f"{source.name} has no value")
        if source.inline:
            return self._expand(source, node, dst, wanted)
        if function not in self._known:
            self._fail(node, f"{source.name} is neither compiled along with this nor @inline")
        args = tuple(self._value(x) for x in self._operands(*node.args))
        result = (dst or self._var()) if wanted else None
        self._emit("call", result, name=self._known[function], args=args)
        return 0 if result is None else result

    def _expression_function(self, node: ast.expr) -> tuple[Source, ast.Call] | None:
        """If ``node`` calls an inline function that is one return of an expression: it and the call."""
        if isinstance(node, ast.Call):
            function = self.scope.source.resolve(node.func)
            if isinstance(function, FunctionType) and function not in _INTRINSICS:
                source = self._sources(function)
                if source.inline and len(source.body) == 1 and isinstance(source.body[0], ast.Return):
                    return source, node
        return None

    @contextmanager
    def _expanded(self, source: Source, node: ast.Call) -> Iterator[ast.expr]:
        """Inside, the scope is that of ``source`` called by ``node``; gives the first expression it returns."""
        outer = self.scope
        self._count(node, len(source.params))
        if outer.depth > _MAX_INLINE_DEPTH:
            self._fail(node, f"{source.name}: inline functions call each other too deeply")
        assigned = source.assigned
        names: dict[str, Value] = {}
        for name, x in zip(source.params, self._operands(*node.args), strict=True):
            # the caller's variable serves where the function does not change its parameter
            names[name] = self._value(x, self._var(name)) if name in assigned else self._value(x)
        self.scope = _Scope(source, names, depth=outer.depth + 1)
        last = source.body[-1]
        try:
            yield last.value if isinstance(last, ast.Return) and last.value is not None else node
        finally:
            self.scope = outer

    def _expand(self, source: Source, node: ast.Call, dst: Var | None, wanted: bool) -> Operand:
        if self._expression_function(node) is not None:
            with self._expanded(source, node) as value:
                return self._expr(value, dst)
        with self._expanded(source, node):
            self.scope.end = Label()
            self.scope.result = (dst or self._var(source.name)) if wanted else None
            result, end = self.scope.result, self.scope.end
            self._function_body(source)
            self._label(end)
        return 0 if result is None else result


def _ends(body: list[ast.stmt]) -> bool:
    """Whether control can reach the end of ``body``, as far as its form tells."""
    last = body[-1] if body else None
    if isinstance(last, ast.Return | ast.Break | ast.Continue):
        return False
    if isinstance(last, ast.If):
        return _ends(last.body) or _ends(last.orelse)
    if isinstance(last, ast.While) and isinstance(last.test, ast.Constant) and last.test.value:
        return any(isinstance(n, ast.Break) for n in ast.walk(last))  # perhaps an inner loop's: then say return
    return True


def clean(code: list[Ins]) -> None:
    """Remove jumps to jumps, jumps to what follows, code that is never reached and labels that nobody wants."""
    while True:
        alias: dict[Label, Label] = {}
        for i, ins in enumerate(code[:-1]):
            if ins.op == "label" and ins.target is not None:
                follower = code[i + 1]
                to = follower.target
                if follower.op in ("label", "jump") and to is not None and to is not ins.target:
                    alias[ins.target] = to
        wanted: set[Label] = set()
        for ins in code:
            if ins.op in ("jump", "branch") and ins.target is not None:
                seen: set[Label] = set()
                while ins.target in alias and ins.target not in seen:
                    seen.add(ins.target)
                    ins.target = alias[ins.target]
                wanted.add(ins.target)
        out: list[Ins] = []
        dead = False
        for ins in code:
            if ins.op == "label":
                if ins.target not in wanted:
                    continue
                dead = False
                if out and out[-1].op in ("jump", "branch") and out[-1].target is ins.target:
                    out.pop()
                elif len(out) > 1 and out[-1].op == "jump" and out[-2].op == "branch" and out[-2].target is ins.target:
                    jump = out.pop()  # a branch around a jump
                    out[-1].target, out[-1].cond = jump.target, out[-1].cond.inverse
            if not dead:
                out.append(ins)
            dead = dead or ins.op in ("jump", "return")
        if len(out) == len(code):
            return
        code[:] = out
