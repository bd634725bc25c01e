"""The words of `skep image`, which are qemu-img's."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from skep import __version__
from skep.block.qcow2.create import parse_size
from skep.cli.image import commands
from skep.cli.opening import CACHES
from skep.cli.words import Parser

_SECRET = "a secret: secret,id=NAME,file=PATH"
_IMAGE_OPTS = "FILE is options: driver=qcow2,file.filename=disk.qcow2"

ENGINES = ("io_uring", "native", "threads")
"""`native`, Linux's older interface, is io_uring here."""


def size(text: str) -> int:
    """Bytes, with a suffix of k, M, G, T, P or E if need be."""
    found = parse_size(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size")
    return found


class _Subcommand(NamedTuple):
    do: Callable[[Any], int]
    about: str
    groups: tuple[Callable[[Parser], None], ...]
    """Words that others have too."""
    words: Callable[[Parser], None]


def make_parser(asked: str | None = None) -> Parser:
    """Of all subcommands, or of the one that is asked for, if there is such a one: the others would take longer to make
    than many a command takes."""
    parser = Parser(prog="skep image", description="Make, look at, check, convert and change disk images.")
    parser.add_argument("-V", "--version", action="version", version=f"skep image {__version__}")
    subcommands = parser.add_subparsers(prog=parser.prog, metavar="SUBCOMMAND", parser_class=Parser)
    for name in (asked,) if asked is not None and asked in _SUBCOMMANDS else _SUBCOMMANDS:
        one = _SUBCOMMANDS[name]
        made: Parser = subcommands.add_parser(name, help=one.about, description=one.about, allow_abbrev=False)
        made.set_defaults(command=one.do)
        made.add_argument("--object", dest="objects", action="append", default=[], metavar="OBJECT", help=_SECRET)
        if name != "create":
            made.add_argument("--image-opts", action="store_true", help=_IMAGE_OPTS)
        for group in one.groups:
            group(made)
        one.words(made)
    return parser


def _info(one: Parser) -> None:
    one.add_argument("--backing-chain", action="store_true", help="and the images below it")
    _file(one)


def _create(one: Parser) -> None:
    one.set_defaults(image_opts=False)
    one.add_argument("-f", dest="format", default="raw", metavar="FORMAT", help="of the image (raw)")
    one.add_argument("-b", dest="backing", metavar="FILE", help="lie over this image")
    one.add_argument("-F", dest="backing_format", metavar="FORMAT", help="of the image below")
    one.add_argument("-u", dest="unsafe", action="store_true", help="do not open the image below")
    one.add_argument("file", nargs="?", metavar="FILE", help="(none with -o help)")
    one.add_argument("size", nargs="?", type=size, help="of the disk: bytes, or 10M, 1G and so on")


def _check(one: Parser) -> None:
    one.add_argument("-r", dest="repair", choices=("leaks", "all"), help="mend only what costs space, or everything")
    one.add_argument("-T", dest="source_cache", choices=CACHES, help="how the host's cache is used")
    _file(one)


def _convert(one: Parser) -> None:
    one.add_argument("-f", dest="format", metavar="FORMAT", help="of the sources; otherwise found out")
    one.add_argument("-O", dest="target_format", metavar="FORMAT", help="of the new image (raw)")
    one.add_argument("-B", dest="backing", metavar="FILE", help="the new image lies over this one")
    one.add_argument("-F", dest="backing_format", metavar="FORMAT", help="of the image below")
    one.add_argument("-c", dest="compress", action="store_true", help="compress")
    one.add_argument("-n", dest="no_create", action="store_true", help="the target is there already")
    one.add_argument("--target-image-opts", action="store_true", help="and is options, as of --image-opts")
    one.add_argument("--target-is-zero", action="store_true", help="and reads as zeros")
    one.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="as the disk was then")
    one.add_argument("-S", dest="sparse", type=size, metavar="SIZE", help="zeros to leave out (4k)")
    one.add_argument("-m", dest="workers", type=int, default=8, metavar="N", help="transfers at once, 1 to 16 (8)")
    one.add_argument("-W", dest="out_of_order", action="store_true", help="write in any order")
    one.add_argument("-C", dest="offload", action="store_true", help="let the host copy, where it can")
    one.add_argument("-t", dest="cache", choices=CACHES, default="unsafe", help="how the target is written (unsafe)")
    one.add_argument("-T", dest="source_cache", choices=CACHES, default="writeback", help="how the source is read")
    one.add_argument("-r", dest="rate", type=size, metavar="BYTES", help="a second, at most")
    one.add_argument("--bitmaps", action="store_true", help="copy persistent bitmaps too")
    one.add_argument("--skip-broken-bitmaps", action="store_true", help="but for those that cannot be relied on")
    one.add_argument("--resume", action="store_true", help="go on with a copy that was killed, noted in TARGET.resume")
    one.add_argument("--salvage", action="store_true", help="zeros instead of what cannot be read")
    one.add_argument("files", nargs="*", metavar="FILE", help="the sources, and the new image (none with -o help)")


