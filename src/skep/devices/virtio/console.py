"""The console device (virtio 1.2, 5.3): up to 16 ports, each a console of the guest's or a named pipe to the host.

With MULTIPORT negotiated, what both sides have to say of ports goes by messages on two control queues; without, there
is port 0 alone, and it is a console. Messages to the driver are kept as what is to be said, each once, and written down
when the driver has a buffer for them: so they are bounded, and tell the state as it is then.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import ClassVar

from skep.config import values
from skep.config.tree import Node
from skep.config.views import NoKeys, View, option, view
from skep.contracts.chardev import CharBackend
from skep.devices.virtio.device import DRIVER_OK, VirtioDevice
from skep.devices.virtio.port import Port
from skep.devices.virtio.queue import Chain, DriverError, Queue
from skep.errors import UserError
from skep.locks import Lock, Order
from skep.memory import GuestMemory

# 5.3.3, feature bits.
F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 1 << 0, 1 << 1, 1 << 2

# 5.3.2, virtqueues: port 0 has the first two, port n > 0 has 2n + 2 and 2n + 3.
CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3

# 5.3.6.2, control messages.
DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)

MOST_PORTS = 16
QUEUE_SIZE = 32
_MESSAGE = struct.Struct("<IHH")  # id, event, value
_CONFIG = struct.Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr
_EMERG_WRITE = 8
_LONGEST_NAME = 128


def _port_name(value: str) -> str:
    if not value.isprintable() or not 0 < len(value.encode(errors="replace")) <= _LONGEST_NAME:
        raise ValueError(f"{value!r} is not 1 to {_LONGEST_NAME} bytes of printable text")
    return value


class PortOptions(View):
    """The keys under ``port.N`` of a virtio-console."""

    path: str = option(values.any_text, doc="where the host's end is, as for lpc.com1.path")
    name: str | None = option(_port_name, None, doc="the port's name in the guest: /dev/virtio-ports/NAME")
    console: bool = option(values.boolean, False, doc="a terminal of the guest: hvc0, and so on in the order of ports")


def port_options(node: Node) -> dict[int, PortOptions]:
    """The ports of the device at ``node``, by number. Raises UserError."""
    view(node, NoKeys, others=("device", "port"))
    ports = {}
    for number in node.node("port").children():
        if not number.isdecimal() or str(int(number)) != number or int(number) >= MOST_PORTS:
            raise UserError("no such port", node.full(f"port.{number}"), f"they are port.0 to port.{MOST_PORTS - 1}")
        ports[int(number)] = view(node.node(f"port.{number}"), PortOptions)
    if not ports:
        raise UserError("has no port", node.full("port"), "say where one goes, as in port.0.path=stdio")
    return ports


class VirtioConsole(VirtioDevice):
    state_fields: ClassVar[tuple[str, ...]] = (*VirtioDevice.state_fields, "ports_state", "to_say")
    device_id = 3
    class_code = 0x07_8000  # simple communication controller, other

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        lock: Lock,
        ports: dict[int, PortOptions],
        backends: dict[int, CharBackend],
        say: Callable[[str], None] | None = None,
    ) -> None:
        """``backends`` belong to the caller, who closes them first."""
        self._options = ports
        self._count = max(ports) + 1
        self._chars = Lock(f"{name} ports", Order.CHARDEV)
        queues = [QUEUE_SIZE] * (2 * self._count + 2)
        super().__init__(name, memory, lock, F_SIZE | F_MULTIPORT | F_EMERG_WRITE, queues, say)
        self.ports = {number: self._port(number, backends[number]) for number in ports}
        self.ports_state = list(self.ports.values())
        self._of_queue = {
            queue: port for number, port in self.ports.items() for queue in (_receiveq(number), _receiveq(number) + 1)
        }
        self.power_on()
        for port in self.ports.values():
            port.backend.connect(port)

    def _port(self, number: int, backend: CharBackend) -> Port:
        receiveq = _receiveq(number)
        return Port(
            backend,
            self._chars,
            console=self._options[number].console,
            changed=lambda: self._port_changed(number),
            take=lambda: self.ask(receiveq),
            give=lambda: self.ask(receiveq + 1),
        )

    def power_on(self) -> None:
        self.to_say: list[list[int]] = []
        """Messages that the driver has not had a buffer for: port, event, value."""
        for port in self.ports.values():
            port.reset()

    def queue_reset(self, index: int) -> None:
        if index & 1 and index in self._of_queue:
            self._of_queue[index].sent = 0

    # Configuration space.

    def config_read(self, offset: int, size: int) -> int:
        columns, rows = self._size_of_port_0()
        config = _CONFIG.pack(columns, rows, self._count, 0)
        return int.from_bytes(config[offset : offset + size], "little")

    def _size_of_port_0(self) -> tuple[int, int]:
        return (0 in self.ports and self.ports[0].size) or (0, 0)

    def config_write(self, offset: int, size: int, value: int) -> None:
        if offset == _EMERG_WRITE and 0 in self.ports:
            self.ports[0].emergency(value & 0xFF)

    def negotiated(self) -> None:
        if not self._multiport and 0 in self.ports:
            self.ports[0].open(True)

    @property
    def _multiport(self) -> bool:
        return bool(self.driver_features & F_MULTIPORT)

    # The life of a device. The caller holds no lock.

    def pause(self) -> None:
        for port in self.ports.values():
            port.set_paused(True)
        super().pause()

    def resume(self) -> None:
        super().resume()
        for number, port in self.ports.items():
            port.set_paused(False)
            self._port_changed(number)

    # Requests.

    def ready(self, queue: Queue) -> bool:
        index = queue.index
        if index == CONTROL_RECEIVE:
            return bool(self.to_say)
        port = self._of_queue.get(index)
        if port is None:
            return index == CONTROL_TRANSMIT
        return port.has_room if index & 1 else port.has_input

    def serve(self, chain: Chain) -> int:
        index = chain.queue.index
        if index == CONTROL_RECEIVE:
            return self._say_one(chain)
        if index == CONTROL_TRANSMIT:
            self._hear(chain)
            return 0
        port = self._of_queue[index]
        return port.transmit(chain, lambda: self.worker.held) if index & 1 else port.fill(chain)

    # Control messages (5.3.6.2).

    def _hear(self, chain: Chain) -> None:
        if chain.writable:
            raise DriverError("a device-writable buffer in the control transmitq")
        message = b"".join(bytes(buffer[: _MESSAGE.size]) for buffer in chain.readable[: _MESSAGE.size])
        if len(message) < _MESSAGE.size:
            raise DriverError(f"a control message of {len(message)} bytes")
        number, event, value = _MESSAGE.unpack_from(message)
        port = self.ports.get(number)
        if event == DEVICE_READY and value == 1:
            for number, port in self.ports.items():
                if not port.added:
                    port.added = True
                    self._tell(number, DEVICE_ADD)
        elif port is not None and event == PORT_READY and value == 1 and port.added:
            self._introduce(number, port)
        elif port is not None and event == PORT_OPEN:
            port.open(bool(value))
            self.ask(_receiveq(number))

    def _introduce(self, number: int, port: Port) -> None:
        options = self._options[number]
        port.known = True
        if options.console:
            self._tell(number, CONSOLE_PORT, 1)
        if options.name is not None:
            self._tell(number, PORT_NAME, 1)
        port.size_news = port.size is not None
        port.host_open = False
        self._tell_news(number, port)

    def _tell_news(self, number: int, port: Port) -> None:
        if port.size_news:
            port.size_news = False
            self._tell(number, RESIZE)
        if port.present != port.host_open:
            port.host_open = port.present
            self._tell(number, PORT_OPEN, int(port.present))

    def _tell(self, number: int, event: int, value: int = 0) -> None:
        """Once is enough, and the last time counts; of PORT_OPEN both values may wait."""
        message = [number, event, value]
        with self._chars:
            if message in self.to_say:
                self.to_say.remove(message)
            self.to_say.append(message)
        self.ask(CONTROL_RECEIVE)

    def _say_one(self, chain: Chain) -> int:
        if chain.readable:
            raise DriverError("a device-readable buffer in the control receiveq")
        with self._chars:
            number, event, value = self.to_say.pop(0)
        message = _MESSAGE.pack(number, event, value)
        if event == PORT_NAME:
            message += (self._options[number].name or "").encode()
        elif event == RESIZE:
            message += struct.pack("<HH", *(self.ports[number].size or (0, 0)))
        buffer = chain.writable[0]
        message = message[: len(buffer)]
        buffer[: len(message)] = message
        return len(message)

    def _port_changed(self, number: int) -> None:
        """Somebody came or left, or the terminal's size is another. On a thread of the backend's."""
        port = self.ports[number]
        with self.lock:
            if self._paused:
                return  # we come back to it
            if port.known:
                self._tell_news(number, port)
            elif number == 0 and port.size_news and self.status & DRIVER_OK and not self._multiport:
                port.size_news = False
                self.config_changed()


def _receiveq(number: int) -> int:
    return 2 * number + 2 if number else 0
