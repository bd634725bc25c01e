"""virtio-blk against a model: whatever is under way at once, on whatever queue, a disk is its bytes (5.2.6)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.block.options import BlockSizes
from skep.devices.virtio.blk import T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, UNMAP
from skep.errors import UserError
from tests.devices.virtio.disk import Disk, disk
from tests.devices.virtio.driver import DriverQueue
from tests.devices.virtio.test_blk import ranges

BLOCK = 4096
BLOCKS = 32
QUEUES = 3


class Operation(NamedTuple):
    kind: int
    block: int
    count: int
    queue: int
    cut: int
    """Where the data is cut in two buffers."""


operations = st.builds(
    Operation,
    st.sampled_from([T_IN, T_IN, T_OUT, T_OUT, T_OUT, T_WRITE_ZEROES, T_DISCARD, T_FLUSH]),
    st.integers(0, BLOCKS - 1),
    st.integers(1, 4),
    st.integers(0, QUEUES - 1),
    st.integers(1, BLOCK - 1),
)


class Started:
    """A disk with several queues, and what it should hold; None: anything, since it was discarded."""

    def __init__(self, made: Disk) -> None:
        self.made = made
        made.start()
        self.queues: list[DriverQueue] = made.driver.start_all(QUEUES)
        self.mark = made.driver.mark
        self.model: list[bytes | None] = [bytes(BLOCK)] * BLOCKS
        self.version = 0

    def batch(self, batch: list[Operation]) -> None:
        """Send all that do not touch each other's blocks, then look at what came of them."""
        driver, memory = self.made.driver, self.made.board.memory
        driver.free_all(self.mark)
        touched: set[int] = set()
        sent: dict[tuple[int, int], tuple[Operation, int, int]] = {}
        for one in batch:
            blocks = range(one.block, min(one.block + one.count, BLOCKS)) if one.kind != T_FLUSH else range(0)
            if touched & set(blocks):
                continue
            touched |= set(blocks)
            header, status, data = driver.allocate(16), driver.allocate(1), driver.allocate(4 * BLOCK, BLOCK)
            length = len(blocks) * BLOCK
            sector = one.block * BLOCK // 512 if one.kind in (T_IN, T_OUT) else 0
            memory.write(header, one.kind.to_bytes(8, "little") + sector.to_bytes(8, "little"))
            memory.write(status, b"\xaa")
            if one.kind in (T_DISCARD, T_WRITE_ZEROES):
                flags = UNMAP if one.kind == T_WRITE_ZEROES and one.cut & 1 else 0
                described = ranges((one.block * BLOCK // 512, length // 512, flags))
                memory.write(data, described)
                pieces = [(data, len(described), False)]
            elif one.kind == T_OUT:
                self.version += 1
                memory.write(data, self.version.to_bytes(4, "little") * (length // 4))
                pieces = [(data, one.cut, False), (data + one.cut, length - one.cut, False)]
            elif one.kind == T_IN:
                pieces = [(data, one.cut, True), (data + one.cut, length - one.cut, True)]
            else:
                pieces = []
            head = self.queues[one.queue].add([(header, 16, False), *pieces, (status, 1, True)])
            sent[one.queue, head] = one, status, data
            self.queues[one.queue].kick()
        expected = {key: self._apply(one, data) for key, (one, _, data) in sent.items()}
        for index, queue in enumerate(self.queues):
            for head, _ in queue.wait(sum(queue_index == index for queue_index, _ in sent)):
                one, status, data = sent[index, head]
                assert memory.load_u8(status) == 0, one
                for at, content in enumerate(expected[index, head] if one.kind == T_IN else []):
                    got = memory.read(data + at * BLOCK, BLOCK)
                    assert content in (None, got), one
                    self.model[one.block + at] = got  # once read, it is that

    def _apply(self, one: Operation, data: int) -> list[bytes | None]:
        """What the blocks hold after the operation."""
        memory, end = self.made.board.memory, min(one.block + one.count, BLOCKS)
        for block in range(one.block, end):
            at = data + (block - one.block) * BLOCK
            if one.kind == T_OUT:
                self.model[block] = memory.read(at, BLOCK)
            elif one.kind == T_WRITE_ZEROES:
                self.model[block] = bytes(BLOCK)
            elif one.kind == T_DISCARD:
                self.model[block] = None
        return self.model[one.block : end]


def wait_always(made: Disk) -> None:
    """As if the host had nothing in its memory."""
    made.blk.backend._nowait = False  # type: ignore[attr-defined]
    made.blk.backend._slow_until = 1 << 63  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=["at once", "in the pool", "write-through", "nocache", "recorded"])
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    directory: Path = tmp_path_factory.mktemp("model")
    options: dict[str, dict[str, object]] = {
        "write-through": {"write_cache": False},
        "nocache": {"no_cache": True, "block": BlockSizes(BLOCK, BLOCK)},
        "recorded": {"record": str(directory / "log")},
    }
    try:
        with disk(directory / "disk", bytes(BLOCKS * BLOCK), queues=QUEUES, **options.get(request.param, {})) as made:
            if request.param == "in the pool":
                wait_always(made)
            yield Started(made)
    except UserError as error:
        pytest.skip(str(error))


@settings(max_examples=40, deadline=None)
@given(batches=st.lists(st.lists(operations, min_size=1, max_size=20), min_size=1, max_size=4), pauses=st.booleans())
def test_5_2_6_a_disk_is_its_bytes(started: Started, batches: list[list[Operation]], pauses: bool) -> None:
    for batch in batches:
        started.batch(batch)
        if pauses:
            function = started.made.function
            function.pause()
            function.load(function.save())
            function.resume()
    started.batch([Operation(T_IN, block, 4, block // 4 % QUEUES, 512) for block in range(0, BLOCKS, 4)])
