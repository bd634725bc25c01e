"""The split virtqueue against virtio 1.2, 2.7; sections in the names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.devices.virtio.fence import Fence, lock_fence, make_fence, membarrier_fence
from skep.devices.virtio.queue import DriverError, Queue
from skep.memory import GuestMemory

DESC, AVAIL, USED, BUFFER, TABLE = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000
MEMORY = 0x10000
NEXT, WRITE, INDIRECT = 1, 2, 4


class Ring:
    """A queue of 8 and raw access to what its driver writes."""

    def __init__(self, *, indirect: bool = True, event_idx: bool = False, size: int = 8) -> None:
        self.memory = GuestMemory(MEMORY)
        self.size = size
        self.queue = Queue(self.memory, 256)
        self.queue.size, self.queue.desc, self.queue.driver, self.queue.device = size, DESC, AVAIL, USED
        self.queue.start(indirect=indirect, event_idx=event_idx)
        self.idx = 0

    def descriptor(
        self, index: int, gpa: int = BUFFER, n: int = 16, flags: int = 0, following: int = 0, table: int = DESC
    ) -> None:
        self.memory.store_u64(table + 16 * index, gpa)
        self.memory.store_u64(table + 16 * index + 8, n | flags << 32 | following << 48)

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.memory.store_u16(AVAIL + 4 + 2 * (self.idx % self.size), head)
            self.idx = (self.idx + 1) & 0xFFFF
        self.memory.store_u16(AVAIL + 2, self.idx)

    def close(self) -> None:
        self.queue.stop()
        self.memory.close()


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring()
    yield made
    made.close()


def test_2_7_13_an_empty_ring_gives_nothing(ring: Ring) -> None:
    assert ring.queue.pop() is None


def test_2_7_5_a_chain_is_followed(ring: Ring) -> None:
    ring.memory.write(BUFFER, b"header and data ")
    ring.descriptor(3, BUFFER, 6, NEXT, 5)
    ring.descriptor(5, BUFFER + 6, 10, NEXT, 0)
    ring.descriptor(0, BUFFER + 16, 8, WRITE)
    ring.offer(3)
    chain = ring.queue.pop()
    assert chain is not None and chain.head == 3
    assert [bytes(view) for view in chain.readable] == [b"header", b" and data "]
    chain.writable[0][:] = b"answered"
    ring.queue.push(chain, 8)
    assert ring.memory.read(BUFFER + 16, 8) == b"answered"
    assert ring.memory.read(USED, 12) == bytes.fromhex("0000 0100 03000000 08000000")
    assert ring.queue.pop() is None


def test_2_7_8_the_dma_door_opens_before_the_index_moves(ring: Ring) -> None:
    seen: list[tuple[int, int, int]] = []
    ring.memory.add_write_listener(lambda gpa, n: seen.append((gpa, n, ring.memory.load_u16(USED + 2))))
    ring.descriptor(0, BUFFER, 16, NEXT, 1)
    ring.descriptor(1, BUFFER + 0x100, 32, NEXT | WRITE, 2)
    ring.descriptor(2, BUFFER + 0x200, 1, WRITE)
    ring.offer(0)
    seen.clear()
    chain = ring.queue.pop()
    assert chain is not None
    ring.queue.push(chain, 33)
    assert seen == [(BUFFER + 0x100, 32, 0), (BUFFER + 0x200, 1, 0)]
    ring.queue.settle()
    assert seen[-1] == (USED, 6 + 8 * 8, 1)


@pytest.mark.parametrize("prefix", [0, 1])
def test_2_7_5_3_an_indirect_table_ends_a_chain(ring: Ring, prefix: int) -> None:
    """...of zero or more direct descriptors, and its own WRITE flag is ignored."""
    ring.descriptor(0, BUFFER, 4, NEXT, 1)
    ring.descriptor(1, TABLE, 16 * 3, INDIRECT | WRITE)
    ring.descriptor(0, BUFFER, 16, NEXT, 2, table=TABLE)
    ring.descriptor(2, BUFFER, 17, WRITE, table=TABLE)
    ring.offer(1 - prefix)
    chain = ring.queue.pop()
    assert chain is not None
    assert [len(view) for view in chain.readable] == [4, 16][1 - prefix :]
    assert [len(view) for view in chain.writable] == [17]
    assert chain.head == 1 - prefix


def test_2_7_5_3_as_long_as_the_queue_but_no_longer(ring: Ring) -> None:
    for i in range(9):
        ring.descriptor(i, BUFFER, 1, NEXT if i < 7 else 0, i + 1, table=TABLE)
    ring.descriptor(0, TABLE, 16 * 9, INDIRECT)
    ring.offer(0)
    chain = ring.queue.pop()
    assert chain is not None and len(chain.readable) == 8
    ring.descriptor(7, BUFFER, 1, NEXT, 8, table=TABLE)
    ring.offer(0)
    with pytest.raises(DriverError):
        ring.queue.pop()


class Descriptor(NamedTuple):
    number: int
    gpa: int = BUFFER
    n: int = 16
    flags: int = 0
    following: int = 0
    table: int = DESC


FORBIDDEN = {
    "2.7.5: a loop": [Descriptor(0, flags=NEXT, following=1), Descriptor(1, flags=NEXT, following=0)],
    "2.7.5: next out of the table": [Descriptor(0, flags=NEXT, following=8)],
    "2.7.4.2: writable before readable": [Descriptor(0, flags=NEXT | WRITE, following=1), Descriptor(1)],
    "empty buffer": [Descriptor(0, n=0)],
    "outside memory": [Descriptor(0, gpa=MEMORY - 8)],
    "the top of the address space": [Descriptor(0, gpa=(1 << 64) - 8)],
    "longer than memory": [Descriptor(0, n=0xFFFF_FFFF)],
    "2.7.5.3.1: indirect and next": [Descriptor(0, TABLE, 16, INDIRECT | NEXT)],
    "2.7.5.3.1: indirect in indirect": [
        Descriptor(0, TABLE, 16, INDIRECT),
        Descriptor(0, TABLE, 16, INDIRECT, table=TABLE),
    ],
    "2.7.5.3: half a descriptor": [Descriptor(0, TABLE, 24, INDIRECT), Descriptor(0, table=TABLE)],
    "2.7.5.3: an empty table": [Descriptor(0, TABLE, 0, INDIRECT), Descriptor(0, table=TABLE)],
    "2.7.5.3: a table outside memory": [Descriptor(0, MEMORY - 16, 32, INDIRECT), Descriptor(0, table=MEMORY - 16)],
    "2.7.5.3: next out of the indirect table": [
        Descriptor(0, TABLE, 32, INDIRECT),
        Descriptor(0, flags=NEXT, following=2, table=TABLE),
    ],
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden_chains(ring: Ring, what: str) -> None:
    for descriptor in FORBIDDEN[what]:
        ring.descriptor(*descriptor)
    ring.offer(0)
    with pytest.raises(DriverError):
        ring.queue.pop()


def test_2_7_5_3_1_indirect_without_the_feature() -> None:
    ring = Ring(indirect=False)
    ring.descriptor(0, TABLE, 16, INDIRECT)
    ring.descriptor(0, table=TABLE)
    ring.offer(0)
    with pytest.raises(DriverError):
        ring.queue.pop()
    ring.close()


def test_2_7_5_a_chain_of_more_than_4_gib() -> None:
    """The same half of a sparse memory, often enough."""
    memory = GuestMemory(2 << 30)
    queue = Queue(memory, 8)
    queue.desc, queue.driver, queue.device = DESC, AVAIL, USED
    queue.start(indirect=True, event_idx=False)
    for i in range(3):
        memory.store_u64(DESC + 16 * i, 0)
        memory.store_u64(DESC + 16 * i + 8, (2 << 30) - 1 | (NEXT if i < 2 else 0) << 32 | (i + 1) << 48)
    memory.store_u16(AVAIL + 2, 1)
    with pytest.raises(DriverError, match="too long"):
        queue.pop()
    queue.stop()
    memory.close()


def test_2_7_6_heads_and_indices_out_of_range(ring: Ring) -> None:
    ring.descriptor(0)
    ring.offer(8)
    with pytest.raises(DriverError):
        ring.queue.pop()
    other = Ring()
    other.memory.store_u16(AVAIL + 2, 9)  # more than the queue holds
    with pytest.raises(DriverError):
        other.queue.pop()
    other.close()


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        (0, DESC, AVAIL, USED),
        (3, DESC, AVAIL, USED),
        (512, DESC, AVAIL, USED),
        (8, DESC + 8, AVAIL, USED),
        (8, DESC, AVAIL + 1, USED),
        (8, DESC, AVAIL, USED + 2),
        (8, MEMORY - 16, AVAIL, USED),
        (8, DESC, MEMORY - 20, USED),
        (8, DESC, AVAIL, MEMORY - 68),
        (8, DESC, AVAIL, (1 << 64) - 4),
    ],
)
def test_2_7_areas_must_be_aligned_and_in_memory(size: int, desc: int, avail: int, used: int) -> None:
    memory = GuestMemory(MEMORY)
    queue = Queue(memory, 256)
    queue.size, queue.desc, queue.driver, queue.device = size, desc, avail, used
    with pytest.raises(DriverError):
        queue.start(indirect=True, event_idx=True)
    assert not queue.started
    memory.close()


def test_2_7_7_interrupts_without_event_idx(ring: Ring) -> None:
    ring.descriptor(0)
    ring.offer(0, 0)
    for flags, wanted in ((0, True), (1, False)):
        ring.memory.store_u16(AVAIL, flags)
        chain = ring.queue.pop()
        assert chain is not None
        ring.queue.push(chain, 0)
        assert ring.queue.settle() is wanted
        assert ring.queue.settle() is False  # nothing new


@pytest.mark.parametrize("start", [0, 0xFFFE])
def test_2_7_7_interrupts_with_event_idx(start: int) -> None:
    """An interrupt exactly when the used index passes used_event, also across the wrap at 65536."""
    ring = Ring(event_idx=True)
    ring.queue.stop()
    ring.queue.next_avail = ring.queue.next_used = ring.queue.signalled = ring.idx = start
    ring.queue.start(indirect=False, event_idx=True)
    ring.descriptor(0)
    ring.memory.store_u16(AVAIL + 4 + 2 * 8, (start + 3) & 0xFFFF)
    said = []
    for _ in range(6):
        ring.offer(0)
        chain = ring.queue.pop()
        assert chain is not None
        ring.queue.push(chain, 0)
        said.append(ring.queue.settle())
    assert said == [False, False, False, True, False, False]
    ring.close()


def test_2_7_10_notifications() -> None:
    plain = Ring()
    plain.queue.silence()
    assert plain.memory.load_u16(USED) == 1
    assert plain.queue.listen() is False
    assert plain.memory.load_u16(USED) == 0
    plain.descriptor(0)
    plain.offer(0)
    assert plain.queue.listen() is True
    plain.close()

    event = Ring(event_idx=True)
    event.descriptor(0)
    event.offer(0, 0)
    event.queue.silence()
    assert event.queue.pop() and event.queue.pop()
    assert event.queue.listen() is False
    assert event.memory.load_u16(USED) == 0, "2.7.10.1: flags stay 0"
    assert event.memory.load_u16(USED + 4 + 8 * 8) == 2
    event.close()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_2_7_garbage_raises_nothing_else_and_terminates(data: st.DataObject) -> None:
    """Whatever the driver's areas hold, and whatever it changes meanwhile: chains of bounded length, or DriverError."""
    ring = Ring(event_idx=data.draw(st.booleans()))
    word = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, BUFFER, TABLE, DESC, USED, MEMORY - 1]))
    flags = st.integers(0, 7)
    small = st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF))
    length = st.one_of(st.sampled_from([0, 1, 16, 32, 48, 512]), st.integers(0, 0xFFFF_FFFF))
    for table in (DESC, TABLE):
        for i in range(8):
            ring.descriptor(i, data.draw(word), data.draw(length), data.draw(flags), data.draw(small), table=table)
    for i in range(8):
        ring.memory.store_u16(AVAIL + 4 + 2 * i, data.draw(small))
    ring.memory.store_u16(AVAIL + 2, data.draw(small))
    try:
        for _ in range(9):
            chain = ring.queue.pop()
            if chain is None:
                break
            assert 1 <= len(chain.readable) + len(chain.writable) <= 8
            for view in chain.writable:
                view[:1] = b"!"
            ring.queue.push(chain, data.draw(st.integers(0, 0xFFFF_FFFF)))
            ring.queue.settle()
            ring.queue.listen()
        else:
            raise AssertionError("more chains than the queue can hold")
    except DriverError:
        pass
    ring.close()


@pytest.mark.parametrize("make", [make_fence, lock_fence, membarrier_fence])
def test_this_host_has_the_fences(make: Callable[[], Fence]) -> None:
    fence = make()
    for _ in range(3):
        fence()
