"""One image, used by QEMU and by us in turn, with random commands: both find in it what either wrote."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from skep.block.backend import read_at, write_at
from skep.block.format import Can
from skep.block.image import create_image, open_image
from skep.cli import main
from tests.block.conformance import run

SIZE = 9 << 20
SECTOR = 512

VARIANTS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("raw", {}),
    ("vhdx", {"block_size": "1M"}),
    ("vhdx", {"subformat": "dynamic", "block_size": "2M", "log_size": "2M"}),
    ("vhdx", {"subformat": "fixed", "block_size": "1M"}),
    ("vmdk", {}),
    ("vmdk", {"zeroed_grain": "on"}),
    ("vmdk", {"compat6": "on", "adapter_type": "lsilogic"}),
    ("vmdk", {"subformat": "monolithicFlat"}),
    ("vmdk", {"subformat": "twoGbMaxExtentSparse"}),
    ("vmdk", {"subformat": "twoGbMaxExtentFlat"}),
    ("vpc", {"force_size": "on"}),
    ("vpc", {"force_size": "on", "subformat": "fixed"}),
    ("vpc", {}),
    ("vdi", {}),
    ("vdi", {"static": "on"}),
)
CHECKED = ("vhdx", "vmdk", "vdi")
"""Formats that `qemu-img check` knows."""


class Play:
    """The image, and what the disk has to be."""

    def __init__(self, path: Path, format: str, options: Mapping[str, str], rng: random.Random) -> None:
        self.path = path
        said = ",".join(f"{name}={value}" for name, value in options.items())
        self.creation = ["-o", said] if said else []
        self.format = format
        self.rng = rng
        with open_image(path, format=format, read_only=True) as image:
            self.model = bytearray(image.size)
            self.can = image.can
        self.leaky = False
        """QEMU may have lost space in it: where it notes zeros in a VMDK, it forgets the grain that was there."""

    def place(self) -> tuple[int, int]:
        sectors = len(self.model) // SECTOR
        n = min(self.rng.choice((1, 7, 8, 128, 129, 2048, 4097)), sectors)
        first = self.rng.randrange(sectors - n + 1)
        if self.rng.random() < 0.5:
            first = min(first // 128 * 128, sectors - n)
        return first * SECTOR, n * SECTOR

    def ours(self) -> None:
        with open_image(self.path, format=self.format) as image:
            for _ in range(self.rng.randint(1, 6)):
                at, n = self.place()
                match self.rng.randrange(6):
                    case 0:
                        image.write_zeroes(at, n, self.rng.random() < 0.5)
                        self.model[at : at + n] = bytes(n)
                    case 1:
                        image.flush()
                    case 2:
                        image.discard(at, n)
                        self.model[at : at + n] = read_at(image, at, n)
                    case _:
                        self.model[at : at + n] = self.rng.randbytes(n)
                        write_at(image, at, self.model[at : at + n])

    def theirs(self) -> None:
        commands = []
        for _ in range(self.rng.randint(1, 6)):
            at, n = self.place()
            match self.rng.randrange(5):
                case 0:
                    self.leaky |= self.format == "vmdk"
                    commands.append(f"write -z {at} {n}")
                    self.model[at : at + n] = bytes(n)
                case 1:
                    commands.append("flush")
                case _:
                    byte = self.rng.randrange(1, 256)
                    commands.append(f"write -P {byte} {at} {n}")
                    self.model[at : at + n] = bytes([byte]) * n
        said = run("qemu-io", "-f", self.format, *(part for command in commands for part in ("-c", command)), self.path)
        assert "failed" not in said and "rror" not in said, said

    def converted(self) -> None:
        """By either tool, into another image of the same kind, which takes its place."""
        new = self.path.with_name(f"converted-{self.path.name}")
        words = ["convert", "-f", self.format, "-O", self.format, *self.creation, str(self.path), str(new)]
        if self.rng.random() < 0.5:
            assert main(["image", *words]) == 0
        else:
            run("qemu-img", *words)
        self.path, self.leaky = new, False

    def mended(self) -> None:
        with open_image(self.path, format=self.format) as image:
            if Can.REPAIR in image.can:
                image.repair()
                assert image.check().clean
                self.leaky = False

    def both_agree(self) -> None:
        with open_image(self.path, format=self.format, read_only=True) as image:
            assert read_at(image, 0, image.size) == self.model
            if Can.CHECK in image.can:
                result = image.check()
                assert not result.corruptions and not result.errors, result
                assert not result.leaks or self.leaky, result
        raw = self.path.with_suffix(".model")
        raw.write_bytes(self.model)
        run("qemu-img", "compare", "-f", self.format, "-F", "raw", self.path, raw)
        if self.format in CHECKED:
            run("qemu-img", "check", "-f", self.format, self.path)


def play(directory: Path, format: str, options: Mapping[str, str], seed: int, rounds: int) -> None:
    rng = random.Random(f"{format} {options} {seed}")
    path = directory / f"disk{seed}.{format}"
    if rng.random() < 0.5:
        create_image(path, format, SIZE, options=options)
    else:
        said = ",".join(f"{name}={value}" for name, value in options.items())
        run("qemu-img", "create", "-q", "-f", format, *(("-o", said) if said else ()), path, str(SIZE))
    game = Play(path, format, options, rng)
    for _ in range(rounds):
        rng.choice((*(game.ours, game.theirs) * 4, game.converted, game.mended))()
        if rng.random() < 0.3:
            game.both_agree()
    game.both_agree()


def name(variant: tuple[str, Mapping[str, str]]) -> str:
    return "-".join((variant[0], *(f"{key}={value}" for key, value in variant[1].items())))


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_in_turn(tmp_path: Path, variant: tuple[str, Mapping[str, str]]) -> None:
    for seed in range(2):
        play(tmp_path, *variant, seed, 5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_in_turn_for_long(tmp_path: Path, variant: tuple[str, Mapping[str, str]]) -> None:
    variants = sum(one[0] == variant[0] for one in VARIANTS)
    for seed in range(2, 2 + -(-64 // variants)):  # 64 of each format
        play(tmp_path, *variant, seed, 20)
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.mark.parametrize("format", ["raw", "vhdx", "vpc", "vdi", "vmdk"])
def test_converted_by_qemu(tmp_path: Path, format: str) -> None:
    """What `qemu-img convert` writes of random data, ours reads; a stream of VMDK in both directions."""
    rng = random.Random(11)
    model = b"".join(rng.choice((bytes(65536), rng.randbytes(65536), b"z" * 65536)) for _ in range(64))
    raw, path = tmp_path / "raw", tmp_path / "disk"
    raw.write_bytes(model)
    options = {"vmdk": ["-o", "subformat=streamOptimized"], "vpc": ["-o", "force_size=on"]}.get(format, [])
    run("qemu-img", "convert", "-f", "raw", "-O", format, *options, raw, path)
    with open_image(path, format=format, read_only=True) as image:
        assert read_at(image, 0, image.size) == model
