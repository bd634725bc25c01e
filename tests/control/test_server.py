"""The control socket, with clients that behave and clients that do not."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import skep
from skep.control import actions, text
from skep.control.client import Client
from skep.control.controller import Controller
from skep.control.conversation import LONGEST
from skep.control.directory import Claim
from skep.control.server import MOST, Server
from skep.errors import UserError
from skep.vm import State
from tests.tiny_kernel import tiny_kernel


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[skep.Vm]:
    kernel = tmp_path_factory.mktemp("kernel") / "bzImage"
    kernel.write_bytes(tiny_kernel())
    with skep.Vm(kernel=kernel, memory="16M", name="web", devices=["virtio-rnd"]) as vm:
        vm.start()
        vm.console.expect("B", timeout=60)
        yield vm


@pytest.fixture
def server(vm: skep.Vm) -> Iterator[Server]:
    with Claim("web") as claim, Server(Controller(vm), claim) as server:
        yield server


@pytest.fixture
def path(server: Server) -> Path:
    return Path(os.environ["XDG_RUNTIME_DIR"], "skep", "web.sock")


class Raw:
    """A client that sends what it likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")

    def line(self) -> dict[str, Any]:
        line = self.file.readline()
        assert line.endswith(b"\n"), line
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, data: bytes) -> dict[str, Any]:
        self.socket.sendall(data + b"\n")
        return self.line()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.socket.close()


def test_a_conversation(path: Path) -> None:
    with Raw(path) as client:
        assert client.line() == {"skep": skep.__version__, "vm": "web"}
        status = client.ask(b'{"action": "status", "id": [7]}')
        assert status["id"] == [7] and status["result"]["state"] == "running"
        assert client.ask(b'{"action": "freeze", "arguments": {}}') == {"result": {"state": "frozen"}}
        assert client.ask(b'{"action": "thaw"}') == {"result": {"state": "running"}}
        assert client.ask(b'{"action": "thwa", "id": 3}') == {
            "id": 3, "error": {"message": "no such action: 'thwa'; the nearest is thaw"}
        }  # fmt: skip


def test_a_status_tells_all(server: Server, vm: skep.Vm) -> None:
    disk = vm.board.pci.functions[2, 0].device  # type: ignore[attr-defined]
    disk.complain("the driver is lost")
    with Client("web") as client:
        status = client.request("status")
    assert status.pop("guest_seconds") > 0
    assert "virtio-rnd 0.2.0: the driver is lost" in list(text.lines("status", {**status, "guest_seconds": 1.0}))
    assert status == {
        "name": "web",
        "state": "running",
        "pid": os.getpid(),
        "engine": vm.engine.name,
        "memory": 16 << 20,
        "processors": ["running"],
        "ports": [{"name": "com1", "where": "program", "present": True, "waiting": 0, "dropped": 0}],
        "complaints": ["virtio-rnd 0.2.0: the driver is lost"],
        "end": None,
    }


def test_requests_sent_at_once_are_done_in_their_order(path: Path) -> None:
    with Raw(path) as client:
        client.line()
        client.socket.sendall(
            b'{"action":"freeze","id":1}\n{"action":"registers","id":2}\n{"action":"thaw","id":3}\n{"action":"status","id":4}\n'
        )
        answers = [client.line() for _ in range(4)]
    assert [answer["id"] for answer in answers] == [1, 2, 3, 4]
    assert answers[1]["result"]["processors"][0]["doing"] == "frozen"
    assert answers[3]["result"]["state"] == "running"


def test_in_pieces_and_after_the_sending_side_was_shut_down(path: Path) -> None:
    with Raw(path) as client:
        client.line()
        for byte in b'{"action": "freeze"}\n{"action": "thaw"}\n':
            client.socket.sendall(bytes((byte,)))
        client.socket.shutdown(socket.SHUT_WR)
        assert [client.line(), client.line()] == [{"result": {"state": "frozen"}}, {"result": {"state": "running"}}]
        assert client.file.read() == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "not JSON"),
        (b"status", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'{"action": "status"', "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b"1" * 60_000, "not JSON"),
        (b"null", "a request is an object"),
        (b'["status"]', "a request is an object"),
        (b"{}", "no such action: 'None'"),
        (b'{"action": "status", "argument": {}}', "a request has no 'argument'"),
        (b'{"action": "\\ud800"}', "no such action"),
        (b'{"action": "dump", "arguments": {"file": "core"}}', "web: core does not begin with a /"),
        (b'{"action": "dump", "arguments": {"file": "/"}}', "/: exists, and is no file"),
        (b'{"action": "dump", "arguments": {"file": "/dev/null"}}', "/dev/null: exists, and is no file"),
        (b'{"action": "dump", "arguments": {"file": "/tmp/a\\u0000b"}}', "embedded null byte"),
        (b'{"action": "dump", "arguments": {"file": "/nonexistent/core"}}', "/nonexistent/core: no such file"),
        (b'{"action": "registers", "arguments": {"cpu": -1}}', "web: there is no processor -1 now"),
        (b'{"action": "registers", "arguments": {"cpu": 1}}', "web: there is no processor 1 now"),
    ],
)
def test_what_is_refused(path: Path, vm: skep.Vm, line: bytes, message: str) -> None:
    with Raw(path) as client:
        client.line()
        assert message in client.ask(line)["error"]["message"]
    assert vm.state is State.RUNNING
    with Client("web") as again:
        assert again.request("status")["state"] == "running"


