"""The tree, its views, and the rules of bhyve_config(5) that it keeps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.config import Tree, View, check_settings, keys_of, option, parse_options, values, view
from skep.errors import HostError, InternalError, UserError


class Disk(View):
    path: str = option(values.text, doc="the image")
    ro: bool = option(values.boolean, False, doc="refuse writes")
    queues: int = option(values.integer(1, 4), 1, key="queue.count", doc="how many queues")


# The tree


def test_expansion_happens_at_freeze_and_reaches_later_keys() -> None:
    tree = Tree({"boot.kernel": "/vm/%(name)/vmlinuz", "a": "100%% of %(boot.kernel)", "b": "5% off"})
    tree["name"] = "web"
    tree.freeze()
    assert tree["boot.kernel"] == "/vm/web/vmlinuz"
    assert tree["a"] == "100% of /vm/web/vmlinuz"
    assert tree["b"] == "5% off"


def test_expansion_in_a_circle_and_of_nothing() -> None:
    with pytest.raises(UserError, match=r"^a: %\(a\) leads back to itself$"):
        Tree({"a": "%(b)", "b": "%(a)"}).freeze()
    with pytest.raises(UserError, match=r"^a: %\(nmae\) names no configuration key; did you mean %\(name\)\?$"):
        Tree({"a": "%(nmae)", "name": "x"}).freeze()


def test_frozen_is_frozen() -> None:
    tree = Tree({"a": "1"}).freeze()
    assert tree.freeze() is tree
    with pytest.raises(InternalError):
        tree["a"] = "2"
    with pytest.raises(InternalError):
        tree.remove("a")
    copy = tree.thawed()
    copy["a"] = "2"
    assert (tree["a"], copy["a"]) == ("1", "2")


def test_a_name_is_a_leaf_or_a_node() -> None:
    with pytest.raises(UserError, match=r"^memory: has parts of its own, such as memory.size, and takes no value$"):
        Tree({"memory.size": "1G"})["memory"] = "1G"
    with pytest.raises(UserError, match=r"^cpus.count: cpus has a value and takes no parts$"):
        Tree({"cpus": "1"})["cpus.count"] = "1"


@pytest.mark.parametrize("key", ["", ".", "a.", ".a", "a..b", "a b", "a=b", "%(a)"])
def test_bad_keys(key: str) -> None:
    with pytest.raises(UserError, match="not a configuration key"):
        Tree()[key] = "x"


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
VALUES = st.text(st.characters(blacklist_characters="\n\0", blacklist_categories=("Cs",)), max_size=12)


@given(st.dictionaries(NAMES, VALUES))
def test_a_dump_fed_back_is_the_same_tree(tmp_path_factory: pytest.TempPathFactory, leaves: dict[str, str]) -> None:
    tree = Tree({f"node.{key}": value.replace("%", "%%") for key, value in leaves.items()}).freeze()
    assert {key: tree[f"node.{key}"] for key in leaves} == leaves
    path = tmp_path_factory.mktemp("dump") / "tree"
    path.write_text(tree.dump(), encoding="utf-8", newline="")
    again = Tree()
    again.load(path)
    assert again.freeze() == tree
    assert again.dump() == tree.dump()


def test_the_dump_is_sorted_and_leaves_its_own_request_out() -> None:
    tree = Tree({"b": "2", "config.dump": "1", "a": "1"})
    assert tree.freeze().dump() == "a=1\nb=2\n"


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "vm.conf"
    path.write_text("# a comment\n\n  cpus=2\nboot.cmdline=console=ttyS0  quiet \n")
    tree = Tree()
    tree.load(path)
    assert {key: tree[key] for key in tree} == {"cpus": "2", "boot.cmdline": "console=ttyS0  quiet "}
    path.write_text("cpus 2\n")
    with pytest.raises(UserError, match=r"line 1: 'cpus 2' is not KEY=VALUE"):
        tree.load(path)
    with pytest.raises(UserError, match=r"absent: No such file or directory$"):
        tree.load(tmp_path / "absent")
    with pytest.raises(UserError, match=r"Is a directory$"):
        tree.load(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"not a configuration file \(not text\)$"):
        tree.load(path)


def test_nodes_list_numbers_in_their_order() -> None:
    tree = Tree({"pci.0.10.0.device": "x", "pci.0.2.0.device": "y", "pci.0.2.0.path": "z", "pcie": "no"})
    assert tree.node("pci.0").children() == ["2", "10"]
    assert tree.node("pci").node("0.2.0").leaves() == ["device", "path"]
    assert tree.node("pci.0.2.0").get("path") == "z"


# Typed views


def test_a_view_reads_values_and_defaults() -> None:
    node = Tree({"d.path": "/x", "d.queue.count": "0x3"}).node("d")
    assert view(node, Disk) == Disk("/x", False, 3)
    assert keys_of(Disk) == {"path": "the image", "ro": "refuse writes", "queue.count": "how many queues"}


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({}, "d.path: must be given; the image"),
        ({"d.path": ""}, "d.path: must not be empty"),
        ({"d.path": "x", "d.ro": "maybe"}, "d.ro: 'maybe' is neither true (on, yes, 1) nor false (off, no, 0)"),
        ({"d.path": "x", "d.queue.count": "5"}, "d.queue.count: 5 is not in 1 to 4"),
        ({"d.path": "x", "d.pth": "y"}, "d.pth: unknown configuration key; the nearest is d.path"),
        ({"d.path": "x", "d.zzz": "y"}, "d.zzz: unknown configuration key; known here: path, queue.count, ro"),
    ],
)
def test_a_view_names_what_is_wrong(leaves: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        view(Tree(leaves).node("d"), Disk)
    assert str(caught.value) == message


# Values


@pytest.mark.parametrize("word", ["true", "ON", "yes", "1"])
def test_true(word: str) -> None:
    assert values.boolean(word) is True


@pytest.mark.parametrize("word", ["false", "Off", "no", "0"])
def test_false(word: str) -> None:
    assert values.boolean(word) is False


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("1G", 1 << 30),
        ("4g", 4 << 30),
        ("65536K", 64 << 20),
        ("512MiB", 512 << 20),
        ("512", 512 << 20),
        ("1048575", 1048575 << 20),
        ("1048576", 1 << 20),
        ("2097152B", 2 << 20),
        ("0", 0),
    ],
)
def test_memory_sizes(text: str, size: int) -> None:
    assert values.memory_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1X", "1 G", "1_0", "9" * 5000, "٣"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        values.memory_size(text)


@pytest.mark.parametrize("text", ["", "one", "1_0", " 1", "0x", "9" * 5000, "٣"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        values.integer(0, 1 << 70)(text)


def test_uuid() -> None:
    assert values.uuid("D3ADBEEF-0000-1111-2222-333344445555") == "d3adbeef-0000-1111-2222-333344445555"
    with pytest.raises(ValueError, match="is not a UUID"):
        values.uuid("d3adbeef")


# The VM's own keys


def test_defaults() -> None:
    settings = check_settings(Tree())
    assert (settings.cpus, settings.memory_size, settings.engine, settings.cpu_model) == (
        1,
        256 << 20,
        "auto",
        "baseline",
    )


def test_devices_keys_are_left_to_the_devices() -> None:
    assert check_settings(Tree({"pci.0.2.0.device": "virtio-blk", "lpc.com1.path": "stdio"})).cpus == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("memory.size", "0", "memory.size: 0 bytes of memory are too few; give 512M or more to boot a Linux"),
        ("memory.size", "1M", "memory.size: 1048576 bytes of memory are too few; give 512M or more to boot a Linux"),
        ("memory.size", "3000001", "memory.size: 3000001 bytes are not whole pages of 4096"),
        ("memory.size", "lots", "memory.size: 'lots' is not a size; write 512M or 4G"),
        ("cpus", "0", "cpus: 0 is not in 1 to 255"),
        ("cpus", "256", "cpus: 256 is not in 1 to 255"),
        ("engine", "magic", "engine: 'magic' is not one of auto, kvm, translate"),
        ("memroy.size", "1G", "memroy.size: unknown configuration key; the nearest is memory.size"),
        ("lcp.com1.path", "stdio", "lcp.com1.path: unknown configuration key; the nearest is lpc.com1.path"),
    ],
)
def test_bad_settings(key: str, value: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_settings(Tree({key: value}))
    assert str(caught.value).startswith(message)


def test_more_memory_than_the_host_has() -> None:
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(HostError, match=r"^memory.size: \d+ MiB are more than this host's \d+ MiB; ask for less$"):
        check_settings(Tree({"memory.size": str(host + 4096)}))


# bhyve's grammar


def test_grammar() -> None:
    assert parse_options("/a=b,ro,sectorsize=512/4096", "--disk", first="path") == {
        "path": "/a=b",
        "ro": "true",
        "sectorsize": "512/4096",
    }
    assert parse_options("cpus=2", "-c") == {"cpus": "2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--disk: path is missing"),
        ("x,", "--disk: an option without a name in 'x,'"),
        ("x,=1", "--disk: an option without a name in 'x,=1'"),
        ("x,ro,ro", "--disk: ro is given twice in 'x,ro,ro'"),
    ],
)
def test_bad_grammar(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_options(text, "--disk", first="path")
    assert str(caught.value) == message