def _compare(one: Parser) -> None:
    one.add_argument("-F", dest="second_format", metavar="FORMAT", help="of the second image")
    one.add_argument("-T", dest="source_cache", choices=CACHES, help="how the host's cache is used")
    one.add_argument("-s", dest="strict", action="store_true", help="sizes and allocation have to be the same too")
    _file(one)
    one.add_argument("second", metavar="FILE2")


def _map(one: Parser) -> None:
    one.add_argument("--start-offset", type=size, default=0, metavar="OFFSET")
    one.add_argument("--max-length", type=size, metavar="LENGTH")
    _file(one)


def _measure(one: Parser) -> None:
    one.add_argument("-O", dest="target_format", default="raw", metavar="FORMAT", help="of the image (raw)")
    one.add_argument("--size", type=size, help="of a disk that is not there yet")
    one.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="as the disk was then")
    one.add_argument("file", nargs="?", metavar="FILE")


def _resize(one: Parser) -> None:
    one.add_argument("--preallocation", choices=("off", "metadata", "falloc", "full"), default="off")
    one.add_argument("--shrink", action="store_true", help="lose what is beyond the new end")
    _file(one)
    one.add_argument("size", metavar="[+|-]SIZE")


def _snapshot(one: Parser) -> None:
    what = one.add_mutually_exclusive_group()
    what.add_argument("-l", dest="listing", action="store_true", help="show them")
    what.add_argument("-c", dest="make", metavar="NAME", help="take one")
    what.add_argument("-a", dest="apply", metavar="NAME", help="go back to one")
    what.add_argument("-d", dest="delete", metavar="NAME", help="forget one")
    _file(one)


def _commit(one: Parser) -> None:
    one.add_argument("-t", dest="cache", choices=CACHES, help="how it is written")
    one.add_argument("-b", dest="base", metavar="FILE", help="the one of the chain to write into (the next)")
    one.add_argument("-d", dest="keep", action="store_true", help="leave the image as it is")
    one.add_argument("-r", dest="rate", type=size, metavar="BYTES", help="a second, at most")
    _file(one)


def _rebase(one: Parser) -> None:
    one.add_argument("-t", dest="cache", choices=CACHES, help="how it is written")
    one.add_argument("-T", dest="source_cache", choices=CACHES, help="how it is read")
    one.add_argument("-u", dest="unsafe", action="store_true", help="change the name only")
    one.add_argument("-b", dest="backing", metavar="FILE", help="the image below; '' for none")
    one.add_argument("-F", dest="backing_format", metavar="FORMAT", help="of the image below")
    _file(one)


def _amend(one: Parser) -> None:
    one.add_argument("-t", dest="cache", choices=CACHES, help="how it is written")
    one.add_argument("--force", action="store_true", help="even if it makes the data unreadable for ever")
    one.add_argument("file", nargs="?", metavar="FILE", help="(none with -o help)")


def _bitmap(one: Parser) -> None:
    for name in ("add", "remove", "clear", "enable", "disable"):
        one.add_argument(f"--{name}", dest="actions", action="append_const", const=(name, None))
    one.add_argument("--merge", dest="actions", action="append", type=lambda text: ("merge", text), metavar="SOURCE")
    one.add_argument("-b", dest="source", metavar="FILE", help="which has SOURCE")
    one.add_argument("-F", dest="source_format", metavar="FORMAT")
    one.add_argument("-g", dest="granularity", type=size, metavar="BYTES")
    _file(one)
    one.add_argument("bitmap")


