"""The KVM engine under test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from skep.engine.kvm import KvmEngine
from skep.machine.amd64 import why_not_kvm
from tests.engine.tiny import Tiny


@pytest.fixture(params=["here", pytest.param("hardware", marks=pytest.mark.hardware)])
def kvm(request: pytest.FixtureRequest) -> KvmEngine:
    """On this host's KVM, which may be an emulation that runs tiny guests only, and on hardware virtualization."""
    if request.param == "here" and why_not_kvm() is None:
        pytest.skip("this host's KVM is the hardware's")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm does not open")
    return KvmEngine()


@pytest.fixture
def boot(kvm: KvmEngine) -> Iterator[Callable[..., Tiny]]:
    machines: list[Tiny] = []

    def make(text: str, **options: Any) -> Tiny:
        tiny = Tiny(kvm, text, **{"cpu_model": "baseline", **options})
        tiny.interrupts.kick = tiny.vcpu.kick
        machines.append(tiny)
        return tiny

    yield make
    for machine in machines:
        machine.close()
