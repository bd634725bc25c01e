"""Backends of a serial line, against pipes, files and a pseudo-terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.chardev.backlog import LIMIT
from skep.chardev.console import Console, ConsoleClosed, ConsoleTimeout
from skep.chardev.loop import Loop
from skep.chardev.stdio import Escape, Stdio
from skep.chardev.writer import Writer
from skep.contracts.chardev import CharBackend, PlainLine
from skep.errors import InternalError
from tests.on_terminal import OnTerminal


class Fifo(PlainLine):
    """A receiver with a FIFO as small as a UART's."""

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self.held = bytearray()
        self.changed = threading.Condition()

    def room(self) -> int:
        with self.changed:
            return self.size - len(self.held)

    def receive(self, data: bytes) -> None:
        with self.changed:
            assert 0 < len(data) <= self.size - len(self.held)
            self.held += data
            self.changed.notify()

    def drain(self, backend: CharBackend, count: int, timeout: float = 10.0) -> bytes:
        """What a guest does: empty the FIFO whenever there is something in it."""
        out = bytearray()
        deadline = time.monotonic() + timeout
        while len(out) < count:
            with self.changed:
                if not self.changed.wait_for(lambda: self.held, deadline - time.monotonic()):
                    break
                out += self.held
                self.held.clear()
            backend.room_available()
        return bytes(out)


def wait_for(what: object, timeout: float = 5.0) -> bool:
    assert callable(what)
    deadline = time.monotonic() + timeout
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop("test-loop")
    yield loop
    loop.close()


# The loop


def test_the_loop_calls_for_descriptors_and_for_threads(loop: Loop) -> None:
    reader, writer = os.pipe()
    got: list[object] = []
    loop.watch(reader, lambda: got.append(os.read(reader, 10)))
    os.write(writer, b"one")
    assert wait_for(lambda: got == [b"one"])
    loop.call(lambda: got.append(threading.current_thread().name))
    assert wait_for(lambda: got == [b"one", "test-loop"])
    loop.watch(reader)
    os.write(writer, b"two")
    loop.call(lambda: got.append("after"))
    assert wait_for(lambda: got[-1] == "after")
    assert b"two" not in got
    os.close(reader)
    os.close(writer)


