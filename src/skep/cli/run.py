"""``skep run``: one VM in the foreground of this terminal."""

from __future__ import annotations

import queue
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from skep.config import Tree, check_settings

EXIT_ENDED = 0
EXIT_TRIPLE_FAULT = 3


def run(tree: Tree, verbose: bool) -> int:
    """Run the VM of ``tree`` to its end, or print the tree where it asks for that; returns the exit status."""
    settings = check_settings(tree.freeze())
    if settings.config_dump:
        sys.stdout.write(tree.dump())
        return EXIT_ENDED
    raise NotImplementedError


class Signals:
    """What other processes and the kernel ask of us by signals, done on a thread of its own.

    A Python signal handler runs in the middle of whatever the main thread does, perhaps while it holds the very lock
    that the VM's methods need; so the handler only puts the request into a queue.
    """

    def __init__(self, press_power_button: Callable[[], None], stop: Callable[[], None]) -> None:
        self._press = press_power_button
        self._stop = stop
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._pressed = False
        self._thread = threading.Thread(target=self._main, name="signals", daemon=True)
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def __enter__(self) -> Signals:
        self._thread.start()
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._requests.put(None)
        self._thread.join()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requests.put(number)

    def _main(self) -> None:
        while (number := self._requests.get()) is not None:
            if number == signal.SIGTERM and not self._pressed:
                self._pressed = True
                self._press()
            else:
                self._stop()
