"""A Linux guest at work on its disk, and what is on that disk when the power goes: for the tests of power cuts.

In the guest, sqlite3 commits transactions in WAL mode, and a shell makes, renames and removes files and syncs them, on
one ext4 file system. What has become durable each announces through /dev/kmsg, which returns when the line is out of
the serial port; there it becomes a mark in the log of writes, so that the log says what was promised at any point.

The log is of what the disk is asked, or, for an image of another format than raw, of what the format does to its file.

On the host, :class:`PowerCut` makes the images that a loss of power could leave and has e2fsck, debugfs and sqlite3
say whether the promises hold; of another format than raw, first our own check and QEMU's.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import skep
from skep.block.backend import read_at, write_at
from skep.block.file import open_file
from skep.block.format import Can, Image
from skep.block.image import create_image, open_image
from skep.block.record import Entry, Kind, Recorder, Replay, mark, read_log
from skep.block.registry import format_named
from skep.chardev.console import Console
from skep.devices.virtio.blk import VirtioBlk
from skep.devices.virtio.pci import VirtioPci
from skep.guest.debian import Guest
from tests.linux import BOOT, command_line, complaints
from tests.programs import add_programs

SIZE = 24 << 20
QEMU_CHECKS = ("qcow2", "vhdx", "vmdk", "vdi")
"""Formats that `qemu-img check` knows."""
_SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""e2fsck syncs what it mends."""
LIVING = 4
"""Rounds for which the shell keeps a file."""
CHECKPOINT = 25
"""Transactions after which the database is brought up to date by hand."""

_WORK = """
echo 7 > /proc/sys/kernel/printk
[ -z "$CACHE" ] || echo "$CACHE" > /sys/block/vda/cache_type || exit 1
mount -t ext4 -o $OPTIONS /dev/vda /mnt || exit 2
cd /mnt
durable() {
    dd if=/dev/null of=$1 conv=notrunc,fsync 2> /dev/null || exit 5
}
files() {
    i=0
    while [ -e /tmp/busy ]; do
        i=$((i + 1))
        exec 9> orphan; rm orphan; echo "$i of which nobody knows" >&9
        [ $i -le LIVING ] || rm f.$((i - LIVING))
        seq $i $((i + 7 * i)) > new
        if [ $((i % 3)) = 0 ]; then
            mv new f.$i; echo $i >> list; sync
        else
            durable new; mv new f.$i; echo $i >> list; durable list
        fi
        echo "<1>files $i" > /dev/kmsg
    done
}
: > /tmp/busy
files & job=$!
sqlite3 -bail db < /work.sql > /dev/null || exit 3
rm /tmp/busy
wait $job || exit 4
cd / && umount /mnt
""".replace("LIVING", str(LIVING))


@dataclass
class Session:
    """What a guest did: its disk before, the log of its writes, and what it meant to write."""

    before: Path
    entries: list[Entry]
    digests: list[str]
    """Of the database after each transaction; 0 is the empty one."""
    synchronous: str
    sector: int
    """Bytes that are written whole or not at all."""
    console: str
    format: str = "raw"
    """Of ``before``."""

    @property
    def flushes(self) -> list[int]:
        """The points right behind a completed flush."""
        return [i + 1 for i, entry in enumerate(self.entries) if entry.kind is Kind.FLUSH]

    def promised(self, what: str, to: int) -> int:
        """The last number announced for ``what`` in the first ``to`` entries."""
        numbers = [
            int(entry.data.split()[1])
            for entry in self.entries[:to]
            if entry.kind is Kind.MARK and entry.data.startswith(what.encode())
        ]
        return max(numbers, default=0)


