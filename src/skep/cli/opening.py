"""How the tools `skep image` and `skep io` open an image: by its name, or by options as `--image-opts` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from skep.block.format import Image
from skep.block.image import open_image, open_layers
from skep.block.secrets import NO_SECRETS, Secrets
from skep.block.tree import Tree, nested
from skep.block.words import words
from skep.errors import UserError

CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe")


class How(NamedTuple):
    """All that can be said of an image when it is opened."""

    format: str | None = None
    read_only: bool = True
    cache: str = "writeback"
    """One of ``CACHES``."""
    shared: bool = False
    """Even if somebody else writes to it."""
    backing: bool = True
    """With what lies below it."""
    discard: bool = True
    secrets: Secrets = NO_SECRETS
    layers: Tree | None = None
    """What to open, instead of a file of some format."""
    may_stay_locked: bool = False
    """Nobody is going to read an encrypted disk."""


def open_by(path: str, how: How) -> Image:
    """Raises UserError."""
    if how.shared and not how.read_only:
        raise UserError("force-share=on can only be used with read-only images", path)
    no_cache = how.cache in ("none", "directsync")
    synchronous = not how.read_only and how.cache in ("writethrough", "directsync")
    volatile = not how.read_only and how.cache == "unsafe"
    if how.layers is not None:
        return open_layers(
            how.layers,
            read_only=how.read_only,
            no_cache=no_cache,
            synchronous=synchronous,
            volatile=volatile,
            lock=not how.shared,
            backing=how.backing,
            secrets=how.secrets,
            may_stay_locked=how.may_stay_locked,
        )
    return open_image(
        path,
        format=how.format,
        read_only=how.read_only,
        no_cache=no_cache,
        synchronous=synchronous,
        volatile=volatile,
        lock=not how.shared,
        backing=how.backing,
        secrets=how.secrets,
        may_stay_locked=how.may_stay_locked,
    )


def described(text: str, how: How, path: str | None = None) -> tuple[str, How]:
    """The file's name, and how to open it, of QEMU's dotted options: `driver=qcow2,file.filename=disk.qcow2`.

    How the host's cache is used and whether discards count may stand among them; ``path`` is the file where they do
    not name one. Raises UserError.
    """
    said: dict[str, str | None] = {**words(text)}
    if path is not None and not any(name.startswith("file.") for name in said):
        said["file.filename"] = path
        if how.format is not None:
            said.setdefault("driver", how.format)
    name = path or _name(said) or text
    direct = no_flush = False
    for option in list(said):
        value = said[option] or ""
        match option.removeprefix("file."):
            case "cache.direct":
                direct = _on(option, value)
            case "cache.no-flush":
                no_flush = _on(option, value)
            case "discard":
                how = how._replace(discard=discards(value))
            case "aio":
                check_aio(value)
            case _:
                continue
        del said[option]
    if direct or no_flush:
        how = how._replace(cache="none" if direct else "unsafe")
    return name, how._replace(layers=nested(said))


def _name(said: Mapping[str, str | None]) -> str | None:
    return next((value for name, value in said.items() if name.split(".")[-1] == "filename"), None)


def discards(mode: str) -> bool:
    if mode not in ("unmap", "on", "ignore", "off"):
        raise UserError(f"Invalid discard option: {mode}")
    return mode in ("unmap", "on")


def check_aio(mode: str) -> None:
    """All of them do the same here."""
    if mode not in ("threads", "native", "io_uring"):
        raise UserError(f"Invalid aio option: {mode}")


def _on(name: str, value: str) -> bool:
    if value not in ("on", "off", "true", "false"):
        raise UserError(f"is on or off, not {value!r}", name)
    return value in ("on", "true")
