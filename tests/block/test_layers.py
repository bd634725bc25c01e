"""Stacks of layers, told as trees of options: by tools, programs and a VM's configuration."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from skep.block.backend import read_at, write_at
from skep.block.format import BackingName
from skep.block.image import create_image, open_disk, open_image, open_layers
from skep.block.options import BlockOptions
from skep.block.record import Kind, read_log
from skep.block.tree import Tree, nested, parse_layers
from skep.config.tree import Tree as Configuration
from skep.errors import UserError
from tests.block.conformance import run

MIB = 1 << 20
SECRETS = {"s": b"open sesame"}
LUKS = {"key-secret": "s", "iter-time": "1"}


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create_image(path, "qcow2", MIB)
    return path


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_words_and_json_tell_the_same() -> None:
    tree = parse_layers("driver=qcow2,file.driver=throttle,file.bps=1M,file.file.filename=a,,b,read-only=on")
    assert tree == {
        "driver": "qcow2",
        "read-only": "on",
        "file": {"driver": "throttle", "bps": "1M", "file": {"filename": "a,b"}},
    }
    told = '"file":{"driver":"throttle","bps":"1M","file.filename":"a,b"}'
    assert parse_layers(f'json:{{"driver":"qcow2","read-only":true,{told}}}') == tree
    assert parse_layers('json:{"driver":"qcow2","backing":null}') == {"driver": "qcow2", "backing": None}


@pytest.mark.parametrize(
    "between",
    [(), ({"driver": "throttle", "iops": "100000"},), ({"driver": "raw"}, {"driver": "trace", "log": "/dev/null"})],
    ids=["at once", "a filter", "raw and a filter"],
)
@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi"])
def test_tables_do_not_lie_over_tables(
    tmp_path: Path, qcow2: Path, kind: str, between: tuple[dict[str, str], ...]
) -> None:
    """Told at once, and not by the first request that takes a lock twice."""
    create_image(tmp_path / "inner", kind, MIB // 2)
    with open_image(qcow2) as image:
        image.write_from((tmp_path / "inner").read_bytes()[: MIB // 2])
    before = descriptors()
    layers: Tree = {"driver": "qcow2", "file": {"filename": str(qcow2)}}
    for one in reversed(between):
        layers = {**one, "file": layers}
    with pytest.raises(UserError, match=f"a {kind} image cannot lie over one of qcow2"):
        open_layers({"driver": kind, "file": layers})
    assert descriptors() == before


def test_a_data_file_with_tables_is_refused(tmp_path: Path, qcow2: Path) -> None:
    create_image(tmp_path / "disk", "qcow2", MIB, options={"data_file": "data"})
    before = descriptors()
    with pytest.raises(UserError, match="a qcow2 image cannot lie over one of qcow2"):
        open_layers(
            f"driver=qcow2,file.filename={tmp_path}/disk,data-file.driver=qcow2,data-file.file.filename={qcow2}"
        )
    assert descriptors() == before


def test_layers_below_a_format(tmp_path: Path, qcow2: Path) -> None:
    """A trace of what the format does to its file, and a log that says the same; QEMU reads what came of it."""
    stack = f"driver=qcow2,file.driver=trace,file.log={tmp_path}/trace,file.file.driver=record,"
    stack += f"file.file.log={tmp_path}/log,file.file.file.driver=throttle,file.file.file.bps=100M,"
    stack += f"file.file.file.file.driver=delay,file.file.file.file.ms=1,file.file.file.file.file.filename={qcow2}"
    data = random.Random(1).randbytes(65536)
    with open_layers(stack) as image:
        assert image.format == "qcow2" and image.path == str(qcow2)
        write_at(image, 65536, data)
        image.flush()
        assert read_at(image, 65536, 65536) == data
    seen = [line.split()[1:] for line in (tmp_path / "trace").read_text().splitlines()]
    writes = [(int(at), int(n)) for what, at, n in seen if what == "write"]
    assert writes and "flush" in [what for what, *_ in seen]
    logged = [entry for entry in read_log(str(tmp_path / "log")) if entry.kind is Kind.WRITE]
    assert set(writes) <= {(entry.offset, len(entry.data)) for entry in logged}
    assert any(entry.data == data for entry in logged)
    run("qemu-img", "check", qcow2)
    with open_image(qcow2) as image:
        assert read_at(image, 65536, 65536) == data


def test_layers_over_a_format(tmp_path: Path, qcow2: Path) -> None:
    """What is no format at the top is a raw image to whoever opens it."""
    with open_layers(f"driver=trace,log={tmp_path}/trace,file.driver=qcow2,file.file.filename={qcow2}") as image:
        assert image.format == "raw" and image.size == MIB
        write_at(image, 512, b"x" * 512)
        assert not next(iter(image.extents())).zero
    assert "write 512 512" in (tmp_path / "trace").read_text()


def test_a_format_in_a_format(tmp_path: Path) -> None:
    """qcow2 in LUKS, which has sectors only; QEMU finds the same in it."""
    path, data = tmp_path / "disk.luks", random.Random(1).randbytes(100_000 // 512 * 512)
    create_image(path, "luks", 4 * MIB, options=LUKS, secrets=SECRETS)
    create_image(tmp_path / "inner", "qcow2", 8 * MIB, options={"cluster_size": "512"})
    with open_layers(f"driver=luks,key-secret=s,file.filename={path}", secrets=SECRETS) as outer:
        write_at(outer, 0, (tmp_path / "inner").read_bytes().ljust(MIB, b"\0"))
    stack = f"driver=qcow2,file.driver=luks,file.key-secret=s,file.file.filename={path}"
    with open_layers(stack, secrets=SECRETS) as image:
        write_at(image, 5 * MIB + 512, data)
        assert image.check().clean
    with open_layers(stack, secrets=SECRETS, read_only=True) as image:
        assert read_at(image, 5 * MIB + 512, len(data)) == data
    (tmp_path / "raw").write_bytes(data)
    told = ("--object", "secret,id=s,data=open sesame", "--image-opts")
    run("qemu-img", "check", *told, stack)
    run("qemu-io", *told, stack, "-c", "read -P 0 0 5M")


def test_what_is_below_cannot_stay_locked(tmp_path: Path) -> None:
    create_image(tmp_path / "disk.luks", "luks", MIB, options=LUKS, secrets=SECRETS)
    with pytest.raises(UserError, match="password was not told"):
        open_layers(f"driver=qcow2,file.driver=luks,file.file.filename={tmp_path}/disk.luks", may_stay_locked=True)


@pytest.mark.parametrize("what", ["read", "write", "zero", "discard", "flush"])
def test_faults(tmp_path: Path, what: str) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(MIB))
    rule = f"driver=fault,what={what},start=64K,end=128K,after=1,times=2,file.filename={path}"
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: read_at(image, 65536, 512),
        "write": lambda: write_at(image, 65536, b"x" * 512),
        "zero": lambda: image.write_zeroes(65536, 512, True),
        "discard": lambda: image.discard(65536, 4096),
    }
    with open_layers(f"driver=raw,{rule.replace('driver=', 'file.driver=').replace(',', ',file.')}") as image:
        read_at(image, 0, 65536)
        write_at(image, 131072, b"x" * 512)
        calls["flush"] = image.flush
        failed = []
        for _ in range(5):
            try:
                calls[what]()
                failed.append(False)
            except OSError as error:
                assert error.errno == errno.EIO
                failed.append(True)
        assert failed == [False, True, True, False, False]


def test_copies_on_read(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * MIB)
    create_image(tmp_path / "over", "qcow2", backing=BackingName("base", "raw"))
    with open_layers(f"driver=copy-on-read,file.driver=qcow2,file.file.filename={tmp_path}/over") as image:
        assert read_at(image, 0, 512) == b"b" * 512
    with open_image(tmp_path / "over", backing=False) as image:
        assert read_at(image, 0, 65536) == b"b" * 65536 and not any(read_at(image, 65536, 512))
    with pytest.raises(UserError, match="not an image over another"):
        open_layers(f"driver=raw,file.driver=copy-on-read,file.file.filename={tmp_path}/base")


def test_what_lies_below_may_be_told(tmp_path: Path) -> None:
    """Instead of what the image says; or that nothing does."""
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * MIB)
    create_image(tmp_path / "over", "qcow2", backing=BackingName("a", "raw"))
    for told, expected in (("", b"a"), (f",backing.driver=raw,backing.file.filename={tmp_path}/b", b"b")):
        with open_layers(f"driver=qcow2,file.filename={tmp_path}/over{told}", inside=[str(tmp_path)]) as image:
            assert read_at(image, 0, 1) == expected
    with open_layers({"driver": "qcow2", "backing": None, "file": {"filename": f"{tmp_path}/over"}}) as image:
        assert image.backing is None
    create_image(tmp_path / "apart", "qcow2", MIB, options={"data_file": str(tmp_path / "data")})
    os.rename(tmp_path / "data", tmp_path / "moved")
    stack = f"driver=qcow2,file.filename={tmp_path}/apart,data-file.driver=file,data-file.filename={tmp_path}/moved"
    with open_layers(stack) as image:
        write_at(image, 0, b"moved" * 102 + b"..")
    assert (tmp_path / "moved").read_bytes()[:5] == b"moved"


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        ("", "file.filename: is missing"),
        ("driver=qcow3,file.filename=PATH", "no such driver"),
        ("driver=qcow2,file.driver=ftp,file.filename=PATH", "file.driver: no such driver"),
        ("driver=qcow2,file=PATH", "say file.driver"),
        ("driver=qcow2", "file.filename: is missing"),
        ("driver=qcow2,filename=PATH,file.filename=PATH", "told twice"),
        ("driver=qcow2,file.filename=PATH,key-secret=s", "not opened with 'key-secret'|no such option"),
        ("driver=qcow2,file.filename=PATH,encrypt.key-sekret=s", "nearest is encrypt.key-secret"),
        ("driver=qcow2,file.filename=PATH,file.fliename=x", "nearest is file.filename"),
        ("driver=qcow2,file.driver=throttle,file.file.filename=PATH", "file.bps: is missing"),
        ("driver=qcow2,file.driver=throttle,file.bps=fast,file.file.filename=PATH", "file.bps"),
        ("driver=qcow2,file.driver=throttle,file.iops.x=1,file.file.filename=PATH", "an option, not a layer"),
        ("driver=qcow2,file.driver=delay,file.file.filename=PATH", "file.ms: is missing"),
        ("driver=qcow2,file.driver=fault,file.what=all,file.file.filename=PATH", "is one of read, write"),
        ("driver=qcow2,file.driver=trace,file.file.filename=PATH", "file.log: is missing"),
        ("driver=qcow2,file.driver=trace,file.log=/nowhere/x,file.file.filename=PATH", "trace cannot be made"),
        ("driver=qcow2,file.driver=delay,file.ms=1", "file.file: is missing"),
        ("driver=qcow2,file.driver=nbd", "file.host: is missing"),
        ("driver=qcow2,file.driver=nbd,file.host=h,file.path=/s", "both told"),
        ("driver=qcow2,file.filename=PATH,file.locking=maybe", "auto, on or off"),
        ("driver=qcow2,file.filename=PATH,read-only=maybe", "on or off"),
        ("driver=qcow2,file.filename=PATH,backing.driver=raw,backing.file.filename=/nowhere/x", "no such disk image"),
        ("a.b=1,a=2", "an option and a layer at once"),
        ("json:{", "not JSON"),
        ("json:[1]", "not a JSON object"),
        ('json:{"driver":[1]}', "is no option"),
        ("json:" + '{"a":' * 300 + "1" + "}" * 300, "more than 200 layers|not JSON"),
        ("x." * 300 + "y=1", "more than 200 layers"),
    ],
)
def test_mistakes(qcow2: Path, stack: str, says: str) -> None:
    """Told, and nothing is left open."""
    before = descriptors()
    with pytest.raises(UserError, match=says):
        open_layers(stack.replace("PATH", str(qcow2)))
    assert descriptors() == before


def node(**keys: str) -> BlockOptions:
    told = {f"pci.0.3.0.{key.replace('__', '.').replace('_', '-')}": value for key, value in keys.items()}
    return BlockOptions.from_node(Configuration({"pci.0.3.0.device": "virtio-blk", **told}).node("pci.0.3.0"))


def test_a_vms_disk(tmp_path: Path, qcow2: Path) -> None:
    below = {"layers__file__driver": "delay", "layers__file__ms": "1", "layers__file__file__filename": str(qcow2)}
    options = node(layers__driver="qcow2", **below)
    assert json.loads(options.path.removeprefix("json:"))["driver"] == "qcow2"
    disk = open_disk(options)
    write_at(disk, 0, b"x" * 512)
    disk.close()
    disk = open_disk(BlockOptions(path=str(qcow2), format="qcow2"))
    assert read_at(disk, 0, 512) == b"x" * 512
    disk.close()
    for keys, says in (
        ({"path": "x", "layers__driver": "raw"}, "is told by the layers"),
        ({"format": "raw", "layers__driver": "raw"}, "is told by the layers"),
        ({}, "must be given"),
    ):
        with pytest.raises(UserError, match=says):
            node(**keys)


def test_a_vms_encrypted_disk(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(SECRETS["s"])
    for format, prefix in (("luks", ""), ("qcow2", "encrypt.")):
        path = tmp_path / f"disk.{format}"
        own = {prefix + name: value for name, value in LUKS.items()} | ({"encrypt.format": "luks"} if prefix else {})
        create_image(path, format, MIB, options=own, secrets=SECRETS)
        with pytest.raises(UserError, match="password was not told"):
            open_disk(BlockOptions(path=str(path), format=format))
        disk = open_disk(node(path=str(path), format=format, keyfile=str(key)))
        write_at(disk, 0, b"secret" * 256)
        disk.close()
        assert b"secret" not in path.read_bytes()
        layers = {"layers__driver": format, "layers__file__filename": str(path)}
        layers["layers__encrypt__key_secret" if prefix else "layers__key_secret"] = "key"
        disk = open_disk(node(keyfile=str(key), ro="true", **layers))
        assert read_at(disk, 0, 1536) == b"secret" * 256
        disk.close()
    with pytest.raises(UserError, match="not opened with"):
        open_disk(BlockOptions(path=str(tmp_path / "key"), key_file=str(key)))
    with pytest.raises(UserError, match="keyfile: its file"):
        open_disk(BlockOptions(path=str(path), format="qcow2", key_file="/nowhere/x"))


def test_a_vm_guesses_no_format(qcow2: Path) -> None:
    with pytest.raises(UserError, match="its format is not told"):
        open_disk(node(layers__file__filename=str(qcow2)))


def test_nested_options() -> None:
    assert nested({"a.b.c": "1", "a.b.d": None}) == {"a": {"b": {"c": "1", "d": None}}}
