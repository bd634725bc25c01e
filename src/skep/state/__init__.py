"""How state is declared: a class lists its fields once, and the list serves save and load.

    class Pit(Fields):
        state_version = 1
        state_fields = ("gate", "channels")

A field is an attribute that holds a plain value (int, bool, str, bytes, None, or a list, tuple or dict of such), a
bytearray (saved as bytes, loaded in place), an object that is itself Fields, or a list of those. What is saved under
one version loads under the same or a later one, which overrides :meth:`Fields.upgrade`.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from skep.errors import UserError

SavedState = dict[str, Any]
"""A device's state in plain values (int, bool, str, bytes, list, dict), with its version under "version"."""


class Fields:
    """Gives :meth:`save` and :meth:`load` over ``state_fields``. Loading checks everything, then changes anything."""

    state_version: ClassVar[int] = 1
    state_fields: ClassVar[tuple[str, ...]] = ()

    def save(self) -> SavedState:
        return {"version": self.state_version, **{name: _saved(getattr(self, name)) for name in self.state_fields}}

    def load(self, state: SavedState) -> None:
        """Raises UserError for a state of a newer version, of other fields, or of other types."""
        checked = self.check(state)
        for name in self.state_fields:
            current, value = getattr(self, name), checked[name]
            if isinstance(current, Fields):
                current.load(value)
            elif isinstance(current, bytearray):
                current[:] = value
            elif _is_list_of_fields(current):
                for one, saved in zip(current, value, strict=True):
                    one.load(saved)
            else:
                setattr(self, name, copy.deepcopy(value))
        self.loaded()

    def upgrade(self, state: SavedState) -> SavedState:
        """Turn a state of an older version into one of this; called only where versions differ."""
        raise UserError(f"saved as version {state.get('version')}, which this Skep no longer reads", self._who())

    def loaded(self) -> None:
        """All fields were loaded: derive what is derived from them."""

    def check(self, state: SavedState) -> SavedState:
        """The state as :meth:`load` would take it; raises what it would raise, and changes nothing."""
        version = state.get("version") if isinstance(state, dict) else None
        if type(version) is not int or version < 1:
            raise UserError("the saved state has no version", self._who())
        if version > self.state_version:
            known = f"saved as version {version}, this Skep reads up to {self.state_version}"
            raise UserError(known, self._who(), "use a newer Skep")
        if version < self.state_version:
            state = self.upgrade(state)
        for name in state:
            if name != "version" and name not in self.state_fields:
                raise UserError(f"the saved state has an unknown field {name!r}", self._who())
        for name in self.state_fields:
            if name not in state:
                raise UserError(f"the saved state lacks the field {name!r}", self._who())
            if not _fits(getattr(self, name), state[name]):
                raise UserError(f"the saved field {name!r} is not of its type", self._who())
        return state

    def _who(self) -> str:
        return str(getattr(self, "name", type(self).__name__))


def _is_list_of_fields(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Fields) for one in value)


def _saved(value: Any) -> Any:
    if isinstance(value, Fields):
        return value.save()
    if isinstance(value, bytearray):
        return bytes(value)
    if _is_list_of_fields(value):
        return [one.save() for one in value]
    return copy.deepcopy(value)


def _fits(current: Any, value: Any) -> bool:
    """``value`` may replace ``current``: the same type (None on either side fits any), nested states checked too."""
    if isinstance(current, Fields):
        return isinstance(value, dict) and bool(current.check(value))
    if isinstance(current, bytearray):
        return isinstance(value, bytes) and len(value) == len(current)
    if _is_list_of_fields(current):
        return isinstance(value, list) and len(value) == len(current) and all(map(_fits, current, value))
    return current is None or value is None or type(value) is type(current)
