"""What tests of the board's devices share: time that the test moves, and wires that remember."""

from __future__ import annotations

from skep.bus import Bus
from skep.clock import GuestClock
from skep.locks import Lock, Order


class Time:
    """A guest clock of one tick a nanosecond, which stands still between calls of :meth:`pass_ns`."""

    def __init__(self) -> None:
        self.lock = Lock("board", Order.BOARD)
        self.counter = 0
        self.clock = GuestClock(lambda: self.counter, 1_000_000_000, self.lock)

    @property
    def now(self) -> int:
        return self.clock.now_ns()

    def pass_ns(self, ns: int) -> None:
        """Time goes on, and every timer that is due by then has called back, each at its own time."""
        end = self.counter + ns
        while True:
            with self.lock:  # the clock's own thread may be faster, which makes no difference
                callback = self.clock._take_due()
                if callback is not None:
                    callback()
                    continue
                queue = self.clock._queue
                wait = queue[0][0] - self.clock.tsc() if queue else ns
                if self.counter + wait > end or not queue:
                    break
                self.counter += max(wait, 0)
        self.counter = end

    def close(self) -> None:
        self.clock.close()


class Wire:
    """An interrupt line with nothing at its end."""

    def __init__(self) -> None:
        self.level = False
        self.rises = 0

    def set(self, level: bool) -> None:
        self.rises += level and not self.level
        self.level = level


class Msis:
    """Where messages arrive, as (address, data)."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, int]] = []

    def signal(self, address: int, data: int) -> None:
        self.messages.append((address, data))


def new_bus() -> Bus:
    return Bus(Lock("board", Order.BOARD))
