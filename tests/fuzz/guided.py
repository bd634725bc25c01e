"""The process in which atheris (libFuzzer) runs: :mod:`tests.fuzz` starts it.

``python -m tests.fuzz.guided FORMAT SCRATCH CORPUS [OPTION...]``, the options being libFuzzer's.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["skep.block"]):
    from tests.block.damage import MOST, SECTOR, Sparse, Table, mend_checksums, mutate, tables
    from tests.fuzz.images import pack, sound_images, unpack
    from tests.fuzz.targets import target


class Mutator:
    """Makes inputs from inputs, and knows the format."""

    def __init__(self, format: str, scratch: Path) -> None:
        self._format = format
        self._known = [tables(format, image) for image in sound_images(format, scratch)]

    def mutated(self, data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        image, way = unpack(data)
        if rng.random() < 0.1:
            way = rng.randrange(1 << 16)
        if rng.random() < 0.6 or not image.sectors:
            image = mutate(image, self._format, rng, rng.choice(self._known) + self._tables_of(image))
        else:
            sector = rng.choice(sorted(image.sectors)[: rng.choice((1, 4, 1 << 20))])
            at, n = rng.randrange(SECTOR), rng.choice((8, 64, SECTOR))
            piece = image.sectors[sector][at : at + n]
            image.write(sector * SECTOR + at, atheris.Mutate(piece, len(piece)))
            mend_checksums(self._format, image)
        return pack(image, way)[:most]

    def crossed(self, first: bytes, second: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        (image, way), (other, _) = unpack(first), unpack(second)
        for sector, data in other.sectors.items():
            if rng.random() < 0.3:
                image.sectors[sector] = data
        mend_checksums(self._format, image)
        return pack(image, way)[:most]

    def _tables_of(self, image: Sparse) -> list[Table]:
        """Where this image has them, which may be anywhere."""
        return [table for table in tables(self._format, image) if table.count > 0 and 0 <= table.at < MOST]


def main(format: str, scratch: Path, options: list[str]) -> None:
    mutators = {}
    if format != "nbd":
        mutator = Mutator(format, scratch)
        mutators = {"custom_mutator": mutator.mutated, "custom_crossover": mutator.crossed}
    atheris.Setup([sys.argv[0], *options], target(format, scratch), **mutators)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
