"""One random sequence of commands for two qcow2 images: each command is done by QEMU's tools on one and by ours on the
other, and which is whose changes from command to command. Whatever wrote an image, both tools find it sound, and find
the same disk in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from skep.block.backend import write_at
from skep.block.image import open_image
from skep.cli import main

MIB = 1 << 20
SECTOR = 512

VARIANTS = (
    "",
    "cluster_size=512",
    "cluster_size=2M",
    "compat=0.10",
    "extended_l2=on",
    "refcount_bits=64,lazy_refcounts=on",
    "cluster_size=4k,refcount_bits=8,compression_type=zstd",
    "data_file={name}.data",
)

Tool = Callable[..., str]
"""Takes the program, `img` or `io`, and its words; returns what it printed."""


def qemu(program: str, *words: str | Path) -> str:
    command = [f"qemu-{program}", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def skep(program: str, *words: str | Path) -> str:
    command = [{"img": "image", "io": "io"}[program], *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(command)
    assert status == 0, (command, out.getvalue(), err.getvalue())
    return out.getvalue()


class Game:
    """The two images, and what is known of both."""

    def __init__(self, place: Path, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.place = place
        self.options = VARIANTS[seed % len(VARIANTS)]
        self.size = rng.choice((MIB, 3 * MIB, 5 * MIB + SECTOR * rng.randrange(100)))
        self.old_version = "0.10" in self.options
        self.apart = "data_file" in self.options
        self.snapshots: list[str] = []
        self.images = [place / "one.qcow2", place / "two.qcow2"]
        self.base = rng.choice(("qcow2", "raw", None))
        if self.base is not None:
            self.lay("base", self.base)
        for path, tool in zip(self.images, (skep, qemu), strict=True):
            self.create(tool, path)

    def lay(self, name: str, format: str) -> None:
        """Something to lie over."""
        length = self.rng.choice((self.size, self.size // 2 // SECTOR * SECTOR, self.size + MIB))
        skep("img", "create", "-q", "-f", format, self.place / name, str(length))
        with open_image(self.place / name, format=format) as image:
            write_at(image, image.size // 3 // SECTOR * SECTOR, self.rng.randbytes(99 * SECTOR))

    def create(self, tool: Tool, path: Path) -> None:
        words = ["-o", self.options.format(name=path.name)] if self.options else []
        words += ["-b", "base", "-F", self.base] if self.base is not None else []
        tool("img", "create", "-q", "-f", "qcow2", *words, path, str(self.size))

    def step(self, number: int) -> None:
        kinds = [self.write] * 6
        kinds += [self.snapshot, self.apply, self.delete, self.grow, self.shrink]
        kinds += [self.convert, self.rebase, self.commit, self.amend]
        do = self.rng.choice(kinds)
        tools: list[Tool] = [skep, qemu]
        self.rng.shuffle(tools)
        do(list(zip(tools, self.images, strict=True)), number)
        qemu("img", "compare", "-q", *self.images)

    Turns = Sequence[tuple[Tool, Path]]

    def write(self, turns: Turns, number: int) -> None:
        """Some of data, zeros, and discards that leave zeros."""
        commands: list[str] = []
        for _ in range(self.rng.randint(1, 3)):
            length = min(self.rng.choice((SECTOR, 4096, 65536, 300 * SECTOR)), self.size)
            offset = self.rng.randrange((self.size - length) // SECTOR + 1) * SECTOR
            kind = self.rng.choice((f"-P {self.rng.randrange(1, 256)}", "-z", "-z -u"))
            commands += ["-c", f"write {kind} {offset} {length}"]
        for tool, path in turns:
            tool("io", "-f", "qcow2", *commands, path)

    def snapshot(self, turns: Turns, number: int) -> None:
        if not self.apart:
            self.snapshots.append(f"s{number}")
            for tool, path in turns:
                tool("img", "snapshot", "-c", self.snapshots[-1], path)

    def apply(self, turns: Turns, number: int) -> None:
        if self.snapshots:
            name = self.rng.choice(self.snapshots)
            for tool, path in turns:
                tool("img", "snapshot", "-a", name, path)
            self.size = json.loads(qemu("img", "info", "--output=json", self.images[0]))["virtual-size"]

    def delete(self, turns: Turns, number: int) -> None:
        if self.snapshots:
            name = self.snapshots.pop(self.rng.randrange(len(self.snapshots)))
            for tool, path in turns:
                tool("img", "snapshot", "-d", name, path)

    def grow(self, turns: Turns, number: int) -> None:
        """Beyond the old end there may be something below, which QEMU cannot hide in version 2."""
        if not self.snapshots and not (self.old_version and self.base):
            self.size += SECTOR * self.rng.randrange(1, 4000)
            mode = "off" if self.base or self.apart else self.rng.choice(("off", "off", "metadata", "falloc", "full"))
            for tool, path in turns:
                tool("img", "resize", "-q", f"--preallocation={mode}", path, str(self.size))

    def shrink(self, turns: Turns, number: int) -> None:
        if not self.snapshots and self.size > MIB:
            self.size -= SECTOR * self.rng.randrange(1, 1000)
            for tool, path in turns:
                tool("img", "resize", "-q", "--shrink", path, str(self.size))

    def convert(self, turns: Turns, number: int) -> None:
        """Into another image of its kind, which takes its place."""
        if self.snapshots or self.apart:
            return
        words = ["-c"] if self.rng.random() < 0.5 else []
        words += ["-o", self.options] if self.options else []
        if self.base is not None and self.rng.random() < 0.5:
            words += ["-B", "base", "-F", self.base]
        else:
            self.base = None
        for tool, path in turns:
            tool("img", "convert", "-f", "qcow2", "-O", "qcow2", *words, path, "converted")
            os.replace("converted", path)

    def rebase(self, turns: Turns, number: int) -> None:
        if self.base is None:
            return
        words = ["-b", ""]
        if self.rng.random() < 0.6:
            new = self.rng.choice(("qcow2", "raw"))
            self.lay(f"base{number}", new)
            words = ["-b", f"base{number}", "-F", new]
        for tool, path in turns:
            tool("img", "rebase", *words, path)
        if words == ["-b", ""]:
            self.base = None
        else:
            os.replace(f"base{number}", "base")
            self.base = words[-1]
            for tool, path in turns:
                tool("img", "rebase", "-u", "-b", "base", "-F", self.base, path)

    def commit(self, turns: Turns, number: int) -> None:
        """What an image over this one has."""
        length = min(65536 * self.rng.randint(1, 9), self.size) // SECTOR * SECTOR
        commands = ["-c", f"write -P {number + 1} 0 {length}", "-c", f"write -z {length // 2 // SECTOR * SECTOR} 1k"]
        for tool, path in turns:
            tool("img", "create", "-q", "-f", "qcow2", "-b", path.name, "-F", "qcow2", "top")
            tool("io", "-f", "qcow2", *commands, "top")
            tool("img", "commit", "-q", "top")

    def amend(self, turns: Turns, number: int) -> None:
        if self.old_version:
            return
        options = ["lazy_refcounts=on", "lazy_refcounts=off"]
        if "2M" not in self.options:  # of which QEMU makes new counts for minutes
            options += ["refcount_bits=16", "refcount_bits=32"]
        option = self.rng.choice(options)
        for tool, path in turns:
            tool("img", "amend", "-f", "qcow2", "-o", option, path)

    def end(self) -> None:
        for path in self.images:
            for tool in (qemu, skep):
                tool("img", "check", "-q", path)
        for tool in (qemu, skep):
            tool("img", "compare", *self.images)
        one, two = (self.shown(path) for path in self.images)
        assert one == two

    def shown(self, path: Path) -> Any:
        found = json.loads(qemu("img", "info", "--output=json", path))
        for key in ("filename", "actual-size"):
            del found[key]
        text = re.sub(r'"date-n?sec": \d+', "", json.dumps(found))
        return text.replace("one.qcow2", "").replace("two.qcow2", "")


def play(place: Path, seed: int, steps: int) -> None:
    game = Game(place, seed)
    for number in range(steps):
        game.step(number)
    game.end()


@pytest.mark.parametrize("seed", range(8))
def test_random_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.chdir(tmp_path)  # where QEMU looks for data files
    play(tmp_path, seed, 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 72))
def test_many_random_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    play(tmp_path, seed, 30)
