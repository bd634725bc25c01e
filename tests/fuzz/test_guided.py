"""The fuzzer itself, for some seconds of CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")

ROOT = Path(__file__).parents[2]


def fuzz(format: str, home: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    command = [sys.executable, "-m", "tests.fuzz", format, "6", str(home)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["vdi", "nbd"])
def test_runs_go_on_where_others_ended(tmp_path: Path, format: str) -> None:
    tallies = []
    for _ in range(2):
        done = fuzz(format, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        tallies.append(json.loads((tmp_path / format / "tally.json").read_text()))
    assert tallies[1]["executions"] > tallies[0]["executions"] > 50
    assert tallies[1]["seconds"] >= tallies[0]["seconds"] + 5
    assert not list((tmp_path / format / "finds").iterdir())
    assert len(list((tmp_path / format / "corpus").iterdir())) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "name"), [('raise ValueError("harm")', "crash-"), ("10 ** 10 ** 9", "hang-")], ids=["raised", "hangs"]
)
def test_it_finds(tmp_path: Path, harm: str, name: str) -> None:
    """In a copy of itself with something wrong in it, which needs a way that no sound input has."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    put = "        image.put(path)\n"
    replaced(tmp_path / "tests/fuzz/images.py", put, f"{put}        if way % 16 == 9:\n            {harm}\n")
    replaced(tmp_path / "tests/fuzz/guided.py", "HANGS = 60", "HANGS = 2")
    done = fuzz("vdi", tmp_path / "home", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    finds = list((tmp_path / "home/vdi/finds").iterdir())
    assert len(finds) == 1 and finds[0].name.startswith(name)
    assert ("hang" in name) or "ValueError: harm" in (tmp_path / "home/vdi/log").read_text()
