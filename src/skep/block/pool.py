"""A few threads for the requests of one device that have to wait for the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]


class Pool:
    """Threads come as they are needed, up to ``most``, and stay. A job raises nothing."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._guard = threading.Lock()

    def submit(self, job: Job) -> None:
        """From one thread at a time."""
        self._jobs.put(job)
        if self._jobs.qsize() > self._idle and len(self._threads) < self._most:
            name = f"{self._name} {len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """What was submitted is done first; nothing follows. Closing twice is closing once."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._guard:
                self._idle += 1
            job = self._jobs.get()
            with self._guard:
                self._idle -= 1
            if job is None:
                return
            job()
