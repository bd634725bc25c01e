"""What the commands of `skep io` are, and what each does: qemu-io's, in its words."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from skep.block.format import PREALLOCATION, SECTOR, Can, Image
from skep.block.words import words
from skep.cli.image.printing import dump_values
from skep.cli.io.interpreter import (
    Command,
    Interpreter,
    Misused,
    Request,
    Words,
    Wrong,
    described_command,
    number_of,
    verified,
)
from skep.cli.io.printing import bytes_of
from skep.cli.io.session import Opening
from skep.cli.opening import How, check_aio, described, discards
from skep.errors import UserError

_MOST_BYTES = 0x7FFFFE00
"""Of one request."""
_UNWRITTEN, _UNREAD = 0xCD, 0xAB


def _length(text: str) -> int:
    length = number_of(text)
    if length > _MOST_BYTES:
        raise Wrong(f"length cannot exceed {_MOST_BYTES}, given {text}")
    return length


def _inside(image: Image, offset: int, length: int) -> None:
    if offset + length > image.size:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


# Reading and writing.


def read(io: Interpreter, said: Words) -> None:
    offset, length = number_of(said.rest[0]), _length(said.rest[1])
    said.pattern()
    if not said.has("P") and (said.has("l") or said.has("s")):
        raise Misused
    first, n = verified(said, length)
    if n < 0 or first + n > length:
        raise Wrong("pattern verification range exceeds end of read data")
    _move_in(io, said, "read", offset, [length])


def readv(io: Interpreter, said: Words, *, later: bool = False) -> None:
    said.pattern()
    _move_in(io, said, "readv", number_of(said.rest[0]), [_length(one) for one in said.rest[1:]], later=later)


def _move_in(io: Interpreter, said: Words, name: str, offset: int, lengths: list[int], *, later: bool = False) -> None:
    rooms = [io.session.room(n, _UNREAD) for n in lengths]
    length = sum(lengths)
    image = io.image

    def move() -> None:
        if said.has("b"):
            image.read_vm_state(rooms, offset)
        else:
            _inside(image, offset, length)
            io.session.read(rooms, offset)

    if said.has("b"):
        _whole_sectors(offset, length)
    io.make(Request("read", name, offset, length, said, rooms), move, later=later)


def _whole_sectors(offset: int, length: int) -> None:
    for name, value in (("offset", offset), ("count", length)):
        if value % SECTOR:
            raise Wrong(f"{value} is not a sector-aligned value for '{name}'")


def write(io: Interpreter, said: Words) -> None:
    if said.has("b") and said.has("z"):
        raise Wrong("-b and -z cannot be specified at the same time")
    if said.has("f") and (said.has("b") or said.has("c")):
        raise Wrong("-f and -b or -c cannot be specified at the same time")
    for letter in "nu":
        if said.has(letter) and not said.has("z"):
            raise Wrong(f"-{letter} requires -z to be specified")
    if sum(map(said.has, "zPs")) > 1:
        raise Wrong("Only one of -z, -P, and -s can be specified at the same time")
    offset, length = number_of(said.rest[0]), _length(said.rest[1])
    if said.has("b"):
        _whole_sectors(offset, length)
    _move_out(io, said, "write", offset, [length])


def writev(io: Interpreter, said: Words) -> None:
    _move_out(io, said, "writev", number_of(said.rest[0]), [_length(one) for one in said.rest[1:]])


def aio_write(io: Interpreter, said: Words) -> None:
    if said.has("z") and len(said.rest) > 2:
        raise Wrong("-z supports only a single length parameter")
    if said.has("u") and not said.has("z"):
        raise Wrong("-u requires -z to be specified")
    if said.has("z") and said.has("P"):
        raise Wrong("-z and -P cannot be specified at the same time")
    if said.has("i"):
        print("injecting invalid write request")
        return
    _move_out(io, said, "aio_write", number_of(said.rest[0]), [_length(one) for one in said.rest[1:]], later=True)


def aio_read(io: Interpreter, said: Words) -> None:
    if said.has("i"):
        print("injecting invalid read request")
        return
    readv(io, said, later=True)


def aio_flush(io: Interpreter, said: Words) -> None:
    io.finish()


def _move_out(io: Interpreter, said: Words, name: str, offset: int, lengths: list[int], *, later: bool = False) -> None:
    pattern, length = said.pattern(), sum(lengths)
    io.needs_writable()
    rooms = [] if said.has("z") else _filled(io, said, lengths, _UNWRITTEN if pattern is None else pattern)
    session, image = io.session, io.image

    def move() -> None:
        if said.has("b"):
            image.write_vm_state(rooms, offset)
            return
        _inside(image, offset, length)
        if said.has("z"):
            if said.has("n") and (Can.ZERO not in image.can or offset % SECTOR or length % SECTOR):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            session.write_zeroes(offset, length, said.has("u"))
        elif said.has("c"):
            _compressed(image, rooms[0], offset)
        else:
            session.write(rooms, offset)
        if said.has("f"):
            session.disk.flush()

    io.make(Request("wrote", name, offset, length, said), move, later=later)


def _filled(io: Interpreter, said: Words, lengths: list[int], byte: int) -> list[memoryview]:
    rooms = [io.session.room(n, byte) for n in lengths]
    if (path := said.options.get("s")) is not None:
        try:
            with open(path, "rb") as file:
                pattern = file.read(lengths[0])
        except OSError as error:
            print(f"{path}: {error.strerror}", file=sys.stderr)
            raise Wrong from None
        if not pattern:
            print(f"{path}: file is empty", file=sys.stderr)
            raise Wrong
        rooms[0][:] = (pattern * (lengths[0] // len(pattern) + 1))[: lengths[0]]
    return rooms


def _compressed(image: Image, data: memoryview, offset: int) -> None:
    unit = image.cluster_size
    if Can.COMPRESS not in image.can or unit is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    end = offset + len(data)
    if offset % unit or (end % unit and end != image.size):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    for at in range(0, len(data), unit):
        image.write_compressed(data[at : at + unit], offset + at)


def discard(io: Interpreter, said: Words) -> None:
    offset, length = number_of(said.rest[0]), _length(said.rest[1])
    io.needs_writable()

    def move() -> None:
        _inside(io.image, offset, length)
        io.session.discard(offset, length)

    io.make(Request("discard", "discard", offset, length, said), move)


def flush(io: Interpreter, said: Words) -> None:
    if not io.image.read_only and io.session.opening.how.cache != "unsafe":
        io.session.disk.flush()


# The file.


def open_(io: Interpreter, said: Words) -> None:
    if io.session.image is not None:
        raise UserError("file open already, try 'help close'")
    opening = Opening(How(read_only=False, secrets=io.session.secrets))
    for letter in said.options:
        opening.set(letter)
    if said.has("i"):
        check_aio(said.options["i"])
    if said.has("t"):
        opening.set_cache(said.options["t"])
    if said.has("d"):
        opening.how = opening.how._replace(discard=discards(said.options["d"]))
    if len(said.rest) > 1 or not (said.rest or said.has("o")):
        raise Misused
    path = said.rest[0] if said.rest else None
    if said.has("o"):
        path, opening.how = described(said.options["o"], opening.how, path)
    assert path is not None
    io.session.open(path, opening)


def close(io: Interpreter, said: Words) -> None:
    io.finish()
    io.session.close()


def reopen(io: Interpreter, said: Words) -> None:
    if said.rest:
        raise Misused
    if said.has("r") and said.has("w"):
        raise UserError("Only one -r/-w option may be given")
    io.finish()
    old = io.session.opening
    opening = replace(old)
    if said.has("c"):
        opening.set_cache(said.options["c"])
    if said.has("r") or said.has("w"):
        opening.how = opening.how._replace(read_only=said.has("r"))
    if said.has("o"):
        if words(said.options["o"]).get("driver", io.image.format) != io.image.format:
            raise UserError("Cannot change the option 'driver'")
        _, opening.how = described(said.options["o"], opening.how, io.image.path)
    io.session.reopen(opening)


def quit_(io: Interpreter, said: Words) -> None:
    io.stop()


def length(io: Interpreter, said: Words) -> None:
    print(bytes_of(io.image.size))


def info(io: Interpreter, said: Words) -> None:
    image = io.image
    print(f"format name: {image.format}")
    print(f"cluster size: {bytes_of(image.cluster_size or 0)}")
    print(f"vm state offset: {bytes_of(image.vm_state_offset)}")
    if special := image.info():
        print("Format specific information:")
        dump_values(special, 1)


def map_(io: Interpreter, said: Words) -> None:
    for present, offset, n in _allocation(io.image, 0, io.image.size):
        what = "    allocated" if present else "not allocated"
        print(f"{bytes_of(n)} ({n:#x}) bytes {what} at offset {bytes_of(offset)} ({offset:#x})")


def alloc(io: Interpreter, said: Words) -> None:
    start = number_of(said.rest[0])
    count = _length(said.rest[1]) if len(said.rest) > 1 else SECTOR
    end = max(start, min(io.image.size, start + count))
    first, last = start // SECTOR * SECTOR, -(-end // SECTOR) * SECTOR
    there = sum(
        min(end, offset + n) - max(start, offset)
        for present, offset, n in _allocation(io.image, first, last - first if end > start else 0)
        if present
    )
    print(f"{there}/{end - start} bytes allocated at offset {bytes_of(start)}")


def _allocation(image: Image, offset: int, length: int) -> Iterator[tuple[bool, int, int]]:
    """(whether this image itself has them, offset, length), as few as can be."""
    for present, extents in groupby(image.layer(offset, length), lambda one: one.present):
        n = sum(one.length for one in extents)
        yield present, offset, n
        offset += n


def truncate(io: Interpreter, said: Words) -> None:
    mode = said.options.get("m", "off")
    if mode not in PREALLOCATION:
        raise UserError(f"Invalid preallocation mode '{mode}'")
    size = number_of(said.rest[0])
    io.needs_writable()
    if Can.RESIZE not in io.image.can:
        raise UserError("Image format driver does not support resize")
    if size % SECTOR and io.image.format != "raw":
        raise UserError(f"The new size must be a multiple of {SECTOR}")
    old = io.image.size
    io.image.resize(-(-size // SECTOR) * SECTOR)
    io.image.reserve(min(old, io.image.size), mode)


def sleep(io: Interpreter, said: Words) -> None:
    text = said.rest[0]
    if not (text.isascii() and text.isdecimal()):
        raise Wrong(f"{text} is not a valid number")
    time.sleep(int(text) / 1000)


# What only debugging needs.


def breakpoint_(io: Interpreter, said: Words) -> None:
    raise Wrong("Could not set breakpoint: Operation not supported")


def resume(io: Interpreter, said: Words) -> None:
    raise Wrong("Could not resume request: Operation not supported")


def remove_break(io: Interpreter, said: Words) -> None:
    raise Wrong(f"Could not remove breakpoint {said.rest[0]}: Operation not supported")


def wait_break(io: Interpreter, said: Words) -> None:
    """qemu-io waits for ever where there are no breakpoints."""
    raise Wrong(f"Could not wait for breakpoint {said.rest[0]}: Operation not supported")


def abort(io: Interpreter, said: Words) -> None:
    sys.stdout.flush()
    os.abort()


def sigraise(io: Interpreter, said: Words) -> None:
    text = said.rest[0]
    if not (text.isascii() and text.isdecimal()):
        raise Wrong(f"{text} is not a valid number")
    sys.stdout.flush()
    signal.raise_signal(int(text))


def help_(io: Interpreter, said: Words) -> None:
    if not said.rest:
        for command in io.commands:
            print(described_command(command, command.name))
        print("\nUse 'help commandname' for extended help.")
        return
    found = io.find(said.rest[0])
    if found is None:
        print(f"command {said.rest[0]} not found")
        return
    print(described_command(found, said.rest[0]))


_OPEN = "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]"
COMMANDS = (
    Command("abort", abort, "", "simulate a program crash using abort(3)", needs_image=False),
    Command("aio_flush", aio_flush, "", "completes all outstanding aio requests"),
    Command(
        *("aio_read", aio_read, "[-Ciqv] [-P pattern] off len [len..]", "asynchronously reads a number of bytes"),
        *(2, None, "CP:iqv"),
    ),
    Command(
        *("aio_write", aio_write, "[-Cfiquz] [-P pattern] off len [len..]", "asynchronously writes a number of bytes"),
        *(2, None, "CfiP:quz"),
    ),
    Command("alloc", alloc, "offset [count]", "checks if offset is allocated in the file", 1, 2, "", "a"),
    Command("break", breakpoint_, "event tag", "sets a breakpoint on event and tags the stopped request as tag", 2, 2),
    Command("close", close, "", "close the current open file", 0, 0, "", "c"),
    Command(
        *("discard", discard, "[-Cq] off len", "discards a number of bytes at a specified offset", 2, None),
        letters="Cq",
        short="d",
    ),
    Command("flush", flush, "", "flush all in-core file state to disk", 0, 0, "", "f"),
    Command("help", help_, "[command]", "help for one or all commands", 0, 1, "", "?", False),
    Command("info", info, "", "prints information about the current file", 0, 0, "", "i"),
    Command("length", length, "", "gets the length of the current file", 0, 0, "", "l"),
    Command("map", map_, "", "prints the allocated areas of a file", 0, 1),
    Command("open", open_, _OPEN, "open the file specified by path", 1, None, "snCro:ki:t:d:U", "o", False),
    Command("quit", quit_, "", "exit the program", 0, 0, "", "q", False),
    Command(
        *("read", read, "[-abCqv] [-P pattern [-s off] [-l len]] off len"),
        *("reads a number of bytes at a specified offset", 2, None),
        letters="abCl:pP:qs:v",
        short="r",
    ),
    Command(
        *("readv", readv, "[-Cqv] [-P pattern] off len [len..]", "reads a number of bytes at a specified offset"),
        *(2, None, "CP:qv"),
    ),
    Command("remove_break", remove_break, "tag", "remove a breakpoint by tag", 1, 1),
    Command(
        *("reopen", reopen, "[(-r|-w)] [-c cache] [-o options]", "reopens an image with new options"),
        *(0, None, "o:c:rw"),
    ),
    Command("resume", resume, "tag", "resumes the request tagged as tag", 1, 1),
    Command("sigraise", sigraise, "signal", "raises a signal", 1, 1, needs_image=False),
    Command("sleep", sleep, "", "waits for the given value in milliseconds", 1, 1, needs_image=False),
    Command(
        *("truncate", truncate, "[-m prealloc_mode] off", "truncates the current file at the given offset"),
        *(1, 3, "m:", "t"),
    ),
    Command("wait_break", wait_break, "tag", "waits for the suspension of a request", 1, 1),
    Command(
        *("write", write, "[-bcCfnquz] [-P pattern | -s source_file] off len"),
        *("writes a number of bytes at a specified offset", 2, None),
        letters="bcCfnpP:qs:uz",
        short="w",
    ),
    Command(
        *("writev", writev, "[-Cfq] [-P pattern] off len [len..]", "writes a number of bytes at a specified offset"),
        *(2, None, "CfqP:"),
    ),
)
