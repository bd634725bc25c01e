"""Names of a kernel's addresses, from a System.map or from the kernel's own table."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Protocol

from skep.errors import UserError

WITNESSES = ("_text", "asm_exc_page_fault", "entry_SYSCALL_64")
"""Symbols whose address in the running kernel can be known, from which KASLR's slide follows."""
_FARTHEST = 1 << 20
"""Bytes behind a symbol at which an address is no longer called by it."""


class Symbols(Protocol):
    """Addresses as the guest runs, KASLR included. False where nothing is known."""

    source: str
    """Where the names come from, for the reader."""

    def name(self, va: int) -> str | None:
        """"panic+0x118", or None where ``va`` is in no function."""

    def __bool__(self) -> bool: ...


class NoSymbols:
    source = ""

    def name(self, va: int) -> str | None:
        return None

    def __bool__(self) -> bool:
        return False


def with_offset(name: str, offset: int) -> str:
    return f"{name}+{offset:#x}" if offset else name


class SystemMap:
    """A System.map (``nm -n vmlinux``): ``address type name``, a line each. ``slide`` is what KASLR added."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError where it cannot be read or holds no symbols."""
        todo = "give the System.map of the very kernel that is booted, or none"
        try:
            lines = Path(path).read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"cannot read the System.map: {(error.strerror or str(error)).lower()}", path) from None
        self.addresses: dict[str, int] = {}
        """Of :data:`WITNESSES`."""
        found: list[tuple[int, str]] = []
        for line in lines:
            words = line.decode("ascii", "replace").split()
            if len(words) < 3 or len(words[1]) != 1:
                continue
            try:
                address = int(words[0], 16)
            except ValueError:
                continue
            if address >> 63 and words[1] in "tTwW":
                found.append((address, words[2]))
            if words[2] in WITNESSES:
                self.addresses.setdefault(words[2], address)
        if any(b"-dbg package" in line for line in lines[:3]):
            raise UserError(
                "this System.map only says that the real one is in the package linux-image-...-dbg", path, todo
            )
        if not found:
            raise UserError("this is no System.map: no line in it is a kernel function's", path, todo)
        found.sort(key=lambda pair: pair[0])
        self._starts = [address for address, _ in found]
        self._names = [name for _, name in found]
        self.slide = 0
        self.source = f"{path}"

    def __bool__(self) -> bool:
        return True

    def name(self, va: int) -> str | None:
        at = bisect_right(self._starts, va - self.slide) - 1
        if at < 0 or va - self.slide - self._starts[at] > _FARTHEST:
            return None
        return with_offset(self._names[at], va - self.slide - self._starts[at])
