"""Fixtures of the engine tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.engines import translate
from tests.engine.oracle import Oracle
from tests.engine.tiny import Tiny


@pytest.fixture(scope="session")
def host() -> Iterator[Oracle]:
    """The host CPU."""
    with Oracle() as oracle:
        yield oracle


@pytest.fixture
def boot() -> Iterator[Callable[..., Tiny]]:
    """Makes a :class:`Tiny` under the translator and closes it behind the test."""
    machines: list[Tiny] = []

    def make(text: str, **options: Any) -> Tiny:
        machines.append(Tiny(translate(), text, **options))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()
