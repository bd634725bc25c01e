"""Tables of an image's metadata."""

from __future__ import annotations

import os
from array import array
from functools import partial
from pathlib import Path
from struct import Struct

from skep.block.file import HostFile
from skep.block.tables import Table, first_in_use


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


def test_pages_that_are_in_no_file_are_not_looked_at(tmp_path: Path) -> None:
    asked: list[int] = []
    directory = array("I", bytes(4 << 20))
    directory[70000] = 1

    def where(number: int) -> int | None:
        asked.append(number)
        return 0 if directory[number] else None

    path = tmp_path / "file"
    path.write_bytes(bytes(2044) + b"four")
    file = HostFile(os.open(path, os.O_RDWR), str(path), 2048, read_only=False, write_cache=True)
    with file:
        table = Table(file, Struct("<I"), 512 << 20, where, 512, next_page=partial(first_in_use, directory))
        assert table.skip(0, 512 << 20) == 70000 * 512 + 511
        assert asked == [0, 70000]
        assert table.skip(0, 60000 * 512 + 5) == 60000 * 512 + 5
        table[50000 * 512] = 7
        assert table.skip(0, 512 << 20) == 50000 * 512
        assert table.skip(50000 * 512 + 1, 512 << 20) == 50000 * 512 + 1
        assert table.skip(50001 * 512, 512 << 20) == 70000 * 512 + 511
        assert table.skip(70001 * 512, 512 << 20) == 512 << 20
