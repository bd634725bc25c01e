"""Typed views: a dataclass says what a node of the tree may hold, and what it means.

    @dataclass(frozen=True, slots=True)
    class DiskOptions:
        path: str = option(values.text, doc="the image or block device")
        ro: bool = option(values.boolean, False, doc="refuse writes")

    options = view(tree.node("pci.0.2.0"), DiskOptions, others=("device",))

Any key of the node that the dataclass does not declare is an error that names the nearest one it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from skep.config.tree import Node, nearest
from skep.errors import UserError

T = TypeVar("T")

_REQUIRED = dataclasses.MISSING


def option(parse: Callable[[str], Any], default: Any = _REQUIRED, *, key: str | None = None, doc: str) -> Any:
    """One field of a view. Without ``default`` it must be given; ``key`` where its name in the tree differs."""
    metadata = {"parse": parse, "key": key, "doc": doc}
    if default is _REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True)
class NoKeys:
    """A node that has no keys but those that others read."""


def _key(field: dataclasses.Field[Any]) -> str:
    return field.metadata["key"] or field.name


def keys_of(kind: type) -> dict[str, str]:
    """The keys that a view declares, and what each is for."""
    return {_key(field): field.metadata["doc"] for field in dataclasses.fields(kind)}


def view(node: Node, kind: type[T], others: Iterable[str] = ()) -> T:
    """``node`` as a ``kind``. ``others`` are keys and whole branches of the node that somebody else reads."""
    fields = {_key(field): field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    branches = tuple(others)
    for key in node.leaves():
        if key not in fields and not any(key == other or key.startswith(other + ".") for other in branches):
            tail = key[len(key.split(".")[0]) :]
            near = nearest(key, (*fields, *(branch + tail for branch in branches)))
            known = ", ".join(sorted(fields)) or "none"
            hint = f"the nearest is {node.full(near)}" if near else f"known here: {known}"
            raise UserError("unknown configuration key", node.full(key), hint)
    given: dict[str, Any] = {}
    for key, field in fields.items():
        value = node.get(key)
        if value is not None:
            try:
                given[field.name] = field.metadata["parse"](value)
            except ValueError as error:
                raise UserError(str(error), node.full(key)) from None
        elif field.default is _REQUIRED:
            raise UserError("must be given", node.full(key), field.metadata["doc"])
    return kind(**given)