def _dd(one: Parser) -> None:
    one.add_argument("-f", dest="format", metavar="FORMAT", help="of the source")
    one.add_argument("-O", dest="target_format", default="raw", metavar="FORMAT", help="of the new image (raw)")
    one.add_argument("operands", nargs="+", metavar="KEY=VALUE")


def _bench(one: Parser) -> None:
    one.add_argument("-c", dest="count", type=int, default=75000, metavar="N", help="requests (75000)")
    one.add_argument("-d", dest="depth", type=int, default=64, metavar="N", help="at once (64)")
    one.add_argument("-n", dest="native", action="store_true", help="ignored: see -i")
    one.add_argument("-i", dest="aio", choices=ENGINES, help="io_uring where there is one, or threads")
    one.add_argument("-o", dest="offset", type=size, default=0, metavar="OFFSET", help="of the first")
    one.add_argument("-s", dest="buffer", type=size, default=4096, metavar="BYTES", help="of a request (4k)")
    one.add_argument("-S", dest="step", type=size, metavar="BYTES", help="from one to the next (as -s)")
    one.add_argument("-t", dest="cache", choices=CACHES, default="writeback", help="how the host's cache is used")
    one.add_argument("-w", dest="write", action="store_true", help="write")
    one.add_argument("--pattern", type=lambda text: int(text, 0), default=0, metavar="BYTE", help="to write")
    one.add_argument("--flush-interval", type=int, default=0, metavar="N", help="flush after so many writes")
    one.add_argument("--no-drain", action="store_true", help="ignored")
    _file(one)


def _file(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE")


def _format(parser: Parser) -> None:
    parser.add_argument("-f", dest="format", metavar="FORMAT", help="of the image; otherwise found out")


def _output(parser: Parser) -> None:
    parser.add_argument("--output", choices=("human", "json"), default="human")


def _quiet(parser: Parser) -> None:
    parser.add_argument("-q", dest="quiet", action="store_true", help="say nothing but errors")


def _progress(parser: Parser) -> None:
    parser.add_argument("-p", dest="progress", action="store_true", help="show how much is done")


def _shared(parser: Parser) -> None:
    parser.add_argument("-U", "--force-share", dest="shared", action="store_true", help="even if somebody writes to it")


def _options(parser: Parser) -> None:
    about = "options of the format; or `help`"
    parser.add_argument("-o", dest="options", action="append", metavar="NAME=VALUE,...", help=about)


_SUBCOMMANDS: Mapping[str, _Subcommand] = {
    "info": _Subcommand(commands.info, "What an image is", (_output, _format, _shared), _info),
    "create": _Subcommand(commands.create, "Make an image", (_quiet, _options), _create),
    "check": _Subcommand(commands.check, "Look for damage, and mend it", (_output, _format, _shared, _quiet), _check),
    "convert": _Subcommand(
        commands.convert, "Copy images into a new one", (_progress, _quiet, _shared, _options), _convert
    ),
    "compare": _Subcommand(
        commands.compare, "Whether two disks are the same", (_shared, _quiet, _progress, _format), _compare
    ),
    "map": _Subcommand(commands.map_, "Where the data of a disk is", (_output, _format, _shared), _map),
    "measure": _Subcommand(
        commands.measure, "What an image would take", (_output, _format, _shared, _options), _measure
    ),
    "resize": _Subcommand(commands.resize, "Make a disk larger or smaller", (_format, _quiet), _resize),
    "snapshot": _Subcommand(commands.snapshot, "Snapshots inside an image", (_quiet, _shared, _format), _snapshot),
    "commit": _Subcommand(
        commands.commit, "Write an image into the one below it", (_format, _quiet, _progress), _commit
    ),
    "rebase": _Subcommand(commands.rebase, "Lie over another image", (_format, _quiet, _progress, _shared), _rebase),
    "amend": _Subcommand(commands.amend, "Change options of an image", (_format, _quiet, _progress, _options), _amend),
    "bitmap": _Subcommand(commands.bitmap, "Persistent bitmaps of what was written", (_format,), _bitmap),
    "dd": _Subcommand(commands.dd, "Copy a part: if=FILE of=FILE [bs=N] [count=N] [skip=N]", (_shared,), _dd),
    "bench": _Subcommand(commands.bench, "How fast requests are", (_format, _quiet, _shared), _bench),
}
