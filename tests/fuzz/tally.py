"""What all runs of one fuzzer come to."""

from __future__ import annotations

import json
import time
from pathlib import Path


class Tally:
    """Kept in ``HOME/tally.json``, to which this process adds."""

    def __init__(self, home: Path) -> None:
        self._file = home / "tally.json"
        before = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.seconds: float = before.get("seconds", 0.0)
        self.executions: int = before.get("executions", 0)

    def save(self) -> None:
        seconds = round(self.seconds + time.process_time(), 1)
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({"executions": self.executions, "seconds": seconds}))
        new.replace(self._file)

    def __str__(self) -> str:
        return f"{self.executions} executions, {self.seconds / 60:.1f} minutes of CPU in all"
