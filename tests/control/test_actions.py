"""What may be asked, as it comes from outside."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.control import actions
from skep.control.actions import ACTIONS, encode, parse
from skep.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def test_all_have_names_of_their_own_and_help() -> None:
    assert [kind.name for kind in ACTIONS.values()] == list(ACTIONS)
    for kind in ACTIONS.values():
        assert kind.__doc__ and not kind.__doc__.startswith(kind.__name__)
        assert all({"of", "help", "from_words"} == set(field.metadata) for field in dataclasses.fields(kind))


def test_arguments_become_fields() -> None:
    assert parse("registers", {}) == actions.Registers(None)
    assert parse("registers", {"cpu": 3}) == actions.Registers(3)
    assert parse("dump", {"file": "/tmp/core"}) == actions.Dump("/tmp/core")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("treads", {}, "no such action: 'treads'; the nearest is threads"),
        ("", {}, "no such action: ''"),
        (None, {}, "no such action: 'None'"),
        (["status"], {}, "no such action: "),
        ("status", None, "status: the arguments are an object"),
        ("status", [], "status: the arguments are an object"),
        ("status", {"x": 1}, "status: no such argument: 'x'"),
        ("registers", {"cpu": "3"}, "registers: cpu is a number"),
        ("registers", {"cpu": True}, "registers: cpu is a number"),
        ("registers", {"cpu": 1.0}, "registers: cpu is a number"),
        ("dump", {}, "dump: file is missing"),
        ("dump", {"file": None}, "dump: file is a text"),
        ("dump", {"file": 3}, "dump: file is a text"),
    ],
)
def test_mistakes(name: Any, arguments: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(name, arguments)
    assert str(caught.value).startswith(message)


@given(st.sampled_from(list(ACTIONS)) | JSON, JSON)
def test_anything_is_an_action_or_a_mistake(name: Any, arguments: Any) -> None:
    try:
        action = parse(name, arguments)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        assert action.name == name


def test_results_are_what_json_has() -> None:
    frame = actions.Frame("vm.py", 12, "run", "vcpu.run()")
    result = actions.AllThreads([actions.Thread("cpu0", 7, "R", ["board"], [], [frame])])
    assert json.loads(json.dumps(encode(result))) == {
        "threads": [
            {
                "name": "cpu0",
                "tid": 7,
                "state": "R",
                "holds": ["board"],
                "waits_for": [],
                "stack": [{"file": "vm.py", "line": 12, "function": "run", "text": "vcpu.run()"}],
            }
        ]
    }
