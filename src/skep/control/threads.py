"""Where every thread of this process is, and which locks it holds or waits for: what to read when nothing moves."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path

from skep.control.actions import AllThreads, Frame, Thread
from skep.locks import holders


def look() -> AllThreads:
    """Takes no lock that a stuck thread could hold, and waits for nobody."""
    frames = sys._current_frames()
    locks = holders()
    found = []
    for thread in sorted(threading.enumerate(), key=lambda thread: thread.native_id or 0):
        frame = frames.get(thread.ident or 0)
        stack = [] if frame is None else traceback.extract_stack(frame)
        found.append(
            Thread(
                name=thread.name,
                tid=thread.native_id or 0,
                state=_state(thread.native_id),
                holds=[lock.lock for lock in locks if lock.holder == thread.ident],
                waits_for=[lock.lock for lock in locks if thread.ident in lock.waiting],
                stack=[Frame(one.filename, one.lineno or 0, one.name, one.line or "") for one in stack],
            )
        )
    return AllThreads(found)


def _state(tid: int | None) -> str:
    try:
        return Path(f"/proc/self/task/{tid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "?"  # it has just ended