def record(
    guest: Guest,
    home: Path,
    *,
    synchronous: str = "FULL",
    transactions: int = 60,
    sector: int = 4096,
    cpus: int = 1,
    disk: str = "",
    cache: str = "",
    mount: str = "defaults",
    format: str = "raw",
    create: Mapping[str, str] | None = None,
) -> Session:
    """Run the guest, on an image of ``format`` made with the options ``create``. ``disk`` are options of a raw one;
    ``cache`` is what the guest makes of its write cache, as Linux has it:
    "write through" or "write back"; ``mount`` are options of its file system.

    ext4's superblock is 1 KiB with a checksum at its end, is written in place, and without it no journal is found: ext4
    with its checksums counts on disks that write it whole. On sectors of 512 bytes it goes without them.
    """
    before, image, log = home / "before.img", home / "disk.img", home / "log"
    with before.open("wb") as file:
        file.truncate(SIZE)
    make = ["mke2fs", "-q", "-t", "ext4"]
    # Small blocks, and a journal that is small and goes round often.
    make += ["-b", "1024", "-J", "size=1", "-O", "^metadata_csum"] if sector == 512 else ["-b", "4096"]
    subprocess.run([*make, before], check=True, timeout=60)
    image.write_bytes(before.read_bytes())
    if format == "raw":
        disk = f"{disk and ',' + disk},record={log}"
    else:
        file_system, before = before, home / f"before.{format}"
        create_image(before, format, SIZE, options=create)
        with open_image(before, format=format) as made, open_image(file_system, format="raw", read_only=True) as start:
            for extent in start.extents():
                if extent.data:
                    write_at(made, extent.offset, read_at(start, extent.offset, extent.length))
    sql, digests = _transactions(transactions, synchronous)
    work = f"CACHE='{cache}'\nOPTIONS='{mount}'\n{_WORK}"
    initrd = add_programs(
        guest.initrd, home / "initrd.img", ["sqlite3"], {"work.sh": work.encode(), "work.sql": sql.encode()}
    )
    with (
        skep.Vm(
            kernel=guest.kernel,
            initrd=initrd,
            memory="512M",
            cpus=cpus,
            cmdline=command_line("sh /work.sh", "quiet", "printk.devkmsg=on"),
            disks=[f"{image},sectorsize={sector}{disk}"],
        ) as vm,
        ExitStack() as stack,
    ):
        if format != "raw":
            image.write_bytes(before.read_bytes())
            _replace(vm, _recorded(image, format, log))
        marks = stack.enter_context(log.open("ab", buffering=0))
        _overhear(vm.console, marks.fileno())
        vm.start()
        said = vm.console.expect(r"EXIT (\d+)\r\n", timeout=BOOT)
        assert said[1] == "0" and not complaints(said.string), said.string
        vm.wait(BOOT)
    return Session(before, read_log(str(log)), digests, synchronous, sector, said.string, format)


def _recorded(path: Path, format: str, log: Path) -> Image:
    file = Recorder(open_file(str(path), lock=False), str(log))
    return format_named(format)(file)  # type: ignore[call-arg]  # every format is made from a file


def _replace(vm: skep.Vm, image: Image) -> None:
    """Give the VM's disk another image, which is as long."""
    functions = (device.device for device in vm.board.devices if isinstance(device, VirtioPci))
    disk = next(device for device in functions if isinstance(device, VirtioBlk))
    assert disk.backend.size == image.size
    disk.backend.close()
    disk.backend = image


def _overhear(console: Console, log: int) -> None:
    """Mark each announcement in the log, on the processor's thread: before the guest goes on."""
    write, line = console.write, bytearray()

    def overheard(data: bytes) -> None:
        write(data)
        line.extend(data)
        while (end := line.find(b"\n")) >= 0:
            said = re.search(rb"\] ((?:files|commit|checkpoint) \d+)\r$", line[:end])
            if said:
                mark(log, said[1])
            del line[: end + 1]

    console.write = overheard  # type: ignore[method-assign]


