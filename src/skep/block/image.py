"""Opening and making disk images: from a path, or a VM's options, to an open chain of layers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from skep.block.backend import BlockBackend, File
from skep.block.file import open_file
from skep.block.filters import CopyOnRead, Throttle, Trace
from skep.block.format import SECTOR, BackingName, Can, Image, ImageError
from skep.block.options import BlockOptions
from skep.block.record import Recorder
from skep.block.registry import format_named, probe
from skep.errors import HostError, UserError

MOST_LAYERS = 200
"""Of a chain of backing files."""


def open_image(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    read_only: bool = False,
    no_cache: bool = False,
    synchronous: bool = False,
    lock: bool = True,
    backing: bool = True,
    inside: Sequence[str] | None = None,
) -> Image:
    """Open a disk image and what lies below it.

    Without ``format`` it is found out from what is in the file (:func:`skep.block.registry.probe`): for tools, never
    for a disk that a guest writes to. ``no_cache`` and ``synchronous`` are O_DIRECT and O_DSYNC; ``lock`` keeps other
    writers away as QEMU does. Without ``backing`` only the image itself is opened, and reads as zeros where it leaves
    things to another. Files that it names are opened if they lie in a directory of ``inside``, or are named there;
    all are where that is None. A backing file without a format is probed only where all are allowed.

    Raises UserError, and leaves nothing open then.
    """
    path = os.fspath(path)
    image = _open_one(path, format, read_only, no_cache, synchronous, lock, inside)
    try:
        if backing:
            _open_chain(image, no_cache, lock, inside)
    except BaseException:
        image.close()
        raise
    return image


def _open_one(
    path: str,
    format: str | None,
    read_only: bool,
    no_cache: bool,
    synchronous: bool,
    lock: bool,
    inside: Sequence[str] | None,
) -> Image:
    def open_other(name: str) -> File:
        other = backing_path(path, name)
        if inside is not None:
            _allow(other, inside, path)
        return open_file(other, read_only=read_only, no_cache=no_cache, synchronous=synchronous, lock=lock)

    if format is not None:
        format_named(format, path)
    file = open_file(path, read_only=read_only, no_cache=no_cache, synchronous=synchronous, lock=lock)
    try:
        kind = format_named(probe(file) if format is None else format, path)
        if not read_only and Can.WRITE not in kind.can:
            raise ImageError(f"{kind.format} images are only read", path, "say ro")
        image = kind(file)  # type: ignore[call-arg]  # every format is made from a file
    except BaseException:
        file.close()
        raise
    try:
        image.open_files(open_other)
    except BaseException:
        image.close()
        raise
    return image


def _open_chain(image: Image, no_cache: bool, lock: bool, inside: Sequence[str] | None) -> None:
    """Open what lies below, one after another."""
    above = image
    seen = {os.path.realpath(image.path)}
    while (name := above.backing_name()) is not None:
        path = backing_path(above.path, name.name)
        if inside is not None:
            _allow(path, inside, above.path)
            if name.format is None:
                todo = f"skep image rebase -u -b {name.name} -F FORMAT {above.path} writes it down"
                raise ImageError("says nothing of the format of its backing file", above.path, todo)
        real = os.path.realpath(path)
        if real in seen or len(seen) >= MOST_LAYERS:
            what = "a loop" if real in seen else f"more than {MOST_LAYERS} images"
            raise ImageError(f"the chain of backing files is {what}", above.path)
        seen.add(real)
        try:
            above.backing = _open_one(path, name.format, True, no_cache, False, lock, inside)
        except UserError as error:
            raise ImageError(f"its backing file cannot be opened: {error}", above.path) from None
        above.check_backing(above.backing)
        above = above.backing


def backing_path(overlay: str, name: str) -> str:
    """The file that ``name`` in the image ``overlay`` means. Raises UserError for what is not a file's name."""
    name = name.removeprefix("file:")
    scheme, colon, _ = name.partition(":")
    if colon and "/" not in scheme:
        raise ImageError(f"its backing file is not a file: {name[:100]!r}", overlay)
    return os.path.join(os.path.dirname(overlay), name)


