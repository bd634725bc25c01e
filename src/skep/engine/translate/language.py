"""The compiled language: a small, typed subset of Python over unsigned 64-bit integers.

The translator's routines (page walk, TLB fill, delivery of exceptions) are written in it as plain Python functions that
read like the manual. They run in two ways: :func:`compiler.compile_functions` makes machine code of them,
:func:`simulate.simulate` makes Python callables with the same arithmetic, for tests.

Top-level functions of ``int`` parameters; assignment, ``if``, ``while``, ``break``, ``continue``, ``return``, ``pass``;
``+ - * & | ^ ~ << >>`` modulo 2**64, shift counts modulo 64, shifts logical, comparisons unsigned; ``//`` by a constant
power of two; ``and``, ``or``, ``not``, conditional expressions; integer constants, also global names and attributes of
classes or modules; calls of other such functions (:func:`inline` ones are expanded in place); ``st.NAME``, a field of
the state block; and the intrinsics below. This file has what such functions name, and finds and parses their source.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NoReturn, TypeVar

from skep.engine.translate.layout import OFFSETS

MASK = (1 << 64) - 1


def _only_compiled() -> NoReturn:
    raise RuntimeError("this is a name of the compiled language: use compile_functions or simulate")


class _State:
    """``st``: the running vCPU's state block, by the names of layout.OFFSETS."""

    def __getattr__(self, name: str) -> int:
        _only_compiled()

    def __setattr__(self, name: str, value: int) -> None:
        _only_compiled()


st = _State()


def ld8(address: int) -> int:
    """The byte at a host address, zero-extended."""
    _only_compiled()


def ld16(address: int) -> int:
    _only_compiled()


def ld32(address: int) -> int:
    _only_compiled()


def ld64(address: int) -> int:
    _only_compiled()


def st8(address: int, value: int) -> None:
    """Store the low byte of ``value`` with a single store."""
    _only_compiled()


def st16(address: int, value: int) -> None:
    _only_compiled()


def st32(address: int, value: int) -> None:
    _only_compiled()


def st64(address: int, value: int) -> None:
    _only_compiled()


def cas64(address: int, old: int, new: int) -> int:
    """Replace ``old`` by ``new`` at ``address``, atomically: 1 if it was done, 0 if something else was there."""
    _only_compiled()


def lts(a: int, b: int) -> int:
    """Whether ``a`` < ``b`` as signed numbers."""
    _only_compiled()


def sar(a: int, n: int) -> int:
    """Shift right, copying the sign."""
    _only_compiled()


def rol(a: int, n: int) -> int:
    """Rotate left."""
    _only_compiled()


def copy8(to: int, source: int, count: int) -> None:
    """Copy ``count`` bytes upwards, one after the other where the areas overlap (REP MOVSB)."""
    _only_compiled()


def copy16(to: int, source: int, count: int) -> None:
    _only_compiled()


def copy32(to: int, source: int, count: int) -> None:
    _only_compiled()


def copy64(to: int, source: int, count: int) -> None:
    _only_compiled()


def set8(to: int, value: int, count: int) -> None:
    """Fill ``count`` bytes (REP STOSB)."""
    _only_compiled()


def set16(to: int, value: int, count: int) -> None:
    _only_compiled()


def set32(to: int, value: int, count: int) -> None:
    _only_compiled()


def set64(to: int, value: int, count: int) -> None:
    _only_compiled()


def fence() -> None:
    """Later loads see no state older than earlier stores (MFENCE)."""
    _only_compiled()


_F = TypeVar("_F", bound=Callable[..., Any])


def inline(function: _F) -> _F:
    """Expand this function where it is called."""
    setattr(function, "_skep_inline", True)  # noqa: B010  (functions have no such attribute for mypy)
    return function


class CompileError(Exception):
    """The source is not in the language: file, line, and what is wrong."""

    def __init__(self, file: str, line: int, message: str) -> None:
        super().__init__(f"{file}:{line}: {message}")


class Source:
    """One function of the language, parsed."""

    def __init__(self, function: FunctionType, node: ast.FunctionDef) -> None:
        self.function = function
        self.node = node
        self.name = node.name
        self.params = [a.arg for a in node.args.args]
        self.inline = bool(getattr(function, "_skep_inline", False))
        self.returns_value = not (isinstance(node.returns, ast.Constant) and node.returns.value is None)
        documented = ast.get_docstring(node, clean=False) is not None
        self.body = node.body[1:] if documented else node.body
        self.assigned = set(_assigned(node.body))
        self._locals = self.assigned.union(self.params)

    def fail(self, node: ast.AST, message: str) -> NoReturn:
        line = getattr(node, "lineno", self.node.lineno)
        raise CompileError(self.function.__code__.co_filename, line, f"{self.name}: {message}")

    def resolve(self, node: ast.expr) -> Any:
        """The global object that a dotted name means, or None."""
        if isinstance(node, ast.Name) and node.id not in self._locals:
            return self.function.__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            return None if owner is None or owner is st else getattr(owner, node.attr, None)
        return None

    def constant(self, node: ast.expr) -> int | None:
        """The value of a literal or of a global constant."""
        value = node.value if isinstance(node, ast.Constant) else self.resolve(node)
        return int(value) if isinstance(value, int) else None

    def state_field(self, node: ast.expr) -> int | None:
        """The offset that ``st.NAME`` means, None for any other expression."""
        if isinstance(node, ast.Attribute) and self.resolve(node.value) is st:
            if node.attr not in OFFSETS:
                self.fail(node, f"the state block has no field {node.attr!r}")
            return OFFSETS[node.attr]
        return None


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statements inside a statement. (ast.walk goes through all expressions, which takes twenty times as long.)"""
    for name in ("body", "orelse"):
        inside = getattr(node, name, None)
        if isinstance(inside, list):
            yield inside


def _assigned(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements assign to."""
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id
        for inside in _bodies(node):
            yield from _assigned(inside)


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef]:
    for inside in _bodies(node):
        for one in inside:
            if isinstance(one, ast.FunctionDef):
                yield one
            yield from _functions(one)


class Sources:
    """Finds the syntax trees of functions; each file is parsed once."""

    def __init__(self) -> None:
        self._files: dict[str, dict[tuple[str, int], ast.FunctionDef]] = {}
        self._found: dict[FunctionType, Source] = {}

    def __call__(self, function: object) -> Source:
        if not isinstance(function, FunctionType):
            raise TypeError(f"{function!r} is not a plain function")
        if function not in self._found:
            self._found[function] = Source(function, self._node(function))
        return self._found[function]

    def _node(self, function: FunctionType) -> ast.FunctionDef:
        code = function.__code__
        if code.co_filename not in self._files:
            text = "".join(linecache.getlines(code.co_filename, function.__globals__))
            self._files[code.co_filename] = {
                (n.name, n.decorator_list[0].lineno if n.decorator_list else n.lineno): n
                for n in _functions(ast.parse(text, code.co_filename))
            }
        node = self._files[code.co_filename].get((code.co_name, code.co_firstlineno))
        if node is None:
            raise CompileError(code.co_filename, code.co_firstlineno, f"no source for {code.co_name}")
        a = node.args
        if a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults:
            raise CompileError(code.co_filename, node.lineno, f"{node.name}: plain parameters only")
        return node
