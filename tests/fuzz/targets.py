"""What can be fuzzed: the formats of images, and ``nbd``, the client of that protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import images, nbd

WAYS = 3
"""To treat each of the sound images."""


def inputs(name: str, scratch: Path) -> list[bytes]:
    """Sound ones, to begin with."""
    if name == "nbd":
        return nbd.sound(scratch)
    return [images.pack(image, way) for image in images.sound_images(name, scratch) for way in range(WAYS)]


def target(name: str, scratch: Path) -> Callable[[bytes], None]:
    """What is done with an input; it raises what is a find."""
    return nbd.run if name == "nbd" else images.target(name, scratch)
