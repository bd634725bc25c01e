"""`skep io` beside the real qemu-io: the same commands print the same but for times, and leave the same disk."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from skep.cli import main

_TIMES = re.compile(r"ops; .*$", re.MULTILINE)
_MACHINE = re.compile(r"^(\d+,\d+),[\d:.]+,[\d.]+,[\d.]+$", re.MULTILINE)


def shown(text: str) -> str:
    return _MACHINE.sub(r"\1", _TIMES.sub("ops", text)).replace("skep io:", "qemu-io:")


def qemu(*words: str | Path, typed: str = "") -> tuple[str, str, int]:
    command = ["qemu-io", *map(str, words)]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, check=False, timeout=60)
    return shown(done.stdout), done.stderr, done.returncode


def skep(*words: str | Path) -> tuple[str, str, int]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["io", *map(str, words)])
    return shown(out.getvalue()), err.getvalue().replace("skep io:", "qemu-io:"), status


def make(path: Path, *words: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", *words[:-1], path, words[-1]], check=True, timeout=60)


TRANSFERS = """
read 0 4k
read -C 0 4k
write -P 0x61 10 600
read -v 0 640
read -P 0x61 0 512
read -P 0 -s 100 -l 200 1M 512
read -P 1 -s 100 1M 512
read -P 1 -l 600 1M 512
read -l 4 0 512
read -q 0 512
readv -v -P 0 2M 16 16 8
readv 0 0x200 1k
write -z 0 64k
write -z -u 0 64k
write -z -u 100 1000
write -c 128k 64k
read -P 0xcd 128k 64k
write -c 0 512
write -z -P 1 0 512
write -u 0 512
write -n 0 512
write -f 0 512
write 1000 70000
read -P 0xcd 1000 70000
writev 0 512 512
writev -f -P 7 3 5 6
writev -q 0 512 512
writev 0
aio_write -P 9 1M 64k
aio_flush
aio_read -P 9 1M 64k
aio_flush
aio_read -P 8 1M 64k
aio_flush
aio_write -z 1M 64k 3
aio_write -u 1M 64k
aio_read -i 0 512
aio_write -i 0 512
aio_read 100M 512
aio_flush
discard 0 64k
discard -q 0 64k
discard -C 0 64k
discard 0 3
discard 100M 512
flush
sleep 1
sleep x
sleep
"""

MISTAKES = """
read
read 0
read x 4
read 0 4x
read 0 1E
read 0 16E
read 0 2G
read 10M 512
read 9M 2M
read -x 0 512
read -P
read -P x 0 512
read -P 256 0 512
read 0 512 -q
write -s /nope 0 512
write -z -b 0 512
write -f -b 0 512
write -f -c 0 64k
write -b 0 100
read -b 3 512
nonsense
flush 3
length 3
help read write
help nonsense
help length
help ?
r 0 512
truncate
truncate x
truncate -m bogus 6M
open
open nope
open -x a
reopen -r -w
reopen -c bogus
reopen -x
reopen -o driver=raw
break read_aio a
resume a
remove_break a
"""

LOOKING = """
length
info
map
write 64k 64k
write -z 1M 64k
map
alloc 0
alloc 0 1M
alloc 512 100
alloc 65000 3000
alloc 1M 1M
alloc 100M
alloc 20M
alloc 0 20M
truncate 20M
length
truncate 5M
length
truncate 5000000
length
reopen -r
write 0 512
discard 0 512
truncate 1M
reopen -w
write -q 0 512
close
length
read 0 1
close
"""


def plain(said: str) -> list[str]:
    """Lines, but for what the two images have of their own."""
    return [line for line in said.splitlines() if "filename:" not in line and " cid:" not in line]


def both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, *create: str, options: tuple[str, ...] = ()
) -> None:
    """Each line by itself, so that what differs has a name, and then what is left."""
    monkeypatch.chdir(tmp_path)
    disks = [Path("one"), Path("two")]
    for disk in disks:
        make(disk, *create)
    commands = [word for line in lines.split("\n") if line for word in ("-c", line)]
    mine = skep(*options, *commands, disks[0])
    theirs = qemu(*options, *commands, disks[1])
    assert plain(mine[0]) == plain(theirs[0])
    assert mine[2] == theirs[2]
    # Messages of the host's and ours are not in QEMU's words, but there are as many.
    assert len(mine[1].splitlines()) == len(theirs[1].splitlines()), (mine[1], theirs[1])
    if "-f" in create:
        kind = create[create.index("-f") + 1]
        compared = ["qemu-img", "compare", "-f", kind, "-F", kind, *map(str, disks)]
        assert subprocess.run(compared, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("lines", [TRANSFERS, MISTAKES, LOOKING], ids=["transfers", "mistakes", "looking"])
@pytest.mark.parametrize(
    "create",
    [
        ("-f", "qcow2", "10M"),
        ("-f", "qcow2", "-o", "extended_l2=on", "10M"),
        ("-f", "raw", "10M"),
        ("-f", "vmdk", "10M"),
    ],
    ids=lambda words: "-".join(words[1:-1]),
)
def test_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, create: tuple[str, ...]) -> None:
    if create[1] == "vmdk":
        # QEMU takes -c and does not compress, gives zeros that were zeros before a place, and keeps discarded data.
        lines = re.sub(r"^(write.*(-c|-z 1M)|discard.* 64k$).*\n", "", lines, flags=re.MULTILINE)
    both(tmp_path, monkeypatch, lines, *create, options=("-f", create[1]))


def test_backing_files_and_temporary_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("base"), "-f", "qcow2", "4M")
    assert skep("-c", "write -q -P 1 0 1M", "base")[2] == 0
    for disk in ("one", "two"):
        make(Path(disk), "-f", "qcow2", "-b", "base", "-F", "qcow2", "4M")
    lines = [
        "write -P 2 64k 1000",
        "write -z 1M 70000",
        "map",
        "alloc 0 1M",
        "discard 64k 64k",
        "map",
        "read -P 1 0 4k",
    ]
    commands = [word for line in lines for word in ("-c", line)]
    assert skep(*commands, "one") == qemu(*commands, "two")
    # What goes to a temporary file is seen until it is closed; copying on read takes what is read from below.
    temporary = ["-s", "-c", "write -P 9 0 64k", "-c", "read -P 9 0 64k", "-c", "read -P 1 64k 4k"]
    for words in (
        temporary,
        ["-C", "-c", "read -P 1 128k 64k", "-c", "map"],
        ["-r", "-c", "read -P 1 0 64k"],
    ):
        assert skep(*words, "one") == qemu(*words, "two"), words
    assert subprocess.run(["qemu-img", "compare", "one", "two"], check=False, timeout=60).returncode == 0


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("disk"), "-f", "qcow2", "4M")
    for words in (
        ["--image-opts", "-c", "length", "driver=qcow2,file.filename=disk"],
        ["-r", "--image-opts", "-c", "info", "driver=qcow2,file.driver=file,file.filename=disk,read-only=on"],
        ["--image-opts", "-f", "qcow2", "driver=qcow2,file.filename=disk"],
        ["-t", "bogus", "-c", "length", "disk"],
        ["-d", "bogus", "-c", "length", "disk"],
        ["-i", "bogus", "-c", "length", "disk"],
        ["-U", "-c", "length", "disk"],
        ["-U", "-r", "-c", "length", "disk"],
        ["-n", "-m", "-c", "read 3 5", "-c", "write 512 1k", "disk"],
        ["-t", "writethrough", "-c", "write -P 1 0 4k", "disk"],
        ["-d", "ignore", "-c", "discard 0 64k", "-c", "read -P 1 0 4k", "disk"],
        ["-c", "read 0 1"],
        [
            "-c",
            "open -r disk",
            "-c",
            "length",
            "-c",
            "close",
            "-c",
            "open -o driver=qcow2 disk",
            "-c",
            "length",
        ],
        ["-c", "open -o driver=qcow2,file.filename=disk", "-c", "open disk"],
        ["-c", "open -r disk two", "-c", "open -t bogus disk", "-c", "open -o nonsense=1 disk"],
        ["nowhere"],
        ["disk", "-f", "nonsense"],
        ["-c", "quit", "-c", "nonsense", "disk"],
    ):
        mine, theirs = skep(*words), qemu(*words)
        assert (mine[0], mine[2], bool(mine[1])) == (theirs[0], theirs[2], bool(theirs[1])), words


def test_the_state_of_a_vm_is_kept_beside_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for disk in ("one", "two"):
        make(Path(disk), "-f", "qcow2", "-o", "cluster_size=4k", "5M")
    write = ["-c", "write -b -P 5 0 64k", "-c", "write -b -P 6 3M 4k", "-c", "write -P 1 0 64k"]
    read = [
        "-c",
        "read -b -P 5 0 64k",
        "-c",
        "read -b -P 0 64k 1k",
        "-c",
        "read -b -P 6 3M 4k",
        "-c",
        "read -P 1 0 64k",
    ]
    assert skep(*write, "one") == qemu(*write, "two")
    for disk in ("one", "two"):
        assert skep(*read, disk) == qemu(*read, disk)
        assert subprocess.run(["qemu-img", "check", "-q", disk], check=False, timeout=60).returncode == 0
    assert skep("-c", "read -b 40M 512", "one")[0] == "read 512/512 bytes at offset 41943040\n512 bytes, 1 ops\n"


def test_commands_are_typed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    typed = "length\n\nread 0 512\nq\nlength\n"
    command = [sys.executable, "-m", "skep.cli", "io", "-f", "raw", str(disk)]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, check=False, timeout=60)
    assert (shown(done.stdout), done.returncode) == qemu("-f", "raw", disk, typed=typed)[::2]


def test_what_was_flushed_is_there_after_an_abort(tmp_path: Path) -> None:
    """`abort` is how scripts leave an image that was not closed."""
    disk = tmp_path / "disk"
    make(disk, "-f", "qcow2", "4M")
    command = [
        sys.executable,
        "-m",
        "skep.cli",
        "io",
        "-c",
        "write -P 1 0 64k",
        "-c",
        "flush",
        "-c",
        "abort",
        str(disk),
    ]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == -signal.SIGABRT
    assert qemu("-c", "read -P 1 0 64k", disk)[2] == 0
