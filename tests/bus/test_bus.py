"""Routing: every access to its window, the rest reads all ones, and nothing grows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.bus import Bus
from skep.locks import Lock, Order


class Ram:
    """A region of bytes that notes its accesses, and that the lock is held."""

    def __init__(self, size: int, lock: Lock) -> None:
        self.bytes = bytearray(size)
        self.lock = lock
        self.log: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> int:
        assert self.lock.held() and offset >= 0 and offset + size <= len(self.bytes)
        self.log.append((offset, size))
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        assert self.lock.held() and offset >= 0 and offset + size <= len(self.bytes) and 0 <= value < 1 << 8 * size
        self.log.append((offset, size))
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")


@pytest.fixture
def lock() -> Lock:
    return Lock("board", Order.BOARD)


def test_ports(lock: Lock) -> None:
    bus, a, b = Bus(lock), Ram(8, lock), Ram(1, lock)
    bus.add_ports(0x3F8, 8, a)
    bus.add_ports(0x61, 1, b)
    bus.port_write(0x3F9, 2, 0x1234)
    assert a.bytes[1:3] == b"\x34\x12" and bus.port_read(0x3F9, 2) == 0x1234
    assert a.log == [(1, 2), (1, 2)]
    bus.port_write(0x61, 1, 5)
    assert b.bytes == b"\5"
    assert [bus.port_read(0x400, n) for n in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    bus.port_write(0x400, 4, 0)


def test_an_access_over_an_edge_is_split(lock: Lock) -> None:
    bus, a, b = Bus(lock), Ram(2, lock), Ram(4, lock)
    bus.add_ports(0x10, 2, a)
    bus.add_ports(0x13, 4, b)
    bus.port_write(0x10, 4, 0x44332211)
    assert bytes(a.bytes) == b"\x11\x22" and b.bytes[0] == 0x44
    assert bus.port_read(0x10, 4) == 0x44FF2211
    assert bus.port_read(0x0F, 2) == 0x11FF
    bus.port_write(0x0F, 2, 0x9900)
    assert a.bytes[0] == 0x99
    assert bus.port_read(0xFFFE, 4) == 0xFFFFFFFF
    m, n = Ram(0x1000, lock), Ram(0x1000, lock)
    bus.add_mmio(0xFEC00000, 0x1000, m)
    bus.add_mmio(0xFEC01000, 0x1000, n)
    bus.mmio_write(0xFEC00FFC, 8, 0x8877665544332211)
    assert m.bytes[-4:] == b"\x11\x22\x33\x44" and n.bytes[:4] == b"\x55\x66\x77\x88"
    assert bus.mmio_read(0xFEC00FFC, 8) == 0x8877665544332211
    assert bus.mmio_read(0xFEBFFFFE, 4) == 0xFFFF


def test_windows_do_not_overlap_and_can_be_removed(lock: Lock) -> None:
    bus, r = Bus(lock), Ram(0x1000, lock)
    bus.add_mmio(0x1000, 0x1000, r)
    for gpa, size in ((0x1000, 1), (0x1FFF, 1), (0xFFF, 2), (0, 0x3000), (0x3000, 0), (-1, 1)):
        with pytest.raises(ValueError):
            bus.add_mmio(gpa, size, r)
    bus.add_mmio(0x0, 0x1000, r)
    bus.add_mmio(0x2000, 0x1000, r)
    with pytest.raises(KeyError):
        bus.remove_mmio(0x1800)
    bus.remove_mmio(0x1000)
    assert bus.mmio_read(0x1000, 8) == (1 << 64) - 1
    assert bus.mmio_read(0x2000, 8) == 0
    bus.add_ports(0xCF8, 8, r)
    for first, count in ((0xCFF, 1), (0xCF0, 9), (0xFFFF, 2), (-1, 1), (0, 0)):
        with pytest.raises(ValueError):
            bus.add_ports(first, count, r)
    with pytest.raises(KeyError):
        bus.remove_ports(0xCF9)
    bus.remove_ports(0xCF8)
    assert bus.port_read(0xCFC, 4) == 0xFFFFFFFF


def test_unknown_addresses_are_remembered_up_to_a_bound(lock: Lock) -> None:
    bus = Bus(lock)
    for port in range(1000):
        bus.port_read(port, 1)
        bus.port_write(port, 1, 0)
        bus.mmio_read(port, 1)
    assert bus.unknown[("port", 0)] == 2
    assert len(bus.unknown) == 64


@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(1, 16)), max_size=8),
    st.lists(st.tuples(st.integers(0, 70), st.sampled_from((1, 2, 4, 8)), st.integers(0, (1 << 64) - 1)), max_size=30),
)
def test_mmio_equals_a_flat_model(windows: list[tuple[int, int]], accesses: list[tuple[int, int, int]]) -> None:
    lock = Lock("board", Order.BOARD)
    bus = Bus(lock)
    model: dict[int, int] = {}
    for start, size in windows:
        if any(start + i in model for i in range(size)):
            with pytest.raises(ValueError):
                bus.add_mmio(start, size, Ram(size, lock))
        else:
            bus.add_mmio(start, size, Ram(size, lock))
            model.update((start + i, 0) for i in range(size))
    for gpa, size, value in accesses:
        value &= (1 << 8 * size) - 1
        expected = [model.get(gpa + i, 0xFF) for i in range(size)]
        assert bus.mmio_read(gpa, size) == int.from_bytes(bytes(expected), "little")
        bus.mmio_write(gpa, size, value)
        for i, byte in enumerate(value.to_bytes(size, "little")):
            if gpa + i in model:
                model[gpa + i] = byte