def _transactions(count: int, synchronous: str) -> tuple[str, list[str]]:
    """SQL for the guest's sqlite3, and what the database holds after each transaction."""
    rng = random.Random(count)
    begin = "CREATE TABLE state (n INTEGER);\nCREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT);\n"
    begin += "CREATE INDEX i ON t (body);\nINSERT INTO state VALUES (0);\n"
    script = [
        f"PRAGMA journal_mode=WAL;\nPRAGMA synchronous={synchronous};\n",
        "PRAGMA wal_autocheckpoint=40;\nPRAGMA cache_size=10;\n",
        f"BEGIN;\n{begin}COMMIT;\n",
        # From here on the database is there.
        "PRAGMA wal_checkpoint(TRUNCATE);\n",
        _announce("commit", 0),
    ]
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
        model.executescript(begin)
        digests = [_digest(model)]
        for number in range(1, count + 1):
            body = f"UPDATE state SET n = {number};\n"
            for _ in range(rng.randint(1, 6)):
                some = rng.randrange(200)
                text = f"printf('%0*d', {int(2 ** rng.uniform(0, 13))}, {rng.randrange(10**9)})"
                body += rng.choice(
                    [
                        f"INSERT OR REPLACE INTO t VALUES ({some}, {text});\n",
                        f"INSERT OR REPLACE INTO t VALUES ({some}, {text});\n",
                        f"UPDATE t SET body = {text} WHERE id % 50 = {some % 50};\n",
                        f"DELETE FROM t WHERE id = {some};\n",
                    ]
                )
            script.append(f"BEGIN;\n{body}COMMIT;\n{_announce('commit', number)}")
            if number % CHECKPOINT == 0:
                script.append(f"PRAGMA wal_checkpoint(TRUNCATE);\n{_announce('checkpoint', number)}")
            model.executescript(f"BEGIN;\n{body}COMMIT;\n")
            digests.append(_digest(model))
    return "".join(script), digests


def _announce(what: str, number: int) -> str:
    return f".once /dev/kmsg\nSELECT '<1>{what} {number}';\n"


def _digest(database: sqlite3.Connection) -> str:
    rows = database.execute("SELECT n, '' FROM state UNION ALL SELECT * FROM (SELECT * FROM t ORDER BY id)").fetchall()
    return hashlib.sha256(repr(rows).encode()).hexdigest()


class Lost(AssertionError):
    """A promise was not kept."""


Point = tuple[int, int | None]
"""The power goes after so many entries of the log. Of what is not durable nothing survives, or, with a random
generator's seed, some."""


class PowerCut:
    """The power goes in a session, and somebody looks at the disk. ``entries`` are what the disk really did, where that
    is not what the session's log says."""

    def __init__(self, session: Session, entries: Sequence[Entry] = ()) -> None:
        self.session = session
        self._entries = entries or session.entries

    def losses(self, points: Sequence[Point]) -> list[str]:
        """What was lost at the points, a line each."""
        ordered = sorted(points, key=lambda point: point[0])
        halves = [ordered[0::2], ordered[1::2]]  # most of the time is e2fsck's
        with ThreadPoolExecutor(len(halves)) as pool:
            return [line for lines in pool.map(self._losses, halves) for line in lines]

    def images(self, home: Path, points: Iterable[Point]) -> Iterator[tuple[Point, Path]]:
        """The disk at each point, all in one file; the points rise."""
        durable, image = home / "durable.img", home / "cut.img"
        durable.write_bytes(self.session.before.read_bytes())
        with durable.open("r+b", buffering=0) as disk:
            log = Replay(self._entries, disk.fileno())
            for to, seed in points:
                log.advance(to)
                with image.open("w+b", buffering=0) as cut:
                    _copy(disk.fileno(), cut.fileno())
                    if seed is not None:
                        for offset, data in log.survivors(random.Random(seed), self.session.sector):
                            os.pwrite(cut.fileno(), data, offset)
                yield (to, seed), image

    def _losses(self, points: Iterable[Point]) -> list[str]:
        lost = []
        with tempfile.TemporaryDirectory(dir=_SCRATCH) as scratch:
            for (to, seed), image in self.images(Path(scratch), points):
                try:
                    self.check(image, to)
                except Lost as loss:
                    lost.append(f"cut after {to}, seed {seed}: {loss}")
        return lost

    def check(self, image: Path, to: int) -> None:
        """The file system needs its journal and no repair, and holds what was promised by then. Raises Lost."""
        if self.session.format != "raw":
            image = disk_of(image, self.session.format)
        check_file_system(image)
        out = image.with_name("out")
        run("rm", "-rf", str(out))
        out.mkdir()
        run("debugfs", "-R", f"rdump / {out}", str(image))
        self._check_files(out, self.session.promised("files", to))
        self._check_database(out / "db", to)

    def _check_files(self, out: Path, done: int) -> None:
        listed = (out / "list").read_text() if (out / "list").exists() else ""
        mine, next_ = "".join(f"{i}\n" for i in range(1, done + 1)), f"{done + 1}\n"
        # An append that was not synced yet: ext4 may have the file's new length, with zeros, before the data.
        rest = listed.removeprefix(mine)
        if not listed.startswith(mine) or not (next_.startswith(rest) or rest == "\0" * len(next_)):
            raise Lost(f"the list after round {done}: {listed[-40:]!r}")
        for number in range(1, done + 1):
            path = out / f"f.{number}"
            if number > done - LIVING:
                text = "".join(f"{i}\n" for i in range(number, 8 * number + 1))
                gone = number == done + 1 - LIVING and not path.exists()  # the next round may have removed it
                if not gone and (not path.exists() or path.read_text() != text):
                    raise Lost(f"{path.name} after round {done}")
            elif path.exists():
                raise Lost(f"{path.name} is back after round {done}")

    def _check_database(self, path: Path, to: int) -> None:
        session = self.session
        if not any(entry.data == b"commit 0" for entry in session.entries[:to] if entry.kind is Kind.MARK):
            return  # it is being made
        committed = session.promised("commit", to)
        promised = committed if session.synchronous == "FULL" else session.promised("checkpoint", to)
        try:
            with closing(sqlite3.connect(path)) as database:
                found = database.execute("PRAGMA integrity_check").fetchall()
                if found != [("ok",)]:
                    raise Lost(f"integrity_check: {found}")
                [(number,)] = database.execute("SELECT n FROM state").fetchall()
                digest = _digest(database)
        except sqlite3.Error as error:
            raise Lost(f"the database after {promised}: {error}") from None
        if not promised <= number <= committed + 1:
            raise Lost(f"transaction {promised} is missing; the last is {number}")
        if digest != session.digests[number]:
            raise Lost(f"not what transaction {number} left")


