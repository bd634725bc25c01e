"""The boots: the same kernel, initramfs and command line to /init, under Skep (cold, warm) and QEMU in turns."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import skep
from benchmarks.console import Boot, boot
from benchmarks.peers import Payload, qemu_command, skep_command


def run(payload: Payload, count: int, timeout: float, qemu: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """``count`` boots of each; the result is what is saved as JSON.

    A cold boot has a cache directory of its own. Warm ones share one, which a boot that is not counted has filled. KVM
    keeps nothing, and all its boots are warm.
    """
    with tempfile.TemporaryDirectory(prefix="skep-bench-") as shared:
        code = str(Path(shared, "bytecode"))

        def cold(watch: bool = False) -> Boot:
            with tempfile.TemporaryDirectory(prefix="skep-bench-") as cache:
                return _skep(payload, timeout, cache, code, watch)

        ways: dict[str, Callable[[], Boot]] = {"cold": cold, "warm": lambda: _skep(payload, timeout, shared, code)}
        if payload.engine == "kvm":
            del ways["cold"]
        if qemu:
            ways["qemu"] = lambda: boot(qemu_command(payload), timeout)
        boots: dict[str, list[Boot]] = {name: [] for name in ways}
        for name in ("warm", "qemu"):
            if name in ways:
                say(f"warming up: boot {name}")
                ways[name]()
        for number in range(count):
            for name, one in ways.items():
                say(f"boot {number + 1} of {count}: {name}")
                boots[name].append(one())
        say("boot, watching memory")
        resident = cold(watch=True).resident
    return {"boots": {name: [asdict(b) for b in done] for name, done in boots.items()}, "resident": resident}


def _skep(payload: Payload, timeout: float, cache: str, code: str, watch: bool = False) -> Boot:
    """``code``: where Python's bytecode is, which an installed Skep has beside its modules, whatever this environment
    forbids."""
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONDONTWRITEBYTECODE": ""}
    if not os.path.exists(cache_from_source(skep.__file__)):
        environment["PYTHONPYCACHEPREFIX"] = code
    return boot(skep_command(payload), 2 * timeout if watch else timeout, environment, watch)
