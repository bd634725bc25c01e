"""The translator's own modules as machine code, by mypyc: translation costs half as much.

They stay ordinary Python: what mypyc makes of them lies beside them in the wheel, and is what Python imports. By hand,

    python3 tools/build/compiled.py DIRECTORY

writes the whole package with its compiled modules to DIRECTORY, for ``PYTHONPATH``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MODULES = (
    "asm", "blocks", "catalog", "codemap", "composing", "emission", "emitter", "forms", "lower", "narrow", "plain",
    "reading", "segment", "special", "store",
)  # fmt: skip
"""Of skep.engine.translate: what runs for each instruction, block or template."""
ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = Path("skep/engine/translate")
_BUILD = """
import os, sys
from mypyc.build import mypycify
from setuptools import setup
sources, into, work = sys.argv[1:4]
os.chdir(sources)
modules = mypycify(sys.argv[4:], target_dir=work + "/c", group_name="skep", opt_level="1", debug_level="0")
setup(name="skep", packages=[], ext_modules=modules, script_args=["build_ext", "-q", "-b", into, "-t", work])
"""


def wanted() -> bool:
    """Whether to compile: there are a C compiler and Python's headers, and SKEP_PURE is not set."""
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return not os.environ.get("SKEP_PURE") and shutil.which(compiler.split()[0]) is not None and headers.exists()


def requirements() -> list[str]:
    """What compiling needs: the mypy that checks the sources, and setuptools, which runs the C compiler."""
    if not wanted():
        return []
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    mypy = next(r for r in project["optional-dependencies"]["dev"] if r.startswith("mypy=="))
    return [mypy, "setuptools", *project["dependencies"]]  # with iced-x86 mypyc knows its types


def build(sources: Path, into: Path) -> None:
    """Compile the modules of the package in ``sources`` to shared libraries in ``into``, in the package's folders."""
    with tempfile.TemporaryDirectory() as work:
        files = [str(_PACKAGE / f"{name}.py") for name in MODULES]
        subprocess.run([sys.executable, "-c", _BUILD, str(sources), str(into), work, *files], check=True, cwd=work)


def main() -> None:
    into = Path(sys.argv[1]).resolve()
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(ROOT / "src" / "skep", into / "skep", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    build(into, into)


if __name__ == "__main__":
    main()
