"""``skep top`` with VMs that run, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from skep.control.top import Top
from tests.boot.bzimage import write_guest
from tests.cli.test_ctl import skep
from tests.cli.test_run import WAIT, Run
from tests.engine.engines import ALONE_ON_HARDWARE, ON_HARDWARE, need
from tests.on_terminal import OnTerminal

GUEST = """
        mov rsp, 0x80000
        mov edi, [rsi + 0x228]          ; cmd_line_ptr
        mov al, 'B'
        mov dx, 0x3f8
        out dx, al
        cmp byte [rdi], 'p'
        je polls
        cmp byte [rdi], 'h'
        je halts
spins:  jmp spins
polls:  in al, 0x40                     ; the PIT's counter, which nobody knows beforehand
        jmp polls
halts:  sti
        hlt
        jmp halts
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "vmlinuz"
    write_guest(path, GUEST)
    return path


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "skep"


@pytest.fixture(params=["translate", "kvm", "kvm alone", ON_HARDWARE, ALONE_ON_HARDWARE])
def run(kernel: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Run]]:
    engine, *how = request.param.split()
    need(engine)
    with ExitStack() as started:

        def start(name: str, command: str, *arguments: str) -> Run:
            choice = ["--engine", engine, "-o", f"kvm.irqchip={'off' if 'alone' in how else 'split'}"]
            guest = ["--memory", "64M", "--kernel", str(kernel), "--cmdline", command]
            vm = started.enter_context(Run(name, *guest, *choice, *arguments))
            vm.expect(b"B")
            return vm

        yield start


Start = Callable[..., Run]
ONCE = pytest.mark.parametrize("run", ["translate"], indirect=True)
"""For what has nothing to do with engines."""


def rows(*arguments: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads(skep("top", "-n", "1", "-d", "0.5", "--json", *arguments))
    return told


def test_two_that_run(run: Start) -> None:
    """One spins, one polls its serial port, and has a processor that was never started."""
    one, two = run("spins", "s"), run("polls", "p", "--cpus", "2")
    found = {(row["vm"], row["cpu"]): row for row in rows()}
    assert found.keys() == {("spins", 0), ("polls", 0), ("polls", 1)}
    spins, polls, waits = found["spins", 0], found["polls", 0], found["polls", 1]
    assert (spins["pid"], polls["pid"]) == (one.process.pid, two.process.pid)
    assert spins["state"] in ("guest", "blocked") and waits["state"] == "waiting"
    assert spins["host_cpu"] in range(os.cpu_count() or 1)
    assert spins["busy"] > 0 and 0.2 < spins["busy"] + spins["steal"] <= 1
    assert polls["causes"]["ports"] > 100 and polls["exits"] >= polls["causes"]["ports"]
    assert spins["causes"].get("ports", 0) == 0 and waits["exits"] == 0
    assert waits["busy"] < 0.01  # its thread may still have been on its way to sleep
    assert waits["engine"] == polls["engine"]


def test_frozen_and_halted_ones(run: Start) -> None:
    run("frozen", "s")
    run("halted", "h")
    assert skep("ctl", "frozen", "freeze") == "frozen\n"
    deadline = time.monotonic() + WAIT
    while (states := {row["vm"]: row["state"] for row in rows()}) != {"frozen": "frozen", "halted": "halted"}:
        assert time.monotonic() < deadline, states


@ONCE
def test_who_is_on_a_cpu(run: Start) -> None:
    """A guest that spins is bound to one."""
    vm = run("spins", "s")
    cpu = min(os.sched_getaffinity(0))
    (thread,) = {row["tid"] for row in rows()}
    os.sched_setaffinity(thread, {cpu})
    deadline = time.monotonic() + WAIT
    while not (found := rows("--cpu", str(cpu))):  # it may have been between two stays there
        assert time.monotonic() < deadline
    assert [(row["vm"], row["pid"], row["host_cpu"]) for row in found] == [("spins", vm.process.pid, cpu)]
    assert rows("--cpu", str(os.cpu_count())) == []


@ONCE
def test_lines(run: Start) -> None:
    run("polls", "p")
    head, line = skep("top", "-n", "1", "-d", "0.5").splitlines()
    assert head.split() == ["VM", "VCPU", "STATE", "HOST", "CPU", "BUSY", "STEAL", "EXITS/S", "FOR"]
    assert line.split()[:2] == ["polls", "0"] and " ports " in line
    assert "ports" in skep("ctl", "polls", "exits")


@ONCE
def test_a_vm_that_stands_still_is_said_to(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skep.control.client._PATIENCE", 0.2)
    monkeypatch.setattr("skep.control.top._PATIENCE", 0.2)
    vm = run("stopped", "s")
    vm.process.send_signal(signal.SIGSTOP)
    try:
        looks = Top()
        assert looks.look() == []
        assert "does not answer" in looks.errors["stopped"]
    finally:
        vm.process.send_signal(signal.SIGCONT)


def test_nobody() -> None:
    assert rows() == []
    assert skep("top").startswith("VM ")
    assert "no time" in skep("top", "-d", "0", status=2)


@ONCE
def test_on_a_terminal_until_control_c(run: Start) -> None:
    run("polls", "p")
    with OnTerminal("-m", "skep.cli", "top", "-d", "0.1") as top:
        for _ in range(3):
            top.read_until(b"\x1b[H\x1b[JVM ")
            top.read_until(b"polls", WAIT)
        top.type(b"\x03")
        assert top.process.wait(WAIT) == 0
