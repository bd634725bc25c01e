"""Tests marked ``hardware`` need hardware virtualization. Where this host has it they run as all others do; where it
has none they run in the nested laboratory, all of a session in one L1, and their reports come out here as if they had
run here. pytest's options for what is to be run, stopped at and shown are the usual ones.

An L1 that falls silent is ended, and what it left to do is given to a second one, once. Where what it is made of
cannot be had, its tests are skipped.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest

from skep.errors import UserError
from skep.machine.amd64 import why_not_kvm
from tests.nested.laboratory import Machine, Payload, Silent, missing

MARKER = "hardware"
PATIENCE = 600.0
"""Seconds for a test in an L1 that lives: longer than any takes there on a busy host."""
ATTEMPTS = 2

_COMMAND = """
python3 -u -m pytest -p tests.nested.inside -p no:cacheprovider --nested=never -q --tb=long {options} @/mnt/tests \
    < /dev/null > /dev/console 2>&1
echo "{{\\"end\\": $?}}" > /dev/ttyS1
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nested",
        choices=("auto", "always", "never"),
        default="auto",
        help="where tests that need hardware virtualization run: in the nested laboratory where this host has none"
        " (auto), there in any case, or here, which skips them where it has none (never)",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those for the laboratory come last, so that nothing else shares the host with it."""
    where = config.getoption("--nested")
    here = why_not_kvm()
    apart = [item for item in items if item.get_closest_marker(MARKER)]
    if not apart or config.option.collectonly or (where != "always" and here is None):
        return
    lacking = here if where == "never" else missing()
    if lacking is not None:
        for item in apart:
            item.add_marker(pytest.mark.skip(reason=lacking))
        return
    items[:] = [*(item for item in items if item not in set(apart)), *apart]
    config.pluginmanager.register(Nested(config, [item.nodeid for item in apart]))


class Ended(Silent):
    """Pytest in L1 ended with tests left: it would do so again."""


class Nested:
    """The laboratory of one session: started for the first test that needs it, ended behind the session."""

    def __init__(self, config: pytest.Config, tests: list[str]) -> None:
        self._config = config
        self._left = tests
        """Node ids of tests that are not finished, in their order."""
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._payload: Payload | None = None
        self._machine: Machine | None = None
        self._attempts = 0
        self._lacking: str | None = None
        """What L1 would be made of."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item.get_closest_marker(MARKER) is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        if self._machine is not None:
            self._machine.close()
            self._machine = None
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """What L1 says of one test, or why it says nothing."""
        reports: list[pytest.TestReport] = []
        while self._lacking is None:
            try:
                if self._machine is None:
                    self._start()
                    reports = []
                for said in self._said():
                    if "report" in said and said["report"]["nodeid"] == item.nodeid:
                        reports.append(self._report(said["report"]))
                    elif said.get("finish") == item.nodeid:
                        self._left.remove(item.nodeid)
                        return reports
            except UserError as error:
                self._lacking = f"no nested machine can be had: {error}"
            except Silent as error:
                console = self._machine.console() if self._machine is not None else ""
                if self._machine is not None:
                    self._machine.close()
                    self._machine = None
                if isinstance(error, Ended):
                    self._attempts = ATTEMPTS
                if self._attempts >= ATTEMPTS:
                    return [_failure(item, f"{error}\n\nL1's console:\n{console[-4000:]}")]
        return [_skipped(item, self._lacking)]

    def _report(self, data: dict[str, Any]) -> pytest.TestReport:
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        assert isinstance(report, pytest.TestReport)
        if isinstance(report.longrepr, list):  # why it was skipped: JSON knows no tuples
            report.longrepr = tuple(report.longrepr)
        return report

    def _start(self) -> None:
        if self._attempts >= ATTEMPTS:
            raise Silent("L1 failed too often")
        self._attempts += 1
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="skep-nested-")
            self._payload = Payload(Path(self._directory.name))
        assert self._payload is not None
        options = [f"-m {shlex.quote(MARKER)}"]
        image = self._payload.build(
            _COMMAND.format(options=" ".join(options)), [("tests", "".join(f"{one}\n" for one in self._left))]
        )
        self._machine = Machine(image, Path(self._directory.name) / f"console.{self._attempts}")

    def _said(self) -> Any:
        """The lines of L1, each an object, as long as it lives."""
        assert self._machine is not None
        while True:
            line = self._machine.line(PATIENCE)
            try:
                said = json.loads(line)
            except ValueError:  # QEMU's, or the BIOS's
                continue
            if "end" in said:
                raise Ended(f"pytest in L1 ended with status {said['end']}")
            yield said


def _skipped(item: pytest.Item, why: str) -> pytest.TestReport:
    file, line, _ = item.location
    return pytest.TestReport(item.nodeid, item.location, {}, "skipped", (file, line or 0, why), "setup")


def _failure(item: pytest.Item, text: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
