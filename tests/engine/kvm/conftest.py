"""The KVM engine under test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from skep.engine.kvm import KvmEngine
from tests.engine.engines import NAMES, Machines, named


@pytest.fixture(params=NAMES[1:])
def kvm(request: pytest.FixtureRequest) -> KvmEngine:
    engine = named(request.param)
    assert isinstance(engine, KvmEngine)
    return engine


@pytest.fixture
def boot(kvm: KvmEngine) -> Iterator[Machines]:
    with closing(Machines(kvm)) as machines:
        yield machines
