"""KVM's memory slots, which follow the memory map while the guest runs, and what KVM knows of dirty pages.

A slot says where memory is and what may be done with it; what is there the host's window says, through which KVM sees
changes at once. So a region whose contents alone change keeps its slot. KVM changes no slot's place or size: it goes,
and others come, and while one is gone the vCPUs stand still.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from skep.engine.kvm import failures, uapi
from skep.engine.kvm.uapi import ioctl
from skep.memory import PAGE, Region, Rights
from skep.memory.dirty import Mark

_CLEARED = 1 << 18
"""Pages whose log is cleared at a time: KVM holds the guest's page tables meanwhile."""

Still = Callable[[], AbstractContextManager[None]]
"""A context in which no vCPU is in guest code."""


class Slot(NamedTuple):
    number: int
    region: Region


class Slots:
    """The slots of a VM (:class:`skep.memory.regions.MapListener`).

    They are a :class:`~skep.memory.dirty.DirtySource` as well, by KVM's bitmaps, unless rings tell what is dirty: then
    only whether it is to be told is theirs."""

    def __init__(
        self, vm: int, most: int, *, read_only: bool, cleared_by_hand: bool, still: Still, forgotten: Mark
    ) -> None:
        """``most``: slots that KVM has. ``cleared_by_hand``: a bitmap that is read stays as it is until it is cleared,
        and at first all pages are dirty (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is enabled so). ``forgotten`` is told of
        dirty pages of slots that go."""
        self._vm = vm
        self._most = most
        self._read_only = read_only
        self._by_hand = cleared_by_hand
        self._still = still
        self._slots: dict[tuple[int, int, Rights], Slot] = {}
        self._logs = False
        self.rescue: Callable[[], None] = lambda: self.collect_dirty(forgotten)
        """Called with the vCPUs at a stand before slots go: it takes what is dirty in them."""

    def adopt(self, regions: Sequence[Region]) -> None:
        """The slots of a new VM. Raises HostError where there are too few."""
        self._check(0, regions)
        for region in regions:
            self._create(region)

    @contextmanager
    def changing(
        self, before: Sequence[Region], after: Sequence[Region], where: Sequence[tuple[int, int]]
    ) -> Iterator[None]:
        wanted = {_key(region): region for region in after}
        gone = [key for key in self._slots if key not in wanted]
        come = [region for key, region in wanted.items() if key not in self._slots]
        self._check(len(self._slots) - len(gone), come)
        with self._still() if gone else nullcontext():
            if gone and self._logs:
                self.rescue()
            for key in gone:
                self._delete(self._slots.pop(key))
            yield
            for region in come:
                self._create(region)

    def by_number(self, number: int) -> Slot | None:
        """Any thread may ask."""
        return next((slot for slot in tuple(self._slots.values()) if slot.number == number), None)

    def _check(self, kept: int, come: Sequence[Region]) -> None:
        if kept + len(come) > self._most:
            raise failures.no_slots(kept + len(come), self._most)
        if not self._read_only and any(not region.rights & 2 for region in come):
            raise failures.no_rom()

    def _create(self, region: Region) -> None:
        used = {slot.number for slot in self._slots.values()}
        slot = Slot(next(number for number in range(len(used) + 1) if number not in used), region)
        self._slots[_key(region)] = slot
        self._set(slot)
        if self._logs and self._by_hand:
            self._clear_all(slot)

    def _set(self, slot: Slot) -> None:
        flags = uapi.MEM_LOG_DIRTY_PAGES if self._logs and slot.region.rights is Rights.WRITE else 0
        if slot.region.rights is not Rights.WRITE:
            flags |= uapi.MEM_READONLY
        gpa, size, host = slot.region[:3]
        ioctl(self._vm, uapi.SET_USER_MEMORY_REGION, uapi.UserspaceMemoryRegion(slot.number, flags, gpa, size, host))

    def _delete(self, slot: Slot) -> None:
        ioctl(self._vm, uapi.SET_USER_MEMORY_REGION, uapi.UserspaceMemoryRegion(slot.number, 0, slot.region.gpa, 0, 0))

    # Dirty pages

    def log(self, on: bool) -> None:
        """Whether KVM is to know of them."""
        self._logs = on
        for slot in self._slots.values():
            if slot.region.rights is Rights.WRITE:
                self._set(slot)

    def start_dirty(self) -> None:
        self.log(True)
        for slot in self._slots.values():
            if self._by_hand:
                self._clear_all(slot)

    def collect_dirty(self, mark: Mark) -> None:
        for slot in self._slots.values():
            self._read(slot, mark)

    def stop_dirty(self) -> None:
        self.log(False)

    def _read(self, slot: Slot, mark: Mark) -> None:
        """What is dirty in a slot, which is clean then."""
        if slot.region.rights is not Rights.WRITE:
            return
        pages = slot.region.size // PAGE
        bitmap = (ctypes.c_uint64 * ((pages + 63) // 64))()
        ioctl(self._vm, uapi.GET_DIRTY_LOG, uapi.DirtyLog(slot.number, 0, ctypes.addressof(bitmap)))
        data = bytes(bitmap)
        if any(data):
            mark(slot.region.gpa, data)
            if self._by_hand:
                self._clear(slot, bitmap)

    def _clear_all(self, slot: Slot) -> None:
        if slot.region.rights is Rights.WRITE:
            words = (slot.region.size // PAGE + 63) // 64
            bitmap = (ctypes.c_uint64 * words)()
            ctypes.memset(bitmap, 0xFF, 8 * words)
            self._clear(slot, bitmap)

    def _clear(self, slot: Slot, bitmap: ctypes.Array[ctypes.c_uint64]) -> None:
        """The pages whose bits are set are clean from here on."""
        pages = slot.region.size // PAGE
        for first in range(0, pages, _CLEARED):
            count = min(_CLEARED, pages - first)
            at = ctypes.addressof(bitmap) + first // 8
            ioctl(self._vm, uapi.CLEAR_DIRTY_LOG, uapi.ClearDirtyLog(slot.number, count, first, at))


def _key(region: Region) -> tuple[int, int, Rights]:
    return region.gpa, region.size, region.rights
