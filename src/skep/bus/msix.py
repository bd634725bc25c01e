"""MSI-X: a table of messages, a bit per message that waits (PCI Local Bus 3.0, 6.8.2)."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import ClassVar

from skep import bells
from skep.contracts.io import BoundSink, MsiSink
from skep.state import Fields

ENABLE, FUNCTION_MASK = 1 << 15, 1 << 14
"""Message control, bits that the guest writes."""

_ENTRY = 16
_MASKED = 1 << 32 * 3  # vector control bit 0, of an entry as one number
_STEADY = 16
"""So often a message is sent, with nothing changed between, before the sink is to take it from an eventfd: that takes
the host's kernel milliseconds, and some drivers mask and unmask at each interrupt."""


class MsiX(Fields):
    """One function's table and pending bits, as the region of a BAR of their own: table first, then the bits.

    Messages that are sent often go by an eventfd where the sink takes them from one: no lock is held then, and no vCPU
    disturbed. An eventfd belongs to its vector for good, and only while nothing masks the vector to the sink too.

    The message control register is in the function's configuration space, which tells us by :meth:`set_control`.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("table", "pending", "control")

    def __init__(self, vectors: int) -> None:
        if not 1 <= vectors <= 2048:
            raise ValueError("MSI-X has 1 to 2048 vectors")
        self.vectors = vectors
        self.pba_offset = max(0x800, vectors * _ENTRY)
        self.bar_size = max(0x1000, 1 << (self.pba_offset + (vectors + 63) // 64 * 8 - 1).bit_length())
        self._sink: MsiSink | None = None
        self._lock: AbstractContextManager[object] | None = None
        self._eventfds: dict[int, int] = {}
        self._bound: dict[int, int] = {}
        """Those that the sink has, by vector."""
        self._sent: dict[int, int] = {}
        """How often vectors were, since something of them changed."""
        self.reset()

    def connect(self, sink: MsiSink, lock: AbstractContextManager[object]) -> None:
        self._sink, self._lock = sink, lock

    def reset(self) -> None:
        for vector in list(self._bound):
            self._unbind(vector)
        self.table = [_MASKED] * self.vectors
        """Each entry a number of 128 bits: address, upper address, data, vector control."""
        self.pending = 0
        self.control = 0

    @property
    def enabled(self) -> bool:
        return bool(self.control & ENABLE)

    def signal(self, vector: int) -> None:
        """Send a vector's message, or note it where it is masked. From any thread; not enabled: nothing."""
        if not 0 <= vector < self.vectors or self._lock is None:
            return
        eventfd = self._bound.get(vector)
        if eventfd is not None:
            bells.ring(eventfd, 1)
            if vector in self._bound:
                return
        with self._lock:
            if eventfd is not None:  # the sink had to give it back meanwhile
                self._collect(vector)
                self._deliver(vector)
            elif self.control & ENABLE:
                self.pending |= 1 << vector
                self._deliver(vector)

    def set_control(self, control: int) -> None:
        """Message control was written."""
        before, self.control = self.control, control & (ENABLE | FUNCTION_MASK)
        if before != self.control:
            for vector in list(self._bound):
                self._unbind(vector)
            self._sent.clear()
        if before != self.control and self.pending:
            for vector in range(self.vectors):
                self._deliver(vector)

    def _deliver(self, vector: int) -> None:
        """Send what is pending, if nothing masks it."""
        bit, entry = 1 << vector, self.table[vector]
        if self.pending & bit and self.control == ENABLE and not entry & _MASKED and self._sink is not None:
            self.pending &= ~bit
            self._sink.signal(*_message(entry))
            self._sent[vector] = sent = self._sent.get(vector, 0) + 1
            if sent == _STEADY:
                self._bind(vector, self._sink)

    def _bind(self, vector: int, sink: MsiSink) -> None:
        if isinstance(sink, BoundSink):
            if vector not in self._eventfds:
                self._eventfds[vector] = bells.hang()
            if sink.bind(self._eventfds[vector], *_message(self.table[vector])):
                self._bound[vector] = self._eventfds[vector]

    def _unbind(self, vector: int) -> None:
        eventfd = self._bound.pop(vector)  # first: who signals looks there again afterwards
        if isinstance(self._sink, BoundSink):
            self._sink.unbind(eventfd)
        self._sent.pop(vector, None)
        self._collect(vector)

    def _collect(self, vector: int) -> None:
        """What was added to its eventfd, and found nobody, waits as if the vector had been masked."""
        if vector not in self._bound and bells.answer(self._eventfds[vector]) and self.control & ENABLE:
            self.pending |= 1 << vector

    def close(self) -> None:
        """Nobody signals any more."""
        for vector in list(self._bound):
            self._unbind(vector)
        for eventfd in self._eventfds.values():
            os.close(eventfd)
        self._eventfds.clear()

    def read(self, offset: int, size: int) -> int:
        vector, within = divmod(offset, _ENTRY)
        if vector < self.vectors:
            bits = self.table[vector] >> 8 * within
        elif offset >= self.pba_offset:
            bits = self.pending >> 8 * (offset - self.pba_offset)
        else:
            bits = 0
        return bits & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Whole aligned dwords and quadwords; others are undefined by the specification, and do nothing."""
        vector, within = divmod(offset, _ENTRY)
        if vector >= self.vectors or size < 4 or within % size:
            return
        if vector in self._bound:
            self._unbind(vector)
        self._sent.pop(vector, None)
        mask = ((1 << 8 * size) - 1) << 8 * within
        entry = self.table[vector] & ~mask | value << 8 * within & mask
        self.table[vector] = entry & ((_MASKED << 1) - 1) & ~3  # reserved bits of vector control; a dword address
        self._deliver(vector)


def _message(entry: int) -> tuple[int, int]:
    """Address and data."""
    return entry & 0xFFFF_FFFF_FFFF_FFFF, entry >> 64 & 0xFFFF_FFFF
