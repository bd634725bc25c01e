"""Writes to ports that KVM keeps until it next leaves a guest (api.rst, KVM_REGISTER_COALESCED_MMIO).

They lie in a ring that all vCPUs of a VM share, in a page of each one's mapping, and whichever leaves guest code first
makes them, before it does what it left for. So no access of any vCPU overtakes one.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any

from skep.contracts.io import IoSpace
from skep.engine.kvm import uapi
from skep.engine.kvm.uapi import ioctl
from skep.locks import Lock, Order

_FIRST, _LAST = uapi.CoalescedMmioRing.first.offset // 4, uapi.CoalescedMmioRing.last.offset // 4
_HEADER, _ENTRY = 8, struct.Struct("<QII8s")
_ENTRIES = (mmap.PAGESIZE - _HEADER) // _ENTRY.size

Ring = memoryview
"""The page, as numbers of 32 bits: where the first entry is, and where the next will be."""
EMPTY: Ring = memoryview(bytes(8)).cast("I")
"""Where there is none."""


class Posted:
    """See :class:`skep.contracts.io.PostedWrites`."""

    def __init__(self, fd: int, page: int, io: IoSpace) -> None:
        """``fd`` is the VM's; ``page`` says in which page of a vCPU's mapping the ring lies."""
        self._fd = fd
        self.at = page * mmap.PAGESIZE
        """Where the ring is in a vCPU's mapping."""
        self._io = io
        self._lock = Lock("posted writes", Order.POSTED)
        self.streams: set[int] = set()
        """Ports of :mod:`skep.engine.kvm.streams`."""

    def add(self, port: int) -> None:
        ioctl(self._fd, uapi.REGISTER_COALESCED_MMIO, uapi.CoalescedMmioZone(port, 1, 1))

    def add_stream(self, port: int) -> None:
        self.streams.add(port)

    def keep_streams(self, keep: bool) -> None:
        """Their bytes wait from now on; or are exits again."""
        for port in self.streams:
            request = uapi.REGISTER_COALESCED_MMIO if keep else uapi.UNREGISTER_COALESCED_MMIO
            ioctl(self._fd, request, uapi.CoalescedMmioZone(port, 1, 1))

    def ring(self, mapping: mmap.mmap) -> Ring:
        """As a vCPU's mapping has it."""
        return memoryview(mapping)[self.at : self.at + mmap.PAGESIZE].cast("I")

    def make(self, ring: Ring, note: Any) -> bool:
        """Make the writes that are there; ``note`` is :meth:`skep.engine.exits.Exits.note`. False: there are none."""
        if ring[_FIRST] == ring[_LAST]:
            return False
        with self._lock:
            while (first := ring[_FIRST] % _ENTRIES) != ring[_LAST] % _ENTRIES:
                port, size, _, data = _ENTRY.unpack_from(ring, _HEADER + first * _ENTRY.size)
                value = int.from_bytes(data[:size], "little")
                note("out", port, size, value)
                self._io.port_write(port, size, value)
                ring[_FIRST] = (first + 1) % _ENTRIES
        return True
