"""GNU as for guest programs whose code is of more than one size: ``.code16``, ``.code32`` and ``.code64`` in one text.

Intel syntax without register prefixes. The text is assembled and linked to run at one address.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

from tests.engine.assemble import Program


@functools.cache
def gas(text: str, address: int) -> Program:
    """Machine code and labels of ``text`` at ``address``. The assembler's own words are raised on an error."""
    with tempfile.TemporaryDirectory() as directory:
        source, thing, linked, raw = (Path(directory, f"a.{kind}") for kind in ("s", "o", "elf", "bin"))
        source.write_text(f".intel_syntax noprefix\n.text\n{text}\n")
        _run("as", "--64", "-o", str(thing), str(source))
        _run("ld", "-Ttext", hex(address), "-e", hex(address), "-o", str(linked), str(thing))
        _run("objcopy", "-O", "binary", "-j", ".text", str(linked), str(raw))
        symbols = [line.split() for line in _run("nm", str(linked)).splitlines()]
        return Program(address, raw.read_bytes(), {name: int(value, 16) for value, _, name in symbols})


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{command[0]}: {done.stderr}")
    return done.stdout
