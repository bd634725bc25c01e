"""The engines under test."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest

from skep.engine.contract import Engine
from skep.engine.kvm import KvmEngine
from skep.engine.translate import TranslateEngine
from skep.errors import UserError
from skep.machine import choose_engine
from skep.machine.amd64 import why_not_kvm
from tests.engine.tiny import Tiny

NAMES = ("translate", "kvm", pytest.param("hardware", marks=pytest.mark.hardware))
"""Parameters of a test that runs under each: the translator, this host's KVM, which may be an emulation that runs tiny
guests only, and KVM on hardware virtualization. See :func:`named`."""
ON_HARDWARE = pytest.param("kvm on hardware", marks=(pytest.mark.hardware, pytest.mark.slow))
WHOLE_ON_HARDWARE = pytest.param("kvm whole on hardware", marks=(pytest.mark.hardware, pytest.mark.slow))
ALONE_ON_HARDWARE = pytest.param("kvm alone on hardware", marks=(pytest.mark.hardware, pytest.mark.slow))
"""Parameters of whole VMs that run under KVM, with the interrupt controllers that "auto" gives them, with all of them
the kernel's, and with none."""
KVM_ON_HARDWARE = pytest.param("kvm", id="kvm on hardware", marks=(pytest.mark.hardware, pytest.mark.slow))
"""A parameter of a process with a VM under KVM."""
EVERYWHERE = pytest.mark.parametrize("boot", NAMES, indirect=True)
"""For tests of what each engine promises, with the fixture ``boot``."""
EXACTLY = pytest.mark.parametrize("boot", [NAMES[0], NAMES[2]], indirect=True)
"""The same, but an emulation of KVM is too slow for it, or lets interrupts in only every so many instructions."""
RINGS = {"kvm": 1 << 16, "hardware": 1024}
"""Entries. An instruction emulator in place of a processor does not look whether a ring is full: that is for the real
one, with a small ring."""


@functools.cache
def translate() -> Engine:
    """Made once: code caches and stubs are shared by all the VMs of a test run."""
    return TranslateEngine()


def need(engine: str) -> None:
    """Skip the test where this host cannot have ``engine``, "translate" or "kvm", be it an emulation of KVM."""
    try:
        choose_engine(engine, "off")
        if engine == "kvm":
            os.close(os.open("/dev/kvm", os.O_RDWR))
    except (UserError, OSError) as error:
        pytest.skip(str(error))


def named(name: str) -> Engine:
    """One of NAMES; KVM's with " rings" behind it have dirty rings. Skips the test where it is not to be had."""
    if name == "translate":
        return translate()
    where, _, rings = name.partition(" ")
    if where == "kvm" and why_not_kvm() is None:
        pytest.skip("this host's KVM is the hardware's")
    need("kvm")
    return KvmEngine(dirty_ring=RINGS[where] if rings else 0)


class Machines:
    """Makes each :class:`Tiny` of a test with one engine. Under KVM its processor is the plainest: others' features are
    not the engine's."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._made: list[Tiny] = []

    def __call__(self, text: str, **options: Any) -> Tiny:
        if self.engine.name == "kvm":
            options = {"cpu_model": "baseline", **options}
        self._made.append(Tiny(self.engine, text, **options))
        return self._made[-1]

    def close(self) -> None:
        for machine in self._made:
            machine.close()
