"""``--stats`` and ``--perf-map``: what the engine tells about itself, and to Linux perf."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from skep.engine.translate.layout import Kind
from skep.engine.translate.statistics import EXITS
from tests.cli.test_run import ENVIRONMENT, SKEP, WAIT
from tests.engine.engines import need
from tests.tiny_kernel import tiny_kernel


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(tiny_kernel())
    return [*SKEP, "run", "--memory", "16M", "--kernel", str(kernel), "--engine", "translate"]


def told(stderr: bytes) -> dict[str, float]:
    lines = (line.split(None, 1) for line in stderr.decode().splitlines())
    return {name: float(value.replace(",", "")) for value, name in lines}


def test_statistics_count_what_the_guest_did(command: list[str]) -> None:
    echoed = b"x" * 500
    done = subprocess.run(
        [*command, "--stats"], input=echoed + b"q", capture_output=True, check=True, timeout=WAIT, env=ENVIRONMENT
    )
    assert done.stdout == b"B" + echoed
    stats = told(done.stderr)
    assert 5 < stats["blocks translated"] < 100
    assert stats["instructions translated"] > stats["blocks translated"]
    assert stats["exits: no translation yet"] >= 5
    assert stats["exits: ports"] >= 2 * len(echoed)  # the byte in, the byte out
    assert stats["without an exit: reads of ports that were known"] >= len(echoed)  # LSR
    assert stats["seconds in guest code"] > 0
    assert stats["seconds in Python"] > stats["seconds translating"] > 0


@pytest.mark.parametrize("irqchip", ["split", "off", "whole"])
def test_under_kvm_they_are_exits_by_cause(command: list[str], irqchip: str) -> None:
    need("kvm")
    words = [*command[:-1], "kvm", "-o", f"kvm.irqchip={irqchip}", "--stats"]
    done = subprocess.run(words, input=b"x" * 50 + b"q", capture_output=True, check=True, timeout=WAIT, env=ENVIRONMENT)
    assert done.stdout == b"B" + b"x" * 50
    stats = told(done.stderr)
    assert stats["exits: ports"] >= 100  # the byte in, the byte out
    assert {"in the kernel: HLT", "in the kernel: pages mapped"} < stats.keys()


def test_every_kind_of_exit_has_a_name() -> None:
    assert set(EXITS) == {value for value in vars(Kind).values() if isinstance(value, int)}


def test_without_the_option_nothing_is_said(command: list[str]) -> None:
    done = subprocess.run(command, input=b"q", capture_output=True, check=True, timeout=WAIT, env=ENVIRONMENT)
    assert done.stderr == b""


def test_perf_knows_what_the_guests_code_is_called(command: list[str], tmp_path: Path) -> None:
    assert shutil.which("perf"), "Debian's package is linux-perf"
    data = str(tmp_path / "perf.data")
    echoed = b"x" * 20000
    record = ["perf", "record", "-q", "-e", "cpu-clock:u", "-F", "20000", "-o", data, "--"]
    whole = [*record, *command, "--perf-map"]
    subprocess.run(whole, input=echoed + b"q", capture_output=True, check=True, timeout=WAIT, env=ENVIRONMENT)
    report = ["perf", "script", "-i", data, "-F", "pid,ip,sym"]
    lines = subprocess.run(report, capture_output=True, check=True, text=True, timeout=WAIT).stdout.splitlines()
    names = {line.split()[-1] for line in lines}
    for pid in {line.split()[0] for line in lines}:
        (Path("/tmp") / f"perf-{pid}.map").unlink(missing_ok=True)
    assert any(name.startswith("kernel:10") for name in names), names  # the tiny kernel lies at 1 MiB
    assert "skep:exit_saved" in names or "skep:enter" in names


def test_a_link_in_place_of_the_map_is_not_followed(command: list[str], tmp_path: Path) -> None:
    """Anybody may make files in /tmp, before us."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    words = " ".join(f"'{word}'" for word in command)
    script = f"echo $$; ln -s {precious} /tmp/perf-$$.map; exec {words} --perf-map"
    done = subprocess.run(
        ["sh", "-c", script], check=False, input=b"q", capture_output=True, timeout=WAIT, env=ENVIRONMENT
    )
    link = Path(f"/tmp/perf-{int(done.stdout.split()[0])}.map")
    try:
        assert done.returncode == 2
        assert done.stderr.startswith(b"skep: ") and done.stderr.count(b"\n") == 1
        assert str(link) in done.stderr.decode()
        assert precious.read_text() == "kept"
    finally:
        os.unlink(link)
