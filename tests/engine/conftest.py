"""Fixtures of the engine tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.engine.engines import Machines, named
from tests.engine.oracle import Oracle


@pytest.fixture(scope="session")
def host() -> Iterator[Oracle]:
    """The host CPU."""
    with Oracle() as oracle:
        yield oracle


@pytest.fixture
def boot(request: pytest.FixtureRequest) -> Iterator[Machines]:
    """Under the translator; under each engine where :data:`tests.engine.engines.EVERYWHERE` marks the test."""
    with closing(Machines(named(getattr(request, "param", "translate")))) as machines:
        yield machines
