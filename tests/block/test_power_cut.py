"""The power goes under ext4 and sqlite3 in a Linux guest: their journals mend it, and what was promised is there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from skep.block.record import Entry, Kind
from skep.guest.debian import Guest
from tests.block.powercut import Point, PowerCut, Session, record, run
from tests.linux import Linux
from tests.programs import add_programs


def after_flushes(session: Session, count: int | None = None) -> list[Point]:
    """Cuts at completed flushes, at all of them or at ``count`` spread evenly: the rest is lost."""
    points = session.flushes
    step = max(1, len(points) // count) if count else 1
    return [(to, None) for to in points[::step]]


def anywhere(session: Session, count: int, seed: int) -> list[Point]:
    """Cuts at random points, where some of the rest survives."""
    rng = random.Random(seed)
    return [(rng.randint(0, len(session.entries)), rng.randrange(1 << 32)) for _ in range(count)]


def lying(entries: Sequence[Entry]) -> list[Entry]:
    """The same on a disk whose every flush forgets the last write."""
    return [Entry(e.kind, max(0, e.offset - 1), e.data) if e.kind is Kind.FLUSH else e for e in entries]


def is_noticed(session: Session) -> bool:
    """Whether a disk that lies loses something somewhere: which cuts show it is up to the guest's timing."""
    cut = PowerCut(session, lying(session.entries))
    return any(cut.losses([point]) for point in anywhere(session, 400, seed=3))


def test_nothing_is_lost_at_50_power_cuts(guest: Guest, tmp_path: Path) -> None:
    session = record(guest, tmp_path, transactions=40, sector=512)
    assert session.promised("commit", len(session.entries)) == 40
    assert session.promised("files", len(session.entries)) > 20
    points = after_flushes(session, 25)[:25] + anywhere(session, 25, seed=1)
    assert PowerCut(session).losses(points) == []
    assert is_noticed(session)


@pytest.mark.slow
@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
def test_nothing_is_lost_at_any_flush_and_1000_points_between(
    guest: Guest, tmp_path: Path, synchronous: str, sector: int
) -> None:
    session = record(guest, tmp_path, transactions=200, synchronous=synchronous, sector=sector)
    assert PowerCut(session).losses(after_flushes(session)) == []
    assert PowerCut(session).losses(anywhere(session, 1000, seed=2)) == []
    assert is_noticed(session)


DISKS: dict[str, dict[str, Any]] = {
    "the guest switches the cache off": {"cache": "write through"},
    "it starts switched off": {"disk": "wce=false"},
    "and is switched on": {"disk": "wce=false", "cache": "write back"},
    "O_DSYNC": {"disk": "direct"},
    "O_DIRECT": {"disk": "nocache"},
    "two processors": {"cpus": 2},
    "one queue for two processors": {"cpus": 2, "disk": "queues=1"},
    "blocks are discarded": {"mount": "discard"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", DISKS.values(), ids=DISKS)
def test_nothing_is_lost_whatever_the_disk(guest: Guest, tmp_path: Path, options: dict[str, Any]) -> None:
    session = record(guest, tmp_path, transactions=100, sector=512, **options)
    assert PowerCut(session).losses(after_flushes(session, 200) + anywhere(session, 200, seed=4)) == []


IMAGES: dict[str, tuple[str, dict[str, str]]] = {
    "qcow2": ("qcow2", {}),
    "qcow2, small clusters": ("qcow2", {"cluster_size": "1024"}),
    "qcow2, subclusters": ("qcow2", {"extended_l2": "on"}),
    "vmdk": ("vmdk", {}),
    "vmdk, a stream": ("vmdk", {"subformat": "streamOptimized"}),
    "vhdx": ("vhdx", {"block_size": "1M"}),
    "vpc": ("vpc", {"force_size": "on"}),
    "vdi": ("vdi", {}),
}


def test_nothing_is_lost_under_a_format(guest: Guest, tmp_path: Path) -> None:
    """The log is of the image's file: what the format writes there is cut as well."""
    session = record(guest, tmp_path, transactions=20, sector=512, format="qcow2", create={"cluster_size": "4096"})
    assert PowerCut(session).losses(after_flushes(session, 10)[:10] + anywhere(session, 20, seed=6)) == []
    cut = PowerCut(session, lying(session.entries))
    assert any(cut.losses([point]) for point in anywhere(session, 100, seed=3))


@pytest.mark.slow
@pytest.mark.parametrize(("format", "create"), IMAGES.values(), ids=IMAGES)
def test_nothing_is_lost_under_any_format(guest: Guest, tmp_path: Path, format: str, create: dict[str, str]) -> None:
    session = record(guest, tmp_path, transactions=60, sector=512, format=format, create=create)
    assert PowerCut(session).losses(after_flushes(session, 100)[:100] + anywhere(session, 200, seed=7)) == []


@pytest.mark.slow
def test_linux_itself_mends_what_a_power_cut_left(guest: Guest, tmp_path: Path) -> None:
    """As above, but it is the guest's kernel that replays the journal, and its sqlite3 the write-ahead log."""
    session = record(guest, tmp_path, transactions=100)
    images = []
    for (to, _), image in PowerCut(session).images(tmp_path, sorted(anywhere(session, 12, seed=5))):
        images.append((to, image.rename(tmp_path / f"cut.{len(images)}")))
    initrd = add_programs(guest.initrd, tmp_path / "initrd.img", ["sqlite3"])
    disks = [f"{image},sectorsize={session.sector}" for _, image in images]
    with Linux(Guest(guest.kernel, initrd), disks=disks) as linux:
        for letter in "abcdefghijkl":
            linux(f"mount -t ext4 /dev/vd{letter} /mnt")
            assert linux("[ ! -s /mnt/db ] || sqlite3 /mnt/db 'PRAGMA integrity_check'") in ("ok\n", "")
            linux("umount /mnt")
        linux.power_off()
    for to, image in images:
        assert "recovering" not in run("e2fsck", "-f", "-n", str(image))
        PowerCut(session).check(image, to)
