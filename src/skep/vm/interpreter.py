"""How CPython is set while guests run."""

from __future__ import annotations

import gc
import sys
import threading


class Interpreter:
    """A count of those who want it so, because VMs of one process share it."""

    SWITCH_INTERVAL = 0.0005
    """Seconds after which a thread that wants the interpreter gets it. The default of 5 ms delays every interrupt that
    a timer's thread brings while a processor's thread is busy in Python."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._before = (True, 0.005)

    def enter(self) -> None:
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._before = (gc.isenabled(), sys.getswitchinterval())
                gc.freeze()
                gc.disable()
                sys.setswitchinterval(self.SWITCH_INTERVAL)

    def leave(self) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0:
                collected, interval = self._before
                gc.unfreeze()
                if collected:
                    gc.enable()
                sys.setswitchinterval(interval)


INTERPRETER = Interpreter()
