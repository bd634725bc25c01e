from __future__ import annotations

from pathlib import Path

from tests.fuzz.tally import Tally


def test_runs_add_up(tmp_path: Path) -> None:
    for executions in (3, 4):
        tally = Tally(tmp_path)
        tally.executions += executions
        tally.save()
        tally.save()
    before = Tally(tmp_path)
    assert before.executions == 7
    assert before.seconds > 0
