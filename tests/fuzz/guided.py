"""The process in which libFuzzer runs, by atheris: :mod:`tests.fuzz` starts it.

``python -m tests.fuzz.guided FORMAT SCRATCH HOME SECONDS [OPTION...]``, the options being libFuzzer's.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import atheris

from tests.fuzz.branches import Branches, Reporter
from tests.fuzz.tally import Tally

HANGS = 60
"""Seconds of CPU after which an input is given up that does not even come back to the interpreter."""

counting = Branches("skep.block")
# What a server says is made by libFuzzer, which has to see what the bytes are compared with; atheris shows that.
with atheris.instrument_imports(include=["skep"]) if sys.argv[1] == "nbd" else counting:
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


class Trials:
    """Tries one input after the other until the time is up, which is the CPU's: this machine may have others to serve.

    The one that is being tried is in ``HOME/current``: nobody else has it if the process dies.
    """

    def __init__(self, attempt: Callable[[bytes], None], home: Path, seconds: float) -> None:
        self._attempt = attempt
        self._seconds = seconds
        self._current = (home / "current").open("wb", buffering=0)
        self._tally = Tally(home)
        self._next = 0.0
        self._reporter: Reporter | None = None
        faulthandler.register(signal.SIGVTALRM, chain=True)

    def one(self, data: bytes) -> None:
        os.pwrite(self._current.fileno(), data, 0)
        os.ftruncate(self._current.fileno(), len(data))
        signal.setitimer(signal.ITIMER_VIRTUAL, HANGS)
        if self._reporter is None:
            self._reporter = Reporter(counting.counts)
        self._reporter.begin()
        self._tally.executions += 1
        try:
            self._attempt(data)
        except BaseException:
            self._tally.save()
            raise
        self._reporter.end()
        if (now := time.process_time()) > self._next:
            self._tally.save()
            self._next = now + 1
            if now > self._seconds:
                os._exit(0)


def main(format: str, scratch: Path, home: Path, seconds: float, options: list[str]) -> None:
    mutators = {}
    if format != "nbd":
        mutator = Mutator(format, scratch)
        mutators = {"custom_mutator": mutator.mutated, "custom_crossover": mutator.crossed}
    atheris.Setup([sys.argv[0], *options], Trials(target(format, scratch), home, seconds).one, **mutators)
    gc.freeze()
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5:])
