"""A Linux that counts is frozen under one engine, and goes on under another, in another process.

KVM's part is done where hardware virtualization is: here, or in the nested laboratory, into which the state goes as a
file, and out of it. The translator's part is always done here: in the laboratory it would be emulated twice.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from skep.machine.amd64 import why_not_kvm
from tests.guest import counting
from tests.nested.__main__ import main as nested
from tests.nested.laboratory import missing

ENGINES = ("translate", "kvm")
PAIRS = [
    pytest.param(before, after, marks=() if before == after == "translate" else pytest.mark.slow)
    for before in ENGINES
    for after in ENGINES
]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_linux_that_counts_goes_on(tmp_path: Path, before: str, after: str) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    do("begin", before, begun, begun)
    do("go_on", after, begun, ended)
    assert ended.read_text() == "powered off"


def do(what: str, engine: str, state: Path, made: Path) -> None:
    """One of the two halves, which makes a file."""
    if engine == "translate" or why_not_kvm() is None:
        counting.main([what, engine, str(state), str(made)])
        return
    if (lacking := missing()) is not None:
        pytest.skip(lacking)
    put = [f"--put={state}"] if state.exists() else []
    command = f"python3 -m tests.guest.counting {what} {engine} /mnt/put/{state.name} /tmp/taken/{made.name}"
    assert nested([*put, f"--take={made.parent}", "--", command]) == 0