def test_a_line_without_end_is_given_up(path: Path) -> None:
    with Raw(path) as client:
        client.line()
        try:
            client.socket.sendall(b"x" * (10 << 20))
        except OSError:
            pass  # it has hung up
        assert f"at most {LONGEST} bytes" in client.line()["error"]["message"]


def test_random_bytes(path: Path) -> None:
    rng = random.Random(0x5E9)
    for _ in range(100):
        with Raw(path) as client:
            data = rng.randbytes(rng.randrange(2000))
            client.socket.sendall(data.replace(b"{", b"\n") if rng.random() < 0.5 else data)
    with Client("web") as client:
        assert client.request("status")["state"] == "running"


def test_a_thousand_connections_are_few_at_a_time_and_cost_nothing(server: Server, path: Path, vm: skep.Vm) -> None:
    before = len(os.listdir("/proc/self/fd"))
    opened = []
    for number in range(1000):
        opened.append(Raw(path))
        if len(opened) > 100:
            opened.pop(0).__exit__()
        if number % 100 == 0:
            with Client("web") as client:
                assert client.request("status")["state"] == "running"
            assert len(server._clients) <= MOST
    for one in opened:
        one.__exit__()
    deadline = time.monotonic() + 10
    while server._clients and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server._clients
    assert len(os.listdir("/proc/self/fd")) == before


def test_who_does_not_read_costs_little_and_holds_up_nobody(server: Server, path: Path) -> None:
    slow = [Raw(path) for _ in range(MOST - 1)]
    for one in slow:
        one.socket.setblocking(False)
        try:
            while True:
                one.socket.send(b'{"action": "threads"}\n' * 100)
        except BlockingIOError:
            pass
    with Client("web") as client:
        assert client.request("status")["state"] == "running"
    for one in list(server._clients.values()):
        assert len(one._received) <= 2 * LONGEST and len(one._unsent) < 1 << 20
    for one in slow:
        one.__exit__()


def test_where_all_wait_a_new_one_is_told(server: Server, path: Path, vm: skep.Vm) -> None:
    """All places taken by actions that hang: none of them is hung up on for somebody new."""
    hang = threading.Event()
    vm.freeze, freeze = hang.wait, vm.freeze  # type: ignore[method-assign, assignment]
    waiting: list[Raw] = []
    try:
        for _ in range(MOST):
            waiting.append(Raw(path))
            waiting[-1].line()
            waiting[-1].socket.sendall(b'{"action": "freeze"}\n')
        told = [one for one in waiting if select_readable(one)]
        assert len(told) == MOST - 8
        assert all("too much is under way: freeze, freeze" in one.line()["error"]["message"] for one in told)
        with Client("web") as client:  # one of those that were told has to go for it
            assert client.request("status")["state"] == "running"
            assert "vm.freeze()" in json.dumps(client.request("threads"))
    finally:
        hang.set()
        vm.freeze = freeze  # type: ignore[method-assign]
        for one in waiting:
            one.__exit__()


def select_readable(one: Raw) -> bool:
    one.socket.settimeout(0.2)
    try:
        return bool(one.socket.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        one.socket.settimeout(20)


def test_the_socket_is_its_users_alone(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused_even_if_let_in(path: Path, tmp_path: Path) -> None:
    """The files' modes are one wall, the peer's credentials another."""
    code = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1])\n"
        "print(s.makefile().readline(), end='')\n"
    )
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", code, str(path)]
    run = path.parent.parent
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode != 0
    modes = [(one, stat.S_IMODE(one.stat().st_mode)) for one in (run, path.parent, path)]
    try:
        for one, _ in modes:
            one.chmod(0o777)
        interpreter = subprocess.run([*words[:4], sys.executable, "-c", ""], check=False, timeout=30)
        if interpreter.returncode:
            words[4] = "/usr/bin/python3"
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    finally:
        for one, mode in modes:
            one.chmod(mode)
    assert json.loads(done.stdout) == {"error": {"message": "this VM is another user's"}}, done.stderr


def test_closing_gives_all_back(vm: skep.Vm) -> None:
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    with Claim("web") as claim:
        server = Server(Controller(vm), claim)
        clients = [Raw(claim.socket) for _ in range(3)]
        for client in clients:
            client.line()
        clients[0].socket.sendall(b'{"action"')
        server.close()
        server.close()
        assert all(client.file.read() == b"" for client in clients)
        assert not os.path.exists(claim.socket)
        for client in clients:
            client.__exit__()
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_an_answer_under_way_is_given_before_the_end(vm: skep.Vm) -> None:
    with Claim("web") as claim:
        server = Server(Controller(vm), claim)
        with Raw(claim.socket) as client:
            client.line()
            client.socket.sendall(b'{"action": "registers"}\n')
            time.sleep(0.05)
            server.close()
            assert client.line()["result"]["processors"]


def test_clients_learn_who_is_not_there(server: Server) -> None:
    with pytest.raises(UserError, match="wbe: no VM of that name is running; the nearest is web"):
        Client("wbe")
    with pytest.raises(UserError, match="`skep list` shows"):
        Client("quite-different")


def test_a_program_performs_actions_too(vm: skep.Vm) -> None:
    controller = Controller(vm)
    assert controller.perform(actions.Freeze()) == actions.Done("frozen")
    before = controller.perform(actions.Status())
    assert controller.perform(actions.Status()) == before, "in a freeze nothing changes"
    with pytest.raises(UserError, match="cannot start a VM that is frozen"):
        vm.start()
    assert controller.perform(actions.Thaw()) == actions.Done("running")
