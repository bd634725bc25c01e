"""The engines under test, each made once: their code caches and stubs are shared by all the VMs of a test run."""

from __future__ import annotations

import functools

from skep.engine.contract import Engine
from skep.engine.translate import TranslateEngine


@functools.cache
def translate() -> Engine:
    return TranslateEngine()
