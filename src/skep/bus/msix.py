"""MSI-X: a table of messages, a bit per message that waits (PCI Local Bus 3.0, 6.8.2)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar

from skep.contracts.io import MsiSink
from skep.state import Fields

ENABLE, FUNCTION_MASK = 1 << 15, 1 << 14
"""Message control, bits that the guest writes."""

_ENTRY = 16
_MASKED = 1 << 32 * 3  # vector control bit 0, of an entry as one number


class MsiX(Fields):
    """One function's table and pending bits, as the region of a BAR of their own: table first, then the bits.

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
        self.reset()

    def connect(self, sink: MsiSink, lock: AbstractContextManager[object]) -> None:
        self._sink, self._lock = sink, lock

    def reset(self) -> None:
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
        with self._lock:
            if self.control & ENABLE:
                self.pending |= 1 << vector
                self._deliver(vector)

    def set_control(self, control: int) -> None:
        """Message control was written."""
        before, self.control = self.control, control & (ENABLE | FUNCTION_MASK)
        if before != self.control and self.pending:
            for vector in range(self.vectors):
                self._deliver(vector)

    def _deliver(self, vector: int) -> None:
        """Send what is pending, if nothing masks it."""
        bit, entry = 1 << vector, self.table[vector]
        if self.pending & bit and self.control == ENABLE and not entry & _MASKED and self._sink is not None:
            self.pending &= ~bit
            self._sink.signal(entry & 0xFFFF_FFFF_FFFF_FFFF, entry >> 64 & 0xFFFF_FFFF)

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
        mask = ((1 << 8 * size) - 1) << 8 * within
        entry = self.table[vector] & ~mask | value << 8 * within & mask
        self.table[vector] = entry & ((_MASKED << 1) - 1) & ~3  # reserved bits of vector control; a dword address
        self._deliver(vector)
