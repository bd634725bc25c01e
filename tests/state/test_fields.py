"""One list of fields serves save and load, and nothing that does not fit is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from skep.contracts.device import SavedState
from skep.errors import UserError
from skep.state import Fields


class Channel(Fields):
    state_fields = ("count",)

    def __init__(self, count: int = 0) -> None:
        self.count = count


class Timer(Fields):
    state_version = 2
    state_fields = ("mode", "deadline", "ram", "channels", "first", "table")

    def __init__(self) -> None:
        self.name = "timer"
        self.mode = 0
        self.deadline: int | None = None
        self.ram = bytearray(4)
        self.channels = [Channel(1), Channel(2)]
        self.first = Channel(3)
        self.table: dict[str, list[int]] = {}
        self.not_saved = 5
        self.doubled = 0

    def loaded(self) -> None:
        self.doubled = 2 * self.mode

    def upgrade(self, state: SavedState) -> SavedState:
        return {**state, "version": 2, "deadline": None}


def test_save_then_load_is_identity_and_shares_nothing() -> None:
    a, b = Timer(), Timer()
    a.mode, a.deadline, a.ram[2], a.channels[1].count, a.first.count = 7, 9, 1, 8, 6
    a.table["x"] = [1]
    saved = a.save()
    ram, channel = b.ram, b.channels[0]
    b.load(saved)
    assert b.save() == saved and b.ram is ram and b.channels[0] is channel and b.doubled == 14
    b.table["x"].append(2)
    a.table["x"].append(3)
    assert saved["table"] == {"x": [1]}
    assert saved["version"] == 2 and "not_saved" not in saved


def test_an_older_version_is_upgraded() -> None:
    state = Timer().save()
    del state["deadline"]
    state["version"] = 1
    state["mode"] = 4
    timer = Timer()
    timer.load(state)
    assert timer.mode == 4


def change(**fields: Any) -> SavedState:
    return {**Timer().save(), "mode": 1, **fields}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (change(version=3), "newer"),
        (change(version=0), "version"),
        (change(version="2"), "version"),
        (change(extra=1), "extra"),
        ({k: v for k, v in change().items() if k != "ram"}, "ram"),
        (change(mode="7"), "mode"),
        (change(mode=True), "mode"),
        (change(ram=b"12345"), "ram"),
        (change(channels=[Channel().save()]), "channels"),
        (change(channels=[Channel().save(), {"version": 1}]), "count"),
        (change(first={"version": 1, "count": "x"}), "count"),
        (change(first=3), "first"),
        ([], "version"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(state: Any, says: str) -> None:
    timer = Timer()
    before = timer.save()
    with pytest.raises(UserError, match=says):
        timer.load(state)
    assert timer.save() == before


def test_a_version_without_an_upgrade_is_refused() -> None:
    class Old(Fields):
        state_version = 5

    with pytest.raises(UserError, match="no longer"):
        Old().load({"version": 4})
