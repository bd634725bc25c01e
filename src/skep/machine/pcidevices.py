"""The devices that a tree may put into PCI slots, whatever the kind of machine. A VM imports those that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from skep.bus.pci import HostBridge, PciFunction
from skep.config import Node, keys_of, view
from skep.config.views import NoKeys
from skep.errors import UserError
from skep.locks import Lock
from skep.machine import PlugSerial
from skep.memory import GuestMemory

_QUEUES = 4
"""Of a disk, unless the tree says otherwise; fewer where there are fewer CPUs."""


class Surroundings(NamedTuple):
    """What a device gets of the board that it is on."""

    memory: GuestMemory
    lock: Lock
    cpus: int
    plug: PlugSerial
    say: Callable[[str], None]


def make_pci_device(node: Node, board: Surroundings) -> PciFunction:
    """The device that ``node`` describes. Raises UserError, and leaves nothing open then."""
    kind = node.get("device")
    known = f"known are {', '.join(_KINDS)}"
    if kind is None:
        raise UserError("says nothing of its device", node.full("device"), known)
    if kind not in _KINDS:
        raise UserError(f"no such device: {kind!r}", node.full("device"), known)
    return _KINDS[kind].make(f"{kind} {node.path.removeprefix('pci.')}", node, board)


def describe() -> Iterator[str]:
    """Every device and its keys, a line each."""
    for name, kind in _KINDS.items():
        yield f"{name}: {kind.about}"
        for key, about in kind.keys().items():
            yield f"  {key:<16}{about}"


def check_boot_indexes(nodes: Iterable[Node]) -> None:
    """One device is first, one second. Raises UserError where two would be."""
    first: dict[str, str] = {}
    for node in nodes:
        index, key = node.get("bootindex"), node.full("bootindex")
        if index is not None and first.setdefault(index, key) != key:
            raise UserError(f"{index} is the place of {first[index]} too", key, "give each disk another one")


def _hostbridge(name: str, node: Node, board: Surroundings) -> PciFunction:
    view(node, NoKeys, others=("device",))
    return HostBridge()


def _virtio_blk(name: str, node: Node, board: Surroundings) -> PciFunction:
    from skep.block.image import open_disk
    from skep.block.options import BlockOptions
    from skep.devices.virtio.blk import VirtioBlk
    from skep.devices.virtio.pci import VirtioPci

    options = BlockOptions.from_node(node)
    queues = options.queues or min(board.cpus, _QUEUES)
    blk = VirtioBlk(name, board.memory, board.lock, open_disk(options), options, queues, board.say)
    return VirtioPci(blk)


def _virtio_console(name: str, node: Node, board: Surroundings) -> PciFunction:
    from skep.devices.virtio.console import VirtioConsole, port_options
    from skep.devices.virtio.pci import VirtioPci

    ports = port_options(node)
    backends = {
        number: board.plug(port.name or f"{name} port {number}", port.path, node.full(f"port.{number}.path"))
        for number, port in ports.items()
    }
    return VirtioPci(VirtioConsole(name, board.memory, board.lock, ports, backends, board.say))


def _virtio_rnd(name: str, node: Node, board: Surroundings) -> PciFunction:
    from skep.devices.virtio.pci import VirtioPci
    from skep.devices.virtio.rnd import VirtioRnd

    view(node, NoKeys, others=("device",))
    return VirtioPci(VirtioRnd(name, board.memory, board.lock, board.say))


def _no_keys() -> dict[str, str]:
    return {}


def _disk_keys() -> dict[str, str]:
    from skep.block.options import BlockOptions

    return keys_of(BlockOptions)


def _port_keys() -> dict[str, str]:
    from skep.devices.virtio.console import MOST_PORTS, PortOptions

    keys = {f"port.N.{key}": about for key, about in keys_of(PortOptions).items()}
    keys["port.N.path"] += f"; N is 0 to {MOST_PORTS - 1}"
    return keys


class _Kind(NamedTuple):
    make: Callable[[str, Node, Surroundings], PciFunction]
    about: str
    keys: Callable[[], dict[str, str]]


_KINDS = {
    "hostbridge": _Kind(_hostbridge, "what every PCI bus begins with", _no_keys),
    "virtio-blk": _Kind(_virtio_blk, "a disk: virtio-blk,PATH[,KEY[=VALUE]]...", _disk_keys),
    "virtio-console": _Kind(
        _virtio_console,
        "terminals and named ports: virtio-console[,NAME=PATH]..., and console=PATH is a terminal",
        _port_keys,
    ),
    "virtio-rnd": _Kind(_virtio_rnd, "the host's random numbers", _no_keys),
}
