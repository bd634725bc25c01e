"""The documentation: it builds, its links lead somewhere, its examples run, and it leaves nothing out."""

from __future__ import annotations

import argparse
import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.cli.parser import make_parser
from skep.config.settings import Settings
from skep.config.views import keys_of

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGE_OF = {"locks": "errors", "alarm": "clock", "bells": "bus"}
"""Rooms whose page has another name."""


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "Wait for the VM" in (tmp_path / "python.html").read_text(), "docstrings are in it"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def examples() -> Iterator[object]:
    """Every page with ``pycon`` blocks: what is typed in a session, and what it prints."""
    for page in PAGES:
        blocks = re.findall(r"^```pycon\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        if blocks:
            yield pytest.param("\n".join(blocks), id=page.stem)


@pytest.mark.parametrize("text", examples())
def test_examples_print_what_they_say(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = doctest.DocTestParser().get_doctest(text, {}, "page", None, 0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=said.append)
    assert not said, "".join(said)


def test_every_room_has_a_page() -> None:
    rooms = {path.stem for path in (ROOT / "src/skep").iterdir() if path.stem not in ("__init__", "__pycache__", "py")}
    pages = {page.stem for page in PAGES}
    assert {room for room in rooms if PAGE_OF.get(room, room) not in pages} == set()


def options() -> Iterator[tuple[str, str]]:
    """(command, option) of the whole command line."""
    commands = next(one for one in make_parser()._actions if isinstance(one, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        for action in parser._actions:
            for option in action.option_strings:
                yield name, option


def test_every_option_is_documented() -> None:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("cli.md", "control.md", "guest.md"))
    documented = set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", text)) | {"-h", "--help"}
    missing = {f"{command} {option}" for command, option in options() if option not in documented}
    # A long name stands for its short one too.
    assert {one for one in missing if one.split()[1].startswith("--")} == set()


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs/config.md").read_text()
    assert {key for key in keys_of(Settings) if f"`{key}`" not in text and key != "config.dump"} == set()


def test_make_docs_is_what_is_tested() -> None:
    assert "sphinx-build -W" in (ROOT / "Makefile").read_text()
    assert os.access(ROOT / "docs/conf.py", os.R_OK)
