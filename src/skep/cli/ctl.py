"""``skep ctl`` and ``skep list``: asking the VMs that run."""

from __future__ import annotations

import json
import sys
from typing import Any

from skep.control import directory
from skep.control.client import Client
from skep.control.text import lines, size
from skep.errors import UserError


def ctl(name: str, action: str, arguments: dict[str, Any], as_json: bool) -> int:
    """Have one VM do one thing, and print what it answers."""
    with Client(name) as client:
        result = client.request(action, **arguments)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        for line in lines(action, result):
            print(line)
    return 0


def list_vms(as_json: bool) -> int:
    """Print the VMs of this user."""
    found = [status for name in directory.names() if (status := _status(name)) is not None]
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        print()
        return 0
    rows: list[tuple[str, ...]] = [("NAME", "STATE", "PID", "ENGINE", "CPUS", "MEMORY", "GUEST TIME")]
    for one in found:
        if "error" in one:
            rows.append((one["name"], one["error"], "", "", "", "", ""))
            continue
        cpus, seconds = len(one["processors"]), int(one["guest_seconds"])
        time = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        cells = (one["name"], one["state"], one["pid"], one["engine"], cpus or "", size(one["memory"]), time)
        rows.append(tuple(map(str, cells)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _status(name: str) -> dict[str, Any] | None:
    """None: it is gone, or not there yet."""
    try:
        with Client(name) as client:
            return client.request("status")
    except UserError as error:
        if name not in directory.names():
            return None
        return {"name": name, "error": error.what}
