"""What is made of the suite's samples; and that the suite notices a machine that miscomputes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import suite
from benchmarks.console import BenchmarkError
from benchmarks.figures import means, percentile, rows, table_lines
from benchmarks.machine import Guest, Host, Repetition
from benchmarks.picture import draw
from benchmarks.rows import CAP


def batch(*seconds: float) -> list[dict[str, float]]:
    return [{"elapsed": s, "cpu": s / 2} for s in seconds]


SAMPLES = {
    "alu": {"native": batch(1, 1, 1), "skep": batch(2, 1, 9), "qemu": batch(8, 8, 8)},
    "x87": {"native": batch(1), "skep": batch(1), "qemu": batch(1000)},
    "calls": {"native": batch(1), "skep": batch(4), "qemu": batch(2)},
    "avx2": {"native": batch(1), "skep": [], "qemu": batch(2)},
}


def test_a_rows_figures() -> None:
    alu = rows(SAMPLES, "elapsed")[0]
    assert (alu.name, alu.times["skep"].median, alu.times["skep"].p99) == ("alu", 2, 9)
    assert alu.speed == 4
    assert alu.cost == 2
    assert rows(SAMPLES, "cpu")[0].times["skep"].median == 1


def test_ratios_are_capped_and_a_row_that_a_machine_cannot_do_does_not_count() -> None:
    table = rows(SAMPLES, "elapsed")
    assert means(table) == {
        "integer": pytest.approx(2**0.5),  # 4 and 0.5
        "FP and SIMD": pytest.approx(CAP),
        "all": pytest.approx((4 * 0.5 * CAP) ** (1 / 3)),
    }


def test_percentile_is_the_nearest_rank() -> None:
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([3, 1, 2], 0.99) == 3
    assert percentile([3, 1, 2], 0.5) == 2


def test_table_has_a_line_for_each_row() -> None:
    lines = list(table_lines(rows(SAMPLES, "elapsed")))
    alu = next(line for line in lines if line.startswith("  alu"))
    assert alu.split() == ["alu", "1000.0", "(1000)", "2000.0", "(9000)", "8000.0", "(8000)", "4.00", "2.00"]
    avx2 = next(line for line in lines if line.startswith("  avx2"))
    assert avx2.split()[-2:] == ["-", "-"]


def test_picture_is_svg_with_a_bar_for_each_row() -> None:
    root = ElementTree.fromstring(draw(rows(SAMPLES, "elapsed")))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}rect")) == 1 + 3  # the ground, and the rows that have a ratio
    assert "4.0" in {text.text for text in root.findall(f"{space}text")}


BENCH = '#!/bin/sh\necho "BENCH $1 0 1500000 1000000 5 $RESULT"\n'
CONSOLE = """
import sys
print("firmware's wordsREADY", flush=True)
for line in sys.stdin:
    print("BENCH", line.split()[0], "0 2000000 0 5 00000000000000ab\\nDONE 0", flush=True)
"""


@pytest.mark.parametrize(("result", "agrees"), [("00000000000000ab", True), ("00000000000000ac", False)])
def test_results_of_all_machines_are_compared(tmp_path: Path, result: str, agrees: bool) -> None:
    program = tmp_path / "bench" / "bench"
    program.parent.mkdir()
    program.write_text(BENCH.replace("$RESULT", result))
    program.chmod(0o755)
    guest = Guest(["python3", "-c", CONSOLE])
    try:
        guest.wait_ready(20)
        machines: dict[str, Guest | Host] = {"native": Host(tmp_path, tmp_path), "skep": guest}
        if agrees:
            done = suite.batches(machines, ["alu"], 1, "", lambda _: None)["alu"]
            assert done["native"] == [Repetition(0.0015, 0.001, result)]
            assert (done["skep"][0].elapsed, done["skep"][0].check) == (0.002, result)
        else:
            with pytest.raises(BenchmarkError, match="do not agree"):
                suite.batches(machines, ["alu"], 1, "", lambda _: None)
    finally:
        guest.close()


def test_a_machine_that_ends_is_an_error_with_its_last_words() -> None:
    guest = Guest(["sh", "-c", "echo no such kernel; exit 2"])
    try:
        with pytest.raises(BenchmarkError, match=r"the machine ended(.|\n)*no such kernel"):
            guest.wait_ready(20)
    finally:
        guest.close()
