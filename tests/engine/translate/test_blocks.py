"""The block table and its lists, beside sets: in machine code, and the same source as Python."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from skep.engine.translate.block_runtime import BLOCK_ROUTINES
from skep.engine.translate.blocks import LARGEST, PIECES, SCRATCH, Cache
from skep.engine.translate.layout import Mode
from skep.engine.translate.simulate import simulate
from skep.engine.translate.store import Store
from skep.engine.translate.tables import DESCRIPTION, DESCRIPTIONS, END, FOLLOWING, HEAD, HEADS, KILLED, Block
from skep.memory import GuestMemory

FRAMES = 3
NUMBERS = 40


class Host:
    """This process's own memory, by its addresses."""

    def load(self, address: int, size: int) -> int:
        return int.from_bytes(ctypes.string_at(address, size), "little")

    def store(self, address: int, size: int, value: int) -> None:
        ctypes.memmove(address, value.to_bytes(size, "little"), size)


@dataclass
class Made:
    block: Block
    own: list[set[int]]
    """By frame: the bytes that it was made from."""
    looked: set[int]
    """Physical addresses: what may be looked at."""


class Twin:
    """Blocks as sets of bytes."""

    def __init__(self) -> None:
        self.blocks: dict[int, Made] = {}
        self.marked: list[set[int]] = [set() for _ in range(FRAMES)]

    def forget(self, frame: int, low: int, high: int) -> None:
        range_ = set(range(low, high))
        for key, made in list(self.blocks.items()):
            looked = {pa & 4095 for pa in made.looked if pa >> 12 == frame}
            if range_ & (made.own[frame] | looked):
                del self.blocks[key]
        kept: set[int] = set()
        for made in self.blocks.values():
            if made.own[frame]:
                kept |= made.own[frame] | {pa & 4095 for pa in made.looked if pa >> 12 == frame}
        self.marked[frame] &= kept


@pytest.fixture
def cache() -> Iterator[Cache]:
    memory = GuestMemory(1 << 20)
    cache = Cache(memory, Store(None))
    yield cache
    cache.close()
    memory.close()


def routines(cache: Cache, python: bool) -> dict[str, Callable[..., Any]]:
    if python:
        return dict(simulate(BLOCK_ROUTINES, Host(), object()))
    arguments = {"publish": 3, "forget": 4, "drop": 2, "evict": 3, "mark": 3}
    return {name: cache._routine(name, n) for name, n in arguments.items()}


def listed(cache: Cache, frame: int) -> list[int]:
    """The keys of the blocks on a page's list."""
    heads = cache._state[HEADS >> 3]
    number = Host().load(heads + HEAD * frame, 4)
    keys = []
    while number:
        block = cache.blocks.block(number)
        keys.append(block.key)
        second = block.pa >> 12 != frame
        number = Host().load(cache._state[DESCRIPTIONS >> 3] + number * DESCRIPTION + FOLLOWING + 4 * second, 4)
        assert len(keys) <= NUMBERS
    return keys


def marked(cache: Cache, frame: int) -> set[int]:
    words = cache.map._bytes
    found = {64 * i + bit for i in range(64) for bit in range(64) if words[64 * frame + i] >> bit & 1}
    assert cache.map.mask[frame] == sum(1 << line for line in {at >> 6 for at in found})
    return found


@pytest.mark.parametrize("python", [False, True], ids=["machine code", "Python"])
def test_making_and_forgetting(cache: Cache, python: bool) -> None:
    choose = random.Random(11)
    call = routines(cache, python)
    c, twin = cache.blocks.address, Twin()
    number = killed = 0
    for _ in range(120 if python else 1000):
        action = choose.randrange(10)
        if action < 6:
            offset, size = choose.randrange(4096), choose.randint(1, 200)
            frame, pa2 = choose.randrange(FRAMES), None
            if offset + size > 4096:
                pa2 = choose.choice([f for f in range(FRAMES) if f != frame]) << 12
            key = (frame << 12 | offset) << Mode.BITS | choose.choice((0, 1, Mode.CODE32))
            looked = choose.choice(((0, 0), (4, 9), (offset, min(offset + 300, 4096))))
            number = number % NUMBERS + 1
            if number == 1 and twin.blocks:
                call["evict"](c, 1, NUMBERS)
                killed += len(twin.blocks)
                for other in {pa for made in twin.blocks.values() for pa in (made.block.pa >> 12,)}:
                    twin.forget(other, 0, 4096)
                assert not twin.blocks
            if key in twin.blocks:
                number -= 1
                continue
            start = 65536 + 64 * number
            block = Block(number, key, start, start + 20, start + 60, 0, size, looked, 7, pa2)
            own: list[set[int]] = [set() for _ in range(FRAMES)]
            own[frame] = set(range(offset, min(offset + size, 4096)))
            call["mark"](c, frame << 12 | offset, len(own[frame]))
            if pa2 is not None:
                own[pa2 >> 12] = set(range(size - len(own[frame])))
                cache.map.mark(pa2, size - len(own[frame]))
            for page, bytes_ in zip(twin.marked, own, strict=True):
                page |= bytes_
            if looked[1]:
                cache.map.mark(frame << 12 | looked[0], 1)
                twin.marked[frame].add(looked[0])
            cache.blocks.describe(block)
            call["publish"](c, number, 1)
            twin.blocks[key] = Made(block, own, {frame << 12 | at for at in range(*looked)})
        elif action < 9:
            frame, low = choose.randrange(FRAMES), choose.randrange(4096)
            high = min(low + choose.choice((1, 8, 60)), 4096)
            before = len(twin.blocks)
            call["forget"](c, frame, low, high)
            twin.forget(frame, low, high)
            killed += before - len(twin.blocks)
        elif twin.blocks:
            key = choose.choice(list(twin.blocks))
            call["drop"](c, twin.blocks.pop(key).block.number)
            killed += 1
        if choose.random() < 0.02:
            assert {block.key for block in cache.blocks.values()} == set(twin.blocks)
        for key, made in twin.blocks.items():
            assert cache.blocks.get(key) == made.block
        for frame in range(FRAMES):
            assert sorted(listed(cache, frame)) == sorted(k for k, made in twin.blocks.items() if made.own[frame])
            assert marked(cache, frame) == twin.marked[frame]
        assert (len(cache.blocks), cache._state[KILLED >> 3]) == (len(twin.blocks), killed)
    assert killed > 20


def test_no_block_lies_where_single_instructions_do() -> None:
    memory = GuestMemory(1 << 20)
    cache = Cache(memory, Store(None), vcpus=255)
    ends = []
    for _ in range(PIECES):
        ends.append(cache._state[END >> 3] + LARGEST)
        cache._next_piece()
    places = [cache.scratch(index) for index in range(255)]
    assert max(ends) <= min(places) and max(places) + SCRATCH <= cache.buffer.size
    assert all(b - a == SCRATCH for a, b in pairwise(places))
    cache.close()
    memory.close()
