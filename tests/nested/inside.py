"""The pytest plugin of L1: it says on the second serial port what happens, a JSON object a line."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

PORT = os.environ.get("SKEP_REPORTS", "/dev/ttyS1")
LONGEST = 20_000
"""Characters of a report's sections; a serial port is slow."""


class Teller:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._port = open(PORT, "w", encoding="ascii")  # noqa: SIM115

    def _tell(self, what: str, content: Any) -> None:
        print(json.dumps({what: content}), file=self._port, flush=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tell("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        report.sections = [(name, text[-LONGEST:]) for name, text in report.sections]
        self._tell("report", self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._tell("finish", nodeid)

    def pytest_unconfigure(self) -> None:
        self._port.close()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Teller(config))
