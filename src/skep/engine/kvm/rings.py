"""KVM's dirty rings: what each vCPU writes first after its page was clean, in the order in which it does.

A full ring makes its vCPU leave the guest. The harvest stops all of them: the processor may keep what it wrote last to
itself while it runs (Intel's page-modification log).
"""

from __future__ import annotations

import ctypes
import mmap
from collections import defaultdict

from skep.engine.kvm import uapi
from skep.engine.kvm.slots import Slots, Still
from skep.engine.kvm.uapi import ioctl
from skep.memory import PAGE
from skep.memory.dirty import Mark

_ENTRY = ctypes.sizeof(uapi.DirtyGfn)
_WORDS = _ENTRY // 8
_SLOT = 32
"""In an entry's first word the slot's number begins there, above the flags."""


class Ring:
    """One vCPU's, of ``entries`` entries."""

    def __init__(self, vcpu: int, entries: int) -> None:
        self._map = mmap.mmap(vcpu, entries * _ENTRY, offset=uapi.DIRTY_LOG_PAGE_OFFSET * PAGE)
        self._words = memoryview(self._map).cast("Q")
        self._entries = entries
        self._next = 0

    def harvest(self) -> list[tuple[int, int]]:
        """(slot, page in it) of what is there, which KVM may use again after KVM_RESET_DIRTY_RINGS."""
        found: list[tuple[int, int]] = []
        words = self._words
        while True:
            at = self._next % self._entries * _WORDS
            head = words[at]
            if not head & uapi.DIRTY_GFN_F_DIRTY or len(found) == self._entries:
                return found
            found.append((head >> _SLOT, words[at + 1]))
            words[at] = head & ~uapi.DIRTY_GFN_F_DIRTY | uapi.DIRTY_GFN_F_RESET
            self._next += 1

    def close(self) -> None:
        self._words.release()
        self._map.close()


class Rings:
    """Those of a VM (:class:`skep.memory.dirty.DirtySource`)."""

    def __init__(self, vm: int, entries: int, slots: Slots, still: Still, mark: Mark) -> None:
        """``mark`` is told of what does not wait until it is asked for."""
        self._vm = vm
        self._entries = entries
        self._slots = slots
        self._still = still
        self._mark = mark
        self._rings: list[Ring] = []
        slots.rescue = self.full

    def add(self, vcpu: int) -> None:
        """A vCPU was made, with this descriptor."""
        self._rings.append(Ring(vcpu, self._entries))

    def full(self) -> None:
        """A vCPU cannot go on before its ring is harvested."""
        with self._still():
            self._harvest(self._mark)

    def start_dirty(self) -> None:
        self._slots.log(True)

    def collect_dirty(self, mark: Mark) -> None:
        with self._still():
            self._harvest(mark)

    def stop_dirty(self) -> None:
        self._slots.log(False)
        with self._still():
            self._harvest(lambda gpa, bitmap: None)

    def _harvest(self, mark: Mark) -> None:
        """The vCPUs stand still."""
        found: dict[int, list[int]] = defaultdict(list)
        for ring in self._rings:
            for number, page in ring.harvest():
                found[number].append(page)
        for number, pages in found.items():
            slot = self._slots.by_number(number)
            if slot is not None:
                bitmap = bytearray((slot.region.size // PAGE + 7) // 8)
                for page in pages:
                    bitmap[page >> 3] |= 1 << (page & 7)
                mark(slot.region.gpa, bytes(bitmap))
        if found:
            ioctl(self._vm, uapi.RESET_DIRTY_RINGS)

    def close(self) -> None:
        """Before the vCPUs."""
        for ring in self._rings:
            ring.close()
        self._rings.clear()
