"""Layers, opened one over another: files, filters, formats, and the chain of images below an image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from skep.block.backend import File
from skep.block.format import BackingName, Can, Image, ImageError
from skep.block.naming import place_of, scheme_of
from skep.block.over import Over
from skep.block.protocol import open_protocol, whole_bytes
from skep.block.raw import RawImage
from skep.block.registry import FILTERS, FORMATS, format_named, probe
from skep.block.secrets import NO_SECRETS, Secrets
from skep.block.tree import MOST_LAYERS, Layer, Tree, parse_layers
from skep.errors import UserError


class Opening(NamedTuple):
    """How the layers of a disk are opened; see :func:`skep.block.image.open_image`."""

    read_only: bool = False
    no_cache: bool = False
    synchronous: bool = False
    lock: bool = True
    inside: Sequence[str] | None = None
    """What the names inside images may mean; None: anything."""
    secrets: Secrets = NO_SECRETS
    may_stay_locked: bool = False
    chain: bool = True
    """What lies below an image is opened too."""
    guess: bool = True
    """A format that nobody told is found out: never where a guest may have written."""
    volatile: bool = False

    @property
    def below(self) -> Opening:
        """For what lies below an image."""
        return self._replace(read_only=True, synchronous=False, may_stay_locked=False)


def open_named(name: str, format: str | None, options: Mapping[str, str], how: Opening) -> Image:
    """The image of that name, which its user told: a file's path, ``nbd://...`` or ``json:{...}``. Raises UserError,
    and leaves nothing open then."""
    if name.startswith("json:"):
        return open_tree(parse_layers(name), how)
    if format is not None:
        format_named(format, name)
    return _with_chain(_open_image(_open_place(name, how), format, options, None, how), how)


def open_tree(tree: Tree, how: Opening) -> Image:
    """The stack of layers that a tree of options tells (:mod:`skep.block.tree`). Raises UserError, and leaves nothing
    open then."""
    return _image_over(Layer(tree), how)


def _open_place(name: str, how: Opening) -> File:
    """A file's bytes, whatever is in it."""
    return open_protocol(
        name,
        read_only=how.read_only,
        no_cache=how.no_cache,
        synchronous=how.synchronous,
        lock=how.lock,
        volatile=how.volatile,
    )


# Layers as a tree tells them.


def _image_over(said: Layer, how: Opening) -> Image:
    """The layer as an image: what is none is a raw one."""
    layer = _open_layer(said, how, image=True)
    return layer if isinstance(layer, Image) else RawImage(layer)


def _file_over(said: Layer, how: Opening) -> File:
    """The layer as the file below another one."""
    return _open_layer(said, how._replace(may_stay_locked=False), image=False)


def _open_layer(said: Layer, how: Opening, *, image: bool) -> File:
    """Without a driver it is an image, or the file below one."""
    driver = said.take("driver")
    if (read_only := said.switch("read-only")) is not None:
        how = how._replace(read_only=read_only or how.read_only)
    if said.switch("force-share"):
        how = how._replace(lock=False)
    if driver is None and (image or said.has("file")):
        return _open_format(said, None, how)
    if driver is None or driver in ("file", "host_device"):
        return _open_file(said, how)
    if driver == "nbd":
        from skep.block.nbd.client import open_layer

        return open_layer(said, read_only=how.read_only, write_cache=not how.synchronous)
    if driver in FORMATS:
        return _open_format(said, driver, how)
    if driver in FILTERS:
        return _open_filter(said, driver, how, image=image)
    known = ", ".join(sorted(("file", "host_device", "nbd", *FORMATS, *FILTERS)))
    raise UserError(f"no such driver: {driver!r}", said.where("driver"), f"known are {known}")


def _open_file(said: Layer, how: Opening) -> File:
    name, locking, direct = said.need("filename"), said.take("locking", "auto"), said.switch("cache.direct")
    said.done()
    if locking not in ("auto", "on", "off"):
        raise UserError(f"is auto, on or off, not {locking!r}", said.where("locking"))
    how = how._replace(lock=how.lock and locking != "off", no_cache=how.no_cache if direct is None else direct)
    return _open_place(name, how)


