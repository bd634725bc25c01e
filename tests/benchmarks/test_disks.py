"""The disk library's rows, on small disks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import disks
from benchmarks.console import BenchmarkError

MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    disks.prepare(tmp_path, None, 4 * MIB)
    return tmp_path


def test_every_kind_of_row_runs_on_both_sides(place: Path) -> None:
    wanted = ("convert qcow2 to raw", "write 4 KiB, qcow2, -t writeback, beside threads", "info of 1 TB")
    rows = [row for row in disks.rows(50, direct=False) if row.name in wanted]
    assert len(rows) == len(wanted)
    measured = {row.name: {"wanted": row.wanted, **disks.measure(place, row, 1)} for row in rows}
    heading, columns, *table = disks.lines({"here": measured})
    assert heading.startswith("here") and columns.split() == ["elapsed", "CPU", "wanted", "MiB"]
    assert [re.sub(r" {2,}.*", "", line.strip()) for line in table] == list(wanted)


def test_another_disk_is_no_result(place: Path) -> None:
    row = disks.Row("nothing", ("convert", "-f", "raw", "-O", "raw", "raw.img", "new"), makes="qcow2")
    with pytest.raises(BenchmarkError, match="compare"):
        disks.measure(place, row, 1)


def test_names_of_rows_differ() -> None:
    names = [row.name for row in disks.rows(1, direct=True)]
    assert len(set(names)) == len(names) > 20
