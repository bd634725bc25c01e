"""Who listens to a guest's consoles, and notices that its kernel panicked, or that it says nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

from skep.chardev.transcript import Transcript
from skep.explain.subject import PANIC, Cause

FIRST_WORD = 60.0
"""Seconds after which a guest that never said anything is looked at, and spoken of if it is clear what is wrong."""
_GATHER = 0.25
_SETTLED = 0.5
"""Seconds without output after which a panic's own report is over."""
_LONGEST = 20
"""Such spells that it may take."""

Report = Callable[[Cause, float], None]
"""Called with the cause, and the seconds of silence."""


class Watch:
    """A thread that sleeps while the guest says nothing. ``silence``, in seconds, is reported; 0: no silence is."""

    def __init__(self, name: str, transcript: Transcript, silence: float, report: Report) -> None:
        self._transcript = transcript
        self._silence = silence
        self._report = report
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._transcript.news.set()
        self._thread.join()

    def _main(self) -> None:
        patience: float | None = self._silence or FIRST_WORD
        while not self._ended.is_set():
            self._transcript.listen()
            if not self._transcript.news.wait(patience):
                self._report(Cause.SILENT if self._silence else Cause.MUTE, patience or 0.0)
                patience = None
                continue
            patience = self._silence or None
            if not self._ended.wait(_GATHER) and PANIC in self._transcript.text():
                self._wait_until_quiet()
                self._report(Cause.PANIC, 0.0)

    def _wait_until_quiet(self) -> None:
        for _ in range(_LONGEST):
            self._transcript.listen()
            if self._ended.wait(_SETTLED) or not self._transcript.news.is_set():
                return
