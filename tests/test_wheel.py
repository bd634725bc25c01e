"""Wheels as they are built: with the translator compiled, and without."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from skep.engine.translate import blocks

ROOT = Path(__file__).resolve().parents[1]


def _wheel(into: Path, **environment: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(into), str(ROOT)]
    subprocess.run(pip, check=True, env={**os.environ, **environment}, timeout=3000)
    (wheel,) = into.glob("*.whl")
    return wheel


def _libraries(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith(".so")]


def _python(installed: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


_DESCRIPTION = "from skep.engine.translate import TranslateEngine; print(TranslateEngine.description)"


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, SKEP_PURE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not _libraries(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    assert _python(tmp_path / "installed", "-c", _DESCRIPTION) == "translate, pure Python\n"


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    """What the engine's tests ask of the sources holds for what is made of them."""
    wheel = _wheel(tmp_path, SKEP_PURE="")
    assert not wheel.name.endswith("-any.whl")
    assert "skep/engine/translate/emission" in {name.split(".")[0] for name in _libraries(wheel)}
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert _python(installed, "-c", _DESCRIPTION) == "translate, compiled by mypyc\n"
    names = "test_asm.py test_composing.py test_lower.py test_renaming.py test_sharing.py test_store.py"
    engine = [f"tests/engine/translate/{name}" for name in names.split()]
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "-o", f"pythonpath={installed} ."]
    _python(installed, "-m", "pytest", *options, *engine, "tests/engine/test_differential.py")


def test_the_compiled_language_stays_python() -> None:
    """Our own compiler reads the source of its functions, which what mypyc makes of them has not."""
    sys.path.insert(0, str(ROOT / "tools/build"))
    try:
        names = importlib.import_module("compiled").MODULES
    finally:
        sys.path.pop(0)
    lists = (
        blocks.ROUTINES, blocks.STRING_ROUTINES, blocks.NARROW_ROUTINES, blocks.SYSTEM_ROUTINES, blocks.COMPOSE_ROUTINES
    )  # fmt: skip
    routines = {routine.__module__ for list_ in lists for routine in list_}
    for name in names:
        module = importlib.import_module(f"skep.engine.translate.{name}")
        assert module.__name__ not in routines
        own = [f for f in vars(module).values() if getattr(f, "__module__", "") == module.__name__]
        assert not [f for f in own if getattr(f, "_skep_inline", False)]
