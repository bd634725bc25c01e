"""What the engine cannot do for a guest is said in one line, without a traceback."""

from __future__ import annotations

import pytest

from skep.cli import main, parser
from skep.errors import EngineLimit


def test_an_engines_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def reach(arguments: list[str]) -> int:
        raise EngineLimit("the guest runs 16-bit code, which this engine does not have yet")

    monkeypatch.setattr(parser, "run_command", reach)
    assert main(["run"]) == 4
    assert capsys.readouterr().err == "skep: the guest runs 16-bit code, which this engine does not have yet\n"
