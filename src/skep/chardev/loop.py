"""A small epoll loop on a thread of its own: one for each VM, for everything that waits on a file descriptor.

Not asyncio: importing that costs every VM's start 80 ms, and nothing here needs more than this.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

from skep.errors import InternalError

_MOST_EVENTS = 64


class Loop:
    """Calls back, on its thread and one at a time, for descriptors that are ready and for what other threads ask.

    Callbacks must not block. An exception in one is ours, and ends the loop: it goes to ``failed``, which may be
    called from the loop's thread only.
    """

    def __init__(self, name: str, failed: Callable[[BaseException], None] | None = None) -> None:
        self._failed = failed
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._closing = False
        self._closed = False
        self._guard = threading.Lock()  # of the eventfd and the epoll against close()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def add(self, fd: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``fd`` is readable or hung up, until ``remove``.

        Raises PermissionError for what epoll does not take: regular files and the like, which are always ready.
        """
        with self._guard:
            if self._closed:
                raise InternalError("the loop is closed")
            self._callbacks[fd] = callback
            try:
                self._epoll.register(fd, select.EPOLLIN)
            except BaseException:
                del self._callbacks[fd]
                raise

    def remove(self, fd: int) -> None:
        """No call for ``fd`` starts any more. To be said before the descriptor is closed."""
        with self._guard:
            if self._callbacks.pop(fd, None) is not None and not self._closed:
                self._epoll.unregister(fd)

    def call(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, soon. After ``close`` it is dropped."""
        self._calls.append(callback)
        with self._guard:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

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
        for fd, _ in self._epoll.poll(maxevents=_MOST_EVENTS):
            if fd == self._wake:
                os.eventfd_read(self._wake)
                self._run_calls()
                continue
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()

    def _run_calls(self) -> None:
        # Only those that were there: one that asks again waits for the next turn, and descriptors get theirs.
        for _ in range(len(self._calls)):
            self._calls.popleft()()
