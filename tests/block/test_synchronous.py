"""Without a write cache: each write is in the file, with what leads to it, when it returns."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from skep.block.backend import read_at, write_at
from skep.block.format import BackingName
from skep.block.image import create_image, open_image

SIZE = 8 << 20


@pytest.mark.parametrize(
    ("format", "options", "over"),
    [
        ("vhdx", {"block_size": "1M"}, False),
        ("vhdx", {"block_size": "1M"}, True),
        ("vmdk", {}, False),
        ("vmdk", {}, True),
        ("vmdk", {"subformat": "streamOptimized"}, False),
        ("vpc", {"force_size": "on"}, False),
        ("vpc", {"force_size": "on"}, True),
        ("vdi", {}, False),
    ],
)
def test_each_write_is_there_at_once(tmp_path: Path, format: str, options: Mapping[str, str], over: bool) -> None:
    path, copy = tmp_path / "disk", tmp_path / "copy"
    if over:
        create_image(tmp_path / "below", format, SIZE, options=options)
    create_image(path, format, SIZE, options=options, backing=BackingName("below", format) if over else None)
    model = bytearray(SIZE)
    rng = random.Random(1)
    with open_image(path, format=format, synchronous=True) as image:
        assert not image.write_cache
        for i in range(12):
            at = rng.randrange(SIZE // 512 - 200) * 512
            model[at : at + 4096] = bytes([i + 1]) * 4096
            write_at(image, at, model[at : at + 4096])
            copy.write_bytes(path.read_bytes())
            with open_image(copy, format=format) as found:  # for writing: a log is replayed
                assert read_at(found, 0, SIZE) == model
