"""A small epoll loop on a thread of its own, for everything that waits on a file descriptor.

Not asyncio: importing that costs every VM's start 80 ms, and nothing here needs more than this.
"""

from __future__ import annotations

import heapq
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from skep import bells
from skep.errors import InternalError

_MOST_EVENTS = 64
_READABLE = select.EPOLLIN
_WRITABLE = select.EPOLLOUT

Callback = Callable[[], None]


class Loop:
    """Calls back, on its thread and one at a time, for descriptors that are ready and for what other threads ask.

    Callbacks must not block. An exception in one is ours, and ends the loop: it goes to ``failed``, which may be
    called from the loop's thread only.
    """

    def __init__(self, name: str, failed: Callable[[BaseException], None] | None = None) -> None:
        self._failed = failed
        self._epoll = select.epoll()
        self._wake = bells.hang()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._callbacks: dict[int, tuple[Callback | None, Callback | None]] = {}
        self._calls: deque[Callback] = deque()
        self._later: list[tuple[float, int, Callback]] = []
        self._serial = 0
        self._closing = False
        self._closed = False
        self._guard = threading.RLock()
        """Of the eventfd and the epoll against close(). Signal handlers call, too, amid their own thread's calls."""
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def watch(self, fd: int, readable: Callback | None = None, writable: Callback | None = None) -> None:
        """Call ``readable`` whenever there is something to read from ``fd``, ``writable`` whenever it takes something;
        either also when it is hung up. In place of what was asked for ``fd`` before; with neither, no call for it
        starts any more, which is to be said before the descriptor is closed.

        Raises PermissionError for what epoll does not take: regular files and the like, which are always ready.
        """
        events = (_READABLE if readable else 0) | (_WRITABLE if writable else 0)
        with self._guard:
            before = self._callbacks.get(fd)
            if self._closed:
                if events:
                    raise InternalError("the loop is closed")
            elif not events:
                if before is not None:
                    self._epoll.unregister(fd)
            elif before is None:
                self._epoll.register(fd, events)
            else:
                self._epoll.modify(fd, events)
            if events:
                self._callbacks[fd] = (readable, writable)
            else:
                self._callbacks.pop(fd, None)

    def call(self, callback: Callback) -> None:
        """Call ``callback`` once, soon. After ``close`` it is dropped."""
        self._calls.append(callback)
        with self._guard:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def call_later(self, delay: float, callback: Callback) -> None:
        """Call ``callback`` once, ``delay`` seconds from now or a little later. After ``close`` it is dropped."""
        with self._guard:
            if self._closed:
                return
            self._serial += 1
            heapq.heappush(self._later, (time.monotonic() + delay, self._serial, callback))
            if self._later[0][1] == self._serial:
                os.eventfd_write(self._wake, 1)

    def run(self, callback: Callback) -> None:
        """Have ``callback`` called on the loop's thread and wait for it; where that has ended, call it here."""
        done = threading.Event()

        def call() -> None:
            try:
                callback()
            finally:
                done.set()

        self.call(call)
        while not done.wait(0.2):
            if not self._thread.is_alive():
                if not done.is_set():
                    callback()
                return

    def close(self) -> None:
        """End the thread; what was asked by ``call`` until now is done first. Not from a callback."""
        if threading.current_thread() is self._thread:
            raise InternalError("a loop cannot wait for its own end")
        self._closing = True
        with self._guard:
            if self._closed:
                return
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        with self._guard:
            self._closed = True
            self._epoll.close()
            os.close(self._wake)
            self._callbacks.clear()
            self._calls.clear()
            self._later.clear()

    def _main(self) -> None:
        try:
            while not self._closing:
                self._turn()
            self._run_calls()
        except BaseException as error:
            if self._failed is None:
                raise
            self._failed(error)

    def _turn(self) -> None:
        for fd, events in self._epoll.poll(self._pause(), _MOST_EVENTS):
            if fd == self._wake:
                os.eventfd_read(self._wake)
                self._run_calls()
                continue
            # Looked up for each: a callback may have changed what is asked for the other, or for others.
            if events & ~_WRITABLE and (readable := self._callbacks.get(fd, (None, None))[0]) is not None:
                readable()
            if events & ~_READABLE and (writable := self._callbacks.get(fd, (None, None))[1]) is not None:
                writable()
        while (due := self._take_due()) is not None:
            due()

    def _pause(self) -> float | None:
        with self._guard:
            return max(0.0, self._later[0][0] - time.monotonic()) if self._later else None

    def _take_due(self) -> Callback | None:
        with self._guard:
            if self._later and self._later[0][0] <= time.monotonic():
                return heapq.heappop(self._later)[2]
            return None

    def _run_calls(self) -> None:
        # Only those that were there: one that asks again waits for the next turn, and descriptors get theirs.
        for _ in range(len(self._calls)):
            self._calls.popleft()()
