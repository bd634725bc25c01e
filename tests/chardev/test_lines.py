"""Backends that clients come to and leave again: a pseudo-terminal, a Unix socket, a TCP socket; and a file."""

from __future__ import annotations

import os
import re
import resource
import select
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skep.chardev.backlog import LIMIT, Backlog
from skep.chardev.link import Link
from skep.chardev.listener import BUSY
from skep.chardev.loop import Loop
from skep.chardev.plugs import Plugs
from skep.chardev.pump import Pump
from skep.contracts.chardev import CharBackend
from skep.errors import UserError
from tests.chardev.test_chardev import Fifo, wait_for


class Port(Fifo):
    """A receiver that remembers what it is told, and of a line sends all back that it gets."""

    def __init__(self, size: int = 1 << 16) -> None:
        super().__init__(size)
        self.came: list[bool] = []
        self.again = threading.Event()

    def attached(self, present: bool) -> None:
        self.came.append(present)

    def drained(self) -> None:
        self.again.set()


class Client:
    """Somebody at the other end: a socket, or the terminal's device."""

    def __init__(self, where: str) -> None:
        kind, _, rest = where.partition(":")
        self.socket: socket.socket | None = None
        if kind == "pty":
            self.fd = os.open(rest, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            return
        if kind == "unix":
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(rest)
        else:
            host, _, port = rest.rpartition(":")
            self.socket = socket.create_connection((host.strip("[]"), int(port)))
        self.fd = self.socket.fileno()
        os.set_blocking(self.fd, False)

    def read(self, count: int, timeout: float = 10.0) -> bytes:
        """At least ``count`` bytes, fewer only at the end."""
        out = bytearray()
        deadline = time.monotonic() + timeout
        while len(out) < count and select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                data = os.read(self.fd, 1 << 16)
            except OSError:
                break
            if not data:
                break
            out += data
        return bytes(out)

    def write(self, data: bytes) -> None:
        while data:
            assert select.select([], [self.fd], [], 10)[1]
            data = data[os.write(self.fd, data) :]

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
        else:
            os.close(self.fd)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def plugs(said: list[str]) -> Iterator[Plugs]:
    failed: list[BaseException] = []
    plugs = Plugs("test", said.append, lambda: None, failed.append)
    yield plugs
    plugs.close()
    assert not failed


@pytest.fixture(params=["pty", "unix", "tcp", "tcp6"])
def line(request: pytest.FixtureRequest, plugs: Plugs, tmp_path: Path) -> CharBackend:
    where = {
        "pty": "pty",
        "unix": f"unix:{tmp_path}/com1",
        "tcp": "tcp:127.0.0.1:0",
        "tcp6": "tcp:[::1]:0",
    }[str(request.param)]
    return plugs.plug("com1", where, "lpc.com1.path")


def client_of(line: CharBackend) -> Client:
    return Client(line.status().where)


def test_both_ways_whole_and_in_order(line: CharBackend) -> None:
    port = Port(16)
    line.connect(port)
    down, up = os.urandom(70_000), os.urandom(70_000)
    with client_of(line) as client:
        feeder = threading.Thread(target=client.write, args=(down,))
        feeder.start()
        assert port.drain(line, len(down), 30) == down
        feeder.join(10)
        for at in range(0, len(up), 7):
            line.write(up[at : at + 7])
        assert client.read(len(up)) == up
    assert line.status().dropped == 0


def test_output_waits_for_who_comes_late_and_comes_again(line: CharBackend) -> None:
    line.connect(Port())
    for number in range(3):
        line.write(b"boot %d\r\n" % number)
        time.sleep(0.05)
        assert (line.status().present, line.status().waiting) == (False, 8)
        with client_of(line) as client:
            assert client.read(8) == b"boot %d\r\n" % number
        assert wait_for(lambda: not line.status().present)


def test_the_port_hears_who_comes_and_leaves(line: CharBackend) -> None:
    port = Port()
    line.connect(port)
    assert wait_for(lambda: port.came == [False])
    for _ in range(2):
        port.came.clear()
        with client_of(line):
            assert wait_for(lambda: port.came == [True])
            assert line.status().present
        assert wait_for(lambda: port.came == [True, False])


def test_what_nobody_reads_is_kept_counted_and_said(line: CharBackend, said: list[str]) -> None:
    line.connect(Port())
    lines = [b"%08d\r\n" % number for number in range(3 * LIMIT // 10)]
    began = time.monotonic()
    for one in lines:
        line.write(one)
    assert time.monotonic() - began < 10  # 300,000 writes, none of which waited
    total = sum(map(len, lines))
    assert line.status().dropped == total - LIMIT
    assert said[-1] == "com1: nobody reads its output, of which only the last MiB is kept"
    with client_of(line) as client:
        note = b"\r\n[skep: %d bytes of output are lost here]\r\n" % (total - LIMIT)
        assert client.read(len(note) + LIMIT) == note + b"".join(lines)[-LIMIT:]
        line.write(b"after")
        assert client.read(5) == b"after"
    assert sum("nobody reads" in one for one in said) == 1


def test_a_slow_reader_gets_all_of_what_a_patient_port_writes(line: CharBackend) -> None:
    """The port that can make its guest wait, a virtio console's."""
    port = Port()
    line.connect(port)
    data = os.urandom(5 * LIMIT // 2)
    got = bytearray()
    with client_of(line) as client:

        def read() -> None:
            while len(got) < len(data) and (some := client.read(1)):
                got.extend(some)

        reader = threading.Thread(target=read)
        reader.start()
        at = 0
        while at < len(data):
            port.again.clear()
            if not (room := line.output_room()):
                assert port.again.wait(20)
                continue
            line.write(data[at : at + min(room, 30_000)])
            at += min(room, 30_000)
        reader.join(30)
    assert got == data and line.status().dropped == 0


def test_who_left_unheard_holds_up_no_end() -> None:
    """A terminal that nobody has open any more is always ready, and takes only so much."""
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    loop, backlog = Loop("test"), Backlog()
    backlog.put(bytes(LIMIT))
    links: list[Link] = []
    loop.run(lambda: links.append(Link(loop, master, Pump(), backlog, lambda: None)))
    loop.run(links[0].flush)
    loop.run(links[0].detach)
    os.close(slave)
    finisher = threading.Thread(target=links[0].finish, args=(0.2,), daemon=True)
    finisher.start()
    finisher.join(10)
    loop.close()
    os.close(master)
    assert not finisher.is_alive()


def test_a_reader_that_stops_reading_never_makes_the_port_wait(line: CharBackend) -> None:
    line.connect(Port())
    with client_of(line):
        assert wait_for(lambda: line.status().present)
        began = time.monotonic()
        for _ in range(20 * LIMIT // 4096):
            line.write(bytes(4096))
        assert time.monotonic() - began < 5
        assert line.status().dropped >= 10 * LIMIT


def test_input_waits_for_the_guest_and_is_bounded(line: CharBackend) -> None:
    port = Port(16)
    line.connect(port)
    with client_of(line) as client:
        sent = 0
        while select.select([], [client.fd], [], 0.5)[1] and sent < 64 << 20:
            sent += os.write(client.fd, bytes(4096))
        assert sent < 32 << 20  # what the kernel keeps, and we two chunks
        assert line.status().present
        port.size = 1 << 16
        line.room_available()
        assert len(port.drain(line, sent, 60)) == sent


def test_the_last_output_arrives_before_the_end(line: CharBackend) -> None:
    line.connect(Port())
    with client_of(line) as client:
        assert wait_for(lambda: line.status().present)
        line.write(b"Power down\r\n" * 1000)
        closer = threading.Thread(target=line.close)
        closer.start()
        assert client.read(12_000) == b"Power down\r\n" * 1000
        assert client.read(1) == b""
        closer.join(10)


def test_who_does_not_read_does_not_hold_up_the_end(line: CharBackend) -> None:
    line.connect(Port())
    with client_of(line) as client:
        assert wait_for(lambda: line.status().present)
        line.write(bytes(LIMIT))
        began = time.monotonic()
        line.close()
        line.close()
        assert time.monotonic() - began < 5
        taken = LIMIT - line.status().dropped
        if not line.status().where.startswith("pty"):  # whose kernel forgets what it holds
            assert len(client.read(taken)) == taken
        assert client.read(1) == b""


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    plugs = Plugs("test", lambda line: None, lambda: None, lambda error: None)
    clients = []
    for name, where in (
        ("com1", "pty"),
        ("com2", f"unix:{tmp_path}/socket"),
        ("com3", "tcp:127.0.0.1:0"),
        ("com4", f"file:{tmp_path}/file"),
    ):
        backend = plugs.plug(name, where, "key")
        backend.connect(Port())
        if name != "com4":
            clients.append(client_of(backend))
        backend.write(b"hello")
    plugs.close()
    for client in clients:
        client.close()
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Sockets


@pytest.fixture(params=["unix", "tcp"])
def listener(request: pytest.FixtureRequest, plugs: Plugs, tmp_path: Path) -> CharBackend:
    where = f"unix:{tmp_path}/com1" if request.param == "unix" else "tcp:127.0.0.1:0"
    return plugs.plug("com1", where, "lpc.com1.path")


def test_a_second_client_is_turned_away(listener: CharBackend) -> None:
    port = Port()
    listener.connect(port)
    with client_of(listener) as first:
        assert wait_for(lambda: listener.status().present)
        with client_of(listener) as second:
            assert second.read(1000) == BUSY
        first.write(b"still here")
        assert port.drain(listener, 10) == b"still here"
        listener.write(b"and I")
        assert first.read(5) == b"and I"
    assert wait_for(lambda: not listener.status().present)
    with client_of(listener) as third:
        listener.write(b"next")
        assert third.read(4) == b"next"


def test_what_a_client_typed_before_it_left_arrives(listener: CharBackend) -> None:
    port = Port(0)
    listener.connect(port)
    with client_of(listener) as client:
        assert wait_for(lambda: listener.status().present)
        client.write(b"x" * 20_000)
    time.sleep(0.1)
    port.size = 16
    listener.room_available()
    assert port.drain(listener, 20_000) == b"x" * 20_000


def test_nothing_is_written_to_who_has_left_already(listener: CharBackend) -> None:
    """TCP would take it all the same, and lose it."""
    for _ in range(20):
        client_of(listener).close()
    listener.write(b"for you")
    listener.connect(Port())
    time.sleep(0.05)
    with client_of(listener) as client:
        assert client.read(7) == b"for you"


def test_who_left_while_the_guest_takes_nothing_makes_room(listener: CharBackend) -> None:
    """Its input was not all read, so that its end was not seen."""
    port = Port(0)
    listener.connect(port)
    with client_of(listener) as first:
        first.write(b"x" * 20_000)
        assert wait_for(lambda: listener.status().present)
        time.sleep(0.05)
    with client_of(listener) as second:
        listener.write(b"welcome")
        assert second.read(7) == b"welcome"


def test_hundreds_of_clients_at_once(listener: CharBackend) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    port = Port()
    listener.connect(port)
    clients = []
    try:
        with client_of(listener) as first:
            assert wait_for(lambda: listener.status().present)
            clients = [client_of(listener) for _ in range(300)]
            first.write(b"hello")
            assert port.drain(listener, 5) == b"hello"
            assert clients[-1].read(1000, 20) == BUSY
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_clients_wait(listener: CharBackend) -> None:
    port = Port()
    listener.connect(port)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with client_of(listener) as client:
        assert wait_for(lambda: listener.status().present)
    assert wait_for(lambda: not listener.status().present)
    client = client_of(listener)
    client.close()
    second = socket.socket(socket.AF_UNIX if "unix" in listener.status().where else socket.AF_INET)
    where = listener.status().where.partition(":")[2]
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        with pytest.raises(OSError):
            while True:
                fillers.append(os.dup(0))
        host, _, number = where.rpartition(":")
        second.connect(where if second.family == socket.AF_UNIX else (host, int(number)))
        used = time.process_time()
        time.sleep(0.6)
        assert time.process_time() - used < 0.3  # it does not spin
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)
    with second:
        listener.write(b"at last")
        second.settimeout(10)
        assert second.recv(100) == b"at last"


def test_a_socket_is_for_its_user_alone(plugs: Plugs, tmp_path: Path) -> None:
    path = tmp_path / "com1"
    before = os.umask(0)
    try:
        plugs.plug("com1", f"unix:{path}", "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


KILLED = """
import os, signal, sys
from skep.chardev.unix import listen
listen(sys.argv[1], "key")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_dead_socket_is_replaced_a_living_one_is_not(plugs: Plugs, tmp_path: Path) -> None:
    path = tmp_path / "com1"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, env={**os.environ, "PYTHONPATH": "src"})
    assert path.is_socket()
    plugs.plug("com1", f"unix:{path}", "lpc.com1.path")
    with pytest.raises(UserError, match=f"lpc.com2.path: {path}: somebody else listens there"):
        plugs.plug("com2", f"unix:{path}", "lpc.com2.path")
    assert path.is_socket()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("unix:", "names no socket"),
        ("unix:DIR/file", "exists, and is no socket"),
        ("unix:DIR", "exists, and is no socket"),
        ("unix:DIR/absent/socket", "no such file or directory"),
        ("unix:DIR/" + "x" * 100, "longer than the 107 bytes"),
        ("tcp:", "is not HOST:PORT; say tcp:127.0.0.1:4000"),
        ("tcp:4000", "is not HOST:PORT"),
        ("tcp:::1:4000", "in brackets"),
        ("tcp:127.0.0.1:99999", "is not HOST:PORT"),
        ("tcp:192.0.2.1:0", "cannot assign requested address"),
        ("tcp:no.such.host.invalid:1", "no.such.host.invalid: "),
        ("file:", "names no file"),
        ("file:DIR", "is a directory"),
        ("file:DIR/absent/file", "no such file or directory"),
        ("file:DIR/fifo", "no such device or address"),
        ("teletype", "no such serial backend: 'teletype'; use stdio, none, pty"),
        ("pty:x", "no such serial backend"),
    ],
)
def test_mistakes(tmp_path: Path, where: str, message: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    before = sorted(os.listdir("/proc/self/fd")), sorted(tmp_path.iterdir())
    plugs = Plugs("test", lambda line: None, lambda: None, lambda error: None)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        plugs.plug("com1", where.replace("DIR", str(tmp_path)), "lpc.com1.path")
    assert str(caught.value).startswith("lpc.com1.path: ")
    plugs.close()
    assert (sorted(os.listdir("/proc/self/fd")), sorted(tmp_path.iterdir())) == before


def test_a_tcp_port_in_use(plugs: Plugs) -> None:
    first = plugs.plug("com1", "tcp:127.0.0.1:0", "lpc.com1.path")
    with pytest.raises(UserError, match=r"lpc.com2.path: 127.0.0.1:\d+: address already in use"):
        plugs.plug("com2", first.status().where, "lpc.com2.path")


# Pseudo-terminals


def test_a_terminal_is_named_private_and_raw(plugs: Plugs, said: list[str]) -> None:
    line = plugs.plug("com1", "pty", "key")
    name = line.status().where.removeprefix("pty:")
    assert said == [f"com1: its terminal is {name}"]
    assert stat.S_IMODE(os.stat(name).st_mode) == 0o600
    port = Port()
    line.connect(port)
    for _ in range(2):  # also for who comes later: nothing of the guest's output is echoed to it as input
        with client_of(line) as client:
            assert not termios.tcgetattr(client.fd)[3] & (termios.ECHO | termios.ICANON)
            line.write(b"a\nb")
            assert client.read(3) == b"a\nb"
        assert wait_for(lambda: not line.status().present)
    assert port.room() == port.size


def test_an_idle_terminal_costs_next_to_nothing(plugs: Plugs) -> None:
    plugs.plug("com1", "pty", "key").connect(Port())
    used = time.process_time()
    time.sleep(1)
    assert time.process_time() - used < 0.05


# Files


def test_a_file_grows(plugs: Plugs, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"yesterday\n")
    line = plugs.plug("com1", f"file:{path}", "key")
    line.connect(Port())
    line.write(b"today\n")
    line.close()
    assert path.read_bytes() == b"yesterday\ntoday\n"


def test_a_full_file_system_is_said_and_waited_for(
    plugs: Plugs, said: list[str], tmp_path: Path, small_file_system: Callable[[], Path]
) -> None:
    path = small_file_system() / "log"
    line = plugs.plug("com1", f"file:{path}", "key")
    line.connect(Port())
    filler = path.with_name("filler")
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    for _ in range(8):
        line.write(b"x" * 4096)
    assert wait_for(lambda: said)
    assert said == [f"com1: cannot write to {path}: no space left on device; the last MiB is kept meanwhile"]
    filler.unlink()
    assert wait_for(lambda: path.stat().st_size == 8 * 4096)
    assert line.status().dropped == 0 and len(said) == 1


@pytest.fixture
def small_file_system() -> Iterator[Callable[[], Path]]:
    """A directory with room for 64 KiB, in a mount namespace that a child holds."""
    script = "mount -t tmpfs -o size=64k,nr_inodes=20 none /mnt && echo ready && read -r line"
    child = subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    ready = child.stdout.readline() == b"ready\n"

    def path() -> Path:
        if not ready:
            pytest.skip("no mount namespaces here")
        # unshare became the shell, which has the mount
        return Path(f"/proc/{child.pid}/root/mnt")

    yield path
    child.communicate(b"\n", timeout=10)


# The loop's clock


def test_calls_for_later_come_in_their_order_and_not_early() -> None:
    loop = Loop("test-later")
    got: list[tuple[int, float]] = []
    began = time.monotonic()
    for number, delay in ((3, 0.15), (1, 0.05), (2, 0.1), (0, 0.0)):
        loop.call_later(delay, lambda number=number: got.append((number, time.monotonic() - began)))  # type: ignore[misc]
    assert wait_for(lambda: len(got) == 4)
    assert [number for number, _ in got] == [0, 1, 2, 3]
    assert all(when >= 0.05 * number for number, when in got)
    loop.call_later(10.0, got.clear)
    loop.close()
    loop.call_later(0.0, got.clear)
    assert len(got) == 4


def test_running_on_the_loop_waits_also_when_it_has_failed() -> None:
    loop = Loop("test-run", lambda error: None)
    names: list[str] = []
    loop.run(lambda: names.append(threading.current_thread().name))
    loop.call(lambda: 1 // 0)
    loop._thread.join(10)
    loop.run(lambda: names.append(threading.current_thread().name))
    loop.close()
    assert names == ["test-run", threading.current_thread().name]
