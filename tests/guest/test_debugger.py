"""A debugger in the guest: gdb's hardware watchpoints, which Linux makes of the debug registers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from skep.guest.debian import Guest
from tests.linux import Linux
from tests.programs import add_programs

PROGRAM = """
int counter, other[64];
int step(int i) { other[i & 63] += i; return i + 1; }
int main(void) {
    for (int i = 0; i < 4;) { counter += i; i = step(i); }
    return counter;
}
"""
COMMANDS = """
set pagination off
set confirm off
set startup-with-shell off
set debuginfod enabled off
start
watch counter
rwatch other[2]
continue
continue
continue
continue
continue
"""
PYTHON = (
    "lib/python3.*/*.py",
    *(f"lib/python3.*/{part}/*.py" for part in ("collections", "encodings", "importlib", "re")),
    "share/gdb/python/**/*.py",
)
"""Without its library the interpreter inside gdb does not start, nor does gdb."""
EXPECTED = [
    "Hardware watchpoint 2: counter", "Hardware read watchpoint 3: other[2]",
    "Hardware watchpoint 2: counter", "Old value = 0", "New value = 1",
    "Hardware watchpoint 2: counter", "Old value = 1", "New value = 3",
    "Hardware read watchpoint 3: other[2]", "Value = 0",
    "Hardware watchpoint 2: counter", "Old value = 3", "New value = 6",
]  # fmt: skip


def told(output: str) -> list[str]:
    """What gdb says of watchpoints."""
    return [line for line in output.splitlines() if line.startswith(("Hardware", "Old value", "New value", "Value"))]


@pytest.mark.slow
def test_watchpoints(guest: Guest, tmp_path: Path) -> None:
    if shutil.which("gdb") is None or shutil.which("tcc") is None:
        pytest.skip("gdb or tcc is not installed")
    (tmp_path / "program.c").write_text(PROGRAM)
    subprocess.run(["tcc", "-g", "-o", "program", "program.c"], cwd=tmp_path, check=True, timeout=60)
    files: dict[str, bytes | Path] = {"program": tmp_path / "program", "commands": COMMANDS.encode()}
    for pattern in PYTHON:
        for path in Path("/usr").glob(pattern):
            files[str(path).lstrip("/")] = path
    initrd = add_programs(guest.initrd, tmp_path / "initrd", ["gdb"], files)
    with Linux(Guest(guest.kernel, initrd), memory="1G") as linux:
        output = linux("cd / && gdb -nx -batch -x commands program")
        assert told(output) == EXPECTED, output
        linux.power_off()
