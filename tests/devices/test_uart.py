"""The 16550A, against the PC16550D data sheet."""

from __future__ import annotations

import ctypes
import random

import pytest

from skep.bus import Bus
from skep.contracts.chardev import Receiver
from skep.contracts.conformance import DeviceConformance
from skep.contracts.constantports import PRESENT
from skep.contracts.io import IoRegion
from skep.devices.uart import COM1, FCR_ENABLE, IER, IIR_FCR, LCR, LSR, MCR, MSR, RBR_THR, SCR, Uart
from skep.locks import Lock, Order
from tests.boardtest import Wire

RTS, OUT2, LOOP = 2, 8, 16
READY = RTS | OUT2 | 1


class Line:
    """What the port is plugged into: keeps what is written, and offers input when there is room, as backends do."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.waiting = b""
        self.receiver: Receiver | None = None
        self.asked = 0

    def connect(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def write(self, data: bytes) -> None:
        self.written += data

    def output_room(self) -> int:
        return 1 << 16

    def room_available(self) -> None:
        self.asked += 1

    def close(self) -> None: ...

    def send(self, data: bytes = b"") -> None:
        """Offer ``data`` after what waits."""
        self.waiting += data
        assert self.receiver is not None
        room = self.receiver.room()
        while room > 0 and self.waiting:
            given, self.waiting = self.waiting[:room], self.waiting[room:]
            self.receiver.receive(given)
            room = self.receiver.room()


class Port:
    def __init__(self, mcr: int = READY, fcr: int = FCR_ENABLE) -> None:
        self.line, self.irq = Line(), Wire()
        lock = Lock("board", Order.BOARD)
        self.uart = Uart("com1", self.irq, self.line, lock)
        self.bus = Bus(lock)
        self.uart.attach(self.bus)
        self.write(MCR, mcr)
        self.write(IIR_FCR, fcr)

    def read(self, register: int) -> int:
        return self.bus.port_read(COM1 + register, 1)

    def write(self, register: int, value: int) -> None:
        self.bus.port_write(COM1 + register, 1, value)

    def cause(self) -> int:
        return self.read(IIR_FCR) & 0x0F

    def take(self) -> bytes:
        """Read until the receiver is empty."""
        taken = b""
        while self.read(LSR) & 1:
            taken += bytes([self.read(RBR_THR)])
        return taken


class TestUart(DeviceConformance[Uart]):
    def make_device(self) -> Uart:
        port = Port()
        self.line = port.line
        return port.uart

    def regions(self, device: Uart) -> list[tuple[IoRegion, int]]:
        return device.regions()

    def time_passes(self, device: Uart, rng: random.Random) -> None:
        device.receive(rng.randbytes(max(device.room(), 0)))


def test_power_on_values() -> None:
    port = Port(mcr=0, fcr=0)
    port.uart.reset()
    assert [port.read(register) for register in (IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR)] == [0, 1, 0, 0, 0x60, 0xB0, 0]


def test_bytes_go_out_at_once() -> None:
    port = Port()
    for byte in b"hello":
        assert port.read(LSR) & 0x60 == 0x60
        port.write(RBR_THR, byte)
    assert port.line.written == b"hello"


def known(port: Port) -> int | None:
    """LSR, where an engine need not ask for it."""
    word = ctypes.c_uint16.from_address(port.bus.constants.address + 2 * (COM1 + LSR)).value
    return word & 0xFF if word & PRESENT else None


def test_what_is_known_of_lsr_is_what_reading_it_gives() -> None:
    port = Port()
    rng = random.Random(1)
    seen = set()
    for _ in range(5000):
        match rng.randrange(4):
            case 0:
                port.line.send(rng.randbytes(rng.randrange(20)))
            case 1:
                port.write(rng.randrange(8), rng.randrange(256))
            case _:
                port.read(rng.randrange(8))
        value = known(port)
        seen.add(value)
        before = port.uart.save()
        assert port.read(LSR) == value or value is None
        assert port.uart.save() == before or value is None
    assert seen == {None, 0x60, 0x61}
    port.bus.remove_ports(COM1)
    assert known(port) is None


def test_divisor_latch() -> None:
    port = Port()
    port.write(IER, 5)
    port.write(LCR, 0x83)
    port.write(RBR_THR, 0x01)
    port.write(IER, 0x02)
    assert (port.read(RBR_THR), port.read(IER), port.uart.divisor) == (1, 2, 0x201)
    port.write(LCR, 0x03)
    assert port.read(IER) == 5 and not port.line.written
    port.write(SCR, 0xA5)
    assert port.read(SCR) == 0xA5


def test_identification() -> None:
    port = Port(fcr=0)
    assert port.read(IIR_FCR) & 0xC0 == 0
    port.write(IIR_FCR, 0xC0)
    assert port.uart.fcr == 0, "the other bits count only with the FIFOs on"
    port.write(IIR_FCR, 0xC7)
    assert port.read(IIR_FCR) & 0xC0 == 0xC0


def test_priorities_of_interrupts() -> None:
    """Table IV: line status, received data, transmitter empty, modem status; each cleared in its own way."""
    port = Port(mcr=LOOP | OUT2 | RTS, fcr=0)
    port.read(MSR)
    port.write(RBR_THR, 1)
    port.write(RBR_THR, 2)  # overrun
    port.write(MCR, LOOP | OUT2)
    port.write(IER, 0x0F)
    port.write(MCR, OUT2 | RTS)
    assert port.irq.level
    assert port.cause() == 0x06 and port.read(LSR) & 2
    assert port.cause() == 0x04 and port.read(RBR_THR) == 1
    assert port.cause() == 0x02
    assert port.cause() == 0x00 and port.read(MSR) & 0x0F
    assert port.cause() == 0x01 and not port.irq.level


def test_trigger_levels_and_character_timeout() -> None:
    for code, trigger in ((0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)):
        port = Port(fcr=FCR_ENABLE | code)
        port.write(IER, 1)
        port.line.send(bytes(trigger - 1))
        assert port.cause() == (0x0C if trigger > 1 else 0x01) and port.irq.level == (trigger > 1)
        port.line.send(b"x")
        assert port.cause() == 0x04
        port.read(RBR_THR)
        assert port.cause() == (0x0C if trigger > 1 else 0x01)


def test_transmitter_interrupt() -> None:
    port = Port()
    assert not port.irq.level
    port.write(IER, 2)
    assert port.irq.rises == 1, "enabling it while the transmitter is empty"
    assert port.cause() == 2 and not port.irq.level
    assert port.cause() == 1, "reading it cleared it"
    port.write(RBR_THR, 0x41)
    assert port.irq.rises == 2
    port.write(RBR_THR, 0x42)
    assert port.irq.rises == 3, "each write is an edge"
    port.write(IER, 0)
    assert not port.irq.level
    port.write(IER, 2)
    assert port.irq.level


def test_out2_leads_the_interrupt_out() -> None:
    port = Port(mcr=RTS)
    port.write(IER, 2)
    assert not port.irq.level
    port.write(MCR, RTS | OUT2)
    assert port.irq.level
    port.write(MCR, RTS | OUT2 | LOOP)
    assert not port.irq.level


def test_loopback() -> None:
    """Linux's autoconfig: MSR's upper half is MCR's outputs; bytes come back and do not go out."""
    port = Port()
    port.write(MCR, LOOP | 0x0A)
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, LOOP | 0x05)
    assert port.read(MSR) == 0x60 | 0x0B, "RI rose, which is no TERI"
    port.write(MCR, LOOP)
    assert port.read(MSR) == 0x06, "DSR fell, and RI's end is TERI"
    for byte in range(17):
        port.write(RBR_THR, byte)
    assert port.read(LSR) & 3 == 3 and port.take() == bytes(range(16))
    assert not port.line.written
    port.write(MCR, READY)
    assert port.read(MSR) & 0xF0 == 0xB0


