"""A compressed VMDK, as OVA archives have it, from a raw disk. What is zeros takes no space in it.

    python examples/build_vmdk.py DISK.img DISK.vmdk
"""

from __future__ import annotations

import sys

from skep.block.backend import read_at
from skep.block.image import create_image, open_image

GRAIN = 65536


def build(raw: str, vmdk: str) -> None:
    with open_image(raw, format="raw", read_only=True) as source:
        create_image(vmdk, "vmdk", source.size, options={"subformat": "streamOptimized"})
        with open_image(vmdk, format="vmdk") as target:
            for at in range(0, source.size, GRAIN):
                target.write_compressed(bytes(read_at(source, at, min(GRAIN, source.size - at))), at)


if __name__ == "__main__":
    build(sys.argv[1], sys.argv[2])
