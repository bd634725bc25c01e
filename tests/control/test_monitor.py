"""The monitor's line editor; the whole of it is tried on a terminal in tests/cli/test_ctl.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.control.monitor import LineEditor


def typed(data: bytes) -> tuple[list[str], bytes]:
    """The lines, and what the terminal was sent."""
    shown = bytearray()
    editor = LineEditor(shown.extend)
    return [line for byte in data if (line := editor.feed(byte)) is not None], bytes(shown)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"status\r", "status"),
        (b"  dump   x \n", "dump   x"),
        (b"\r", ""),
        (b"stats\x7f\x7ftus\r", "status"),
        (b"\x7f\x08freeze\r", "freeze"),
        (b"dump core\x17file\r", "dump file"),
        (b"dump core  \x17\x17thaw\r", "thaw"),
        (b"nonsense\x15thaw\r", "thaw"),
        (b"th\x1b[D\x1b[3~\x1b[1;5Caw\x1bOP\x1bb\r", "thaw"),
        (b"th\x00\x01\x02\x03\x80\xffaw\r", "thaw"),
        (b"x" * 1000 + b"\r", "x" * 256),
    ],
)
def test_a_line(data: bytes, line: str) -> None:
    assert typed(data)[0] == [line]


@given(st.lists(st.sampled_from([*b"ab \x7f\x08\x15\x17\r\x1b[~A"]) | st.integers(0, 255)).map(bytes))
def test_the_terminal_shows_the_line_as_it_is(data: bytes) -> None:
    """Replay what was shown on a terminal that knows backspace, and compare its line with the editor's."""
    shown = bytearray()
    editor = LineEditor(shown.extend)
    for byte in data:
        editor.feed(byte)
    screen: list[int] = []
    at = 0
    for byte in bytes(shown).rpartition(b"\r\n")[2]:
        if byte == 8:
            at -= 1
            assert at >= 0
        else:
            screen[at : at + 1] = [byte]
            at += 1
    assert bytes(screen[:at]) == bytes(editor._line)
    assert bytes(screen[at:]).strip(b" ") == b""
