"""Typed views: a class says what a node of the tree may hold, and what it means.

    class DiskOptions(View):
        path: str = option(values.text, doc="the image or block device")
        ro: bool = option(values.boolean, False, doc="refuse writes")

    options = view(tree.node("pci.0.2.0"), DiskOptions, others=("device",))

Any key of the node that the class does not declare is an error that names the nearest one it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn, TypeVar

from skep.config.tree import Node, nearest
from skep.errors import UserError

_REQUIRED = object()


class _Option:
    """What is declared of one field."""

    def __init__(self, parse: Callable[[str], Any], default: Any, key: str | None, doc: str) -> None:
        self.parse = parse
        self.default = default
        self.key = key or ""
        self.doc = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.key = self.key or name


def option(parse: Callable[[str], Any], default: Any = _REQUIRED, *, key: str | None = None, doc: str) -> Any:
    """One field of a view. Without ``default`` it must be given; ``key`` where its name in the tree differs."""
    return _Option(parse, default, key, doc)


class View:
    """Base of the classes that are views: their fields are made by :func:`option`, in the order of the constructor's
    arguments, and never change. (A dataclass for each would take a tenth of a VM's start to make.)"""

    _options: ClassVar[dict[str, _Option]] = {}

    def __init_subclass__(cls) -> None:
        cls._options = {name: each for name, each in vars(cls).items() if isinstance(each, _Option)}

    def __init__(self, *given: Any, **named: Any) -> None:
        values = dict(zip(self._options, given, strict=False)) | named
        if len(values) != len(given) + len(named) or not values.keys() <= self._options.keys():
            raise TypeError(f"{type(self).__name__} has {', '.join(self._options) or 'no fields'}")
        for name, each in self._options.items():
            value = values.get(name, each.default)
            if value is _REQUIRED:
                raise TypeError(f"{type(self).__name__} needs {name}")
            self.__dict__[name] = value

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} does not change")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class NoKeys(View):
    """A node that has no keys but those that others read."""


V = TypeVar("V", bound=View)


def _by_key(kind: type[View]) -> dict[str, tuple[str, _Option]]:
    return {each.key: (name, each) for name, each in kind._options.items()}


def keys_of(kind: type[View]) -> dict[str, str]:
    """The keys that a view declares, and what each is for."""
    return {key: each.doc for key, (_, each) in _by_key(kind).items()}


def view(node: Node, kind: type[V], others: Iterable[str] = ()) -> V:
    """``node`` as a ``kind``. ``others`` are keys and whole branches of the node that somebody else reads."""
    fields = _by_key(kind)
    branches = tuple(others)
    for key in node.leaves():
        if key not in fields and not any(key == other or key.startswith(other + ".") for other in branches):
            tail = key[len(key.split(".")[0]) :]
            near = nearest(key, (*fields, *(branch + tail for branch in branches)))
            known = ", ".join(sorted(fields)) or "none"
            hint = f"the nearest is {node.full(near)}" if near else f"known here: {known}"
            raise UserError("unknown configuration key", node.full(key), hint)
    given: dict[str, Any] = {}
    for key, (name, field) in fields.items():
        value = node.get(key)
        if value is not None:
            try:
                given[name] = field.parse(value)
            except ValueError as error:
                raise UserError(str(error), node.full(key)) from None
        elif field.default is _REQUIRED:
            raise UserError("must be given", node.full(key), field.doc)
    return kind(**given)
