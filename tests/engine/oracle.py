"""The oracle is the host CPU: :class:`Oracle` sends cases to a worker process and reads what became of them."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from tests.engine.place import Batch, Outcome

ROOT = Path(__file__).resolve().parents[2]


class OracleError(Exception):
    """The worker died or hung: a case did what the generator must not let it do."""


class Oracle:
    """A context manager around one worker process (see :mod:`tests.engine.native`)."""

    def __init__(self, timeout: float = 10.0) -> None:
        self.timeout = timeout
        self._worker: subprocess.Popen[bytes] | None = None

    def run(self, batch: Batch) -> list[Outcome]:
        """Outcomes in the order of ``batch.cases``."""
        worker = self._worker or self._start()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            pickle.dump(batch, worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            worker.stdin.flush()
            if not select.select([worker.stdout], [], [], self.timeout)[0]:
                raise OracleError(f"the host did not finish {len(batch.cases)} cases in {self.timeout:g} s")
            outcomes: list[Outcome] = pickle.load(worker.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            status = worker.wait(5)
            self._worker = None
            raise OracleError(f"the native worker ended with status {status}") from error
        except OracleError:
            self.close()
            raise
        return outcomes

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.native"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment,
        )  # fmt: skip
        return self._worker

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
