"""What the fuzzer is guided by: each way through the code has a counter of its own, and what it does stays the same."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.fuzz.branches import Branches

SOURCE = '''"""A module."""
from __future__ import annotations

def way(n: int) -> str:
    """Its words stay where they are."""
    if n < 0:
        return "negative"
    for _ in range(n):
        pass
    try:
        10 // n
    except ZeroDivisionError:
        return "zero"
    match n:
        case 1:
            return "one"
        case 2 | 3:
            return "few" if n == 2 else "three"
    while n > 100:
        n -= 1
    return "even" if n > 3 and n % 2 == 0 else "odd"

def below(n: int) -> list[int]:
    return [i for i in range(n) if i % 2]
'''


@pytest.fixture
def branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Branches:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "counted_ways.py").write_text(SOURCE)
    return Branches("counted_ways")


@pytest.fixture
def module(branches: Branches, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    with branches:
        made = importlib.import_module("counted_ways")
    monkeypatch.delitem(sys.modules, "counted_ways")
    return made


def taken(branches: Branches, job: Callable[[], object]) -> tuple[int, ...]:
    branches.counts[:] = [0] * len(branches.counts)
    job()
    return tuple(branches.counts)


def test_each_way_counts_otherwise(branches: Branches, module: ModuleType) -> None:
    plain: dict[str, Callable[[int], object]] = {}
    exec(compile(SOURCE, "plain", "exec"), plain)
    numbers = (-1, 0, 1, 2, 3, 4, 5, 7, 110)
    ways = [taken(branches, lambda n=n: module.way(n)) for n in numbers]
    assert len(set(ways)) == len(numbers)
    assert [module.way(n) for n in numbers] == [plain["way"](n) for n in numbers]
    assert all(any(way[n] for way in ways) for n in range(len(branches.counts) - 2)), "a branch of way() was not seen"
    assert max(taken(branches, lambda: module.below(9))) == 4
    assert module.below(9) == plain["below"](9)


def test_what_it_counts_is_as_it_was(module: ModuleType) -> None:
    assert module.__doc__ == "A module."
    assert module.way.__doc__ == "Its words stay where they are."
    assert module.way.__annotations__ == {"n": "int", "return": "str"}


def test_other_modules_are_left_alone(branches: Branches) -> None:
    assert branches.find_spec("json") is None
    assert branches.find_spec("counted_ways_too") is None
