"""Where guest accesses outside RAM go: ports and MMIO windows, found by address, under the board lock."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from skep.contracts.constantports import ConstantPorts
from skep.contracts.io import Doorbells, IoRegion, PostedWrites

_REMEMBERED = 64  # unknown addresses; a guest that scans all of them must not fill our memory


class Window(NamedTuple):
    start: int
    end: int
    region: IoRegion
    name: str
    """Whose it is, for diagnosis."""


def _name(region: IoRegion, given: str | None) -> str:
    name: str = getattr(region, "name", "") if given is None else given
    return name


class Bus:
    """The I/O space of one board (:class:`skep.contracts.io.IoSpace`).

    Every access holds ``lock``, the board's. What nobody answers reads all ones, and writes to it vanish, as on
    a PC's bus; ``unknown`` remembers a few such addresses for diagnosis. An access that is not inside one window is
    split into bytes, each routed by itself; how wide accesses inside a window are split is the device's own business.
    Windows do not overlap.
    """

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        self.lock = lock
        self.constants = ConstantPorts()
        self.unknown: dict[tuple[str, int], int] = {}
        """("port" or "mmio", address) -> accesses that nobody answered; at most 64 addresses."""
        self._ports: dict[int, Window] = {}
        self._mmio: list[Window] = []
        self._starts: list[int] = []
        self._doorbells: dict[int, int] = {}
        self._engine: Doorbells | None = None
        self._posted: dict[int, bool] = {}

    def close(self) -> None:
        """After the engine's VM."""
        self.constants.close()

    def add_ports(self, first: int, count: int, region: IoRegion, name: str | None = None) -> None:
        """``region`` answers ``count`` ports from ``first``; its ``name`` is its own, unless given.

        Raises ValueError where one is taken.
        """
        window = Window(first, first + count, region, _name(region, name))
        with self.lock:
            if count <= 0 or first < 0 or window.end > 0x10000 or any(p in self._ports for p in range(*window[:2])):
                raise ValueError(f"ports {first:#x}-{window.end - 1:#x} are not free")
            for port in range(first, window.end):
                self._ports[port] = window

    def remove_ports(self, first: int) -> None:
        """Take away the window that begins at ``first``."""
        with self.lock:
            window = self._ports[first]
            if window.start != first:
                raise KeyError(first)
            for port in range(first, window.end):
                self.constants.set(port, None)
                del self._ports[port]

    def add_mmio(self, gpa: int, size: int, region: IoRegion, name: str | None = None) -> None:
        """``region`` answers ``size`` bytes from ``gpa``; see :meth:`add_ports`."""
        window = Window(gpa, gpa + size, region, _name(region, name))
        with self.lock:
            at = bisect_right(self._starts, gpa)
            free = size > 0 and gpa >= 0
            free = free and (at == 0 or self._mmio[at - 1].end <= gpa)
            free = free and (at == len(self._mmio) or window.end <= self._mmio[at].start)
            if not free:
                raise ValueError(f"MMIO {gpa:#x}-{window.end - 1:#x} is not free")
            self._mmio.insert(at, window)
            self._starts.insert(at, gpa)

    def remove_mmio(self, gpa: int) -> None:
        """Take away the window that begins at ``gpa``."""
        with self.lock:
            at = bisect_right(self._starts, gpa) - 1
            if at < 0 or self._starts[at] != gpa:
                raise KeyError(gpa)
            del self._mmio[at], self._starts[at]

    # A doorbell lies in a window whose region does what the reader of the eventfd does: where the engine has none.

    def add_doorbell(self, gpa: int, fd: int) -> None:
        """A write at ``gpa`` may as well add 1 to the eventfd ``fd``."""
        with self.lock:
            self._doorbells[gpa] = fd
            if self._engine is not None:
                self._engine.add(gpa, fd)

    def remove_doorbell(self, gpa: int) -> None:
        """Before its window goes, and before ``fd`` is closed."""
        with self.lock:
            fd = self._doorbells.pop(gpa)
            if self._engine is not None:
                self._engine.remove(gpa, fd)

    def post_port(self, port: int, *, stream: bool = False) -> None:
        """Bytes written to this port may wait until the guest is next left for something else: its device only takes
        note of them. Those of a ``stream``, which somebody waits to see, wait for some milliseconds at most. Before the
        first engine's VM is adopted."""
        self._posted[port] = stream

    def adopt_posted(self, engine: PostedWrites | None) -> None:
        """An engine's VM was made that can keep writes back, or not (None)."""
        if engine is not None:
            for port, stream in self._posted.items():
                (engine.add_stream if stream else engine.add)(port)

    def adopt_doorbells(self, engine: Doorbells | None) -> None:
        """An engine's VM was made that has them, or is about to go (None)."""
        with self.lock:
            self._engine = engine
            if engine is not None:
                for gpa, fd in self._doorbells.items():
                    engine.add(gpa, fd)

    def owner(self, space: str, address: int) -> str | None:
        """Who answers at ``address`` of "port" or "mmio", for diagnosis; None: nobody."""
        with self.lock:
            if space == "port":
                window = self._ports.get(address)
            else:
                at = bisect_right(self._starts, address) - 1
                window = self._mmio[at] if at >= 0 and address < self._mmio[at].end else None
            return None if window is None else window.name

    def port_read(self, port: int, size: int) -> int:
        with self.lock:
            window = self._ports.get(port)
            if window is not None and port + size <= window.end:
                return window.region.read(port - window.start, size)
            if size > 1:
                return self._split_read(self.port_read, port, size)
            self._nobody("port", port)
            return 0xFF

    def port_write(self, port: int, size: int, value: int) -> None:
        with self.lock:
            window = self._ports.get(port)
            if window is not None and port + size <= window.end:
                window.region.write(port - window.start, size, value)
            elif size > 1:
                for i in range(size):
                    self.port_write(port + i, 1, value >> 8 * i & 0xFF)
            else:
                self._nobody("port", port)

    def mmio_read(self, gpa: int, size: int) -> int:
        with self.lock:
            at = bisect_right(self._starts, gpa) - 1
            if at >= 0:
                window = self._mmio[at]
                if gpa + size <= window.end:
                    return window.region.read(gpa - window.start, size)
            if size > 1:
                return self._split_read(self.mmio_read, gpa, size)
            self._nobody("mmio", gpa)
            return 0xFF

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        with self.lock:
            at = bisect_right(self._starts, gpa) - 1
            if at >= 0:
                window = self._mmio[at]
                if gpa + size <= window.end:
                    window.region.write(gpa - window.start, size, value)
                    return
            if size > 1:
                for i in range(size):
                    self.mmio_write(gpa + i, 1, value >> 8 * i & 0xFF)
            else:
                self._nobody("mmio", gpa)

    @staticmethod
    def _split_read(read: Callable[[int, int], int], address: int, size: int) -> int:
        return sum(read(address + i, 1) << 8 * i for i in range(size))

    def _nobody(self, space: str, address: int) -> None:
        key = (space, address)
        seen = self.unknown.get(key)
        if seen is not None:
            self.unknown[key] = seen + 1
        elif len(self.unknown) < _REMEMBERED:
            self.unknown[key] = 1
