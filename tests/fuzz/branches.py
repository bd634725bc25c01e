"""Counts how often a program took each of its branches, and tells libFuzzer.

atheris does that too, by a call out of Python for each branch, which costs more than what it counts: here a counter is
an item of a list, and libFuzzer is told all of them after each input. It takes them as what a C compiler's
``-fsanitize-coverage=inline-8bit-counters`` makes.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

_COUNTS, _PASSED = "_branch_counts_", "_branch_passed_"


class Branches(MetaPathFinder):
    """Of the modules of ``package`` that are imported while this is in use, as a context manager."""

    def __init__(self, package: str) -> None:
        self._package = package
        self.counts: list[int] = []

    def __enter__(self) -> Branches:
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not f"{name}.".startswith(f"{self._package}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin, self.counts)
        return spec


class Reporter:
    """Tells libFuzzer, which runs already, what was counted. Nothing more is to be imported."""

    def __init__(self, counts: list[int]) -> None:
        library = importlib.util.find_spec("atheris.core_with_libfuzzer")
        libfuzzer, size = ctypes.CDLL(library.origin), len(counts)
        self._counts = counts
        self._none = [0] * size
        self._counters = (ctypes.c_uint8 * size)()
        # (program counter, flags) of each branch: any numbers that differ.
        self._places = (ctypes.c_size_t * (2 * size))(*(one for n in range(size) for one in (n + 1, 0)))
        for announce, array in (
            (libfuzzer["__sanitizer_cov_8bit_counters_init"], self._counters),
            (libfuzzer["__sanitizer_cov_pcs_init"], self._places),
        ):
            begin = ctypes.addressof(array)
            announce(ctypes.c_void_p(begin), ctypes.c_void_p(begin + ctypes.sizeof(array)))

    def begin(self) -> None:
        """An input comes."""
        self._counts[:] = self._none

    def end(self) -> None:
        """It was tried."""
        self._counters[:] = [one if one < 256 else 255 for one in self._counts]


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, counts: list[int]) -> None:
        super().__init__(name, path)
        self._counts = counts

    def get_code(self, fullname: str) -> CodeType:
        """Of the source: what is kept compiled counts nothing."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        return compile(ast.fix_missing_locations(_Counting(self._counts).visit(tree)), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        counts = self._counts

        def passed(branch: int) -> bool:
            counts[branch] += 1
            return True

        vars(module).update({_COUNTS: counts, _PASSED: passed})
        super().exec_module(module)


class _Counting(ast.NodeTransformer):
    """Each way that a statement or an expression may take adds one to its counter first."""

    def __init__(self, counts: list[int]) -> None:
        self._counts = counts

    def _branch(self) -> ast.Constant:
        self._counts.append(0)
        return ast.Constant(len(self._counts) - 1)

    def _step(self) -> ast.stmt:
        item = ast.Subscript(ast.Name(_COUNTS, ast.Load()), self._branch(), ast.Store())
        return ast.AugAssign(item, ast.Add(), ast.Constant(1))

    def _counted(self, way: ast.expr) -> ast.expr:
        return ast.BoolOp(ast.And(), [ast.Call(ast.Name(_PASSED, ast.Load()), [self._branch()], []), way])

    def _body_counted(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        described = isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None
        node.body.insert(int(described), self._step())
        return node

    visit_FunctionDef = visit_ExceptHandler = visit_match_case = _body_counted

    def _both_counted(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(0, self._step())
        node.orelse.insert(0, self._step())
        return node

    visit_If = visit_For = visit_While = _both_counted

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.body, node.orelse = self._counted(node.body), self._counted(node.orelse)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        node.values[1:] = map(self._counted, node.values[1:])
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        self.generic_visit(node)
        node.ifs = [ast.BoolOp(ast.And(), [one, self._counted(ast.Constant(True))]) for one in node.ifs]
        return node
