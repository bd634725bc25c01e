"""Shorter ways to say what takes several keys; whoever offers them to a user writes the same keys."""

from __future__ import annotations

import os

from skep.config.grammar import parse_options
from skep.config.tree import Tree
from skep.errors import UserError

FIRST_SLOT, LAST_SLOT = 2, 30
"""Of PCI bus 0: slot 0 is the host bridge's, and bhyve's users keep 1 or 31 for LPC."""

SERIAL_PORTS = ("com1", "com2", "com3", "com4")


def literally(text: str) -> str:
    """A value that stands for ``text`` itself: nothing in it is expanded."""
    return text.replace("%", "%%")


def file_name(path: str) -> str:
    """A value that names a file, also for who reads the tree in another directory. None is no file."""
    return literally(os.path.abspath(path)) if path else ""


def add_disk(tree: Tree, text: str, where: str) -> None:
    """The next free slot of bus 0 takes a virtio disk, given as ``PATH[,option[=value]]...``."""
    add_device(tree, f"virtio-blk,{text}", where)


def add_device(tree: Tree, text: str, where: str) -> None:
    """The next free slot of bus 0 takes a device, given as bhyve's -s has it: ``EMULATION[,option[=value]]...``.

    Two emulations have a grammar of their own: ``virtio-blk,PATH[,option]...``, and ``virtio-console,NAME=PATH...``,
    a port each, of which the one named ``console`` is a terminal of the guest's.
    """
    kind, comma, rest = text.partition(",")
    options = parse_options(rest, where, first="path" if kind == "virtio-blk" else None) if comma else {}
    if kind == "virtio-console":
        keys = _ports(options, where)
    else:
        keys = {key: literally(value) for key, value in options.items()}
    if kind == "virtio-blk" and "path" in options:
        keys["path"] = file_name(options["path"])
    taken = tree.node("pci.0").children()
    slot = next((slot for slot in range(FIRST_SLOT, LAST_SLOT + 1) if str(slot) not in taken), None)
    if slot is None:
        raise UserError(f"no free PCI slot for another {kind}", where)
    place = f"pci.0.{slot}.0"
    tree[f"{place}.device"] = literally(kind)
    for key, value in keys.items():
        tree[f"{place}.{key}"] = value


def add_console(tree: Tree, text: str, where: str) -> None:
    """What a serial port is plugged into, given as ``[PORT=]WHERE``; com1 without a port."""
    port, equals, plug = text.partition("=")
    if not equals or ":" in port:  # a file's name may have a = in it
        port, plug = "com1", text
    if port not in SERIAL_PORTS:
        raise UserError(f"no such port: {port!r}", where, f"say {', '.join(SERIAL_PORTS)} before the =")
    tree[f"lpc.{port}.path"] = _plug(plug)


def _plug(text: str) -> str:
    """Where a port leads; the name of a file in it also for who reads the tree in another directory."""
    kind, colon, path = text.partition(":")
    return f"{kind}:{file_name(path)}" if colon and kind in ("unix", "file") else literally(text)


def _ports(ports: dict[str, str], where: str) -> dict[str, str]:
    """The keys of a virtio console's ports. A path that begins with / is a Unix socket, as bhyve has it."""
    keys = {}
    for number, (name, path) in enumerate(ports.items()):
        if not path or path == "true":
            raise UserError(f"the port {name} goes nowhere", where, f"say {name}=/path/of/a/socket")
        keys[f"port.{number}.name"] = literally(name)
        keys[f"port.{number}.path"] = _plug(f"unix:{path}" if path.startswith("/") else path)
        if name == "console":
            keys[f"port.{number}.console"] = "true"
    return keys


def set_cpus(tree: Tree, text: str, where: str) -> None:
    """Processors, given as ``N[,max=M]``."""
    keys = {"cpus": "cpus", "max": "max_cpus"}
    for key, value in parse_options(text, where, first="cpus").items():
        if key not in keys:
            raise UserError(f"no such option: {key}", where, "it is N[,max=M]")
        tree[keys[key]] = value
