"""The engines under test."""

from __future__ import annotations

import functools
import os

import pytest

from skep.engine.contract import Engine
from skep.engine.kvm import KvmEngine
from skep.engine.translate import TranslateEngine
from skep.machine.amd64 import why_not_kvm

NAMES = ("translate", "kvm", pytest.param("hardware", marks=pytest.mark.hardware))
"""Parameters of a test that runs under each: the translator, this host's KVM, which may be an emulation that runs tiny
guests only, and KVM on hardware virtualization. See :func:`named`."""
RINGS = {"kvm": 1 << 16, "hardware": 1024}
"""Entries. An instruction emulator in place of a processor does not look whether a ring is full: that is for the real
one, with a small ring."""


@functools.cache
def translate() -> Engine:
    """Made once: code caches and stubs are shared by all the VMs of a test run."""
    return TranslateEngine()


def named(name: str) -> Engine:
    """One of NAMES; KVM's with " rings" behind it have dirty rings. Skips the test where it is not to be had."""
    if name == "translate":
        return translate()
    where, _, rings = name.partition(" ")
    if where == "kvm" and why_not_kvm() is None:
        pytest.skip("this host's KVM is the hardware's")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm does not open")
    return KvmEngine(dirty_ring=RINGS[where] if rings else 0)