def test_closing_the_loop_does_what_was_asked_and_then_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    loop = Loop("test-close")
    done: list[int] = []
    for number in range(100):
        loop.call(lambda number=number: done.append(number))  # type: ignore[misc]
    loop.close()
    loop.close()
    assert done == list(range(100))
    loop.call(lambda: done.append(-1))
    with pytest.raises(InternalError):
        loop.watch(0, lambda: None)
    assert -1 not in done
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_exception_in_a_callback_is_reported_and_ends_the_loop() -> None:
    failed: list[BaseException] = []
    loop = Loop("test-fail", failed.append)
    loop.call(lambda: 1 // 0)
    assert wait_for(lambda: failed)
    assert isinstance(failed[0], ZeroDivisionError)
    loop.close()


def test_regular_files_are_refused(loop: Loop, tmp_path: Path) -> None:
    with open(tmp_path / "f", "wb") as file, pytest.raises(PermissionError):
        loop.watch(file.fileno(), lambda: None)


# Standard input and output


@pytest.fixture
def pipes() -> Iterator[tuple[int, int, int, int]]:
    """Source's reading and writing end, sink's reading and writing end."""
    ends = (*os.pipe(), *os.pipe())
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


def test_everything_from_a_pipe_arrives_in_order_and_its_end_is_nothing(
    loop: Loop, pipes: tuple[int, int, int, int]
) -> None:
    source, feed, _, sink = pipes
    stopped: list[bool] = []
    stdio = Stdio(loop, lambda: stopped.append(True), source, sink)
    fifo = Fifo()
    data = bytes(range(256)) * 400  # Ctrl-A and x among them: on a pipe they mean nothing
    feeder = threading.Thread(target=lambda: (os.write(feed, data), os.close(feed)))
    feeder.start()
    stdio.connect(fifo)
    assert fifo.drain(stdio, len(data)) == data
    feeder.join(5)
    assert fifo.drain(stdio, 1, timeout=0.05) == b""
    assert not stopped
    stdio.close()


def test_a_pipe_is_not_read_faster_than_the_guest_takes(loop: Loop, pipes: tuple[int, int, int, int]) -> None:
    source, feed, _, sink = pipes
    stdio = Stdio(loop, lambda: None, source, sink)
    stdio.connect(Fifo())
    os.set_blocking(feed, False)
    sent = 0
    for _ in range(200):
        try:
            sent += os.write(feed, bytes(4096))
        except BlockingIOError:
            time.sleep(0.002)
    assert sent <= 65536 + 3 * 4096
    stdio.close()


@pytest.mark.parametrize("content", [b"", b"hello\n" * 2000])
def test_a_file_as_standard_input(loop: Loop, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "input"
    path.write_bytes(content)
    with open(path, "rb") as file, open(os.devnull, "wb") as sink:
        stdio = Stdio(loop, lambda: None, file.fileno(), sink.fileno())
        fifo = Fifo()
        stdio.connect(fifo)
        assert fifo.drain(stdio, len(content)) == content
        stdio.close()


def test_closed_standard_input(loop: Loop, pipes: tuple[int, int, int, int]) -> None:
    source, _, out, sink = pipes
    os.close(source)
    stdio = Stdio(loop, lambda: None, source, sink)
    stdio.connect(Fifo())
    stdio.write(b"still here")
    stdio.close()
    assert os.read(out, 100) == b"still here"


def test_output_of_a_stopped_reader_is_dropped_not_waited_for(pipes: tuple[int, int, int, int]) -> None:
    _, _, out, sink = pipes
    writer = Writer(sink, "test-writer")
    began = time.monotonic()
    for _ in range(3 * LIMIT // 4096):
        writer.write(bytes(4096))
    assert time.monotonic() - began < 2
    assert LIMIT <= writer.dropped < 3 * LIMIT
    os.close(out)
    writer.close()
    assert not writer._thread.is_alive()


def test_output_arrives_whole_and_in_order(pipes: tuple[int, int, int, int]) -> None:
    _, _, out, sink = pipes
    writer = Writer(sink, "test-writer")
    data = os.urandom(40000)
    for at in range(0, len(data), 7):
        writer.write(data[at : at + 7])
    writer.close()
    assert os.read(out, 65536) == data


@pytest.mark.parametrize("cut", range(1, 12))
def test_escape_commands_also_when_cut(cut: int) -> None:
    typed = b"ab\x01\x01c\x01ad\x01qe\x01xf\x01Cg\x01\x01"
    got = bytearray()
    commands = {"x": lambda: got.extend(b"<stop>"), "c": lambda: got.extend(b"<monitor>")}
    escape = Escape(got.extend, commands)
    for at in range(0, len(typed), cut):
        escape.feed(typed[at : at + cut])
    assert got == b"ab\x01c\x01de<stop>f<monitor>g\x01"


def test_a_full_writer_says_when_it_has_room_again() -> None:
    reader, sink = os.pipe()
    writer = Writer(sink, "writer")
    drained = threading.Event()
    writer.backlog.drained = drained.set
    assert writer.room() == LIMIT
    left = 0
    while room := writer.room():  # some of it is on its way already
        writer.write(bytes(room))
        left += room
        time.sleep(0.01)
    assert not drained.is_set()
    while left:
        left -= len(os.read(reader, 1 << 16))
    assert drained.wait(20) and writer.room() == LIMIT and not writer.dropped
    os.close(reader)
    writer.write(b"x")
    writer.close()
    assert writer.room() == LIMIT, "what is broken holds nobody up"
    os.close(sink)


# A terminal

ON_A_TERMINAL = """
import os, sys, time
from skep.chardev.loop import Loop
from skep.chardev.stdio import Stdio
from skep.contracts.chardev import PlainLine
class Guest(PlainLine):
    def room(self): return int(sys.argv[1])
    def receive(self, data): os.write(1, b"<" + data.hex().encode() + b">")
loop = Loop("loop")
stopped = []
stdio = Stdio(loop, lambda: stopped.append(1))
stdio.connect(Guest())
os.write(1, b"ready")
while not stopped: time.sleep(0.005)
stdio.close()
loop.close()
"""


def test_a_terminal_is_raw_and_then_as_before() -> None:
    with OnTerminal("-c", ON_A_TERMINAL, "16") as terminal:
        terminal.read_until(b"ready")
        assert terminal.mode()[3] != terminal.before[3]
        terminal.type(b"\x03\x01\x01")  # Ctrl-C belongs to the guest
        terminal.read_until(b"01>")
        terminal.type(b"\x01")
        terminal.type(b"x")
        assert terminal.process.wait(10) == 0
        assert terminal.mode() == terminal.before


def test_ctrl_a_x_works_while_the_guest_reads_nothing() -> None:
    with OnTerminal("-c", ON_A_TERMINAL, "0") as terminal:
        terminal.read_until(b"ready")
        for _ in range(10):
            terminal.type(b"z" * 1000)
            time.sleep(0.01)
        terminal.type(b"\x01x")
        assert terminal.process.wait(10) == 0
        assert terminal.mode() == terminal.before


SIZED = """
import os, signal, threading
from skep.chardev.loop import Loop
from skep.chardev.stdio import Stdio
from skep.contracts.chardev import PlainLine
class Guest(PlainLine):
    def room(self): return 0
    def receive(self, data): pass
    def resized(self, columns, rows): os.write(1, b"<%dx%d>" % (columns, rows))
loop, stopped = Loop("loop"), threading.Event()
stdio = Stdio(loop, stopped.set)
signal.signal(signal.SIGWINCH, lambda *_: stdio.look_at_size())
stdio.connect(Guest())
stopped.wait()
stdio.close()
loop.close()
"""


def test_the_port_hears_of_a_terminals_size() -> None:
    with OnTerminal("-c", SIZED) as terminal:
        termios.tcsetwinsize(terminal.master, (24, 80))
        terminal.read_until(b"<80x24>", 60)
        termios.tcsetwinsize(terminal.master, (50, 132))
        terminal.read_until(b"<132x50>")
        terminal.type(b"\x01x")
        assert terminal.process.wait(10) == 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
def test_a_terminal_is_restored_even_if_we_cannot(end: signal.Signals) -> None:
    with OnTerminal("-c", ON_A_TERMINAL, "16") as terminal:
        terminal.read_until(b"ready")
        assert terminal.mode() != terminal.before
        terminal.process.send_signal(end)
        assert terminal.process.wait(10) == -end
        assert wait_for(lambda: terminal.mode() == terminal.before)


STORM = """
import signal, time
from skep.chardev.loop import Loop
loop, rang = Loop("loop"), []
signal.signal(signal.SIGALRM, lambda *_: loop.call(lambda: rang.append(1)))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
while len(rang) < 200:
    loop.call(lambda: None)
signal.setitimer(signal.ITIMER_REAL, 0)
loop.close()
"""


def test_a_signal_handler_calls_amid_its_threads_own_call() -> None:
    environment = {**os.environ, "PYTHONPATH": "src"}
    subprocess.run([sys.executable, "-c", STORM], check=True, timeout=60, env=environment)


# In the process


def test_console_expects_what_comes_once(loop: Loop) -> None:
    console = Console(loop)
    console.write(b"Booting\r\nlogin: ")
    found = console.expect(r"(log)in: ", timeout=1)
    assert (found[1], found.string[: found.start()]) == ("log", "Booting\r\n")
    with pytest.raises(ConsoleTimeout, match=r"'login' did not come in 0.05 s; last: ''"):
        console.expect("login", timeout=0.05)
    threading.Timer(0.05, lambda: [console.write(bytes([byte])) for byte in "später".encode()]).start()
    assert console.expect("ä.er", timeout=5).string.startswith("spä")
    console.write(b"rest\xff")
    assert console.read() == "rest\ufffd"
    assert console.read() == ""
    console.close()


def test_console_says_when_nothing_can_come(loop: Loop) -> None:
    console = Console(loop)
    threading.Timer(0.05, lambda: (console.write(b"bye"), console.close())).start()
    with pytest.raises(ConsoleClosed, match="'never' did not come; last: 'bye'"):
        console.expect("never", timeout=10)
    assert console.expect("bye", timeout=1)


def test_console_sends_through_a_small_fifo(loop: Loop) -> None:
    console = Console(loop)
    fifo = Fifo()
    text = "echo hello\n" * 100
    console.send("early\n")
    console.connect(fifo)
    console.send(text)
    assert fifo.drain(console, 6 + len(text)) == b"early\n" + text.encode()


def test_a_port_that_can_wait_loses_nothing_to_a_program(loop: Loop) -> None:
    class Port(Fifo):
        again = threading.Event()

        def drained(self) -> None:
            self.again.set()

    console, port = Console(loop), Port()
    console.connect(port)
    while room := console.output_room():
        console.write(b"x" * room)
    assert not port.again.wait(0.05)
    assert console.read() == "x" * LIMIT
    assert port.again.wait(10) and console.output_room() == LIMIT
    assert console.status().dropped == 0


def test_console_keeps_a_bounded_past(loop: Loop) -> None:
    console = Console(loop)
    for _ in range(40):
        console.write(b"x" * 65536)
    console.write(b"end")
    text = console.read()
    assert text.endswith("end")
    assert len(text) <= 1 << 20
    assert console.status().dropped >= 40 * 65536 + 3 - (1 << 20), "and says how much it forgot"
