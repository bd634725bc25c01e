"""`skep image` beside the real qemu-img: the same words, the same answers, and images that are each other's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from skep import __version__
from skep.block.backend import write_at
from skep.block.image import open_image
from skep.cli import main
from skep.cli.image.parser import make_parser

MIB = 1 << 20


def qemu(*words: str | Path, status: int = 0) -> str:
    command = ["qemu-img", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, (words, done.stdout, done.stderr)
    return done.stdout


def skep(*words: str | Path, status: int = 0) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        returned = main(["image", *map(str, words)])
    assert returned == status, (words, out.getvalue(), err.getvalue())
    return out.getvalue()


Tool = Callable[..., str]


def write(path: Path, offset: int, data: bytes, format: str = "qcow2") -> None:
    with open_image(path, format=format) as image:
        write_at(image, offset, data)


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """top.qcow2 over base.qcow2, with data, zeros and a snapshot."""
    monkeypatch.chdir(tmp_path)
    skep("create", "-f", "qcow2", "base.qcow2", "10M")
    skep("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    write(Path("base.qcow2"), 5 * MIB, b"7" * 65536)
    write(Path("top.qcow2"), MIB, b"5" * 65536)
    with open_image("top.qcow2") as image:
        image.write_zeroes(3 * MIB, 65536, True)
    skep("snapshot", "-c", "first", "top.qcow2")
    return Path("top.qcow2")


@pytest.mark.parametrize(
    "words",
    [
        "info",
        "info --output=json",
        "info --backing-chain",
        "info --backing-chain --output=json",
        "map",
        "map --output=json",
        "map --output=json --start-offset 1M --max-length 5M",
        "check",
        "check --output=json",
        "snapshot -l",
        "measure -O qcow2",
        "measure -O qcow2 -o cluster_size=4k",
        "measure -O raw",
        "measure -O qcow2 --output=json",
    ],
)
def test_the_same_answers(chain: Path, words: str) -> None:
    assert skep(*words.split(), chain) == qemu(*words.split(), chain)


TOP = "driver=qcow2,file.driver=file,file.filename=top.qcow2"


@pytest.mark.parametrize(
    "words",
    [
        f"info {TOP}",
        f"info --output=json {TOP}",
        f"info --backing-chain {TOP}",
        f"map --output=json {TOP}",
        f"check {TOP}",
        f"check --output=json {TOP}",
        f"measure -O qcow2 {TOP}",
        f"snapshot -l {TOP}",
        f"compare {TOP} driver=qcow2,file.filename=base.qcow2",
        f"convert -O raw {TOP} copy.raw",
        f"convert -n -O raw --target-image-opts {TOP} driver=raw,file.filename=copy.raw",
        f"dd bs=1M skip=1 count=2 if={TOP} of=part.raw",
        f"resize --shrink {TOP} +1M",
        "info file.filename=top.qcow2",
        f"rebase -b base.qcow2 -F qcow2 {TOP}",
        f"bitmap --add {TOP} marks",
        f"amend -o lazy_refcounts=on {TOP}",
        f"commit {TOP}",
        f"info -f qcow2 {TOP}",
        "info driver=qcow2,file.filename=top.qcow2,nonsense=1",
        "info driver=nonsense,file.filename=top.qcow2",
    ],
)
def test_images_told_by_options(chain: Path, words: str) -> None:
    """Each on its own copy of the chain; then both disks are the same, and their copies."""
    command, *rest = words.split()
    answers: list[tuple[str, int]] = []
    for place in (Path("theirs"), Path("ours")):
        shutil.copytree(".", place, ignore=lambda _, names: [name for name in names if not name.endswith(".qcow2")])
        if "copy.raw" in words and "-n" in rest:
            (place / "copy.raw").write_bytes(bytes(10 * MIB))
        with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()) as out:
            if place.name == "ours":
                with contextlib.redirect_stderr(io.StringIO()):
                    status = main(["image", command, "--image-opts", *rest])
                answers.append((out.getvalue(), status))
            else:
                line = ["qemu-img", command, "--image-opts", *rest]
                done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
                answers.append((done.stdout, done.returncode))
    assert answers[0] == answers[1]
    for name in sorted(path.name for path in Path("theirs").iterdir()):
        qemu("compare", "-q", Path("theirs") / name, Path("ours") / name)


@pytest.mark.parametrize("words", ["-O qcow2 --size 1G", "-O raw --size 10k --output=json", "-O qcow2 --size 1T"])
def test_measuring_what_is_not_there_yet(words: str) -> None:
    assert skep("measure", *words.split()) == qemu("measure", *words.split())


@pytest.mark.parametrize(
    "words",
    [
        "-f qcow2 a 10M",
        "-f raw a 1000",
        "-f qcow2 -o cluster_size=4k,compat=0.10 a 1G",
        "-f qcow2 -o extended_l2=on,lazy_refcounts=on,refcount_bits=64 a 1G",
        "-f qcow2 -o preallocation=metadata a 3M",
        "-f qcow2 -o compression_type=zstd -u -b base -F raw a 64M",
    ],
)
def test_creation_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    told = skep("create", *words.split()).split()
    mine = json.loads(skep("info", "--output=json", "a"))
    expected = qemu("create", *words.split()).split()
    theirs = json.loads(qemu("info", "--output=json", "a"))
    # What was written "4k" is told as it was written by us, in bytes by QEMU.
    assert [word.partition("=")[0] for word in told] == [word.partition("=")[0] for word in expected]
    del mine["actual-size"], theirs["actual-size"]
    assert mine == theirs


def test_every_option_of_qemu_img_is_known() -> None:
    """By its own help: each subcommand, and each option of it."""
    text = qemu("--help").partition("Command syntax:\n")[2].partition("\nCommand parameters:")[0]
    subcommands = make_parser()._subparsers
    assert subcommands is not None
    known = subcommands._group_actions[0].choices
    assert isinstance(known, dict)
    for line in text.strip().splitlines():
        name, _, words = line.strip().partition(" ")
        options = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", words))
        assert options <= set(known[name]._option_string_actions), name
    assert set(known) == {line.split()[0] for line in text.strip().splitlines()}


@pytest.mark.parametrize("words", ["create -f qcow2 -o help", "convert -O vmdk -o help", "amend -f qcow2 -o help"])
def test_help_on_options(words: str) -> None:
    """As many options as QEMU has, and of the same names, but for what only old images had."""
    ours, theirs = (
        set(re.findall(r"^  ([\w.]+)=<", tool(*words.split()), flags=re.MULTILINE)) for tool in (skep, qemu)
    )
    # A password by itself, AES of 2005, and what only QEMU's own options of files have.
    left_out = {"encryption", "data_file", "data_file_raw"} if words[0] == "a" else {"encryption", "nocow"}
    assert theirs - ours <= left_out | {"extent_size_hint"}


@pytest.mark.parametrize(
    "words, begins",
    [
        ("--help", "usage: skep image"),
        ("-h", "usage: skep image"),
        ("info -h", "usage: skep image info"),
        ("--version", f"skep image {__version__}"),
        ("-V", f"skep image {__version__}"),
    ],
)
def test_standard_options(capsys: pytest.CaptureFixture[str], words: str, begins: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["image", *words.split()])
    assert not ended.value.code and capsys.readouterr().out.startswith(begins)


KINDS = (
    *("raw", "raw preallocation=falloc", "vdi", "vdi static=on", "qcow", "parallels"),
    *("vmdk", "vmdk subformat=monolithicFlat", "vmdk subformat=twoGbMaxExtentSparse", "vmdk compat6=on"),
    *("vmdk subformat=twoGbMaxExtentFlat", "vmdk adapter_type=lsilogic,hwversion=6", "vmdk subformat=streamOptimized"),
    *("vpc", "vpc force_size=on", "vpc subformat=fixed", "vhdx", "vhdx subformat=fixed"),
    "vhdx block_size=2M,log_size=2M",
    *("qcow2 preallocation=falloc", "qcow2 cluster_size=512,refcount_bits=1", "qcow2 data_file=d.raw,data_file_raw=on"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_told_as_qemu_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    format, _, options = kind.partition(" ")
    words = ["-f", format, *(["-o", options] if options else []), "disk", "10M"]
    if format not in ("qcow", "parallels"):
        ours = skep("create", *words)
        Path("disk").unlink()
        assert ours == qemu("create", *words)
        if "streamOptimized" not in options:
            subprocess.run(["qemu-io", "-f", format, "-c", "write -P 5 1M 100k", "disk"], check=True, timeout=60)
    else:
        qemu("create", "-q", *words)
    if kind == "vpc subformat=fixed":  # which QEMU does not find out
        return
    assert skep("info", "disk") == qemu("info", "disk")
    mine, theirs = (json.loads(tool("info", "--output=json", "disk")) for tool in (skep, qemu))
    assert mine == {"dirty-flag": False} | theirs
    if format not in ("vhdx", "vpc") and "static" not in options:  # of which QEMU does not say where data is, or finer
        assert skep("map", "disk") == qemu("map", "disk")
    assert skep("snapshot", "-l", "disk") == ("" if format != "qcow2" else qemu("snapshot", "-l", "disk"))


def test_compare_says_where(chain: Path) -> None:
    for words in (["base.qcow2", "top.qcow2"], ["-s", "base.qcow2", "top.qcow2"], ["-q", "top.qcow2", "base.qcow2"]):
        assert skep("compare", *words, status=1) == qemu("compare", *words, status=1)
    skep("resize", "base.qcow2", "20M")
    skep("create", "-f", "raw", "zeros.raw", "30M")
    for tool in (skep, qemu):
        assert tool("compare", "zeros.raw", "zeros.raw") == "Images are identical.\n"
        assert "size mismatch" not in tool("compare", "zeros.raw", "base.qcow2", status=1)
    skep("create", "-f", "qcow2", "none.qcow2", "20M")
    for words in (["zeros.raw", "none.qcow2"], ["-s", "zeros.raw", "none.qcow2"]):
        status = len(words) - 2
        assert skep("compare", *words, status=status) == qemu("compare", *words, status=status)
    write(Path("zeros.raw"), 25 * MIB, b"x" * 512, "raw")
    assert skep("compare", "zeros.raw", "none.qcow2", status=1) == qemu("compare", "zeros.raw", "none.qcow2", status=1)
    skep("compare", "nowhere", "base.qcow2", status=2)


def test_mistakes_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(1024))
    for words in (
        ["info", str(tmp_path / "nowhere")],
        ["create", "-f", "nonsense", str(tmp_path / "a"), "1M"],
        ["create", "-f", "qcow2", str(tmp_path / "a")],
        ["create", "-f", "qcow2", "-o", "cluster_size=5", str(tmp_path / "a"), "1M"],
        ["create", "-f", "qcow2", "-b", str(raw), str(tmp_path / "a")],
        ["resize", str(raw), "-1M"],
        ["resize", str(raw), "512"],
        ["snapshot", "-c", "x", str(raw)],
        ["convert", str(raw), str(raw)],
        ["convert", "-c", "-O", "raw", str(raw), str(tmp_path / "b")],
        ["convert", "-C", "-c", "-O", "qcow2", str(raw), str(tmp_path / "b")],
        ["convert", "-C", "-S", "4k", str(raw), str(tmp_path / "b")],
        ["convert", "-C", "--salvage", str(raw), str(tmp_path / "b")],
        ["commit", str(raw)],
        ["nonsense"],
        [],
        ["info"],
    ):
        assert main(["image", *words]) == 1, words
        out, err = capfd.readouterr()
        assert err.startswith("skep image: ") and err.count("\n") == 1 and not out, (words, out, err)
    assert main(["image", "check", str(raw)]) == 63


def test_convert_lets_the_host_copy(chain: Path) -> None:
    """With -C what is data to the host is data in the copy, zeros or not."""
    Path("source").write_bytes(bytes(MIB) + b"data" * 70000)
    os.truncate("source", 4 * MIB)
    taken = []
    for tool in (skep, qemu):
        tool("convert", "-C", "-f", "raw", "-O", "raw", "source", "copy.raw")
        assert Path("copy.raw").read_bytes() == Path("source").read_bytes()
        taken.append(Path("copy.raw").stat().st_blocks)
        tool("convert", "-C", "-O", "qcow2", chain, "copy.qcow2")
        qemu("compare", chain, "copy.qcow2")
    assert taken[0] == taken[1] >= (MIB + 280000) // 512


@pytest.mark.parametrize("words", ["", "-c", "-S 0", "-c -o compression_type=zstd", "-o extended_l2=on"])
def test_convert_keeps_everything(chain: Path, words: str) -> None:
    extra = words.split()
    write(chain, 7 * MIB + 512, random.Random(1).randbytes(200_000 // 512 * 512))
    skep("convert", "-O", "qcow2", *extra, chain, "copy.qcow2")
    qemu("compare", chain, "copy.qcow2")
    qemu("check", "copy.qcow2")
    skep("convert", "copy.qcow2", "copy.raw")
    qemu("compare", chain, "copy.raw")
    skep("compare", chain, "copy.raw")
    assert Path("copy.raw").stat().st_blocks * 512 < 10 * MIB or extra == ["-S", "0"]
    qemu("convert", "-O", "qcow2", *extra, chain, "theirs.qcow2")
    skep("compare", "theirs.qcow2", "copy.raw")
    skep("check", "theirs.qcow2")


def test_convert_onto_a_backing_file_and_from_a_snapshot(chain: Path) -> None:
    write(chain, MIB, b"9" * 65536)
    skep("convert", "-l", "first", "-O", "raw", chain, "then.raw")
    qemu("convert", "-l", "first", "-O", "raw", chain, "expected.raw")
    assert Path("then.raw").read_bytes() == Path("expected.raw").read_bytes()
    skep("convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", chain, "over.qcow2")
    qemu("compare", chain, "over.qcow2")
    assert json.loads(qemu("info", "--output=json", "over.qcow2"))["backing-filename"] == "base.qcow2"


def test_commit_and_rebase(chain: Path) -> None:
    qemu("convert", "-O", "raw", chain, "before.raw")
    skep("create", "-f", "qcow2", "-o", "cluster_size=4k", "other.qcow2", "8M")
    write(Path("other.qcow2"), 5 * MIB, b"8" * 131072)
    skep("rebase", "-b", "other.qcow2", "-F", "qcow2", chain)
    qemu("compare", chain, "before.raw")
    qemu("check", chain)
    skep("rebase", "-b", "", chain)
    qemu("compare", chain, "before.raw")
    skep("rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", chain)
    qemu("compare", chain, "before.raw")
    skep("snapshot", "-d", "first", chain)
    skep("commit", chain)
    qemu("check", chain)
    qemu("check", "base.qcow2")
    for image in ("base.qcow2", chain):
        qemu("compare", image, "before.raw")
    assert not any(one["present"] for one in json.loads(skep("map", "--output=json", chain)) if one["depth"] == 0)


@pytest.mark.parametrize("backing", [(), ("-b", "base", "-F", "raw")], ids=["alone", "over another"])
def test_amend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backing: tuple[str, ...]) -> None:
    """The same changes, allowed or not, on two images; both end up the same, sound, and with the same disk."""
    monkeypatch.chdir(tmp_path)
    Path("base").write_bytes(b"b" * 5 * MIB)
    for tool, name in ((skep, "one"), (qemu, "two")):
        tool("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *backing, name, "5M")
        write(Path(name), MIB, b"a" * 70000 + bytes(-70000 % 512))
        with open_image(name) as image:
            image.write_zeroes(2 * MIB, 40960, True)
            image.write_zeroes(MIB, 4096, False)
        tool("snapshot", "-c", "first", name)
        write(Path(name), 3 * MIB, b"c" * 512)
    for options, allowed in (
        ("refcount_bits=1", False),  # a snapshot has references too
        ("refcount_bits=64", True),
        ("refcount_bits=3", False),
        ("compat=0.10", False),
        ("lazy_refcounts=on,refcount_bits=8", True),
        ("size=6M", True),
        ("cluster_size=64k", False),
        ("nonsense=1", False),
        ("", True),
        ("refcount_bits=1", True),
        ("lazy_refcounts=off,refcount_bits=16", True),
        ("compat=0.10", True),
        ("refcount_bits=8", False),
        ("lazy_refcounts=on", False),
        ("compat=v3", True),
        ("compat=nonsense", False),
        ("size=7M,compat=v2", True),
    ):
        for tool, name in ((skep, "one"), (qemu, "two")):
            words = ["amend", "-o", options, name] if options else ["snapshot", "-d", "first", name]
            tool(*words, status=int(not allowed))
            for judge in (skep, qemu):
                judge("check", "-q", name)
        one, two = (json.loads(qemu("info", "--output=json", name))["format-specific"] for name in ("one", "two"))
        assert one == two
    for judge in (skep, qemu):
        judge("compare", "one", "two")
    assert skep("map", "--output=json", "one") == qemu("map", "--output=json", "one")


def test_bitmaps_are_kept_as_qemu_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qemu("create", "-f", "qcow2", "a.qcow2", "20M")
    qemu("bitmap", "--add", "a.qcow2", "theirs")
    skep("bitmap", "--add", "-g", "32k", "a.qcow2", "ours")
    write(Path("a.qcow2"), 3 * MIB, b"x" * 100 * 512)
    write(Path("a.qcow2"), 9 * MIB, b"x" * 512)
    qemu("check", "a.qcow2")
    found = json.loads(qemu("info", "--output=json", "a.qcow2"))["format-specific"]["data"]["bitmaps"]
    assert found == json.loads(skep("info", "--output=json", "a.qcow2"))["format-specific"]["data"]["bitmaps"]
    assert [one["name"] for one in found] == ["theirs", "ours"] and all(one["flags"] == ["auto"] for one in found)
    assert marked("a.qcow2", "theirs") == [(3 * MIB, 65536), (9 * MIB, 65536)]
    assert marked("a.qcow2", "ours") == [(3 * MIB, 65536), (9 * MIB, 32768)]
    skep("bitmap", "--add", "--disable", "--merge", "theirs", "a.qcow2", "copy")
    skep("bitmap", "--clear", "a.qcow2", "theirs")
    skep("bitmap", "--remove", "a.qcow2", "ours")
    qemu("check", "a.qcow2")
    skep("check", "a.qcow2")
    assert marked("a.qcow2", "copy") == [(3 * MIB, 65536), (9 * MIB, 65536)]
    assert marked("a.qcow2", "theirs") == []


def marked(path: str, name: str) -> list[tuple[int, int]]:
    """What a bitmap has set, as QEMU's NBD server tells it."""
    from skep.block.qcow2.image import Qcow2Image

    qemu("convert", "--bitmaps", "-O", "qcow2", path, "read.qcow2")
    with open_image("read.qcow2", read_only=True) as image:
        assert isinstance(image, Qcow2Image)
        one = image.tracker.find(name)
        bits = image.tracker.load(one)
        size = 1 << one.granularity_bits
        runs: list[tuple[int, int]] = []
        for number in range(len(bits) * 8):
            if bits[number // 8] >> number % 8 & 1:
                if runs and sum(runs[-1]) == number * size:
                    runs[-1] = (runs[-1][0], runs[-1][1] + size)
                else:
                    runs.append((number * size, size))
        return runs


@pytest.mark.parametrize(
    "words",
    [
        "convert -p -O raw top.qcow2 copy.raw",
        "convert -p -q -O raw top.qcow2 copy.raw",
        "amend -p -o lazy_refcounts=on top.qcow2",
        "commit -p top.qcow2",
        "rebase -p -b other.qcow2 -F qcow2 top.qcow2",
        "compare -p top.qcow2 top.qcow2",
    ],
)
def test_progress_begins_and_ends_as_qemus(chain: Path, words: str) -> None:
    skep("create", "-q", "-f", "qcow2", "other.qcow2", "10M")
    shutil.copy(chain, "kept")
    said = skep(*words.split())
    shutil.copy("kept", chain)
    theirs = qemu(*words.split())
    for text in ("    (0.00/100%)", "    (100.00/100%)"):
        assert (text in said) == (text in theirs), (text, said, theirs)
    ours, others = (re.sub(r" +\([0-9.]+/100%\)[\r\n]+", "", one).split() for one in (said, theirs))
    assert ours == others


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where standard error is one, and it takes a while; it is gone at the end, and nothing is on standard output."""
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(3 * MIB))
    master, slave = pty.openpty()
    try:
        words = ["convert", "-f", "raw", "-O", "raw", "-r", "2M", "source", "target"]
        command = [sys.executable, "-m", "skep.cli", "image", *words]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=slave, check=True, timeout=60
        )
        shown = os.read(master, 1 << 16).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert done.stdout == b""
    assert re.search(r"\r\[#* *\]  *\d+\.\d%", shown) and shown.endswith("\r\x1b[K"), shown
