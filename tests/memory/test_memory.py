"""Guest memory: layout, exact bounds, the DMA door, and that it costs only what is touched."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import skep
from skep.memory import PAGE, GuestMemory, MemoryFault

GiB = 1 << 30


def resident(memory: GuestMemory) -> int:
    return os.fstat(memory.fd).st_blocks * 512


def mapped(memory: GuestMemory, base: int) -> bool:
    with open("/proc/self/maps") as maps:
        return any(line.startswith(f"{base:x}-") for line in maps)


def test_small_guest_is_one_region() -> None:
    m = GuestMemory(16 << 20)
    assert [(r.gpa, r.size, r.host) for r in m.regions] == [(0, 16 << 20, m.base)]
    assert (m.low_size, m.high_size, m.top) == (16 << 20, 0, 16 << 20)
    m.close()


def test_large_guest_is_lazy_and_has_a_hole() -> None:
    m = GuestMemory(20 * GiB)
    assert [r[:3] for r in m.regions] == [(0, 3 * GiB, m.base), (4 * GiB, 17 * GiB, m.base + 4 * GiB)]
    assert m.top == 21 * GiB
    assert resident(m) == 0
    m.write(21 * GiB - 3, b"end")
    m.write(3 * GiB - 3, b"low")
    assert m.read(21 * GiB - 3, 3) == b"end" and m.read(3 * GiB - 3, 3) == b"low"
    assert resident(m) <= 8 * PAGE
    m.close()


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE + 1])
def test_sizes_that_are_not_whole_pages_are_refused(size: int) -> None:
    with pytest.raises(ValueError):
        GuestMemory(size)


def test_the_host_can_map_huge_pages_whole() -> None:
    """Whatever else was mapped before."""
    for size in (1 << 20, 3 << 20, 5 << 20):
        with mmap.mmap(-1, size + 4096):
            memory = GuestMemory(size)
            assert memory.base % (2 << 20) == 0
            memory.close()


def test_bounds_are_exact() -> None:
    m = GuestMemory(6 * PAGE, low_limit=4 * PAGE, high_base=8 * PAGE)
    low, base, top = 4 * PAGE, 8 * PAGE, 10 * PAGE
    inside = [(0, 1), (0, low), (low - 1, 1), (base, 1), (base, 2 * PAGE), (top - 1, 1), (low, 0), (top, 0)]
    outside = [
        (-1, 1), (-1, 2), (low, 1), (low - 1, 2), (base - 1, 1), (base - 1, 2), (top - 1, 2), (top, 1), (0, top),
        (low - 1, base - low + 2), (0, -1), (base + 4, -8), (1 << 64, 1), (top + 1, 0),
    ]  # fmt: skip
    for gpa, n in inside:
        assert m.is_ram(gpa, n), (gpa, n)
        assert len(m.view(gpa, n)) == n
        assert len(m.read(gpa, n)) == n
    for gpa, n in outside:
        assert not m.is_ram(gpa, n), (gpa, n)
        for access in (m.view, m.read):
            with pytest.raises(MemoryFault):
                access(gpa, n)
    with pytest.raises(MemoryFault):
        m.write(low - 1, b"ab")
    assert m.read(low - 1, 1) == b"\0"
    m.close()


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_loads_and_stores(bits: int) -> None:
    m = GuestMemory(2 * PAGE)
    value = int.from_bytes(bytes(range(0x81, 0x81 + bits // 8)), "little")
    load, store = getattr(m, f"load_u{bits}"), getattr(m, f"store_u{bits}")
    told: list[tuple[int, int]] = []
    m.add_write_listener(lambda gpa, n: told.append((gpa, n)))
    for gpa in (0, 1, 3, 8, PAGE - 1, 2 * PAGE - bits // 8):
        store(gpa, value)
        assert load(gpa) == value
        assert m.read(gpa, bits // 8) == value.to_bytes(bits // 8, "little")
        assert told.pop() == (gpa, bits // 8)
        m.write(gpa, bytes(bits // 8))
        told.clear()
    for gpa in (2 * PAGE - bits // 8 + 1, -1):
        with pytest.raises(MemoryFault):
            load(gpa)
        with pytest.raises(MemoryFault):
            store(gpa, value)
    m.close()


@pytest.mark.parametrize("gpa", [0, 4, 6, 61, PAGE - 5])
def test_stores_are_single(gpa: int) -> None:
    """No reader sees half of a store (aligned, or within a cache line on x86)."""
    m = GuestMemory(2 * PAGE)
    values = (0x1111111111111111, 0xEEEEEEEEEEEEEEEE)
    if gpa % 64 > 56:
        gpa = gpa // 64 * 64  # crossing a line is not promised by any CPU
    view = m.view(gpa, 8)
    view[:] = values[0].to_bytes(8, "little")
    done = threading.Event()

    def write() -> None:
        i = 0
        while not done.is_set():
            i ^= 1
            m.store_u64(gpa, values[i])

    writer = threading.Thread(target=write)
    writer.start()
    seen = {m.load_u64(gpa) for _ in range(20000)}
    done.set()
    writer.join()
    assert seen <= set(values)
    view.release()
    m.close()


def test_views_share_memory_and_listeners_come_and_go() -> None:
    m = GuestMemory(4 * PAGE)
    told: list[tuple[int, int]] = []

    def listener(gpa: int, n: int) -> None:
        told.append((gpa, n))

    m.add_write_listener(listener)
    view = m.view(PAGE, 4)
    view[:] = b"abcd"
    assert told == []
    m.dma_write(PAGE, 4)
    m.dma_write(PAGE, 0)
    assert told == [(PAGE, 4)]
    m.remove_write_listener(listener)
    m.write(PAGE, b"x")
    assert told == [(PAGE, 4)] and bytes(view) == b"xbcd"
    m.close()


def test_dirty_pages() -> None:
    m = GuestMemory(6 * PAGE, low_limit=4 * PAGE, high_base=8 * PAGE)
    m.write(0, b"before")
    m.start_dirty()
    m.write(2 * PAGE - 1, b"ab")
    m.store_u16(9 * PAGE, 1)
    dirty = m.take_dirty()
    assert [i for i in range(10) if dirty[i >> 3] >> (i & 7) & 1] == [1, 2, 9]
    assert not any(m.take_dirty())
    m.stop_dirty()
    with pytest.raises(ValueError):
        m.take_dirty()
    m.close()


def test_clear_gives_pages_back_and_keeps_views() -> None:
    m = GuestMemory(64 * PAGE)
    view = m.view(0, 64 * PAGE)
    view[:] = b"x" * len(view)
    assert resident(m) == 64 * PAGE
    told: list[tuple[int, int]] = []
    m.add_write_listener(lambda gpa, n: told.append((gpa, n)))
    m.clear()
    assert resident(m) == 0 and told == [(0, 64 * PAGE)]
    assert not any(view)
    view[5] = 7
    assert m.load_u8(5) == 7
    view.release()
    m.close()


def test_close_frees_the_descriptor_and_the_window() -> None:
    m = GuestMemory(1 << 20)
    fd, base = m.fd, m.base
    assert mapped(m, base)
    m.close()
    m.close()
    assert not mapped(m, base)
    with pytest.raises(OSError):
        os.fstat(fd)
    assert not m.is_ram(0)
    with pytest.raises(MemoryFault):
        m.view(0, 1)


def test_a_view_held_past_close_is_late_not_wild() -> None:
    m = GuestMemory(1 << 20)
    m.write(0, b"kept")
    base, view = m.base, m.view(0, 4)
    m.close()
    assert bytes(view) == b"kept" and mapped(m, base)
    view.release()
    assert not mapped(m, base)


STILL_USED = """
import os, threading
from skep.memory import GuestMemory
memory = GuestMemory(256 << 20)
view = memory.view(0, 256 << 20)
def use():
    while True:
        view[: 128 << 20] = view[128 << 20 :]
threading.Thread(target=use, daemon=True).start()
threading.Event().wait(0.05)
"""


def test_a_process_may_end_while_its_threads_use_it() -> None:
    """A program that forgot to close its VM ends as it meant to, and not by SIGSEGV."""
    environment = {**os.environ, "PYTHONPATH": str(Path(skep.__file__ or "").parent.parent)}
    for _ in range(3):
        command = [sys.executable, "-c", STILL_USED]
        assert subprocess.run(command, check=False, timeout=60, env=environment).returncode == 0
