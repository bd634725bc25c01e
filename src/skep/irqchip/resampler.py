"""Level-triggered wires into an I/O APIC that the engine has, by eventfds: one asserts the wire until the guest ends
its interrupt; then the engine lets go of it, says so through the other, and whoever still wants it asserts it again.

A device that lets go before that costs nothing, and at worst the guest is interrupted once more for nothing. What the
engine asserts already is not asserted again: some kernels do it later, when the guest may have ended that interrupt.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from skep import bells

if TYPE_CHECKING:
    from skep.contracts.interrupts import EngineChips
    from skep.locks import Lock


class Resampler:
    """``wanted`` tells whether a wire is still to be asserted. All but ``close`` is called under ``lock``, the board's.
    A wire is bound, and the thread that sees to the ends of interrupts begins, when one is first used: most guests use
    messages instead, and to bind one takes the host's kernel some milliseconds."""

    def __init__(self, gsis: Iterable[int], wanted: Callable[[int], bool], lock: Lock) -> None:
        self._wanted = wanted
        self._lock = lock
        self._held: set[int] = set()
        """Wires that the engine asserts: we told it to, and of no end since."""
        self._raise = {gsi: bells.hang() for gsi in gsis}
        self._ended = {gsi: bells.hang() for gsi in self._raise}
        self._closing = bells.hang()
        self._engine: EngineChips | None = None
        self._bound: set[int] = set()
        self._thread: threading.Thread | None = None

    def adopt(self, engine: EngineChips) -> None:
        """The engine's wires are these from now on. Nothing of an earlier engine's is left on them."""
        for gsi in self._raise:
            for eventfd in (self._raise[gsi], self._ended[gsi]):
                bells.answer(eventfd)
        self._engine = engine
        self._bound.clear()
        self._held.clear()

    def hold(self, gsis: Iterable[int]) -> None:
        """The state of the engine's I/O APIC was set: these wires it asserts, or tells the end of their interrupts."""
        self._held = set(self._raise).intersection(gsis)
        for gsi in self._held:
            self._bind(gsi)

    def assert_line(self, gsi: int) -> None:
        if gsi in self._held and not bells.answer(self._ended[gsi]):
            return
        self._bind(gsi)
        self._held.add(gsi)
        bells.ring(self._raise[gsi], 1)

    def _bind(self, gsi: int) -> None:
        if gsi in self._bound or self._engine is None:
            return
        self._bound.add(gsi)
        self._engine.bind_line(gsi, self._raise[gsi], self._ended[gsi])
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="skep-lines", daemon=True)
            self._thread.start()

    def close(self) -> None:
        if self._thread is not None:
            bells.ring(self._closing, 1)
            self._thread.join()
            self._thread = None
        for eventfd in (*self._raise.values(), *self._ended.values(), self._closing):
            os.close(eventfd)
        self._raise.clear()
        self._ended.clear()

    def _main(self) -> None:
        of = {eventfd: gsi for gsi, eventfd in self._ended.items()}
        with select.epoll() as epoll:
            for eventfd in (*of, self._closing):
                epoll.register(eventfd, select.EPOLLIN)
            while True:
                for eventfd, _ in epoll.poll():
                    if eventfd == self._closing:
                        return
                    with self._lock:
                        self._end(of[eventfd])

    def _end(self, gsi: int) -> None:
        if bells.answer(self._ended[gsi]):
            self._held.discard(gsi)
            if self._wanted(gsi):
                self.assert_line(gsi)
