"""Programs of this system in a guest: added to its initramfs, with the libraries that they need."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from skep.guest.cpio import Archive


def add_programs(
    initrd: Path, to: Path, programs: Iterable[str] = (), files: Mapping[str, bytes | Path] | None = None
) -> Path:
    """Write to ``to`` the initramfs ``initrd`` with the programs in /bin, their libraries where they look for them, and
    files by their paths. Kernels unpack one archive after the other.

    The test is skipped where this system does not have a program.
    """
    archive = Archive()
    places: dict[str, bytes | Path] = {}
    for program in programs:
        found = shutil.which(program)
        if found is None:
            pytest.skip(f"{program} is not installed")
        places[f"bin/{program}"] = Path(found)
        listed = subprocess.run(["ldd", found], check=True, capture_output=True, text=True, timeout=60).stdout
        for library in re.findall(r"(/\S+) \(0x", listed):
            places[library.lstrip("/")] = Path(library)
    places.update(files or {})
    directories: set[Path] = {Path()}
    for name, content in places.items():
        for parent in reversed(Path(name).parents):
            if parent not in directories:
                directories.add(parent)
                archive.directory(str(parent))
        archive.file(name, content.read_bytes() if isinstance(content, Path) else content, 0o755)
    to.write_bytes(initrd.read_bytes() + archive.finish())
    return to
