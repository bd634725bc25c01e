"""A vCPU's view of memory: virtual addresses to physical ones, RAM or devices behind them, and the code at rip."""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Decoder, Instruction

from skep.contracts.io import IoSpace
from skep.engine.amd64.registers import Efer, Vector, canonical
from skep.engine.exits import Exits
from skep.engine.translate import breakpoints
from skep.engine.translate.blocks import Cache
from skep.engine.translate.layout import Mode, StateBlock
from skep.engine.translate.port import GuestFault
from skep.memory import GuestMemory, MemoryFault, Rights

WRITE, FETCH = 1, 2
_M64 = 0xFFFF_FFFF_FFFF_FFFF


class Unsupported(Exception):
    """The guest needs what this engine does not have."""


class Access:
    """What the Python parts of a vCPU ask of the guest's memory (part of :class:`port.CpuPort`)."""

    st: StateBlock
    memory: GuestMemory
    cache: Cache
    io: IoSpace
    exits: Exits
    hits: int
    _walk: Callable[[int, int, int], int]
    _fetch: Callable[[int], int]
    _flush: Callable[[int], int]
    _invalidate: Callable[[int], int]

    def physical(self, va: int, *, write: bool = False, execute: bool = False, supervisor: bool = False) -> int:
        st = self.st
        array = 0 if supervisor else st.mode & 3
        failed = self._walk(va, (WRITE if write else 0) | (FETCH if execute else 0), array)
        if failed:
            raise self._walk_fault(failed, va)
        return st.w_pa

    def read_physical(self, gpa: int, size: int) -> bytes:
        data = self._load(gpa, size)
        return b"\xff" * size if data is None else data

    def _load(self, gpa: int, n: int) -> bytes | None:
        """What memory has at [gpa, gpa + n), which lies in one page; None: that is a device's to say."""
        memory = self.memory
        if memory.is_ram(gpa, n):
            try:
                return memory.read(gpa, n)
            except MemoryFault:  # something was put over it
                pass
        if memory.overlays:
            with self.cache.world.lock:  # it stays there meanwhile
                if memory.allows(gpa, n, Rights.READ):
                    return bytes(memory.behind(gpa, n))
        return None

    def _store(self, gpa: int, data: bytes) -> bool:
        """Write to memory; False: that is a device's business."""
        memory = self.memory
        if memory.is_ram(gpa, len(data)):
            try:
                memory.write(gpa, data)
                return True
            except MemoryFault:
                pass
        if memory.overlays:
            with self.cache.world.lock:
                if memory.allows(gpa, len(data), Rights.WRITE):
                    memory.behind(gpa, len(data))[:] = data
                    memory.dma_write(gpa, len(data))
                    return True
        return False

    def _pieces(self, va: int, size: int, write: bool, supervisor: bool) -> list[tuple[int, int]]:
        """(physical address, length) of what [va, va + size) is made of; every page has been checked."""
        long = self.st.efer & Efer.LMA
        mask = _M64 if long else 0xFFFFFFFF
        if long and (va & 4095) + size > 4096 and not canonical(va + size - 1 & mask):
            raise GuestFault(Vector.GP, 0)
        pieces = []
        while size:
            n = min(size, 4096 - (va & 4095))
            pieces.append((self.physical(va, write=write, supervisor=supervisor), n))
            va = va + n & mask
            size -= n
        return pieces

    def read(self, va: int, size: int, supervisor: bool = False) -> bytes:
        out = b""
        pieces = self._pieces(va, size, False, supervisor)
        if self.st.watch and not supervisor:
            self.hits |= breakpoints.data_hits(self.st, va, size, write=False)
        for gpa, n in pieces:
            data = self._load(gpa, n)
            if data is not None:
                out += data
            else:
                for at, k in _words(gpa, n):
                    value = self.io.mmio_read(at, k)
                    self.exits.note("read", at, k, value, self.st.rip)
                    out += value.to_bytes(k, "little")
        return out

    def fetch(self, va: int, size: int) -> bytes:
        gpa = self.physical(va, execute=True)
        data = self._load(gpa, size)
        if data is not None:
            return data
        return b"".join(self.io.mmio_read(at, k).to_bytes(k, "little") for at, k in _words(gpa, size))

    def write(self, va: int, data: bytes, supervisor: bool = False) -> None:
        at = 0
        pieces = self._pieces(va, len(data), True, supervisor)
        if self.st.watch and not supervisor:
            self.hits |= breakpoints.data_hits(self.st, va, len(data), write=True)
        for gpa, n in pieces:
            piece = data[at : at + n]
            if not self._store(gpa, piece):
                for address, k in _words(gpa, n):
                    i = address - gpa
                    value = int.from_bytes(piece[i : i + k], "little")
                    self.exits.note("write", address, k, value, self.st.rip)
                    self.io.mmio_write(address, k, value)
            at += n

    def check_write(self, va: int, size: int, supervisor: bool = False) -> None:
        self._pieces(va, size, True, supervisor)

    def ram(self, va: int, size: int, *, write: bool = False) -> int | None:
        gpa = self.physical(va, write=write)
        return gpa if self.memory.is_ram(gpa, size) else None

    def flush_tlb(self, global_too: bool) -> None:
        self._flush(1 if global_too else 0)

    def invalidate_page(self, va: int) -> None:
        self._invalidate(va)

    @property
    def linear_rip(self) -> int:
        """The linear address of the instruction at rip, which is an offset in CS."""
        st = self.st
        return st.cs_base + st.rip & 0xFFFFFFFF if st.mode & Mode.NARROW else st.rip

    def code_address(self, va: int) -> int | None:
        """Physical address of code at ``va``; None where it is no RAM."""
        st = self.st
        failed = self._fetch(va)
        if failed in (0, 254):
            return st.w_pa
        if failed == 255:
            return None
        raise self._walk_fault(failed, va)

    def second_page(self, va: int) -> int:
        """Physical address of the page behind the one that ``va`` is on."""
        st = self.st
        mask = 0xFFFFFFFF if st.mode & Mode.NARROW else _M64
        pa = self.code_address((va & ~4095) + 4096 & mask)
        if pa is None:
            raise Unsupported(f"an instruction at {va:#x} continues outside RAM")
        return pa

    def _walk_fault(self, failed: int, va: int) -> GuestFault:
        if failed == Vector.PF:
            return GuestFault(Vector.PF, self.st.w_error, va)
        return GuestFault(Vector.GP, 0)

    def instruction(self) -> Instruction:
        data, offset = self.bytes_at_rip()
        return Decoder(self._bits, data, ip=offset).decode()

    @property
    def _bits(self) -> int:
        return 32 if self.st.mode & Mode.CODE32 else 16 if self.st.mode & Mode.CODE16 else 64

    def bytes_at_rip(self) -> tuple[bytes, int]:
        """Up to 15 bytes of code at rip, and the offset in their page. #GP if the instruction is not all in CS."""
        st = self.st
        va = self.linear_rip
        offset = va & 4095
        room = 4096 - offset
        most = 15
        if st.mode & Mode.SEGMENTED and st.cs_limit - st.rip < 14:
            most = max(0, st.cs_limit + 1 - st.rip)
        data = self.fetch(va, min(most, room)) if most else b""
        if room < most and Decoder(self._bits, data, ip=offset).decode().is_invalid:
            following = va + room & (0xFFFFFFFF if st.mode & Mode.NARROW else _M64)
            data += self.fetch(following, most - room)
        if most < 15 and Decoder(self._bits, data, ip=offset).decode().is_invalid:
            raise GuestFault(Vector.GP, 0)
        return data, offset


def _words(gpa: int, n: int) -> list[tuple[int, int]]:
    """Naturally sized accesses that [gpa, gpa + n) is made of: a device sees what the instruction did where it can."""
    words = []
    while n:
        k = n if n in (1, 2, 4, 8) else 8 if n > 8 else 4 if n > 4 else 2 if n > 2 else 1
        words.append((gpa, k))
        gpa += k
        n -= k
    return words