def _allow(path: str, inside: Sequence[str], overlay: str) -> None:
    real = os.path.realpath(path)
    for one in map(os.path.realpath, inside):
        if real == one or (os.path.isdir(one) and os.path.commonpath([real, one]) == one):
            return
    raise ImageError(f"it needs {path}, which is not allowed to be opened", overlay, f"say backing={path}")


def create_image(
    path: str | os.PathLike[str],
    format: str,
    size: int | None = None,
    *,
    options: Mapping[str, str] | None = None,
    backing: BackingName | None = None,
    check_backing: bool = True,
) -> None:
    """Make an image: of ``size`` bytes, which are rounded up to whole sectors, or as long as what lies below it.

    ``options`` are the format's, by name. The backing file must open, unless ``check_backing`` is false; what is there
    already is replaced. Raises UserError.
    """
    path = os.fspath(path)
    kind = format_named(format, path)
    options = {} if options is None else options
    for name in options:
        if name not in kind.create_options:
            known = ", ".join(kind.create_options) or "none"
            raise ImageError(f"a {format} image has no option {name!r}", path, f"known are: {known}")
    if backing is not None:
        if Can.BACKING not in kind.can:
            raise ImageError(f"a {format} image lies over no other", path)
        if check_backing:
            with open_image(backing_path(path, backing.name), format=backing.format, read_only=True) as below:
                size = below.size if size is None else size
    if size is None:
        raise ImageError("the size is missing", path, "say how large the disk is to be")
    kind.create(path, -(-size // SECTOR) * SECTOR, options, backing)


def open_disk(options: BlockOptions) -> BlockBackend:
    """Open, check and lock a VM's disk. Raises UserError, and leaves nothing open then."""
    image = open_image(
        options.path,
        format=options.format,
        read_only=options.read_only,
        no_cache=options.no_cache,
        synchronous=options.synchronous,
        lock=options.lock,
        inside=() if options.backing is None else options.backing.split(":"),
    )
    try:
        _check_size(image, options)
        if image.corrupted and not image.read_only:
            raise ImageError("the image is marked as corrupt", options.path, "skep image check -r all mends it")
        if image.file.alignment > (unit := options.block.logical):
            alignment = image.file.alignment
            todo = f"say sectorsize={alignment}, or leave nocache out"
            raise HostError(f"direct I/O works in blocks of {alignment} bytes here, not {unit}", options.path, todo)
        return _filtered(image, options)
    except BaseException:
        image.close()
        raise


def _filtered(image: Image, options: BlockOptions) -> BlockBackend:
    """The layers over the image that were asked for."""
    disk: BlockBackend = image
    try:
        if options.copy_on_read:
            if options.read_only or image.backing is None:
                what = "copyonread needs an image that is written to, over another"
                raise ImageError(what, options.path, "leave it out")
            disk = CopyOnRead(image)
        if options.record is not None:
            disk = Recorder(disk, options.record)
        if options.bytes_per_second or options.requests_per_second:
            disk = Throttle(disk, options.bytes_per_second, options.requests_per_second)
        return disk if options.trace is None else Trace(disk, options.trace)
    except BaseException:
        disk.close()
        raise


def _check_size(image: Image, options: BlockOptions) -> None:
    """A size that is no whole number of blocks is refused: rounding down would hide data, rounding up grow the file."""
    unit = options.block.logical
    size = image.file.size if image.format == "raw" else image.size
    if size == 0:
        raise UserError("the disk image is empty", options.path, "truncate -s SIZE gives it a size")
    if size % unit:
        full = -(-size // unit) * unit
        raise UserError(
            f"the size, {size} bytes, is not a multiple of {unit}", options.path, f"truncate -s {full} rounds it up"
        )
