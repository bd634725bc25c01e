"""A boot's end is seen, whatever else is in its line."""

from __future__ import annotations

import pytest

from benchmarks.console import BenchmarkError, boot


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(r"BOOT\r\n", id="alone"),
        pytest.param(r"\033c\033[?7l\033[2JBOOT\r\n", id="a cleared screen"),
        pytest.param(r"Booting from ROM..\033c\033[?7l\033[2JBOOT\r\n", id="a BIOS that is cut off"),
        pytest.param(r"\033[2J\033[0m.\r\nBOOT\r\n", id="a line of its own"),
        pytest.param(r"\033[2J\033[0m.\rBOOT\r\n", id="a line that was begun again"),
    ],
)
def test_the_line_of_init_is_seen(said: str) -> None:
    assert boot(["printf", said], 10).boot > 0


def test_other_lines_are_not_it() -> None:
    with pytest.raises(BenchmarkError, match="BOOT was not seen"):
        boot(["printf", r"REBOOT\r\nBOOT of something\r\n\033[2J BOOT\r\n"], 10)
