"""The test device of KVM-unit-tests (bhyve's ``-l pc-testdev``; QEMU's pc-testdev and isa-debug-exit).

| where | what |
|---|---|
| port 0xf4 | a write of ``v`` ends the VM with exit status ``v << 1 | 1`` |
| ports 0xe0, 0xe8 | one 32-bit latch, whole or by the byte |
| port 0xe4 | a write of a guest-physical address: the host is to forget its page, which means nothing here |
| ports 0x2000 to 0x2017 | the levels of the interrupt lines 0 to 23 |
| 0xff000000 | 64 KiB of memory that is no RAM |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from skep.contracts.io import IoRegion, IrqLine
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus

LATCH_PORT, FLUSH_PORT, LATCH_BYTES_PORT, EXIT_PORT, LINES_PORT = 0xE0, 0xE4, 0xE8, 0xF4, 0x2000
MEMORY_BASE, MEMORY_SIZE = 0xFF000000, 1 << 16


class PcTestDev(Fields):
    """``leave`` is called with the exit status, in the middle of the guest's write."""

    name = "pc-testdev"
    state_fields: ClassVar[tuple[str, ...]] = ("latch", "levels", "memory")

    def __init__(self, lines: Sequence[IrqLine], leave: Callable[[int], None]) -> None:
        self._lines = lines
        self._leave = leave
        self.latch = bytearray(4)
        self.levels = bytearray(len(lines))
        self.memory = bytearray(MEMORY_SIZE)

    def reset(self) -> None:
        for data in (self.latch, self.levels, self.memory):
            data[:] = bytes(len(data))
        self._drive()

    def pause(self) -> None:
        """Nothing happens by itself."""

    def resume(self) -> None:
        pass

    def loaded(self) -> None:
        self._drive()

    def close(self) -> None:
        """Nothing is held."""

    def _drive(self) -> None:
        for line, level in zip(self._lines, self.levels, strict=True):
            line.set(bool(level))

    def _set_line(self, number: int, size: int, level: int) -> None:
        self.levels[number] = bool(level)
        self._lines[number].set(bool(level))

    def _exit(self, offset: int, size: int, value: int) -> None:
        self._leave((value << 1 | 1) & 0xFF)

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(region, length) for _, region, length in self._ports()] + [(_Bytes(self.memory), MEMORY_SIZE)]

    def _ports(self) -> list[tuple[int, IoRegion, int]]:
        latch = _Bytes(self.latch)
        return [
            (LATCH_PORT, latch, 4),
            (FLUSH_PORT, _WriteOnly(lambda offset, size, value: None), 4),
            (LATCH_BYTES_PORT, latch, 4),
            (EXIT_PORT, _WriteOnly(self._exit), 4),
            (LINES_PORT, _WriteOnly(self._set_line), len(self._lines)),
        ]

    def attach(self, bus: Bus) -> None:
        for port, region, length in self._ports():
            bus.add_ports(port, length, region, self.name)
        bus.add_mmio(MEMORY_BASE, MEMORY_SIZE, _Bytes(self.memory), self.name)


class _Bytes:
    """Plain memory, in one piece or another."""

    def __init__(self, data: bytearray) -> None:
        self._data = data

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        size = min(size, len(self._data) - offset)  # an access may begin at the last byte
        self._data[offset : offset + size] = value.to_bytes(8, "little")[:size]


class _WriteOnly:
    def __init__(self, write: Callable[[int, int, int], None]) -> None:
        self.write = write

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1
