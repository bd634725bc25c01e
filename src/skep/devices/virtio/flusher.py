"""The thread that waits for a disk's flushes, so that reads need not.

One fdatasync serves every request that waits when it begins: each was submitted after the writes that it covers had
completed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from skep.devices.virtio.queue import Chain


class Flusher:
    """``flush`` makes durable, and raises OSError where the host cannot; ``flushed(requests, error)`` is told, on
    this thread, of all that were waiting."""

    def __init__(
        self, name: str, flush: Callable[[], None], flushed: Callable[[list[Chain], Exception | None], None]
    ) -> None:
        self._name = name
        self._flush = flush
        self._flushed = flushed
        self._waiting: SimpleQueue[Chain | None] = SimpleQueue()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, request: Chain) -> None:
        """From any thread."""
        self._waiting.put(request)
        if self._thread is None:
            with self._guard:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    self._thread.start()

    def close(self) -> None:
        """No request is waiting, none follows. Closing twice is closing once."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._waiting.put(None)
            thread.join()

    def _run(self) -> None:
        while (request := self._waiting.get()) is not None:
            requests = [request]
            while not self._waiting.empty():  # nobody else takes
                more = self._waiting.get()
                if more is not None:
                    requests.append(more)
            error: Exception | None = None
            try:
                self._flush()
            except Exception as e:
                error = e
            self._flushed(requests, error)
