"""How `skep image` shows things: qemu-img's human and JSON forms."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from typing import Any, Self

from skep.block.format import Image, Snapshot
from skep.block.naming import place_of


def human_size(size: int) -> str:
    """Three digits and a unit."""
    exponent = math.frexp(size / (1000.0 / 1024.0))[1]
    step = max(0, (exponent - 1) // 10)
    return f"{_three_digits(size / (1 << 10 * step))} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[step]}B"


def _three_digits(number: float) -> str:
    return f"{number:.3g}"


def c_hex(number: int) -> str:
    """As C's ``%#x``, to which zero has no prefix."""
    return f"{number:#x}" if number else "0"


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=4))


def describe(image: Image, path: str) -> dict[str, Any]:
    """What `info` tells of one image, as its JSON."""
    found: dict[str, Any] = {}
    below = image.backing_name()
    if below is not None and below.format is not None:
        found["backing-filename-format"] = below.format
    if taken := image.snapshots():
        found["snapshots"] = [_snapshot(one) for one in taken]
    found["virtual-size"] = image.size
    found["filename"] = path
    if image.cluster_size is not None:
        found["cluster-size"] = image.cluster_size
    found["format"] = image.format
    if (taken_of_host := image.allocated()) is not None:
        found["actual-size"] = taken_of_host
    if special := image.info():
        found["format-specific"] = {"type": image.format, "data": special}
    if image.encrypted:
        found["encrypted"] = True
    if below is not None:
        found["full-backing-filename"] = place_of(path, below.name, None)
        found["backing-filename"] = below.name
    found["dirty-flag"] = image.dirty
    return found


def _snapshot(one: Snapshot) -> dict[str, Any]:
    seconds, nanoseconds = divmod(one.vm_clock, 10**9)
    found: dict[str, Any] = {} if one.icount is None else {"icount": one.icount}
    return found | {
        "vm-clock-nsec": nanoseconds,
        "name": one.name,
        "date-sec": one.seconds,
        "date-nsec": one.nanoseconds,
        "vm-clock-sec": seconds,
        "id": one.id,
        "vm-state-size": one.state_size,
    }


def print_info(found: dict[str, Any], snapshots: Iterable[Snapshot]) -> None:
    """The same for people."""
    print(f"image: {found['filename']}")
    print(f"file format: {found['format']}")
    print(f"virtual size: {human_size(found['virtual-size'])} ({found['virtual-size']} bytes)")
    print(f"disk size: {human_size(found['actual-size']) if 'actual-size' in found else 'unavailable'}")
    if found.get("encrypted"):
        print("encrypted: yes")
    if "cluster-size" in found:
        print(f"cluster_size: {found['cluster-size']}")
    if found["dirty-flag"]:
        print("cleanly shut down: no")
    if "backing-filename" in found:
        name, full = found["backing-filename"], found["full-backing-filename"]
        print(f"backing file: {name}" + (f" (actual path: {full})" if name != full else ""))
    if "backing-filename-format" in found:
        print(f"backing file format: {found['backing-filename-format']}")
    if found.get("snapshots"):
        print_snapshots(snapshots)
    if "format-specific" in found:
        print("Format specific information:")
        dump_values(found["format-specific"]["data"], 1)


def dump_values(value: Any, depth: int) -> None:
    """A tree of values, four columns for each step."""
    entries = value.items() if isinstance(value, dict) else ((f"[{i}]", one) for i, one in enumerate(value))
    for key, one in entries:
        name = key.replace("-", " ")
        if isinstance(one, dict | list):
            print(f"{'    ' * depth}{name}:")
            dump_values(one, depth + 1)
        else:
            text = str(one).lower() if isinstance(one, bool) else one
            print(f"{'    ' * depth}{name}: {text}")


def print_snapshots(snapshots: Iterable[Snapshot]) -> None:
    print("Snapshot list:")
    print(f"{'ID':<9} {'TAG':<16} {'VM SIZE':>8} {'DATE':>19} {'VM CLOCK':>12} {'ICOUNT':>10}")
    for one in snapshots:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.seconds))
        seconds, part = divmod(one.vm_clock // 10**6, 1000)
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{part:03d}"
        count = "" if one.icount is None else one.icount
        print(f"{one.id:<9} {one.name:<16} {human_size(one.state_size):>8} {when:>19} {clock:>12} {count:>10}")


class Meter:
    """How much is done: qemu-img's line where `-p` asks for it, else a bar on a terminal if it takes a while. A context
    manager; call it with what is done, from 0 to 1."""

    _SOON = 0.5
    """Seconds before the bar is drawn."""
    _EVERY = 0.1
    """Between two of it."""

    def __init__(self, line: bool, quiet: bool) -> None:
        self._line = line and not quiet
        self._bar = not line and not quiet and sys.stderr.isatty()
        self._drawn = False
        self._last = -1.0
        self._next = time.monotonic() + self._SOON

    def __call__(self, done: float) -> None:
        done = min(done, 1.0)
        if self._line:
            if done - self._last >= 0.01 or (done == 1.0 and self._last < 1.0):
                self._last = done
                print(f"    ({math.floor(done * 10000) / 100:.2f}/100%)", end="\r", flush=True)
        elif self._bar and (now := time.monotonic()) >= self._next:
            self._next, self._drawn = now + self._EVERY, True
            import shutil

            width = max(10, min(60, shutil.get_terminal_size().columns - 10))
            full = int(done * width)
            print(f"\r[{'#' * full}{' ' * (width - full)}] {done:6.1%}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        self(0)
        return self

    def __exit__(self, *error: object) -> None:
        if self._line:
            print()
        elif self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