def test_nothing_is_lost_of_a_long_input() -> None:
    port = Port()
    data = bytes(range(256)) * 8
    port.line.send(data)
    received = b""
    while True:
        taken = port.take()
        if not taken:
            break
        assert len(taken) <= 16
        received += taken
        assert port.line.asked
        port.line.send()
    assert received == data


def test_without_fifos_one_byte_at_a_time() -> None:
    port = Port(fcr=0)
    port.line.send(b"ab")
    assert port.line.waiting == b"b" and port.read(RBR_THR) == ord("a")
    port.line.send()
    assert port.take() == b"b" and port.read(RBR_THR) == 0


def test_input_waits_until_the_guest_is_ready() -> None:
    """A driver empties the FIFOs, sets up, and asserts RTS: what was typed before is still there."""
    port = Port(mcr=0)
    port.line.send(b"typed before")
    assert not port.read(LSR) & 1
    port.write(IIR_FCR, 0x07)
    port.write(IER, 0x0F)
    port.write(MCR, LOOP | READY)
    assert port.line.receiver is not None and port.line.receiver.room() == 0, "looped back"
    asked = port.line.asked
    port.write(MCR, READY)
    assert port.line.asked > asked
    port.line.send()
    assert port.take() == b"typed before"


def test_a_fifo_that_shrinks_between_the_offer_and_the_bytes_loses_none() -> None:
    port = Port()
    room = port.uart.room()
    port.write(IIR_FCR, 0)
    port.uart.receive(bytes(range(room)))
    assert port.uart.room() == 0 and port.take() == bytes(range(room))


def test_clearing_the_receiver() -> None:
    port = Port()
    port.line.send(b"abc")
    port.write(IIR_FCR, 0x03)
    assert not port.read(LSR) & 1


def test_input_waits_while_paused() -> None:
    port = Port()
    port.uart.pause()
    assert port.uart.room() == 0
    saved = port.uart.save()
    port.uart.receive(b"late")  # it was on its way already
    assert port.uart.save() == saved
    asked = port.line.asked
    port.uart.resume()
    assert port.line.asked == asked + 1 and port.take() == b"late"


@pytest.mark.parametrize("size", [2, 4])
def test_wide_accesses_are_bytes(size: int) -> None:
    port = Port()
    port.bus.port_write(COM1 + SCR - size + 1, size, 0x5A << 8 * (size - 1))
    assert port.read(SCR) == 0x5A
