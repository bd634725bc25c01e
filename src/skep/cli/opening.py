"""How the tools `skep image` and `skep io` open an image: by name, or by `--image-opts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from skep.block.format import Image, ImageError
from skep.block.image import open_image
from skep.errors import UserError

CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe")


@dataclass(frozen=True, slots=True)
class How:
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


def open_by(path: str, how: How) -> Image:
    """Raises UserError."""
    if how.shared and not how.read_only:
        raise UserError("force-share=on can only be used with read-only images", path)
    return open_image(
        path,
        format=how.format,
        read_only=how.read_only,
        no_cache=how.cache in ("none", "directsync"),
        synchronous=not how.read_only and how.cache in ("writethrough", "directsync"),
        lock=not how.shared,
        backing=how.backing,
    )


def described(said: Mapping[str, str], how: How, path: str | None = None) -> tuple[str, How]:
    """The file, and how to open it, of QEMU's dotted options (`driver=qcow2,file.filename=disk.qcow2`), which
    ``how`` is completed by. Raises UserError for what is not known, rather than leave it out."""
    direct, no_flush = None, None
    for name, value in said.items():
        inner = name.removeprefix("file.")
        if name == "driver":
            how = replace(how, format=value)
        elif name in ("file", "filename", "file.filename"):
            path = value
        elif name == "file.driver":
            if value not in ("file", "host_device"):
                raise UserError(f"no such protocol: {value!r}", name, "known are file and host_device")
        elif inner == "read-only":
            how = replace(how, read_only=how.read_only or _on(name, value))
        elif inner == "force-share":
            how = replace(how, shared=how.shared or _on(name, value))
        elif inner == "locking":
            how = replace(how, shared=how.shared or value == "off")
        elif inner == "cache.direct":
            direct = _on(name, value)
        elif inner == "cache.no-flush":
            no_flush = _on(name, value)
        elif inner == "discard":
            how = replace(how, discard=discards(value))
        elif inner == "aio":
            check_aio(value)
        else:
            raise ImageError(f"no such option: {name!r}", path)
    if direct is not None or no_flush is not None:
        cache = "none" if direct else "unsafe" if no_flush else "writeback"
        how = replace(how, cache=cache)
    if path is None:
        raise UserError("no file is named", "--image-opts", "say file.filename=FILE")
    return path, how


def discards(mode: str) -> bool:
    if mode not in ("unmap", "on", "ignore", "off"):
        raise UserError(f"Invalid discard option: {mode}")
    return mode in ("unmap", "on")


def check_aio(mode: str) -> None:
    """All of them do the same here."""
    if mode not in ("threads", "native", "io_uring"):
        raise UserError(f"Invalid aio option: {mode}")


def _on(name: str, value: str) -> bool:
    if value not in ("on", "off", "true", "false", "yes", "no"):
        raise UserError(f"is on or off, not {value!r}", name)
    return value in ("on", "true", "yes")