_PASSES = re.compile(
    r"Pass \d.*|.*: recovering journal|(?:Clearing|Truncating) orphaned inode .*|.*\bfiles \(.*\bblocks|"
    r".*\*{5} FILE SYSTEM WAS MODIFIED \*{5}|Free (?:inodes|blocks) count wrong \(\d+, counted=\d+\)\.|Fix\? yes|"
)
"""What e2fsck may say: it replayed the journal, removed files that had no name any more, and counted."""


def disk_of(image: Path, format: str) -> Path:
    """What an image holds as a raw one beside it; leaks are all that is wrong with the image. Raises Lost."""
    raw = image.with_name("disk.img")
    # For writing: a log is replayed. Unlocked: a process that another thread just forked still holds what is closed.
    with open_image(image, format=format, lock=False) as cut, raw.open("wb") as disk:
        if Can.CHECK in cut.can:
            found = cut.check()
            if found.corruptions or found.errors:
                raise Lost(f"our check: {found}")
        disk.truncate(cut.size)
        for extent in cut.extents():
            if extent.data:
                os.pwrite(disk.fileno(), read_at(cut, extent.offset, extent.length), extent.offset)
    if format in QEMU_CHECKS:
        run("qemu-img", "check", "-f", format, str(image), statuses=(0, 3))  # 3: leaks only
    return raw


def check_file_system(image: Path) -> None:
    """Its journal is all that a file system needs. Raises Lost."""
    said = run("e2fsck", "-f", "-y", str(image), statuses=(0, 1))
    odd = [line for line in said.splitlines() if not _PASSES.fullmatch(line)]
    if odd:
        raise Lost(f"e2fsck -fy: {odd}")
    run("e2fsck", "-f", "-n", str(image))


def run(*command: str, statuses: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", timeout=60)
    if done.returncode not in statuses:
        raise Lost(f"{' '.join(command)}: status {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def _copy(source: int, target: int) -> None:
    """A sparse file's content; what is a hole stays one."""
    size = os.fstat(source).st_size
    os.truncate(target, size)
    at = 0
    while at < size:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
        except OSError:
            return  # only a hole follows
        at = os.lseek(source, begin, os.SEEK_HOLE)
        os.pwrite(target, os.pread(source, at - begin, begin), begin)
