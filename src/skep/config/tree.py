"""The tree itself: names, values, expansion, freeze, dump."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike

from skep.errors import InternalError, UserError

_KEY = re.compile(r"[^\s.=%()]+(\.[^\s.=%()]+)*")
_VARIABLE = re.compile(r"%(%|\(([^)]*)\))")

NOT_DUMPED = frozenset({"config.dump"})
"""Keys that ask for the dump itself: with one of them in it, a dump fed back would print instead of run."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, if any is like it at all."""
    import difflib  # few names are wrong

    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return found[0] if found else None


class Tree:
    """Leaves by their full dotted names. A name is a leaf or a node, never both."""

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._values: dict[str, str] = {}
        self._frozen = False
        for key, value in (values or {}).items():
            self[key] = value

    def __setitem__(self, key: str, value: str) -> None:
        if self._frozen:
            raise InternalError(f"configuration is frozen, {key} came too late")
        if not _KEY.fullmatch(key):
            raise UserError("not a configuration key", repr(key), "keys are names with dots between them: memory.size")
        if "\n" in value or "\0" in value:
            raise UserError("a value is one line of text", key)
        if key not in self._values:
            self._refuse_overlap(key)
        self._values[key] = value

    def _refuse_overlap(self, key: str) -> None:
        below = next((other for other in self._values if other.startswith(key + ".")), None)
        if below is not None:
            raise UserError(f"has parts of its own, such as {below}, and takes no value", key)
        for end in (dot.start() for dot in re.finditer(r"\.", key)):
            if key[:end] in self._values:
                raise UserError(f"{key[:end]} has a value and takes no parts", key)

    def __getitem__(self, key: str) -> str:
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and self._values == other._values

    __hash__ = None  # type: ignore[assignment]

    def get(self, key: str, default: str | None = None) -> str | None:
        return self._values.get(key, default)

    def set_default(self, key: str, value: str) -> None:
        """Give ``key`` a value unless it has one."""
        if key not in self._values:
            self[key] = value

    def remove(self, key: str) -> None:
        """Forget a leaf; one that is not there is forgotten already."""
        if self._frozen:
            raise InternalError(f"configuration is frozen, {key} cannot go")
        self._values.pop(key, None)

    def assign(self, text: str, where: str = "-o") -> None:
        """Take one ``key=value``."""
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not KEY=VALUE", where)
        self[key] = value

    def load(self, path: str | PathLike[str]) -> None:
        """Take every ``key=value`` line of a file; empty lines and those that start with # say nothing."""
        try:
            with open(path, "rb") as file:
                text = file.read().decode()
        except OSError as error:
            raise UserError(error.strerror or str(error), path) from None
        except UnicodeDecodeError:
            raise UserError("not a configuration file (not text)", path) from None
        for number, raw in enumerate(text.split("\n"), 1):
            line = raw.lstrip()
            if line and not line.startswith("#"):
                self.assign(line, f"{path}, line {number}")

    def node(self, path: str = "") -> Node:
        return Node(self, path)

    @property
    def frozen(self) -> bool:
        return self._frozen

    def freeze(self) -> Tree:
        """Expand every ``%(name)`` and allow no change from now on. Freezing twice is freezing once."""
        if not self._frozen:
            self._values = {key: self._expand(key, ()) for key in self._values}
            self._frozen = True
        return self

    def thawed(self) -> Tree:
        """A copy that can be changed. What was expanded stays as it is: a % is a % again."""
        if not self._frozen:
            return Tree(self._values)
        return Tree({key: value.replace("%", "%%") for key, value in self._values.items()})

    def _expand(self, key: str, above: tuple[str, ...]) -> str:
        if key in above:
            raise UserError(f"%({key}) leads back to itself", above[0])

        def replacement(found: re.Match[str]) -> str:
            name = found[2]
            if name is None:
                return "%"
            if name not in self._values:
                near = nearest(name, self._values)
                hint = f"did you mean %({near})?" if near else "a literal % is written %%"
                raise UserError(f"%({name}) names no configuration key", key, hint)
            return self._expand(name, (*above, key))

        return _VARIABLE.sub(replacement, self._values[key])

    def dump(self) -> str:
        """The frozen tree as sorted ``key=value`` lines, which ``load`` takes back."""
        if not self._frozen:
            raise InternalError("only a frozen configuration can be dumped")
        return "".join(f"{key}={self[key].replace('%', '%%')}\n" for key in self if key not in NOT_DUMPED)


class Node:
    """A part of a tree, with names relative to its place; the root's place is the empty string."""

    __slots__ = ("path", "tree")

    def __init__(self, tree: Tree, path: str) -> None:
        self.tree = tree
        self.path = path

    def full(self, key: str) -> str:
        """The full name of a key of this node."""
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str, default: str | None = None) -> str | None:
        return self.tree.get(self.full(key), default)

    def leaves(self) -> list[str]:
        """Every leaf at or below this node, relative to it."""
        prefix = self.full("")
        return [key[len(prefix) :] for key in self.tree if key.startswith(prefix)]

    def children(self) -> list[str]:
        """The names one level down; numbers first and in their order."""
        names = {key.split(".")[0] for key in self.leaves()}
        return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))

    def node(self, key: str) -> Node:
        return Node(self.tree, self.full(key))
