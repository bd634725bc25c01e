"""The keys of a disk's node."""

from __future__ import annotations

import pytest

from skep.block.options import BlockOptions
from skep.errors import UserError


def test_a_path_is_enough() -> None:
    options = BlockOptions.from_options({"path": "/a"})
    assert options == BlockOptions(path="/a")
    assert options.write_cache and not options.read_only and options.lock


def test_bhyves_keys() -> None:
    options = BlockOptions.from_options(
        {
            "path": "/a",
            "ro": "true",
            "nocache": "on",
            "direct": "yes",
            "sectorsize": "512/4096",
            "ser": "x1",
            "wce": "0",
        }
    )
    assert options.read_only and options.no_cache and options.synchronous and not options.write_cache
    assert (options.logical_block, options.physical_block, options.serial) == (512, 4096, "x1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "needs a path"),
        ({"path": "a", "sektorsize": "512"}, "did you mean 'sectorsize'"),
        ({"path": "a", "ro": "perhaps"}, "neither true nor false"),
        ({"path": "a", "format": "qcow2"}, "format=raw"),
        ({"path": "a", "sectorsize": "513"}, "power of 2"),
        ({"path": "a", "sectorsize": "4096/512"}, "smaller than"),
        ({"path": "a", "sectorsize": "9" * 5000}, "power of 2"),
        ({"path": "a", "ser": "x" * 21}, "20 characters"),
        ({"path": "a", "ser": "ü"}, "ASCII"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        BlockOptions.from_options(options, "pci.0.3.0")
    message = str(caught.value)
    assert says in message and "pci.0.3.0" in message and "\n" not in message
