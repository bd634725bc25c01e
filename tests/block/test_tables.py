"""Tables of an image's metadata."""

from __future__ import annotations

import os
from pathlib import Path
from struct import Struct

from skep.block.file import HostFile
from skep.block.tables import Table


def test_nobody_looks_further_than_he_was_told(tmp_path: Path) -> None:
    """A large disk's map is made piece by piece; were each look to the end, it would never be done."""
    asked: list[int] = []
    path = tmp_path / "file"
    file = HostFile(os.open(path, os.O_RDWR | os.O_CREAT), str(path), 0, read_only=False, write_cache=True)
    with file:
        table = Table(file, Struct("<I"), 1 << 20, asked.append, 512)
        assert table.skip(100, 1024) == 1024
        assert asked == [0, 1]
        table[3000] = 7
        assert table.skip(0, 1 << 20) == 3000 // 512 * 512, "a page with changes is looked at entry by entry"
        assert table.skip(1 << 20, 1 << 21) == 1 << 20
