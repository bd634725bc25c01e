"""virtio-console against virtio 1.2, 5.3, through the PCI transport."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.config.tree import Tree
from skep.contracts.chardev import Receiver
from skep.contracts.conformance import DeviceConformance
from skep.contracts.io import IoRegion
from skep.devices.virtio.console import (
    CONSOLE_PORT,
    DEVICE_ADD,
    DEVICE_READY,
    F_EMERG_WRITE,
    F_MULTIPORT,
    F_SIZE,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    PortOptions,
    VirtioConsole,
    port_options,
)
from skep.devices.virtio.pci import VirtioPci
from skep.errors import UserError
from tests.devices.virtio.driver import F_EVENT_IDX, NEEDS_RESET, Board, Driver, DriverQueue

ALL = F_SIZE | F_MULTIPORT | F_EMERG_WRITE | F_EVENT_IDX
BUFFER = 64
"""Bytes of a receive buffer."""


class Host:
    """A backend that takes as much as it is told to, and says what it is told to."""

    def __init__(self, takes: int = 1 << 20) -> None:
        self.takes = takes
        self.got = b""
        self.news = threading.Condition()
        self.waiting = b""
        self.receiver: Receiver

    def connect(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def write(self, data: bytes) -> None:
        with self.news:
            self.got += data
            self.takes -= len(data)
            self.news.notify_all()

    def output_room(self) -> int:
        return max(self.takes, 0)

    def room_available(self) -> None:
        self.offered = threading.Thread(target=self.say)
        self.offered.start()

    def close(self) -> None: ...

    def say(self, data: bytes = b"") -> None:
        with self.news:
            self.waiting += data
            while self.waiting and (room := self.receiver.room()) > 0:
                part, self.waiting = self.waiting[:room], self.waiting[room:]
                self.receiver.receive(part)

    def take_more(self, takes: int) -> None:
        self.takes = takes
        self.receiver.drained()

    def wait_for(self, data: bytes) -> None:
        with self.news:
            assert self.news.wait_for(lambda: self.got == data, 20), self.got


class Made:
    """A console with two ports, 0 the guest's terminal and 2 a named one, and its driver's side."""

    def __init__(self) -> None:
        self.board = Board()
        self.hosts = {0: Host(), 2: Host()}
        options = {0: PortOptions(path="", console=True), 2: PortOptions(path="", name="org.skep.test")}
        board = self.board
        self.device = VirtioConsole("console", board.memory, board.lock, options, dict(self.hosts))
        self.function = VirtioPci(self.device)
        board.add(self.function)
        self.driver: Driver
        self.queues: list[DriverQueue]
        self.buffers: dict[tuple[int, int], int] = {}

    def close(self) -> None:
        self.function.close()
        self.board.memory.close()

    def start(self, features: int = ALL) -> None:
        self.driver = Driver(self.board, features)
        count = 8 if features & F_MULTIPORT else 2
        self.queues = self.driver.start_all(count)
        for index in range(0, count, 2):
            for _ in range(8):
                self.offer(index)

    def offer(self, index: int, gpa: int | None = None) -> None:
        gpa = self.driver.allocate(BUFFER) if gpa is None else gpa
        self.buffers[index, self.queues[index].add([(gpa, BUFFER, True)])] = gpa
        self.queues[index].kick()

    def take(self, index: int) -> list[bytes]:
        """What came in a receive queue; its buffers are offered again."""
        used = [(self.buffers.pop((index, head)), written) for head, written in self.queues[index].take()]
        found = [self.board.memory.read(gpa, written) for gpa, written in used]
        for gpa, _ in used:
            self.offer(index, gpa)
        return found

    def hear(self, index: int, n: int) -> bytes:
        got = b""

        def enough() -> bool:
            nonlocal got
            got += b"".join(self.take(index))
            return len(got) >= n

        self.driver.wait(enough)
        return got

    def send(self, index: int, *pieces: bytes) -> None:
        buffers = []
        for data in pieces:
            gpa = self.driver.allocate(len(data), 1)
            self.board.memory.write(gpa, data)
            buffers.append((gpa, len(data), False))
        self.queues[index].add(buffers)
        self.queues[index].kick()

    def control(self, number: int, event: int, value: int) -> None:
        self.send(3, number.to_bytes(4, "little") + event.to_bytes(2, "little") + value.to_bytes(2, "little"))
        self.queues[3].wait()

    def messages(self, n: int) -> list[tuple[int, int, int, bytes]]:
        found: list[bytes] = []

        def enough() -> bool:
            found.extend(self.take(2))
            return len(found) >= n

        self.driver.wait(enough)
        return [
            (*(int.from_bytes(one[a:b], "little") for a, b in ((0, 4), (4, 6), (6, 8))), one[8:])  # type: ignore[misc]
            for one in found
        ]

    def introduce(self) -> None:
        """As far as a driver comes when it has made both ports and somebody has opened them."""
        self.start()
        self.control(0, DEVICE_READY, 1)
        self.messages(2)
        for number, expected in ((0, 2), (2, 2)):
            self.control(number, PORT_READY, 1)
            self.messages(expected)
            self.control(number, PORT_OPEN, 1)


@pytest.fixture
def made() -> Iterator[Made]:
    one = Made()
    yield one
    one.close()


@pytest.fixture
def ready(made: Made) -> Made:
    made.introduce()
    return made


def test_5_3_4_configuration(made: Made) -> None:
    driver = Driver(made.board, ALL)
    assert driver.pci_read(2, 2) == 0x1043
    assert driver.offered() & 7 == F_SIZE | F_MULTIPORT | F_EMERG_WRITE
    assert driver.config(0, 4) == 0
    assert driver.config(4, 4) == 3  # max_nr_ports
    assert driver.read(0x12, 2) == 2 + 2 + 2 * 2


def test_5_3_5_1_emergency_write_before_any_driver(made: Made) -> None:
    driver = Driver(made.board, 0)
    for byte in b"Oops":
        driver.set_config(8, 4, byte | 0xFF00)
    assert made.hosts[0].got == b"Oops"


def test_5_3_6_2_ports_are_added_and_named(made: Made) -> None:
    made.start()
    made.control(0, DEVICE_READY, 1)
    assert made.messages(2) == [(0, DEVICE_ADD, 0, b""), (2, DEVICE_ADD, 0, b"")]
    made.control(0, PORT_READY, 1)
    assert made.messages(2) == [(0, CONSOLE_PORT, 1, b""), (0, PORT_OPEN, 1, b"")]
    made.control(2, PORT_READY, 1)
    assert made.messages(2) == [(2, PORT_NAME, 1, b"org.skep.test"), (2, PORT_OPEN, 1, b"")]
    made.control(0, DEVICE_READY, 1)
    made.control(2, PORT_READY, 0)
    made.function.pause()
    assert made.take(2) == [], "5.3.6.2.1: a port that exists is not added again"


def test_5_3_6_2_who_comes_and_goes(ready: Made) -> None:
    ready.hosts[2].receiver.attached(False)
    assert ready.messages(1) == [(2, PORT_OPEN, 0, b"")]
    ready.hosts[2].receiver.attached(True)
    assert ready.messages(1) == [(2, PORT_OPEN, 1, b"")]
    ready.hosts[2].receiver.attached(True)
    ready.function.pause()
    assert ready.take(2) == []
    ready.hosts[2].receiver.attached(False)
    before = ready.function.save()
    assert ready.take(2) == [] and ready.function.save() == before
    ready.function.resume()
    assert ready.messages(1) == [(2, PORT_OPEN, 0, b"")]


def test_5_3_6_2_nobody_there_is_not_told_open(made: Made) -> None:
    made.hosts[2].receiver.attached(False)
    made.start()
    made.control(0, DEVICE_READY, 1)
    made.messages(2)
    made.control(2, PORT_READY, 1)
    assert made.messages(1) == [(2, PORT_NAME, 1, b"org.skep.test")]
    made.hosts[0].receiver.attached(False)  # of which the driver knows nothing yet
    made.function.pause()
    assert made.take(2) == []


def test_5_3_6_2_the_terminals_size(ready: Made) -> None:
    ready.hosts[0].receiver.resized(132, 50)
    size = bytes((132, 0, 50, 0))
    assert ready.messages(1) == [(0, RESIZE, 0, size)]
    ready.hosts[0].receiver.resized(1 << 16, 50)
    assert ready.driver.config(0, 4) == 132 | 50 << 16
    ready.control(0, PORT_READY, 1)
    assert (0, RESIZE, 0, size) in ready.messages(3)


def test_5_3_6_the_terminals_size_without_multiport(made: Made) -> None:
    made.hosts[0].receiver.resized(80, 24)
    made.start(ALL & ~F_MULTIPORT)
    assert made.driver.config(0, 2) == 80 and made.driver.config(2, 2) == 24
    before = made.driver.read(0x15, 1)
    made.hosts[0].receiver.resized(100, 30)
    assert made.board.messages.wait(made.driver.CONFIG_DATA)
    assert made.driver.read(0x15, 1) != before
    assert made.driver.config(0, 2) == 100 and made.driver.config(2, 2) == 30


def test_5_3_6_both_ways_without_multiport(made: Made) -> None:
    made.start(ALL & ~F_MULTIPORT)
    made.hosts[0].say(b"hello")
    assert made.hear(0, 5) == b"hello"
    made.send(1, b"wor", b"ld")
    made.hosts[0].wait_for(b"world")


@pytest.mark.parametrize(("number", "queue"), [(0, 0), (2, 6)])
def test_5_3_6_both_ways(ready: Made, number: int, queue: int) -> None:
    ready.hosts[number].say(bytes(range(200)))
    assert ready.hear(queue, 200) == bytes(range(200))
    ready.send(queue + 1, b"a", b"bc")
    ready.hosts[number].wait_for(b"abc")
    assert [written for _, written in ready.queues[queue + 1].wait()] == [0]
    assert not ready.hosts[2 - number].got


def test_input_waits_until_the_guest_opens_the_port(made: Made) -> None:
    made.start()
    made.control(0, DEVICE_READY, 1)
    made.messages(2)
    made.hosts[2].say(b"early")
    assert made.hosts[2].waiting == b"early"
    made.control(2, PORT_OPEN, 1)
    assert made.hear(6, 5) == b"early"
    made.control(2, PORT_OPEN, 0)
    made.hosts[2].say(b"later")
    assert made.hosts[2].waiting == b"later" and made.take(6) == []


def test_more_input_than_the_guest_has_buffers_for(ready: Made) -> None:
    """Nothing is lost, and no more than a bounded part of it kept here."""
    data = random.Random(1).randbytes(100_000)
    ready.hosts[2].say(data)
    assert len(ready.hosts[2].waiting) > 80_000
    assert ready.hear(6, len(data)) == data


def test_a_named_ports_output_waits_in_the_guests_buffers(ready: Made) -> None:
    host, queue = ready.hosts[2], ready.queues[7]
    host.takes = 10
    ready.send(7, b"0123456", b"789abcdef")
    ready.send(7, b"next")
    host.wait_for(b"0123456789")
    ready.function.pause()
    assert queue.take() == [], "its buffer is not given back before the host has all of it"
    saved = ready.function.save()
    ready.function.load(saved)
    ready.function.resume()
    host.take_more(3)
    host.wait_for(b"0123456789abc")
    assert queue.take() == []
    host.take_more(100)
    host.wait_for(b"0123456789abcdefnext")
    assert len(queue.wait(2)) == 2


def test_a_consoles_output_never_waits(ready: Made) -> None:
    """Linux spins until it is taken."""
    ready.hosts[0].takes = 0
    ready.send(1, b"x" * 1000)
    ready.queues[1].wait()
    assert ready.hosts[0].got == b"x" * 1000


def test_a_reset_forgets_what_was_half_said(ready: Made) -> None:
    host = ready.hosts[2]
    host.takes = 4
    ready.send(7, b"0123456789")
    host.wait_for(b"0123")
    host.takes = 1 << 20
    ready.introduce()
    ready.send(7, b"again")
    host.wait_for(b"0123again")


@pytest.mark.parametrize(("queue", "writable"), [(0, False), (1, True), (2, False), (3, True), (6, False), (7, True)])
def test_5_3_6_1_buffers_of_the_wrong_kind(made: Made, queue: int, writable: bool) -> None:
    made.driver = Driver(made.board, ALL)
    made.queues = made.driver.start_all(8)
    made.queues[queue].add([(made.driver.allocate(16), 16, writable)])
    made.queues[queue].kick()
    if not writable:  # there is something to put into it
        made.control(0, DEVICE_READY, 1)
        if queue != 2:
            made.control(2 if queue else 0, PORT_OPEN, 1)
            made.hosts[2 if queue else 0].say(b"x")
    assert made.board.messages.wait(made.driver.CONFIG_DATA)
    assert made.driver.status & NEEDS_RESET
    made.introduce()


def test_5_3_6_2_messages_that_make_no_sense_are_ignored(ready: Made) -> None:
    for number, event, value in ((1, PORT_READY, 1), (1, PORT_OPEN, 1), (9, PORT_OPEN, 1), (0, RESIZE, 0), (0, 99, 1)):
        ready.control(number, event, value)
    ready.send(3, b"\0" * 7)
    assert ready.board.messages.wait(ready.driver.CONFIG_DATA)
    assert "a control message of 7 bytes" in ready.device.complaints[-1]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("control"), st.integers(0, 3), st.integers(0, 8), st.integers(0, 2)),
            st.tuples(st.just("attached"), st.sampled_from([0, 2]), st.booleans(), st.none()),
            st.tuples(st.just("resized"), st.sampled_from([0, 2]), st.integers(0, 1 << 17), st.integers(0, 99)),
        ),
        max_size=60,
    )
)
def test_what_is_to_be_said_is_bounded(traffic: list[tuple[str, int, int, int]]) -> None:
    """A driver that asks and asks, and never offers a buffer for the answers."""
    made = Made()
    made.driver = Driver(made.board, ALL)
    made.queues = made.driver.start_all(8)
    for what, number, a, b in traffic:
        if what == "control":
            made.control(number, a, b)
        else:
            receiver = made.hosts[number].receiver
            receiver.attached(bool(a)) if what == "attached" else receiver.resized(a, b)
        assert len(made.device.to_say) <= 2 * 6
    assert not made.driver.status & NEEDS_RESET
    made.close()


def ports(**keys: str) -> dict[int, PortOptions]:
    tree = Tree({"pci.0.3.0.device": "virtio-console"})
    for key, value in keys.items():
        tree[f"pci.0.3.0.{key.replace('_', '.')}"] = value
    return port_options(tree.node("pci.0.3.0"))


def test_options() -> None:
    assert ports(port_0_path="stdio", port_0_console="true", port_15_path="unix:/a", port_15_name="org.x") == {
        0: PortOptions("stdio", None, True),
        15: PortOptions("unix:/a", "org.x", False),
    }


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "pci.0.3.0.port: has no port"),
        ({"port_16_path": "x"}, "pci.0.3.0.port.16: no such port"),
        ({"port_01_path": "x"}, "pci.0.3.0.port.01: no such port"),
        ({"port_a_path": "x"}, "no such port"),
        ({"port_0_name": "x"}, "pci.0.3.0.port.0.path: must be given"),
        ({"port_0_path": "x", "port_0_nam": "y"}, "the nearest is pci.0.3.0.port.0.name"),
        ({"port_0_path": "x", "port_0_name": "a\tb"}, "printable"),
        ({"port_0_path": "x", "port_0_name": "\u00fc" * 65}, "128 bytes"),
        ({"port_0_path": "x", "ports": "y"}, "unknown configuration key"),
    ],
)
def test_mistakes_are_one_line(keys: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        ports(**keys)
    assert says in str(caught.value) and "\n" not in str(caught.value)


class TestConformance(DeviceConformance[VirtioPci]):
    accesses = 30_000

    def make_device(self) -> VirtioPci:
        board = Board()
        options = {0: PortOptions("", None, True), 1: PortOptions("", "one", False)}
        device = VirtioConsole("console", board.memory, board.lock, options, {0: Host(), 1: Host()})
        function = VirtioPci(device)
        board.pci.add(function, 1)
        return function

    def regions(self, device: VirtioPci) -> Sequence[tuple[IoRegion, int]]:
        return [(bar.region, bar.size) for bar in device.bars.values()]


@settings(max_examples=30, deadline=None)
@given(
    said=st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=5), min_size=1, max_size=5),
    takes=st.lists(st.integers(1, 3000), min_size=4, max_size=8),
    pauses=st.booleans(),
)
def test_2_7_4_what_a_guest_says_arrives_whole_however_it_is_cut(
    said: list[list[int]], takes: list[int], pauses: bool
) -> None:
    """Buffers cut anyhow, and a host that takes a little now and then, with the machine frozen in between."""
    made = Made()
    made.introduce()
    host, queue = made.hosts[2], made.queues[7]
    host.takes = 0
    rng = random.Random(len(said))
    whole = b""
    for cuts in said:
        pieces = [rng.randbytes(n) for n in cuts]
        if len(queue.free) < len(pieces):
            break
        made.send(7, *pieces)
        whole += b"".join(pieces)
    for n in (*takes, len(whole)):
        host.take_more(n)
        made.driver.wait(lambda: host.takes <= 0 or len(host.got) == len(whole))
        assert host.takes >= 0, "never more than there was room for"
        if pauses:
            made.function.pause()
            made.function.load(made.function.save())
            made.function.resume()
    assert host.got == whole
    queue.wait(len(queue.chains))
    made.close()


@settings(max_examples=60, deadline=None)
@given(garbage=st.lists(st.binary(min_size=64, max_size=512), min_size=3, max_size=3), kicks=st.integers(1, 3))
def test_2_1_2_garbage_in_any_queue_ends_in_a_reset_at_most(hostile: Made, garbage: list[bytes], kicks: int) -> None:
    hostile.driver = Driver(hostile.board, ALL)
    hostile.queues = hostile.driver.start_all(8, size=16)
    memory = hostile.board.memory
    for queue in hostile.queues:
        memory.write(queue.desc, garbage[0][:256])
        memory.write(queue.avail, garbage[1][:38])
        memory.write(queue.used, garbage[2][:134])
    for port in hostile.device.ports.values():
        port.open(True)
    for _ in range(kicks):
        for index in range(8):
            hostile.driver.notify(index)
        for host in hostile.hosts.values():
            host.say(b"x" * 100)
            host.receiver.attached(not hostile.device.ports[0].present)
    hostile.function.pause()
    hostile.function.resume()
    assert all("the driver broke the rules" in complaint for complaint in hostile.device.complaints)
    for host in hostile.hosts.values():
        host.got, host.waiting, host.takes = b"", b"", 1 << 20
        host.receiver.attached(True)
    hostile.introduce()
    hostile.send(7, b"sane")
    hostile.hosts[2].wait_for(b"sane")


@pytest.fixture(scope="module")
def hostile() -> Iterator[Made]:
    one = Made()
    yield one
    one.close()
