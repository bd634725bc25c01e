"""Opening and making disk images: from a path, or a VM's options, to an open chain of layers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from skep.block.backend import BlockBackend, File
from skep.block.format import SECTOR, BackingName, Can, Image, ImageError
from skep.block.layers import Opening, open_named, open_tree
from skep.block.naming import REMOTE, backing_path, scheme_of
from skep.block.registry import format_named
from skep.block.secrets import NO_SECRETS, Secrets, secret_of_file
from skep.block.tree import Tree, parse_layers
from skep.errors import HostError, UserError

if TYPE_CHECKING:
    from skep.block.options import BlockOptions


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
    options: Mapping[str, str] | None = None,
    secrets: Secrets = NO_SECRETS,
    may_stay_locked: bool = False,
    volatile: bool = False,
) -> Image:
    """Open a disk image and what lies below it.

    ``path`` is a file's, or a word such as ``nbd://HOST/EXPORT``. Without ``format`` it is found out from what is in
    the file (:func:`skep.block.registry.probe`): for tools, never for a disk that a guest writes to. ``no_cache`` and
    ``synchronous`` are O_DIRECT and O_DSYNC; ``lock`` keeps other writers away as QEMU does. Without ``backing`` only
    the image itself is opened, and reads as zeros where it leaves things to another. Files that it names are opened if
    they lie in a directory of ``inside``, or are named there; all are where that is None. A backing file without a
    format is probed only where all are allowed. ``options`` are the format's ``open_options``: of an encrypted image
    the one that names its password in ``secrets``, unless it ``may_stay_locked``. Nothing that is written to a
    ``volatile`` one is made durable, not even by ``flush``.

    Raises UserError, and leaves nothing open then.
    """
    how = Opening(read_only, no_cache, synchronous, lock, inside, secrets, may_stay_locked, backing, volatile=volatile)
    name = path if isinstance(path, str) else f"file:{os.fspath(path)}"
    return open_named(name, format, {} if options is None else options, how)


def open_layers(
    layers: Tree | str,
    *,
    read_only: bool = False,
    no_cache: bool = False,
    synchronous: bool = False,
    lock: bool = True,
    backing: bool = True,
    inside: Sequence[str] | None = None,
    secrets: Secrets = NO_SECRETS,
    may_stay_locked: bool = False,
    volatile: bool = False,
) -> Image:
    """Open a stack of layers (:mod:`skep.block.tree`), told as ``driver=qcow2,file.driver=...`` or as mappings of
    mappings. All else as :func:`open_image`. What is no format at the top reads as a raw image."""
    how = Opening(read_only, no_cache, synchronous, lock, inside, secrets, may_stay_locked, backing, volatile=volatile)
    return open_tree(parse_layers(layers) if isinstance(layers, str) else layers, how)


def create_image(
    path: str | os.PathLike[str],
    format: str,
    size: int | None = None,
    *,
    options: Mapping[str, str] | None = None,
    backing: BackingName | None = None,
    check_backing: bool = True,
    secrets: Secrets = NO_SECRETS,
) -> None:
    """Make an image: of ``size`` bytes, which are rounded up to whole sectors, or as long as what lies below it.

    ``options`` are the format's, by name. The backing file must open, unless ``check_backing`` is false; what is there
    already is replaced. Raises UserError.
    """
    path = os.fspath(path)
    kind = format_named(format, path)
    if scheme_of(path) in REMOTE and not kind.fits_devices:
        raise ImageError(f"a {format} image needs a file that grows", path, "make raw, qcow2 or luks there")
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
    kind.create(path, -(-size // SECTOR) * SECTOR, options, backing, secrets)


def open_disk(options: BlockOptions) -> BlockBackend:
    """Open, check and lock a VM's disk. Raises UserError, and leaves nothing open then."""
    from skep.block.options import PASSWORD

    name = options.path
    secrets = {} if options.key_file is None else {PASSWORD: secret_of_file(options.key_file, "keyfile")}
    told = {format_named(options.format).key_option: PASSWORD} if secrets and not name.startswith("json:") else {}
    how = Opening(
        options.read_only,
        options.no_cache,
        options.synchronous,
        options.lock,
        inside=() if options.backing is None else options.backing.split(":"),
        secrets=secrets,
        guess=False,
    )
    image = open_named(name, options.format, told, how)
    try:
        _check_size(image, options)
        if image.corrupted and not image.read_only:
            raise ImageError("the image is marked as corrupt", image.path, "skep image check -r all mends it")
        if image.file.alignment > (unit := options.block.logical):
            alignment = image.file.alignment
            todo = f"say sectorsize={alignment}, or leave nocache out"
            raise HostError(f"direct I/O works in blocks of {alignment} bytes here, not {unit}", image.path, todo)
        return _filtered(image, options)
    except BaseException:
        image.close()
        raise


def _filtered(image: Image, options: BlockOptions) -> BlockBackend:
    """The layers over the image that were asked for."""
    from skep.block.filters import CopyOnRead, Throttle, Trace  # tools have no use for them
    from skep.block.record import Recorder

    disk: File = image
    try:
        if options.copy_on_read:
            if options.read_only or image.backing is None:
                what = "copyonread needs an image that is written to, over another"
                raise ImageError(what, image.path, "leave it out")
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
        raise UserError("the disk image is empty", image.path, "truncate -s SIZE gives it a size")
    if size % unit:
        full = -(-size // unit) * unit
        raise UserError(
            f"the size, {size} bytes, is not a multiple of {unit}", image.path, f"truncate -s {full} rounds it up"
        )
