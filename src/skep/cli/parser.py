"""What can be said on the command line, and which part of the tree each option writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from skep import __version__
from skep.cli.words import Parser
from skep.config import Tree
from skep.config.sugar import add_console, add_device, add_disk, file_name, set_cpus
from skep.errors import UserError

DEFAULT_CMDLINE = "console=ttyS0"
"""For a Linux that was given no command line: where it is to talk."""


Write = Callable[[Tree, str], None]
"""Puts what one option said into a tree."""


class _Later(argparse.Action):
    """Remembers what is to be written, so that options take effect in the order in which they stand."""

    def __init__(self, option_strings: Sequence[str], dest: str, write: Write, **rest: Any) -> None:
        super().__init__(option_strings, "writes", default=argparse.SUPPRESS, **rest)
        self._write = write

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        text = "true" if self.nargs == 0 else value
        namespace.writes = [*getattr(namespace, "writes", ()), (self._write, text)]


def _leaf(key: str) -> Write:
    def write(tree: Tree, value: str) -> None:
        tree[key] = value

    return write


def _file(key: str) -> Write:
    def write(tree: Tree, value: str) -> None:
        tree[key] = file_name(value)

    return write


def _device(tree: Tree, text: str) -> None:
    if text == "help":
        from skep.machine.pcidevices import describe

        print("\n".join(describe()))
        raise SystemExit(0)
    add_device(tree, text, "--device")


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="start a virtual machine in this terminal",
        description="Start a virtual machine; its first serial port is this terminal. Ctrl-A x stops it, Ctrl-A c"
        " goes to its monitor and back.",
        epilog="Every option writes the configuration tree; -o config.dump=1 shows it. Exit status: 0 powered off or"
        " stopped, 3 triple fault, 2 your mistake, 4 ours.",
    )

    def add(*names: str, write: Write, **rest: Any) -> None:
        run.add_argument(*names, action=_Later, write=write, **rest)

    add("name", nargs="?", metavar="NAME", write=_leaf("name"), help="what to call it")
    add("--kernel", metavar="FILE", write=_file("boot.kernel"), help="the kernel: a Linux bzImage, or a vmlinux (PVH)")
    add("--multiboot", metavar="FILE", write=_file("boot.multiboot"), help="instead: a Multiboot kernel")
    add("--initrd", metavar="FILE", write=_file("boot.initrd"), help="the initramfs, or the Multiboot module")
    add("--cmdline", metavar="TEXT", write=_leaf("boot.cmdline"), help=f"its command line ({DEFAULT_CMDLINE})")
    add(
        "-c",
        "--cpus",
        metavar="N[,max=M]",
        write=lambda tree, text: set_cpus(tree, text, "--cpus"),
        help="virtual CPUs, and how many there could be (1)",
    )
    add("-m", "--memory", metavar="SIZE", write=_leaf("memory.size"), help="512M, 4G; a bare number is MiB (256M)")
    add("-S", "--wired", nargs=0, write=_leaf("memory.wired"), help="guest memory stays in the host's RAM")
    add(
        "--disk",
        metavar="PATH[,ro][,format=raw]...",
        write=lambda tree, text: add_disk(tree, text, "--disk"),
        help="a virtio disk; may be repeated",
    )
    add(
        "--device",
        metavar="NAME[,CONF]",
        write=_device,
        help="a PCI device: virtio-rnd; virtio-console,NAME=/PATH/OF/SOCKET,..., of which console= is a terminal; may"
        " be repeated. `--device help` has all of them and their keys",
    )
    add("--engine", metavar="ENGINE", write=_leaf("engine"), help="auto, kvm or translate (auto)")
    add(
        "--console",
        metavar="[PORT=]WHERE",
        write=lambda tree, text: add_console(tree, text, "--console"),
        help="what serial port com1 (or PORT, com1 to com4) is plugged into: stdio, none, pty, unix:PATH, tcp:HOST:PORT"
        " or file:PATH (stdio); may be repeated",
    )
    add(
        "--system-map",
        metavar="FILE",
        write=_file("boot.system_map"),
        help="names for the kernel's addresses, should it fail (the kernel's own)",
    )
    add(
        "--silence",
        metavar="SECONDS",
        write=_leaf("explain.silence"),
        help="say what the guest does when it says nothing for so long (never)",
    )
    add("--no-reboot", nargs=0, write=_leaf("no_reboot"), help="a reboot of the guest ends it, with status 0")
    add("--stats", nargs=0, write=_leaf("stats"), help="tell at the end what the engine did")
    add("--perf-map", nargs=0, write=_leaf("perf_map"), help="name the guest's code for Linux perf")
    add("-o", metavar="KEY=VALUE", write=lambda tree, text: tree.assign(text), help="set any key of the tree")
    add("-k", metavar="FILE", write=lambda tree, path: tree.load(path), help="read a file of KEY=VALUE lines")
    run.add_argument("-v", "--verbose", action="store_true", help="say what is chosen, and why, on standard error")
    run.set_defaults(command=_run)


def tree_of(arguments: argparse.Namespace) -> Tree:
    """The configuration that the command line asks for, not frozen yet."""
    tree = Tree()
    for write, value in getattr(arguments, "writes", ()):
        write(tree, value)
    tree.set_default("lpc.com1.path", "stdio")
    if "boot.kernel" in tree:
        tree.set_default("boot.cmdline", DEFAULT_CMDLINE)
    return tree


def _run(arguments: argparse.Namespace) -> int:
    from skep.cli.run import run

    return run(tree_of(arguments), arguments.verbose)


def _add_guest(commands: Any) -> None:
    guest = commands.add_parser(
        "guest",
        help="make a guest to try",
        description="Make a kernel and an initramfs from this system's packages, and print `kernel=` and `initrd=`"
        " lines with their paths; with --root also a disk image with systemd, as `root=`. They are kept under"
        " $XDG_CACHE_HOME/skep.",
    )
    guest.add_argument("system", choices=["debian"], help="whose packages")
    guest.add_argument("--arch", default="amd64", help="the guest's architecture (amd64)")
    guest.add_argument("--refresh", action="store_true", help="make it again from today's packages")
    guest.add_argument("--full", action="store_true", help="the kernel with drivers for real machines, not the cloud's")
    guest.add_argument("--vmlinux", action="store_true", help="unpack the kernel: `kernel=` is then an ELF file")
    guest.add_argument("--root", action="store_true", help="a whole system on a disk image; takes a minute or two")
    guest.add_argument("--size", help="of the root's image, which is sparse (1G)")
    guest.set_defaults(command=_guest)


def _guest(arguments: argparse.Namespace) -> int:
    if arguments.root:
        return _guest_root(arguments)
    if arguments.size is not None:
        raise UserError("there is no image without --root", "--size")
    from skep.guest import debian

    guest = debian.obtain(arguments.arch, arguments.refresh, arguments.full)
    kernel = debian.vmlinux(guest.kernel) if arguments.vmlinux else guest.kernel
    print(f"kernel={kernel}\ninitrd={guest.initrd}")
    return 0


def _guest_root(arguments: argparse.Namespace) -> int:
    from skep.guest import debian, root

    if arguments.full:
        raise UserError("the root is made for the cloud kernel", "--full", "leave it out")
    guest = root.obtain(arguments.arch, arguments.size or root.SIZE, arguments.refresh)
    kernel = debian.vmlinux(guest.kernel) if arguments.vmlinux else guest.kernel
    print(f"kernel={kernel}\ninitrd={guest.initrd}\nroot={guest.image}")
    if sys.stderr.isatty():
        print(root.how_to_run(guest), file=sys.stderr)
    return 0


def _add_ctl(commands: Any) -> None:
    import dataclasses

    from skep.control.actions import ACTIONS

    ctl = commands.add_parser(
        "ctl",
        help="ask something of a VM that runs",
        description="Ask something of a VM of this user's that runs; `skep list` shows them.",
    )
    ctl.set_defaults(command=_ctl)
    ctl.add_argument("name", metavar="NAME", help="the VM's name")
    asked = ctl.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=Parser)
    for name, kind in ACTIONS.items():
        action = asked.add_parser(name, help=kind.__doc__, description=kind.__doc__)
        for field in dataclasses.fields(kind):
            words, about = field.metadata, field.metadata["help"]
            if field.default is dataclasses.MISSING:
                action.add_argument(field.name, metavar=field.name.upper(), type=words["from_words"], help=about)
            else:
                action.add_argument(f"--{field.name}", metavar="N", type=words["from_words"], help=about)
        action.add_argument("--json", action="store_true", help="print the answer as it came")


def _ctl(arguments: argparse.Namespace) -> int:
    import dataclasses

    from skep.cli.ctl import ctl
    from skep.control.actions import ACTIONS

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(ACTIONS[arguments.action])}
    return ctl(arguments.name, arguments.action, given, arguments.json)


def _add_list(commands: Any) -> None:
    listing = commands.add_parser(
        "list", help="show the VMs that run", description="Show the VMs of this user's that run."
    )
    listing.add_argument("--json", action="store_true", help="all that is known of them")
    listing.set_defaults(command=_list)


def _add_top(commands: Any) -> None:
    top = commands.add_parser(
        "top",
        help="show which virtual CPU runs on which of the host's",
        description="Show the virtual CPUs of this user's VMs, the busiest first: what each does, on which CPU of the"
        " host, how much of one it takes (BUSY) and waits for (STEAL), and how often it leaves guest code, for what."
        " On a terminal again and again until Ctrl-C, elsewhere once.",
    )
    top.add_argument("-n", "--times", metavar="N", type=int, help="show it N times")
    top.add_argument("-d", "--delay", metavar="SECONDS", type=float, default=1.0, help="between two looks (1)")
    top.add_argument("--cpu", metavar="N", type=int, help="only what runs on CPU N of the host")
    top.add_argument("--json", action="store_true", help="all that is known, as JSON")
    top.set_defaults(command=_top)


def _top(arguments: argparse.Namespace) -> int:
    from skep.cli.top import top

    return top(arguments.times, arguments.delay, arguments.cpu, arguments.json)


def _list(arguments: argparse.Namespace) -> int:
    from skep.cli.ctl import list_vms

    return list_vms(arguments.json)


def _add_image(commands: Any) -> None:
    _add_tool(commands, "image", _image, "make, check, convert and change disk images, as qemu-img does")


def _add_io(commands: Any) -> None:
    _add_tool(commands, "io", _io, "read and write a disk image by commands, as qemu-io does")


def _add_tool(commands: Any, name: str, do: Callable[[argparse.Namespace], int], about: str) -> None:
    tool = commands.add_parser(name, add_help=False, prefix_chars="\0", help=about)
    tool.add_argument("words", nargs=argparse.REMAINDER)
    tool.set_defaults(command=do)


def _image(arguments: argparse.Namespace) -> int:
    from skep.cli.image import image

    return image(arguments.words)


def _io(arguments: argparse.Namespace) -> int:
    from skep.cli.io import io

    return io(arguments.words)


_COMMANDS: dict[str, Callable[[Any], None]] = {
    "run": _add_run,
    "guest": _add_guest,
    "ctl": _add_ctl,
    "list": _add_list,
    "top": _add_top,
    "image": _add_image,
    "io": _add_io,
}


def make_parser(asked: str | None = None) -> Parser:
    """Of all commands and their options, or of the command that is asked for, if there is such a one."""
    parser = Parser(prog="skep", description="A hypervisor in Python.")
    parser.add_argument("--version", action="version", version=f"skep {__version__}")
    commands = parser.add_subparsers(prog=parser.prog, metavar="COMMAND", parser_class=Parser)
    for name in (asked,) if asked is not None and asked in _COMMANDS else _COMMANDS:
        _COMMANDS[name](commands)
    return parser


def run_command(arguments: Sequence[str]) -> int:
    """Parse and do. Raises UserError for what is wrong with the words."""
    parser = make_parser(arguments[0] if arguments else None)
    parsed = parser.parse_args(arguments)
    if not hasattr(parsed, "command"):
        parser.error("a command is missing")
    status: int = parsed.command(parsed)
    return status
