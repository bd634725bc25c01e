"""NBD exports: of real servers, and of one that says what it must not."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skep.block.backend import read_at, write_at
from skep.block.converting import Conversion, convert
from skep.block.format import BackingName
from skep.block.image import create_image, open_disk, open_image, open_layers
from skep.block.nbd.address import Address, parse
from skep.block.nbd.client import NbdFile
from skep.block.options import BlockOptions
from skep.cli import main
from skep.config.tree import Tree
from skep.errors import UserError
from tests.block.conformance import run

MIB = 1 << 20


@contextlib.contextmanager
def server(place: Path, *command: object) -> Iterator[str]:
    """A server of the export ``disk`` on a socket; its address."""
    words = [str(word).replace("SOCKET", str(place)) for word in command]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        for _ in range(400):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as knock:
                knock.connect(str(place))
                break
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        yield f"nbd+unix:///disk?socket={place}"
    finally:
        process.kill()
        process.communicate()
        place.unlink(missing_ok=True)


QEMU = ("qemu-nbd", "-k", "SOCKET", "-f", "raw", "-x", "disk", "-t", "-e", "4")
NBDKIT = ("nbdkit", "-f", "-U", "SOCKET", "-e", "disk")
SERVERS = {
    "qemu-nbd": QEMU,
    "nbdkit": (*NBDKIT, "file"),
    "without structured replies": (*NBDKIT, "--no-sr", "file"),
    "without anything": (*NBDKIT, "--no-sr", "--mask-handshake=1", "--filter=nozero", "file"),
    "in blocks of 4096": (*NBDKIT, "--filter=blocksize-policy", "file"),
}
MORE = {
    "in blocks of 4096": ("blocksize-minimum=4096", "blocksize-error-policy=error"),
}


@pytest.mark.parametrize("which", SERVERS)
def test_a_raw_disk(tmp_path: Path, which: str) -> None:
    """Random traffic from several threads, and the server's file is what was written."""
    path, size, count = tmp_path / "disk", 4 * MIB, 4
    path.write_bytes(random.Random(1).randbytes(MIB) + bytes(3 * MIB))
    model = bytearray(path.read_bytes())

    def work(which: int) -> None:
        rng = random.Random(which)
        for _ in range(30):
            at = (rng.randrange(size // 1536 // count) * count + which) * 1536
            data = rng.randbytes(min(1536, size - at))
            if rng.random() < 0.3:
                image.write_zeroes(at, len(data), rng.random() < 0.5)
                data = bytes(len(data))
            else:
                image.pwritev([memoryview(data)[:100], memoryview(data)[100:]], at)
            model[at : at + len(data)] = data
            assert read_at(image, at, len(data)) == data

    with server(tmp_path / "socket", *SERVERS[which], path, *MORE.get(which, ())) as name:
        with open_image(name, format="raw") as image, ThreadPoolExecutor(count) as pool:
            assert image.size == size and image.path == name
            list(pool.map(work, range(count)))
            assert read_at(image, 0, size) == model
            at = 0
            for extent in image.extents():
                assert extent.offset == at and (not extent.zero or not any(model[at : at + extent.length]))
                at += extent.length
            assert at == size
            image.discard(0, 65536)
            image.flush()
        with open_image(name, format="raw", read_only=True, synchronous=True) as image:
            assert read_at(image, 65536, size - 65536) == model[65536:]
    assert path.read_bytes()[65536:] == model[65536:]


def test_qcow2_on_an_export(tmp_path: Path) -> None:
    """Made, written, checked; QEMU reads the server's file. What does not fit is the guest's EIO, not lost."""
    path, data = tmp_path / "disk", random.Random(2).randbytes(MIB)
    path.write_bytes(b"\xff" * (3 * MIB))
    with server(tmp_path / "socket", *QEMU, path) as name:
        create_image(name, "qcow2", 16 * MIB)
        with open_image(name, format="qcow2") as image:
            write_at(image, 5 * MIB + 512, data)
            image.snapshot_create("one")
            image.flush()
            with pytest.raises(OSError, match=r"ends before|No space"):
                for at in range(0, 4 * MIB, MIB):
                    write_at(image, at, data)
        with open_image(name, read_only=True) as image:
            assert image.format == "qcow2" and not image.check().corruptions
            assert read_at(image, 5 * MIB + 512, MIB) == data
        with pytest.raises(UserError, match="needs a file that grows"):
            create_image(name, "vmdk", MIB)
        with pytest.raises(UserError, match="export has"):
            create_image(name, "raw", 4 * MIB)
    assert "failed" not in run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0 4M 1M", path)


def test_over_an_export(tmp_path: Path) -> None:
    """An image here over one there: for tools by its name, for a VM only where the configuration says so."""
    base, over = tmp_path / "base", tmp_path / "over.qcow2"
    base.write_bytes(b"b" * MIB)
    with server(tmp_path / "socket", *QEMU, base) as name:
        run("qemu-img", "create", "-f", "qcow2", "-b", name, "-F", "raw", over)
        with open_image(over) as image:
            assert read_at(image, 512, 512) == b"b" * 512
        with pytest.raises(UserError, match="not a file"):
            open_image(over, inside=["/"])
        layers = f"driver=qcow2,file.filename={over},backing.driver=raw,backing.file.driver=nbd,"
        layers += f"backing.file.server.type=unix,backing.file.server.path={tmp_path}/socket,backing.file.export=disk"
        with open_layers(layers, inside=[]) as image:
            assert read_at(image, 512, 512) == b"b" * 512
            raw = tmp_path / "raw"
            create_image(raw, "raw", MIB)
            with open_image(raw, format="raw") as target:
                convert([image], target, Conversion())
    assert raw.read_bytes() == base.read_bytes()


def test_what_the_server_does_not_allow(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with server(tmp_path / "socket", *QEMU, "-r", tmp_path / "disk") as name:
        with pytest.raises(UserError, match="only to read"):
            open_image(name, format="raw")
        with open_image(name, format="raw", read_only=True) as image:
            assert image.size == MIB
        with pytest.raises(UserError, match="no such export"):
            open_image(name.replace("disk", "tape"), format="raw", read_only=True)
    with pytest.raises(UserError, match="cannot be reached"):
        open_image(name, format="raw", read_only=True)


def test_a_lost_connection(tmp_path: Path) -> None:
    """Reads go on with the next server; what was not flushed may be lost, and no flush says otherwise."""
    path, place = tmp_path / "disk", tmp_path / "socket"
    path.write_bytes(b"x" * MIB)
    address = Address("disk", path=str(place), reconnect=20)
    with server(place, *QEMU, path) as name:
        patient, other = NbdFile(address), NbdFile(address)
        hasty = open_image(name, format="raw")
        write_at(patient, 0, b"y" * 512)
        patient.flush()
        write_at(other, 512, b"z" * 512)
    with pytest.raises(OSError, match="connection is lost"):
        read_at(hasty, 0, 512)
    hasty.close()
    with server(place, *QEMU, path), patient, other:
        assert read_at(patient, 0, 512) == b"y" * 512
        patient.flush()
        assert read_at(other, MIB - 512, 512) == b"x" * 512
        for _ in range(2):
            with pytest.raises(OSError, match="may be lost"):
                other.flush()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("nbd://host", Address("", "host")),
        ("nbd://[::1]:99/a%20b/c", Address("a b/c", "::1", 99)),
        ("nbd+unix:///?socket=/s", Address(path="/s")),
        ("nbd+unix:///x?socket=/s%3f", Address("x", path="/s?")),
        ("nbd:host:10:exportname=a", Address("a", "host", 10)),
        ("nbd:unix:/s:exportname=a:b", Address("a:b", path="/s")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse(text) == address


NO_ADDRESSES = ("nbd://", "nbd:///x", "nbd://h:99999", "nbd://h?socket=/s", "nbd+unix:///x", "nbd://u@h/", "nbd:h")


@pytest.mark.parametrize("text", [*NO_ADDRESSES, "nbd://h/?x=y"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UserError):
        parse(text)


# A server that says what it must not.

Talk = Callable[[socket.socket], None]


@contextlib.contextmanager
def scripted(talk: Talk) -> Iterator[Address]:
    """A server on loopback that lets ``talk`` do the talking, with whoever comes first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.settimeout(10)
                talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address("", "127.0.0.1", listener.getsockname()[1], timeout=1)
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def take(connection: socket.socket, length: int) -> bytes:
    data = connection.recv(length, socket.MSG_WAITALL)
    if len(data) < length:
        raise ConnectionError
    return data


def greet(connection: socket.socket) -> None:
    connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    take(connection, 4)


def option(connection: socket.socket) -> tuple[int, bytes]:
    _, kind, length = struct.unpack(">QII", take(connection, 16))
    return kind, take(connection, length)


def reply(connection: socket.socket, kind: int, type: int, body: bytes = b"") -> None:
    connection.sendall(struct.pack(">QIII", 0x0003E889045565A9, kind, type, len(body)) + body)


def agree(connection: socket.socket, size: int = MIB, flags: int = 0x6D) -> None:
    greet(connection)
    while True:
        kind, _ = option(connection)
        if kind == 10:
            reply(connection, kind, 4, struct.pack(">I", 7) + b"base:allocation")
        if kind == 7:
            reply(connection, kind, 3, struct.pack(">HQH", 0, size, flags))
        reply(connection, kind, 1)
        if kind == 7:
            return


def request(connection: socket.socket) -> tuple[int, int, int, int]:
    """(type, cookie, offset, length)"""
    _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", take(connection, 28))
    return kind, cookie, offset, length


def chunk(cookie: int, kind: int, body: bytes = b"", done: bool = True, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, size) + body


HANDSHAKES: dict[str, Talk] = {
    "nothing": lambda c: None,
    "silence": lambda c: time.sleep(1.5),
    "noise": lambda c: c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "old style": lambda c: c.sendall(b"NBDMAGIC" + struct.pack(">QQI", 0x00420281861253, MIB, 1) + bytes(124)),
    "a long reply": lambda c: (greet(c), option(c), reply(c, 8, 1, bytes(1 << 17)))[0],
    "an answer to another": lambda c: (greet(c), option(c), reply(c, 5, 1))[0],
    "answers without end": lambda c: (greet(c), option(c), [reply(c, 8, 3) for _ in range(10000)])[0],
    "tls": lambda c: (greet(c), [reply(c, option(c)[0], 0x80000005) for _ in range(3)])[0],
    "no size": lambda c: (greet(c), [reply(c, option(c)[0], 1) for _ in range(3)])[0],
    "too large": lambda c: agree(c, 1 << 63),
    "no flags": lambda c: agree(c, MIB, 0),
}


@pytest.mark.parametrize("which", HANDSHAKES)
def test_a_bad_handshake(which: str) -> None:
    with scripted(HANDSHAKES[which]) as address, pytest.raises(UserError, match="NBD server"):
        NbdFile(address)


def answer(make: Callable[[int, int, int], bytes]) -> Talk:
    """Agree, and answer each request by its cookie, offset and length."""

    def talk(connection: socket.socket) -> None:
        agree(connection)
        while True:
            kind, cookie, offset, length = request(connection)
            if kind == 2:
                return
            connection.sendall(make(cookie, offset, length))

    return talk


READS: dict[str, Talk] = {
    "noise": answer(lambda k, at, n: b"x" * 64),
    "hangs up": lambda c: (agree(c), request(c))[0],
    "silence": lambda c: (agree(c), time.sleep(1.5))[0],
    "another cookie": answer(lambda k, at, n: chunk(k + 1, 0)),
    "too little": answer(lambda k, at, n: chunk(k, 0)),
    "too much": answer(lambda k, at, n: chunk(k, 1, struct.pack(">Q", at) + bytes(n + 1))),
    "elsewhere": answer(lambda k, at, n: chunk(k, 1, struct.pack(">Q", at + 512) + bytes(n))),
    "before": answer(lambda k, at, n: chunk(k, 1, struct.pack(">Q", 0) + bytes(512))),
    "twice": answer(lambda k, at, n: 2 * chunk(k, 1, struct.pack(">Q", at) + bytes(n), False)),
    "no bytes": answer(lambda k, at, n: 100 * chunk(k, 1, struct.pack(">Q", at), False)),
    "a hole of 4 GiB": answer(lambda k, at, n: chunk(k, 2, struct.pack(">QI", at, (1 << 32) - 1))),
    "empty chunks": answer(lambda k, at, n: 100 * chunk(k, 0, done=False)),
    "a status": answer(lambda k, at, n: chunk(k, 5, struct.pack(">III", 7, 512, 0))),
    "a simple reply": answer(lambda k, at, n: struct.pack(">IIQ", 0x67446698, 0, k) + bytes(n)),
    "an error": answer(lambda k, at, n: chunk(k, 0x8001, struct.pack(">IH", 5, 3) + b"sad")),
    "many errors": answer(lambda k, at, n: 100 * chunk(k, 0x8001, struct.pack(">IH", 5, 0), False)),
    "a long error": answer(lambda k, at, n: chunk(k, 0x8001, length=1 << 31)),
    "a short error": answer(lambda k, at, n: chunk(k, 0x8001, b"12345")),
    "an unknown chunk": answer(lambda k, at, n: chunk(k, 77, bytes(8))),
}


@pytest.mark.parametrize("which", READS)
def test_bad_replies(which: str) -> None:
    """To two readers at once: neither hangs, and what is not asked for is written nowhere."""
    with scripted(READS[which]) as address, NbdFile(address) as file, ThreadPoolExecutor(2) as pool:
        room = bytearray(3 * 1024)
        view = memoryview(room)[1024:2048]
        failed = [pool.submit(file.preadv, [view[:100], view[100:]], 1024) for _ in range(2)]
        for one in failed:
            assert isinstance(one.exception(20), OSError), one.exception()
        assert not any(room[:1024]) and not any(room[2048:])


STATUSES: dict[str, Talk] = {
    "none": answer(lambda k, at, n: chunk(k, 0)),
    "of no bytes": answer(lambda k, at, n: chunk(k, 5, struct.pack(">III", 7, 0, 0))),
    "another context": answer(lambda k, at, n: chunk(k, 5, struct.pack(">III", 8, n, 0))),
    "half": answer(lambda k, at, n: chunk(k, 5, struct.pack(">II", 7, n))),
    "too long": answer(lambda k, at, n: chunk(k, 5, length=4 + (8 << 20))),
    "twice": answer(lambda k, at, n: 2 * chunk(k, 5, struct.pack(">III", 7, n, 0), False)),
}


@pytest.mark.parametrize("which", STATUSES)
def test_bad_statuses(which: str) -> None:
    with scripted(STATUSES[which]) as address, NbdFile(address) as file, pytest.raises(OSError):
        list(file.extents(0, file.size))


def test_a_status_beyond_what_was_asked() -> None:
    talk = answer(lambda k, at, n: chunk(k, 5, struct.pack(">III", 7, (1 << 32) - 1, 3)))
    with scripted(talk) as address, NbdFile(address) as file:
        assert [(one.offset, one.length, one.zero) for one in file.extents(512, MIB)] == [(512, MIB - 512, True)]


def test_what_info_and_map_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As qemu-img: of an export, and of images here over one there."""
    (tmp_path / "disk").write_bytes(b"x" * MIB)
    with server(tmp_path / "socket", *QEMU, tmp_path / "disk") as name:
        create_image(tmp_path / "over", "qcow2", MIB, backing=BackingName(name, "raw"), check_backing=False)
        told = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "disk")}})
        create_image(tmp_path / "json", "qcow2", MIB, backing=BackingName(f"json:{told}", "raw"), check_backing=False)
        for command in (
            ("info", "-f", "raw", name),
            ("info", tmp_path / "over"),
            ("info", "--backing-chain", tmp_path / "over"),
            ("info", tmp_path / "json"),
            ("map", tmp_path / "over"),
            ("map", "--output=json", tmp_path / "over"),
        ):
            assert main(["image", *map(str, command)]) == 0
            assert capsys.readouterr().out == run("qemu-img", *command), command


def test_a_vms_disk(tmp_path: Path) -> None:
    """By its address, or by layers; and the requests of a device, many at once."""
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with server(tmp_path / "socket", *QEMU, tmp_path / "disk") as name:
        disk = open_disk(BlockOptions(path=name))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: write_at(disk, i * 4096, bytes([i]) * 4096), range(256)))
        disk.flush()
        disk.close()
        keys = {"layers.driver": "raw", "layers.file.driver": "nbd", "layers.file.path": str(tmp_path / "socket")}
        tree = Tree({f"pci.0.3.0.{key}": value for key, value in {**keys, "layers.file.export": "disk"}.items()})
        disk = open_disk(BlockOptions.from_node(tree.node("pci.0.3.0")))
        for i in range(256):
            assert read_at(disk, i * 4096, 4096) == bytes([i]) * 4096
        disk.close()