def _open_format(said: Layer, format: str | None, how: Opening) -> Image:
    name, file, data = said.take("filename"), said.below("file"), said.below("data-file")
    bare = said.has("backing")
    backing = said.below("backing")
    if (name is None) == (file is None):
        raise UserError("is missing" if name is None else "is told twice", said.where("file.filename"))
    if name is not None and name.startswith("json:"):
        raise UserError("is told as a tree already", said.where("filename"))
    options = said.rest(None if format is None else format_named(format).open_options)
    below = _open_place(name or "", how) if file is None else whole_bytes(_file_over(file, how))
    image = _open_image(below, format, options, data, how)
    if backing is None:
        return image if bare else _with_chain(image, how)
    try:
        image.backing = _image_over(backing, how.below)
        image.check_backing(image.backing)
    except BaseException:
        image.close()
        raise
    return image


def _open_filter(said: Layer, driver: str, how: Opening, *, image: bool) -> File:
    from skep.block.filtering import filter_told  # few disks have one

    make, below = filter_told(driver, said), said.below("file")
    said.done()
    if below is None:
        raise UserError("is missing", said.where("file"))
    layer = _open_layer(below, how, image=image)
    try:
        return make(layer)
    except BaseException:
        layer.close()
        raise


# Images.


def _open_image(file: File, format: str | None, options: Mapping[str, str], data: Layer | None, how: Opening) -> Image:
    """An image over an open file, which is closed where that fails."""

    def open_other(name: str) -> File:
        if data is not None:
            other = _file_over(data, how)
            try:
                return _fit(kind, other)
            except ImageError:
                other.close()
                raise
        return _open_place(place_of(file.path, name, how.inside), how)

    image = None
    try:
        if format is None and not how.guess:
            raise ImageError("its format is not told", file.path, "say driver=FORMAT")
        kind = format_named(probe(file) if format is None else format, file.path)
        for name in options:
            if name not in kind.open_options:
                known = ", ".join(kind.open_options) or "none"
                raise ImageError(f"a {kind.format} image is not opened with {name!r}", file.path, f"known are: {known}")
        if not how.read_only and Can.WRITE not in kind.can:
            raise ImageError(f"{kind.format} images are only read", file.path, "say ro")
        image = kind.open(_fit(kind, file), options, how.secrets)
        image.open_files(open_other)
        if image.locked and not how.may_stay_locked:
            todo = f"say {image.key_option}=ID, and --object secret,id=ID,file=PATH"
            raise ImageError("the image is encrypted, and its password was not told", file.path, todo)
    except BaseException:
        (file if image is None else image).close()
        raise
    return image


def _fit(kind: type[Image], file: File) -> File:
    """The file, if an image of this kind can lie over it. Raises ImageError."""
    layer = file
    while kind.locks_tables:
        if isinstance(layer, Image) and layer.locks_tables:
            what = f"a {kind.format} image cannot lie over one of {layer.format}"
            raise ImageError(what, file.path, "skep image convert makes a raw one of that")
        if not isinstance(layer, Image | Over):
            break
        layer = layer.file if isinstance(layer, Image) else layer.below
    return file


def _with_chain(image: Image, how: Opening) -> Image:
    """Open what lies below, one after another, by the names in the images. The image is closed where that fails."""
    if not how.chain:
        return image
    try:
        above = image
        seen = {_identity(image.path)}
        while (name := above.backing_name()) is not None:
            if how.inside is not None and name.format is None:
                todo = f"skep image rebase -u -b {name.name} -F FORMAT {above.path} writes it down"
                raise ImageError("says nothing of the format of its backing file", above.path, todo)
            above.backing = below = _open_backing(above, name, seen, how.below)
            above.check_backing(below)
            if below.backing is not None:
                break
            above = below
        if above.needs_backing and above.backing is None:
            todo = "say backing.driver=..., backing.file.filename=..."
            raise ImageError("lies over another image, and has no name of it", above.path, todo)
    except BaseException:
        image.close()
        raise
    return image


def _open_backing(above: Image, name: BackingName, seen: set[str], how: Opening) -> Image:
    place = place_of(above.path, name.name, how.inside)
    if place.startswith("json:"):
        return open_tree(parse_layers(place), how)
    real = _identity(place)
    if real in seen or len(seen) >= MOST_LAYERS:
        what = "a loop" if real in seen else f"more than {MOST_LAYERS} images"
        raise ImageError(f"the chain of backing files is {what}", above.path)
    seen.add(real)
    try:
        if name.format is not None:
            format_named(name.format, place)
        return _open_image(_open_place(place, how), name.format, {}, None, how)
    except UserError as error:
        raise ImageError(f"its backing file cannot be opened: {error}", above.path) from None


def _identity(path: str) -> str:
    return path if scheme_of(path) is not None else os.path.realpath(path)
