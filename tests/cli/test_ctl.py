"""``skep ctl`` and ``skep list`` against ``skep run``, each a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from skep.control.directory import Claim
from tests.cli.test_run import ENVIRONMENT, Run
from tests.engine.engines import KVM_ON_HARDWARE, need
from tests.on_terminal import OnTerminal
from tests.tiny_kernel import tiny_kernel

WAIT = 60.0


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "skep"


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernel") / "bzImage"
    path.write_bytes(tiny_kernel())
    return path


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """The translator, or that of UNDER_EACH."""
    engine: str = getattr(request, "param", "translate")
    need(engine)
    return engine


UNDER_EACH = pytest.mark.parametrize("engine", ["translate", "kvm", KVM_ON_HARDWARE], indirect=True)
"""For what engines have a part in."""


@pytest.fixture
def run(engine: str, kernel: Path) -> Iterator[Callable[..., Run]]:
    with ExitStack() as started:

        def start(*arguments: str) -> Run:
            vm = started.enter_context(Run("--kernel", str(kernel), "--engine", engine, *arguments))
            vm.expect(b"B")
            return vm

        yield start


Start = Callable[..., Run]


def skep(*arguments: str, status: int = 0) -> str:
    """What it prints; where ``status`` is 2, its one line."""
    done = subprocess.run(
        [sys.executable, "-m", "skep.cli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        env={**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]},
    )
    assert done.returncode == status, done
    if status == 2:
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
        return done.stderr.removeprefix("skep: ").strip()
    assert done.stderr == ""
    return done.stdout


def state(name: str = "web") -> str:
    return str(json.loads(skep("ctl", name, "status", "--json"))["state"])


@UNDER_EACH
def test_a_vms_life_from_outside(run: Start, engine: str) -> None:
    vm = run("web", "--console", "com2=pty")
    rows = [line.split() for line in skep("list").splitlines()]
    assert rows[0] == ["NAME", "STATE", "PID", "ENGINE", "CPUS", "MEMORY", "GUEST", "TIME"]
    assert rows[1][:6] == ["web", "running", str(vm.process.pid), engine, "1", "16M"]
    lines = skep("ctl", "web", "status").splitlines()
    assert lines[0] == f"web: running, process {vm.process.pid}"
    assert re.fullmatch(r"com2: pty:/dev/pts/\d+, nobody there", lines[-1])
    assert skep("ctl", "web", "freeze") == "frozen\n"
    assert skep("ctl", "web", "freeze") == "frozen\n"
    vm.send(b"a")
    frozen = skep("ctl", "web", "registers"), json.loads(skep("list", "--json"))[0]["guest_seconds"]
    time.sleep(0.2)
    assert (skep("ctl", "web", "registers"), json.loads(skep("list", "--json"))[0]["guest_seconds"]) == frozen
    assert frozen[0].startswith("processor 0: frozen\n  rip=00000000001002")
    assert vm.output == b"B"
    assert skep("ctl", "web", "thaw") == "running\n"
    vm.expect(b"Ba")
    assert skep("ctl", "web", "reset") == "running\n"
    vm.expect(b"BaB")
    vm.send(b"p")
    skep("ctl", "web", "power")
    status, output, errors = vm.end()
    assert (status, output, errors.count("\n")) == (0, b"BaB", 1)  # the pseudo-terminal's name
    assert skep("list").count("\n") == 1


def test_stop_returns_when_it_is_over(run: Start, directory: Path) -> None:
    vm = run("web")
    vm.send(b"s")
    assert skep("ctl", "web", "stop") == "ended\n"
    assert vm.process.wait(WAIT) == 0
    assert list(directory.iterdir()) == []


@UNDER_EACH
def test_an_nmi_arrives(run: Start) -> None:
    vm = run("web")
    skep("ctl", "web", "nmi")  # which this kernel has no table for
    status, _, errors = vm.end()
    assert status == 3 and "triple fault" in errors


@UNDER_EACH
def test_threads_are_named_and_say_where_they_are(run: Start) -> None:
    run("web")
    text = skep("ctl", "web", "threads")
    for name in ("MainThread", "skep-web", "skep-web-cpu0", "skep-web-control", "skep-web-loop", "skep-clock"):
        assert re.search(rf"^{name} \(\d+, [RSD]\)", text, re.MULTILINE), text
    assert re.search(r"^  \S+/vm/lifecycle\.py:\d+ wait: ", text, re.MULTILINE)


@UNDER_EACH
def test_what_a_guest_does_is_explained(run: Start) -> None:
    vm = run("web")
    vm.send(b"as")
    vm.expect(b"Ba")
    skep("ctl", "web", "explain")  # it may still be on its way
    report = skep("ctl", "web", "explain").splitlines()
    assert report[0] == "the guest, as it is now"
    assert any(line.startswith("  cpu0 spins at 0x100") for line in report), report
    assert "  code: jmp 0x100" in "\n".join(report)
    told = json.loads(skep("ctl", "web", "explain", "--json"))
    assert (told["summary"], told["findings"], told["log"]) == (report[0], [], [])
    skep("ctl", "web", "freeze")
    assert "spins" not in skep("ctl", "web", "explain"), "who is frozen does nothing"
    assert state() == "frozen"


def test_the_second_of_a_name_is_refused(run: Start, kernel: Path) -> None:
    vm = run("web")
    line = skep("run", "web", "--kernel", str(kernel), "--memory", "16M", status=2)
    assert line == f"web: a VM of that name is running (process {vm.process.pid}); give this one another name"
    vm.process.kill()
    vm.process.wait(WAIT)
    again = run("web")
    assert again.end(b"q")[0] == 0


def test_those_without_a_name_are_numbered(run: Start) -> None:
    vms = [run() for _ in range(3)]
    assert [one["name"] for one in json.loads(skep("list", "--json"))] == ["guest", "guest-2", "guest-3"]
    skep("ctl", "guest-2", "stop")
    assert vms[1].process.wait(WAIT) == 0
    assert [line.split()[0] for line in skep("list").splitlines()] == ["NAME", "guest", "guest-3"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_the_killed_leave_no_ghost(run: Start, directory: Path, number: signal.Signals) -> None:
    vm = run("web")
    vm.process.send_signal(number)
    assert vm.process.wait(WAIT) == -number
    assert {path.name for path in directory.iterdir()} == {"web.lock", "web.sock"}
    assert skep("ctl", "web", "status", status=2).startswith("web: no VM of that name is running")
    assert skep("list") == "NAME  STATE  PID  ENGINE  CPUS  MEMORY  GUEST TIME\n"
    assert list(directory.iterdir()) == []


def test_one_that_does_not_answer_is_listed_all_the_same(run: Start) -> None:
    vm = run("web")
    vm.process.send_signal(signal.SIGSTOP)
    try:
        assert skep("list").splitlines()[1] == "web   does not answer within 5 seconds"
    finally:
        vm.process.send_signal(signal.SIGCONT)
    assert state() == "running"


def test_one_that_is_just_starting(directory: Path) -> None:
    with Claim("web"):
        assert skep("list").splitlines()[1] == "web   does not answer: it is just starting, or ending"
        assert skep("ctl", "web", "status", status=2) == "web: does not answer: it is just starting, or ending"


def test_without_a_control_socket(run: Start, directory: Path) -> None:
    run("web", "-o", "control=false")
    assert not directory.exists()
    assert skep("list").count("\n") == 1


def test_a_host_without_a_place_for_the_socket(run: Start, directory: Path) -> None:
    directory.touch()
    vm = run("web")
    assert vm.end(b"q") == (
        0, b"B", f"skep: no control socket: {directory}: not a directory of this user's alone; remove it, or set"
        " XDG_RUNTIME_DIR\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ctl", "the following arguments are required: NAME, ACTION"),
        ("ctl web", "the following arguments are required: ACTION"),
        ("ctl web fly", "argument ACTION: invalid choice: 'fly'"),
        ("ctl web dump", "the following arguments are required: FILE"),
        ("ctl web registers --cpu x", "argument --cpu: invalid int value: 'x'"),
        ("ctl web status", "web: no VM of that name is running; `skep list` shows those that are"),
        ("ctl ../web status", "../web: no VM of that name is running"),
        ("run ../web", "name: '../web' is not 1 to 64 of A-Z a-z 0-9 . _ + -, a letter or digit first"),
    ],
)
def test_mistakes(arguments: str, message: str) -> None:
    assert skep(*arguments.split(), status=2).startswith(message)


# The core


def gdb(core: Path, *commands: str) -> str:
    if shutil.which("gdb") is None:
        pytest.skip("no gdb")
    words = [word for command in commands for word in ("-ex", command)]
    words = ["gdb", "-batch", "-nx", *words, "-c", str(core)]
    return subprocess.run(words, capture_output=True, text=True, timeout=WAIT, check=False).stdout


@pytest.mark.parametrize("engine", ["translate", "kvm"], indirect=True)  # L1 has no GDB
def test_gdb_reads_a_dump(run: Start, tmp_path: Path) -> None:
    vm = run("web", "--memory", "64M")
    core = tmp_path / "core"
    registers = json.loads(skep("ctl", "web", "registers", "--json"))["processors"][0]["registers"]
    assert skep("ctl", "web", "dump", str(core)) == f"{core}: 64 MiB\n"
    assert state() == "running"
    assert core.stat().st_mode & 0o777 == 0o600
    assert core.stat().st_size > 64 << 20 > 16 * 512 * core.stat().st_blocks, "the file is sparse"
    assert [path.name for path in tmp_path.iterdir() if "core" in path.name] == ["core"]
    text = gdb(core, "info threads", "p/x $cs", "p/x $rsp", "x/2i 0x100200", "x/s 0x100000000")
    assert "LWP 1" in text
    assert f"$1 = {registers['cs']['selector']}" in text
    assert f"$2 = {registers['rsp']}" in text
    assert "mov    $0x3fc,%dx" in text and "mov    $0xb,%al" in text
    assert vm.end(b"q")[0] == 0


def test_a_dump_of_a_frozen_vm_leaves_it_frozen(run: Start, tmp_path: Path) -> None:
    run("web")
    skep("ctl", "web", "freeze")
    (tmp_path / "core").write_text("older")
    skep("ctl", "web", "dump", str(tmp_path / "core"))
    assert state() == "frozen"
    assert (tmp_path / "core").read_bytes()[:4] == b"\x7fELF"


def test_a_dump_that_fails_leaves_no_file(run: Start, tmp_path: Path) -> None:
    vm = run("web")
    (tmp_path / "core").mkdir()
    line = skep("ctl", "web", "dump", str(tmp_path / "core"), status=2)
    assert line == f"{tmp_path}/core: exists, and is no file"
    subprocess.run(["prlimit", f"--pid={vm.process.pid}", "--fsize=1048576"], check=True)
    line = skep("ctl", "web", "dump", str(tmp_path / "other"), status=2)
    assert line == f"{tmp_path}/other: file too large"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core", "skep"]
    assert state() == "running"


# The monitor


def on_terminal(kernel: Path, *arguments: str) -> OnTerminal:
    words = ("run", "web", "-m", "16M", "--kernel", str(kernel), "--engine", "translate", *arguments)
    return OnTerminal("-m", "skep.cli", *words)


def test_the_monitor(kernel: Path, tmp_path: Path) -> None:
    with on_terminal(kernel) as terminal:
        terminal.read_until(b"B", WAIT)
        terminal.type(b"\x01c")
        terminal.read_until(b"the monitor of web, which is running; `help` helps, Ctrl-A c goes back\r\nskep> ")
        terminal.type(b"statsu\x7f\x7fus\r")  # erased
        assert b"statsu\b \b\b \bus\r\n" in terminal.read_until(b"com1: stdio\r\nskep> ")
        terminal.type(b"freeze\rthaw\rregisters 0\rnonsense\rregisters x\rregisters 0 1\r")  # typed ahead
        said = terminal.read_until(b"do with '1'\r\nskep> ")
        assert b"\r\nfrozen\r\n" in said and b"\r\nrunning\r\n" in said and b"rip=00000000001002" in said
        assert b"no such action: 'nonsense'\r\n" in said and b"'x' is not what cpu may be\r\n" in said
        terminal.type(b"threads\r")
        assert b"skep-web-cpu0 (" in terminal.read_until(b"\r\nskep> ", WAIT)
        terminal.type(f"dump {tmp_path}/core\r".encode())
        terminal.read_until(b"core: 16 MiB\r\nskep> ")
        terminal.type(b"help\r")
        said = terminal.read_until(b"this\r\nskep> ")
        for word in b"status freeze thaw reset power nmi registers threads quit dump console".split():
            assert word in said
        terminal.type(b"\x01ca")
        terminal.read_until(b"back at the guest's console\r\na")
        terminal.type(b"\x01creset\r")
        terminal.read_until(b"skep> reset\r\nrunning\r\nskep> ")
        terminal.type(b"\x04")
        terminal.read_until(b"console\r\nB")
        terminal.type(b"\x01cquit\r")
        assert terminal.process.wait(WAIT) == 0
        assert terminal.mode() == terminal.before


def test_the_guests_output_waits_while_the_monitor_is_there(kernel: Path) -> None:
    with on_terminal(kernel) as terminal:
        terminal.read_until(b"B", WAIT)
        terminal.type(b"\x01creset\r")
        terminal.read_until(b"skep> reset\r\nrunning\r\nskep> ", WAIT)
        time.sleep(1)
        terminal.type(b"\x01c")
        assert terminal.read_until(b"B") == b"\r\nback at the guest's console\r\nB"
        terminal.type(b"\x01c\x01x")
        assert terminal.process.wait(WAIT) == 0
        assert terminal.mode() == terminal.before
