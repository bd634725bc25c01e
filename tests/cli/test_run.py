"""``skep run`` from the outside: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from skep.control.client import Client
from skep.errors import UserError
from skep.machine.amd64 import why_not_kvm
from tests.engine.engines import KVM_ON_HARDWARE, need
from tests.on_terminal import OnTerminal
from tests.tiny_kernel import COMMANDS, tiny_kernel

SKEP = (sys.executable, "-m", "skep.cli")
_PATH = (str(Path("src").absolute()), *filter(None, (os.environ.get("PYTHONPATH"),)))
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(_PATH)}
WAIT = 60.0
"""Seconds; nothing here takes two on an idle machine."""


@pytest.fixture(params=["translate", "kvm"])
def engine(request: pytest.FixtureRequest) -> str:
    engine: str = request.param
    need(engine)
    return engine


ON_HARDWARE_TOO = pytest.mark.parametrize("engine", ["translate", "kvm", KVM_ON_HARDWARE], indirect=True)
"""For what a real KVM has a part in: a process is dear in the laboratory."""


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernel") / "bzImage"
    path.write_bytes(tiny_kernel())
    return path


class Started:
    """A process of a test's, which ends with it."""

    process: subprocess.Popen[Any]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=WAIT)


class Run(Started):
    """One ``skep run`` with pipes."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*SKEP, "run", "--memory", "16M", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]},
        )
        self.output = b""

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def expect(self, text: bytes) -> None:
        assert self.process.stdout is not None
        deadline = time.monotonic() + WAIT
        while not self.output.endswith(text):
            ready = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            data = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            assert data, (self.output, self.process.poll())
            self.output += data

    def end(self, data: bytes | None = None, wait: float = WAIT) -> tuple[int, bytes, str]:
        output, errors = self.process.communicate(data, timeout=wait)
        return self.process.returncode, self.output + output, errors.decode()


@pytest.fixture
def run(engine: str, kernel: Path) -> Iterator[Callable[..., Run]]:
    with ExitStack() as started:

        def start(*arguments: str) -> Run:
            return started.enter_context(Run("--kernel", str(kernel), "--engine", engine, *arguments))

        yield start


Start = Callable[..., Run]


def wait_until_running(name: str) -> None:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        try:
            with Client(name) as client:
                if client.request("status")["state"] == "running":
                    return
        except UserError:
            pass  # there is no such VM yet
        time.sleep(0.05)
    raise AssertionError(f"{name} does not run")

# How it ends


@ON_HARDWARE_TOO
def test_power_off_is_status_0(run: Start) -> None:
    assert run().end(b"q") == (0, b"B", "")


@ON_HARDWARE_TOO
def test_bytes_of_a_pipe_reach_the_guest_and_its_end_does_not_stop_it(run: Start) -> None:
    text = bytes(byte for byte in range(256) if byte not in COMMANDS) * 8  # Ctrl-A and x among them
    vm = run()
    assert vm.process.stdin is not None
    vm.send(text)
    vm.process.stdin.close()
    vm.process.stdin = None
    vm.expect(b"B" + text)
    time.sleep(0.2)
    assert vm.process.poll() is None
    vm.process.send_signal(signal.SIGINT)
    assert vm.end() == (0, b"B" + text, "")


@ON_HARDWARE_TOO
def test_a_reboot_starts_again_with_the_files_read_at_the_start(run: Start, kernel: Path, tmp_path: Path) -> None:
    copy = tmp_path / "kernel"
    copy.write_bytes(kernel.read_bytes())
    vm = run("--kernel", str(copy))
    vm.expect(b"B")
    copy.unlink()
    for boots in (b"BB", b"BBB"):
        vm.send(b"r")
        vm.expect(boots)
    assert vm.end(b"q") == (0, b"BBB", "")


def test_no_reboot_ends_with_status_0(run: Start) -> None:
    assert run("--no-reboot").end(b"rq") == (0, b"B", "")


def test_a_triple_fault_is_status_3_with_the_registers(run: Start) -> None:
    status, output, errors = run().end(b"t")
    assert (status, output) == (3, b"B")
    lines = errors.splitlines()
    assert lines[0] == "skep: the guest had a triple fault"
    assert any("rip=0000000000100" in line for line in lines)
    assert any(line.startswith("  cs: selector=10 ") for line in lines)


@ON_HARDWARE_TOO
def test_halting_for_good_is_said_once(run: Start) -> None:
    vm = run()
    vm.send(b"h")
    assert vm.process.stderr is not None
    line = vm.process.stderr.readline().decode()
    assert line.startswith("skep: the guest halted with interrupts off")
    vm.process.send_signal(signal.SIGINT)
    status, output, errors = vm.end()
    assert (status, output) == (0, b"B")
    assert all(line.startswith("  ") for line in errors.splitlines()), "the report, and no second one"


@pytest.mark.parametrize(("redirection", "printed"), [("<&-", b"B"), (">&-", b""), ("2>&-", b"Bab")])
def test_a_standard_descriptor_that_is_closed_is_nobody_elses(
    engine: str, kernel: Path, redirection: str, printed: bytes
) -> None:
    """No file of ours takes its number, so that nothing else gets into the guest or out of it."""
    words = (*SKEP, "run", "closed", "--memory", "16M", "--kernel", str(kernel), "--engine", engine)
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    begun = b""
    if redirection == "<&-":
        wait_until_running("closed")
        assert process.stdout is not None
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(b"" if redirection == "<&-" else b"abq", timeout=WAIT)
    assert (process.returncode, begun + output, errors) == (0, printed, b"")


# Signals


@ON_HARDWARE_TOO
def test_sigterm_presses_the_power_button(run: Start) -> None:
    vm = run()
    vm.send(b"ap")
    vm.expect(b"Ba")
    vm.process.send_signal(signal.SIGTERM)
    assert vm.end() == (0, b"Ba", "")


def test_a_second_sigterm_stops(run: Start) -> None:
    vm = run()
    vm.send(b"as")
    vm.expect(b"Ba")
    vm.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        vm.process.wait(0.3)
    vm.process.send_signal(signal.SIGTERM)
    assert vm.end() == (0, b"Ba", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_terminals_signals_stop_at_once(run: Start, number: signal.Signals) -> None:
    vm = run()
    vm.send(b"as")
    vm.expect(b"Ba")
    vm.process.send_signal(number)
    assert vm.end() == (0, b"Ba", "")


# The rest of the command line


@ON_HARDWARE_TOO
def test_a_dump_runs_the_same_vm(run: Start, kernel: Path, engine: str, tmp_path: Path) -> None:
    options = ("--kernel", str(kernel), "--engine", engine, "--memory", "16M", "--no-reboot", "-o", "config.dump=1")
    dump = subprocess.run([*SKEP, "run", *options], capture_output=True, check=True, timeout=WAIT, env=ENVIRONMENT)
    conf = tmp_path / "conf"
    conf.write_bytes(dump.stdout)
    done = subprocess.run(
        [*SKEP, "run", "-k", str(conf)], check=False, input=b"r", capture_output=True, timeout=WAIT, env=ENVIRONMENT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"B", b"")


@ON_HARDWARE_TOO
def test_verbose_says_which_engine_and_why(run: Start, engine: str) -> None:
    status, output, errors = run("-v").end(b"q")
    assert (status, output) == (0, b"B")
    first, *others = errors.splitlines()
    assert first.startswith(f"skep: engine {engine}") and ": as configured" in first
    if engine == "kvm":
        told = [line for line in others if line.startswith("skep: CPU model baseline, without what this host cannot")]
        others = [line for line in others if line not in told and line != "skep: memory: transparent huge pages"]
        if why_not_kvm() is not None:  # the emulation lacks what every processor that has VMX or SVM has
            assert len(told) == 1 and "SSE4_2" in told[0]
    assert others == ["skep: powered off"]


def test_console_none(run: Start) -> None:
    vm = run("mute", "--console", "none")
    wait_until_running("mute")
    vm.process.send_signal(signal.SIGINT)
    assert vm.end() == (0, b"", "")


def test_a_port_on_a_socket_another_on_a_file(run: Start, tmp_path: Path) -> None:
    vm = run("--console", f"unix:{tmp_path}/com1", "--console", f"com2=file:{tmp_path}/log")

    def connect(client: socket.socket) -> None:
        deadline = time.monotonic() + WAIT
        while client.connect_ex(str(tmp_path / "com1")) and time.monotonic() < deadline:
            time.sleep(0.01)

    for reset in (False, True, True):  # a reset forgets what was sent before it, so each one's output is awaited
        with socket.socket(socket.AF_UNIX) as client:
            connect(client)
            client.settimeout(WAIT)
            if reset:
                client.sendall(b"r")
            assert client.recv(1) == b"B"
    with socket.socket(socket.AF_UNIX) as client:
        connect(client)
        client.sendall(b"q")
        assert vm.end() == (0, b"", "")
    assert [path.name for path in tmp_path.iterdir() if "com1" in path.name] == []
    assert (tmp_path / "log").read_bytes() == b""


def test_a_pseudo_terminal_is_named(run: Start) -> None:
    vm = run("--console", "pty")
    assert vm.process.stderr is not None
    line = vm.process.stderr.readline().decode()
    assert line.startswith("skep: com1: its terminal is /dev/pts/")
    terminal = os.open(line.split()[-1], os.O_RDWR | os.O_NOCTTY)
    assert os.read(terminal, 1) == b"B"
    os.write(terminal, b"q")
    assert vm.end() == (0, b"", "")
    os.close(terminal)


# On a terminal


def terminal_of(engine: str, kernel: Path) -> OnTerminal:
    return OnTerminal("-m", "skep.cli", "run", "-m", "16M", "--kernel", str(kernel), "--engine", engine)


def test_ctrl_a_x_stops_and_the_terminal_is_restored(engine: str, kernel: Path) -> None:
    with terminal_of(engine, kernel) as terminal:
        terminal.read_until(b"B")
        assert terminal.mode() != terminal.before
        terminal.type(b"a\x03\x01\x01")
        terminal.read_until(b"a\x03\x01")
        terminal.type(b"s")
        terminal.type(b"\x01x")
        assert terminal.process.wait(WAIT) == 0
        assert terminal.mode() == terminal.before


@pytest.mark.parametrize(("command", "status"), [(b"q", 0), (b"t", 3)])
def test_the_terminal_is_restored_at_the_guests_end(engine: str, kernel: Path, command: bytes, status: int) -> None:
    with terminal_of(engine, kernel) as terminal:
        terminal.read_until(b"B")
        terminal.type(command)
        assert terminal.process.wait(WAIT) == status
        assert terminal.mode() == terminal.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_terminal_is_restored_after_signals(engine: str, kernel: Path, number: signal.Signals) -> None:
    with terminal_of(engine, kernel) as terminal:
        terminal.read_until(b"B")
        terminal.type(b"s")
        terminal.process.send_signal(number)
        if number == signal.SIGTERM:
            time.sleep(0.1)
            terminal.process.send_signal(number)
        assert terminal.process.wait(WAIT) == (-number if number == signal.SIGKILL else 0)
        deadline = time.monotonic() + 5
        while terminal.mode() != terminal.before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert terminal.mode() == terminal.before


# Mistakes


UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
"""Root as anybody else: file modes count."""


def refused(*arguments: str, where: Path, under: tuple[str, ...] = ()) -> str:
    """The one line of a ``skep run`` that is refused, and leaves nothing behind."""
    before = sorted(str(path) for path in where.rglob("*"))
    done = subprocess.run(
        [*under, *SKEP, "run", "--memory", "16M", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        env=ENVIRONMENT,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("skep: ")
    assert done.stderr.count("\n") == 1
    assert sorted(str(path) for path in where.rglob("*")) == before
    return done.stderr.removeprefix("skep: ").strip()


@pytest.fixture
def files(tmp_path: Path, kernel: Path) -> Path:
    """One file of each bad kind."""
    good = kernel.read_bytes()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("not a kernel, though long enough to be one\n" * 100)
    (tmp_path / "truncated").write_bytes(good[: len(good) // 2])
    (tmp_path / "stub").write_bytes(good[:100])
    (tmp_path / "directory").mkdir()
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 32 << 20)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "odd").write_bytes(bytes(1000))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "cannot read the kernel: no such file or directory"),
        ("empty", "the kernel is empty"),
        ("text", "not a Linux kernel (bzImage)"),
        ("stub", "not a Linux kernel (bzImage)"),
        ("truncated", "the kernel is truncated"),
        ("directory", "is a directory"),
    ],
)
def test_bad_kernels(files: Path, name: str, message: str) -> None:
    assert refused("--kernel", str(files / name), where=files).startswith(f"{files / name}: {message}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "cannot read the initrd: no such file or directory"),
        ("empty", "the initrd is empty"),
        ("directory", "is a directory"),
        ("large", "the initrd has 32 MiB and does not fit into 16 MiB of memory"),
    ],
)
def test_bad_initrds(files: Path, kernel: Path, name: str, message: str) -> None:
    line = refused("--kernel", str(kernel), "--initrd", str(files / name), where=files)
    assert line.startswith(f"{files / name}: {message}")


@pytest.mark.parametrize("name", ["absent", "directory", "empty"])
def test_bad_disks(files: Path, kernel: Path, name: str) -> None:
    assert str(files / name) in refused("--kernel", str(kernel), "--disk", str(files / name), where=files)


def test_a_disk_that_is_not_writable(files: Path, kernel: Path) -> None:
    (files / "disk").chmod(0o444)
    line = refused("--kernel", str(kernel), "--disk", str(files / "disk"), where=files, under=UNPRIVILEGED)
    assert line.startswith(f"{files / 'disk'}: ")
    assert "not writable" in line


def test_a_disk_that_another_vm_has(run: Start, files: Path, kernel: Path) -> None:
    disk = files / "disk"
    vm = run("--disk", str(disk))
    vm.expect(b"B")
    line = refused("--kernel", str(kernel), "--disk", str(disk), where=files)
    assert line.startswith(f"{disk}: the image is in use by ")
    assert vm.end(b"q")[0] == 0
    vm = run("--disk", str(disk))
    assert vm.end(b"q")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-o pci.0.2.0.device=virtio-net", "pci.0.2.0.device: no such device: 'virtio-net'"),
        ("-o pci.0.2.0.pth=x", "pci.0.2.0.device: says nothing of its device"),
        ("-o lpc.com1.pth=x", "lpc.com1.pth: unknown configuration key; the nearest is lpc.com1.path"),
        ("--console teletype", "lpc.com1.path: no such serial backend: 'teletype'"),
        ("--disk DISK,rw", "pci.0.2.0.rw: unknown configuration key; the nearest is pci.0.2.0.ro"),
        ("--disk DISK,format=zip", "pci.0.2.0.format: 'zip' is not one of "),
        ("--cmdline " + "x" * 3000, "boot.cmdline: the kernel's command line has 3000 bytes, this kernel takes 2047"),
    ],
)
def test_other_mistakes(files: Path, kernel: Path, arguments: str, message: str) -> None:
    words = arguments.replace("DISK", str(files / "disk")).split()
    assert refused("--kernel", str(kernel), *words, where=files).startswith(message)


def test_nothing_to_boot(tmp_path: Path) -> None:
    assert refused(where=tmp_path).startswith("boot.kernel: there is nothing to boot")


def test_no_kvm(kernel: Path, tmp_path: Path) -> None:
    """In a mount namespace whose /dev has no kvm."""
    hide = ("unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "hide")
    if subprocess.run([*hide, "true"], capture_output=True, check=False, timeout=WAIT).returncode:
        pytest.skip("no mount namespaces here")
    line = refused("--kernel", str(kernel), "--engine", "kvm", where=tmp_path, under=hide)
    assert line.startswith("/dev/kvm: KVM cannot be used: there is no such device; ")
    assert "use --engine translate" in line
