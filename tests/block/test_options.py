"""The keys of a disk's node."""

from __future__ import annotations

import pytest

from skep.block.options import BlockOptions
from skep.config.tree import Tree
from skep.errors import UserError


def options(**keys: str) -> BlockOptions:
    tree = Tree({"pci.0.3.0.device": "virtio-blk", **{f"pci.0.3.0.{key}": value for key, value in keys.items()}})
    return BlockOptions.from_node(tree.node("pci.0.3.0"))


def test_a_path_is_enough() -> None:
    disk = options(path="/a")
    assert disk == BlockOptions(path="/a")
    assert disk.write_cache and not disk.read_only and disk.lock
    assert disk.block == (512, 512)


def test_bhyves_keys() -> None:
    disk = options(path="/a", ro="true", nocache="on", direct="yes", sectorsize="512/4096", ser="x1", wce="0")
    assert disk.read_only and disk.no_cache and disk.synchronous and not disk.write_cache
    assert (disk.block, disk.serial) == ((512, 4096), "x1")
    disk = options(path="/a", nodelete="true", bootindex="3", queues="8")
    assert (disk.no_delete, disk.boot_index, disk.queues) == (True, 3, 8)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "must be given"),
        ({"path": "a", "sektorsize": "512"}, "pci.0.3.0.sectorsize"),
        ({"path": "a", "ro": "perhaps"}, "neither true"),
        ({"path": "a", "format": "qcow9"}, "not one of"),
        ({"path": "a", "sectorsize": "513"}, "power of 2"),
        ({"path": "a", "sectorsize": "4096/512"}, "smaller than"),
        ({"path": "a", "sectorsize": "9" * 5000}, "power of 2"),
        ({"path": "a", "ser": "x" * 21}, "20 printable"),
        ({"path": "a", "queues": "0"}, "not in 1 to 64"),
        ({"path": "a", "queues": "four"}, "not a number"),
        ({"path": "a", "bootindex": "-1"}, "not a number"),
        ({"path": "a", "ser": "ü"}, "ASCII"),
    ],
)
def test_mistakes_are_one_line(keys: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        options(**keys)
    message = str(caught.value)
    assert says in message and "pci.0.3.0" in message and "\n" not in message
