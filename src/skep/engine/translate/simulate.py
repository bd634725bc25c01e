"""Runs functions of the compiled language (:mod:`language`) as Python, with the arithmetic of the machine.

The functions' syntax trees are rewritten so that every result is taken modulo 2**64, and loads, stores and the state
block go to objects that the caller provides. A test runs a routine this way and compiled, and compares.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Protocol

from skep.engine.translate.asm import signed
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
    st,
    st8,
    st16,
    st32,
    st64,
)


class MemoryLike(Protocol):
    """What simulated loads and stores see. Addresses are host addresses, sizes bytes."""

    def load(self, address: int, size: int) -> int: ...

    def store(self, address: int, size: int, value: int) -> None: ...


class Regions:
    """Buffers at given addresses; an access outside of them raises."""

    def __init__(self, regions: dict[int, bytearray | memoryview]) -> None:
        self._regions = regions

    def _find(self, address: int, size: int) -> tuple[bytearray | memoryview, int]:
        for base, buffer in self._regions.items():
            if base <= address and address + size <= base + len(buffer):
                return buffer, address - base
        raise IndexError(f"no memory at {address:#x}, {size} bytes")

    def load(self, address: int, size: int) -> int:
        buffer, offset = self._find(address, size)
        return int.from_bytes(buffer[offset : offset + size], "little")

    def store(self, address: int, size: int, value: int) -> None:
        buffer, offset = self._find(address, size)
        buffer[offset : offset + size] = value.to_bytes(size, "little")


def simulate(
    functions: Sequence[Callable[..., Any]], memory: MemoryLike, state: object
) -> dict[str, Callable[..., int]]:
    """``functions`` as Python callables, by name; ``state`` has the attributes that they name as ``st.NAME``."""
    maker = _Simulation(memory, state)
    return {f.__name__: maker.function(f) for f in functions}


class _Simulation:
    def __init__(self, memory: MemoryLike, state: object) -> None:
        self.sources = Sources()
        self._namespace: dict[str, Any] = {"__state": state}
        self.intrinsics = _intrinsics(memory)
        self._names: dict[Any, str] = {}

    def name(self, function: Any) -> str:
        """What rewritten code calls ``function`` by."""
        if function not in self._names:
            self._names[function] = name = f"__{len(self._names)}_{function.__name__}"
            self._namespace[name] = self.intrinsics.get(function) or self._make(function, name)
        return self._names[function]

    def function(self, function: Callable[..., Any]) -> Callable[..., int]:
        made: Callable[..., int] = self._namespace[self.name(function)]
        return made

    def _make(self, function: FunctionType, name: str) -> Any:
        source = self.sources(function)
        node = copy.deepcopy(source.node)
        node.body = copy.deepcopy(source.body)
        node.decorator_list = []
        node.returns = None
        for arg in node.args.args:
            arg.annotation = None
        node.name = name
        module = ast.Module([_Rewrite(self, source).visit(node)], [])
        exec(compile(ast.fix_missing_locations(module), function.__code__.co_filename, "exec"), self._namespace)
        return self._namespace[name]


class _Rewrite(ast.NodeTransformer):
    def __init__(self, simulation: _Simulation, source: Source) -> None:
        self._simulation = simulation
        self._source = source

    @staticmethod
    def _masked(node: ast.expr) -> ast.expr:
        return ast.BinOp(node, ast.BitAnd(), ast.Constant(MASK))

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.LShift | ast.RShift):
            node.right = ast.BinOp(node.right, ast.BitAnd(), ast.Constant(63))
        return self._masked(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        value = ast.BinOp(copy.deepcopy(node.target), node.op, node.value)
        for n in ast.walk(value):
            if isinstance(n, ast.Name | ast.Attribute):
                n.ctx = ast.Load()
        return self.visit(ast.copy_location(ast.Assign([node.target], value), node))  # type: ignore[no-any-return]

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return node if isinstance(node.op, ast.Not) else self._masked(node)

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Constant(node.value & MASK) if isinstance(node.value, int) else node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        constant = self._source.constant(node)
        return node if constant is None else ast.Constant(constant & MASK)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if self._source.resolve(node.value) is st:
            return ast.Attribute(ast.Name("__state", ast.Load()), node.attr, node.ctx)
        constant = self._source.constant(node)
        return node if constant is None else ast.Constant(constant & MASK)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        function = self._source.resolve(node.func)
        if not isinstance(function, FunctionType):
            self._source.fail(node, f"{ast.unparse(node.func)} is not a function of the language")
        node.args = [self.visit(a) for a in node.args]
        node.func = ast.Name(self._simulation.name(function), ast.Load())
        return node


def _intrinsics(memory: MemoryLike) -> dict[Any, Callable[..., Any]]:
    def loader(size: int) -> Callable[[int], int]:
        return lambda address: memory.load(address, size)

    def storer(size: int) -> Callable[[int, int], None]:
        return lambda address, value: memory.store(address, size, value & (1 << 8 * size) - 1)

    def copier(size: int) -> Callable[[int, int, int], None]:
        def copy_up(to: int, source: int, count: int) -> None:
            for i in range(0, count * size, size):
                memory.store(to + i & MASK, size, memory.load(source + i & MASK, size))

        return copy_up

    def setter(size: int) -> Callable[[int, int, int], None]:
        def fill(to: int, value: int, count: int) -> None:
            for i in range(0, count * size, size):
                memory.store(to + i & MASK, size, value & (1 << 8 * size) - 1)

        return fill

    def compare_and_swap(address: int, old: int, new: int) -> int:
        if memory.load(address, 8) != old:
            return 0
        memory.store(address, 8, new)
        return 1

    table: dict[Any, Callable[..., Any]] = {
        cas64: compare_and_swap,
        lts: lambda a, b: int(signed(a, 64) < signed(b, 64)),
        sar: lambda a, n: signed(a, 64) >> (n & 63) & MASK,
        rol: lambda a, n: (a << (n & 63) | a >> (-n & 63)) & MASK,
        fence: lambda: None,
    }
    for make, names in (
        (loader, (ld8, ld16, ld32, ld64)),
        (storer, (st8, st16, st32, st64)),
        (copier, (copy8, copy16, copy32, copy64)),
        (setter, (set8, set16, set32, set64)),
    ):
        for size, name in zip((1, 2, 4, 8), names, strict=True):
            table[name] = make(size)
    return table
