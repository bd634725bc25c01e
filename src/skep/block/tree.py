"""How a stack of layers is written: a tree of options, as QEMU's block devices have it.

    driver=qcow2,file.driver=throttle,file.bps=10M,file.file.driver=nbd,file.file.host=127.0.0.1

Each layer has a ``driver``, options of its own, and its ``file`` below. The same words are the keys of a VM's disk
under ``layers``, the argument of ``--image-opts``, and a mapping of mappings in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from skep.block.words import words
from skep.errors import UserError

Tree = Mapping[str, "str | Tree | None"]
"""By name: an option, or a layer with options of its own. None: there is no such layer."""

MOST_LAYERS = 200
"""One over another, however they are told."""


def parse_layers(text: str) -> Tree:
    """Of ``NAME=VALUE,...`` or of ``json:{...}``. Raises UserError."""
    if text.startswith("json:"):
        import json  # few stacks are told so

        try:
            found = json.loads(text.removeprefix("json:"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"is not JSON: {error}", text[:60]) from None
        if not isinstance(found, dict):
            raise UserError("is not a JSON object", text[:60])
        return nested(dict(_flat(found, "", 0)))
    return nested(words(text))


def nested(options: Mapping[str, str | None]) -> Tree:
    """``file.driver`` and so on, with their dots, as a tree. Raises UserError."""
    root: dict[str, Any] = {}
    for name, value in options.items():
        *path, last = name.split(".")
        at = root
        if len(path) > MOST_LAYERS:
            raise UserError(f"there are more than {MOST_LAYERS} layers", name[:60])
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise UserError("is an option and a layer at once", name)
        if last in at:
            raise UserError("is an option and a layer at once", name)
        at[last] = value
    return root


def _flat(found: Mapping[str, Any], prefix: str, depth: int) -> Iterable[tuple[str, str | None]]:
    if depth > MOST_LAYERS:
        raise UserError(f"there are more than {MOST_LAYERS} layers", prefix[:60])
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.", depth + 1)
        elif isinstance(value, bool):
            yield prefix + name, "on" if value else "off"
        elif value is None or isinstance(value, str | int):
            yield prefix + name, None if value is None else str(value)
        else:
            raise UserError(f"is no option: {value!r}", prefix + name)


class Layer:
    """The options of one layer, taken one by one; what nobody took is an error."""

    def __init__(self, tree: Tree, where: str = "") -> None:
        self._left = dict(tree)
        self._where = where
        self._known: list[str] = []

    def where(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str, default: str | None = None) -> str | None:
        """An option's value. Raises UserError where it is a layer."""
        self._known.append(name)
        value = self._left.pop(name, default)
        if isinstance(value, Mapping):
            raise UserError("is an option, not a layer", self.where(name))
        return value

    def need(self, name: str) -> str:
        value = self.take(name)
        if value is None:
            raise UserError("is missing", self.where(name))
        return value

    def switch(self, name: str) -> bool | None:
        """None where nothing is said."""
        value = self.take(name)
        if value is None:
            return None
        if value not in ("on", "off", "true", "false"):
            raise UserError(f"is on or off, not {value!r}", self.where(name))
        return value in ("on", "true")

    def number(self, name: str, default: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if not (value.isascii() and value.isdecimal() and len(value) < 20):
            raise UserError(f"is not a number: {value!r}", self.where(name))
        return int(value)

    def size(self, name: str) -> int | None:
        """Bytes, with K, M, G or T behind the number if wanted."""
        from skep.config import values  # most disks are told by a name alone

        value = self.take(name)
        try:
            return None if value is None else values.size(value)
        except ValueError as error:
            raise UserError(str(error), self.where(name)) from None

    def below(self, name: str) -> Layer | None:
        """The options of a layer below. Raises UserError where it is told as a word."""
        self._known.append(name)
        value = self._left.pop(name, None)
        if not value:
            return None
        if not isinstance(value, Mapping):
            todo = f"say {self.where(name)}.driver=..., or {self.where(name)}.filename=..."
            raise UserError(f"is a layer, and has no name: {value!r}", self.where(name), todo)
        return Layer(value, self.where(name))

    def has(self, name: str) -> bool:
        return name in self._left

    def rest(self, known: Iterable[str] | None) -> dict[str, str]:
        """All that was not taken, by names with dots in them; they must be ``known``, unless that is None. Raises
        UserError."""
        found = {name: value for name, value in _flat(self._left, "", 0) if value is not None}
        self._left = {}
        if known is None:
            return found
        known = list(known)
        for name in found:
            if name not in known:
                from skep.config.tree import nearest

                near = nearest(name, [*known, *self._known])
                every = ", ".join(sorted({*known, *self._known}))
                hint = f"the nearest is {self.where(near)}" if near else f"known here: {every}"
                raise UserError("no such option", self.where(name), hint)
        return found

    def done(self) -> None:
        """Raises UserError if something was not taken."""
        self.rest(())
