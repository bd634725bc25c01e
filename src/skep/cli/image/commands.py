"""What each subcommand of `skep image` does. They take parsed arguments and return an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from skep.block import converting, copying
from skep.block.backend import Extent, read_at, write_at
from skep.block.format import SECTOR, BackingName, Can, Image, ImageError
from skep.block.image import create_image, open_image
from skep.block.naming import backing_path, place_of
from skep.block.qcow2.create import parse_size
from skep.block.qcow2.image import Qcow2Image
from skep.block.registry import format_named
from skep.block.tree import nested
from skep.block.words import words
from skep.cli.image.printing import Meter, c_hex, describe, print_info, print_json, print_snapshots
from skep.cli.opening import How, described, open_by
from skep.errors import UserError

if TYPE_CHECKING:
    from skep.block.resuming import Note

_TOLD_FIRST = {
    "qcow2": (
        *("cluster_size", "extended_l2", "preallocation", "compression_type"),
        *("size", "compat", "backing_file", "backing_fmt"),
    )
}
"""Of formats where it is not the size."""
_SIZES = ("cluster_size", "block_size", "log_size")
_BACKING_OPTIONS = ("backing_file", "backing_fmt", "size")


def _how(arguments: Namespace, *, write: bool = False, backing: bool = True) -> How:
    """What the options of a subcommand say of the images that it opens."""
    return How(
        format=getattr(arguments, "format", None),
        read_only=not write,
        cache=getattr(arguments, "cache" if write else "source_cache", None) or "writeback",
        shared=getattr(arguments, "shared", False),
        backing=backing,
        secrets=arguments.secrets,
    )


def _open(path: str, arguments: Namespace, how: How) -> Image:
    """By its name, or by what `--image-opts` says that words are."""
    return open_by(*(described(path, how) if arguments.image_opts else (path, how)))


def _named(arguments: Namespace) -> None:
    """A file is needed, unless help was all that was asked for."""
    if arguments.file is None:
        raise UserError("no file is named", None, "see --help")


def _meter(arguments: Namespace) -> Meter:
    return Meter(arguments.progress, arguments.quiet)


def _options(arguments: Namespace) -> dict[str, str]:
    """Of `-o NAME=VALUE,...`."""
    found: dict[str, str] = {}
    for text in arguments.options or ():
        found |= words(text)
    return found


def _say(arguments: Namespace, text: str) -> None:
    if not arguments.quiet:
        print(text)


# Looking.


def info(arguments: Namespace) -> int:
    found = []
    how = _how(arguments, backing=False)._replace(may_stay_locked=True)
    path, how = described(arguments.file, how) if arguments.image_opts else (arguments.file, how)
    seen: set[str] = set()
    while True:
        with open_by(path, how) as image:
            found.append((describe(image, path), list(image.snapshots())))
            below = image.backing_name()
        real = os.path.realpath(path)
        if real in seen:
            raise ImageError("the chain of backing files is a loop", path)
        seen.add(real)
        if not arguments.backing_chain or below is None:
            break
        path, how = place_of(path, below.name, None), how._replace(format=below.format, layers=None)
    if arguments.output == "json":
        everything = [one for one, _ in found]
        print_json(everything if arguments.backing_chain else everything[0])
        return 0
    for i, (one, snapshots) in enumerate(found):
        if i:
            print()
        print_info(one, snapshots)
    return 0


def check(arguments: Namespace) -> int:
    how = _how(arguments, write=bool(arguments.repair), backing=False)._replace(may_stay_locked=True)
    with _open(arguments.file, arguments, how) as image:
        if Can.CHECK not in image.can:
            print("skep image: This image format does not support checks", file=sys.stderr)
            return 63
        found = image.repair(leaks_only=arguments.repair == "leaks") if arguments.repair else image.check()
        if arguments.repair and (found.corruptions_fixed or found.leaks_fixed):
            _say(
                arguments,
                "The following inconsistencies were found and repaired:\n\n"
                f"    {found.leaks_fixed} leaked clusters\n    {found.corruptions_fixed} corruptions\n\n"
                "Double checking the fixed image now...",
            )
            fixed, found = found, image.check()
            found.corruptions_fixed, found.leaks_fixed = fixed.corruptions_fixed, fixed.leaks_fixed
        name = image.format
    if arguments.output == "json":
        counts: dict[str, Any] = {
            "image-end-offset": found.end,
            "total-clusters": found.clusters,
            "check-errors": found.errors,
            "corruptions": found.corruptions,
            "leaks": found.leaks,
            "corruptions-fixed": found.corruptions_fixed,
            "leaks-fixed": found.leaks_fixed,
            "allocated-clusters": found.allocated,
            "fragmented-clusters": found.fragmented,
            "compressed-clusters": found.compressed,
        }
        shown = {key: count for key, count in counts.items() if count or key == "check-errors"}
        print_json(shown | {"filename": arguments.file, "format": name})
    elif not arguments.quiet:
        _print_check(found)
    return 1 if found.errors else 2 if found.corruptions else 3 if found.leaks else 0


def _print_check(found: Any) -> None:
    for message in found.messages:
        print(message, file=sys.stderr)
    if found.clean:
        print("No errors were found on the image.")
    if found.corruptions:
        print(
            f"\n{found.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if found.leaks:
        print(
            f"\n{found.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if found.errors:
        print(f"\n{found.errors} internal errors have occurred during the check.")
    if found.clusters and found.allocated:
        shares = [100 * part / whole for part, whole in (
            (found.allocated, found.clusters),
            (found.fragmented, found.allocated),
            (found.compressed, found.allocated),
        )]
        print(
            f"{found.allocated}/{found.clusters} = {shares[0]:.2f}% allocated, {shares[1]:.2f}% fragmented,"
            f" {shares[2]:.2f}% compressed clusters"
        )
    if found.end:
        print(f"Image end offset: {found.end}")


def map_(arguments: Namespace) -> int:
    with _open(arguments.file, arguments, _how(arguments)) as image:
        start = arguments.start_offset
        most = image.size if arguments.max_length is None else arguments.max_length
        length = max(0, min(most, image.size - start))
        files = [image.path]
        below: Image | None = image
        while below is not None and (name := below.backing_name()) is not None:
            files.append(place_of(files[-1], name.name, None))
            below = below.backing
        found = _merged(image.extents(start, length))
        if arguments.output == "json":
            text = ",\n".join(_map_entry(one) for one in found)
            print(f"[{text}]")
            return 0
        print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
        for one in found:
            if one.data and not one.zero:
                if one.host is None:
                    raise ImageError("File contains external, encrypted or compressed clusters.")
                where = one.file or files[one.depth]
                print(f"{c_hex(one.offset):<16}{c_hex(one.length):<16}{c_hex(one.host):<16}{where}")
        return 0


def _merged(extents: Iterator[Extent]) -> Iterator[Extent]:
    last: Extent | None = None
    for one in extents:
        if last is not None:
            follows = one.host == (None if last.host is None else last.host + last.length)
            if follows and one._replace(offset=0, length=0, host=None) == last._replace(offset=0, length=0, host=None):
                last = last._replace(length=last.length + one.length)
                continue
            yield last
        last = one
    if last is not None:
        yield last


def _map_entry(one: Extent) -> str:
    words = [f'"start": {one.offset}', f'"length": {one.length}', f'"depth": {one.depth}']
    for key, value in (("present", one.present), ("zero", one.zero), ("data", one.data)):
        words.append(f'"{key}": {str(value).lower()}')
    if one.host is not None:
        words.append(f'"offset": {one.host}')
    return "{ " + ", ".join(words) + "}"


def measure(arguments: Namespace) -> int:
    if (arguments.size is None) == (arguments.file is None):
        raise UserError("give either an image or --size", None)
    kind = format_named(arguments.target_format)
    options = _options(arguments)
    bitmaps = None
    if arguments.file is None:
        size, data = arguments.size, []
    else:
        with _open(arguments.file, arguments, _how(arguments)) as image:
            if arguments.snapshot is not None:
                image.show_snapshot(_snapshot_name(arguments.snapshot))
            size = image.size
            data = [(one.offset, one.length) for one in image.extents() if one.data]
            bitmaps = 0 if image.format == "qcow2" and kind.format == "qcow2" and not image.bitmaps() else None
    required, full = kind.measure(-(-size // SECTOR) * SECTOR, data, options)
    if arguments.output == "json":
        found = {"required": required, "fully-allocated": full}
        print_json(found if bitmaps is None else {"bitmaps": bitmaps, **found})
        return 0
    print(f"required size: {required}\nfully allocated size: {full}")
    if bitmaps is not None:
        print(f"bitmaps size: {bitmaps}")
    return 0


def compare(arguments: Namespace) -> int:
    how = _how(arguments)
    with (
        _open(arguments.file, arguments, how) as one,
        _open(arguments.second, arguments, how._replace(format=arguments.second_format)) as other,
        _meter(arguments) as meter,
    ):
        if arguments.strict and one.size != other.size:
            _say(arguments, "Strict mode: Image size mismatch!")
            return 1
        found = copying.compare(one, other, meter, allocation=arguments.strict)
        shared = min(one.size, other.size)
        if one.size != other.size and (found.offset is None or found.offset >= shared):
            _say(arguments, "Warning: Image size mismatch!")
    if found.allocation:
        _say(arguments, f"Strict mode: Offset {found.offset} block status mismatch!")
        return 1
    if found.offset is not None:
        _say(arguments, f"Content mismatch at offset {found.offset}!")
        return 1
    _say(arguments, "Images are identical.")
    return 0


# Making.


def create(arguments: Namespace) -> int:
    kind = format_named(arguments.format)
    options = _options(arguments)
    if "help" in options:
        return _help(kind)
    _named(arguments)
    backing = arguments.backing if arguments.backing is not None else options.get("backing_file")
    backing_format = arguments.backing_format or options.get("backing_fmt")
    size = arguments.size
    if size is None and "size" in options:
        size = parse_size(options["size"])
        if size is None:
            raise ImageError(f"{options['size']!r} is not a size", arguments.file)
    if backing and backing_format is None:
        what = "the format of the backing file is missing"
        raise ImageError(what, arguments.file, "say -F FORMAT: what a guest wrote must not decide it")
    below = BackingName(backing, backing_format) if backing else None
    own = {name: value for name, value in options.items() if name not in _BACKING_OPTIONS}
    create_image(
        *(arguments.file, arguments.format, size),
        options=own,
        backing=below,
        check_backing=not arguments.unsafe,
        secrets=arguments.secrets,
    )
    if not arguments.quiet:
        with open_by(arguments.file, _how(arguments, backing=False)._replace(may_stay_locked=True)) as image:
            told = _creation(kind, image, size, own, below)
            _say(arguments, f"Formatting '{arguments.file}', fmt={image.format} {told}")
    return 0


def _creation(
    kind: type[Image], image: Image, size: int | None, options: dict[str, str], below: BackingName | None
) -> str:
    """The options as `create` tells them; the size is the one that was asked for, if one was."""
    words = {name: str(one.default) for name, one in kind.create_options.items() if one.told} | options
    words |= {name: str(parse_size(words[name])) for name in _SIZES if name in words}
    words |= {"size": str(image.size if size is None else size)}
    if below is not None:
        words |= {"backing_file": below.name, "backing_fmt": below.format or ""}
    order = [*_TOLD_FIRST.get(kind.format, ("size", "backing_file", "backing_fmt")), *kind.create_options]
    return " ".join(f"{name}={words[name]}" for name in sorted(words, key=order.index))


def _help(kind: type[Image]) -> int:
    names = {name: one.doc for name, one in kind.create_options.items()} | {"size": "Virtual disk size"}
    if Can.BACKING in kind.can:
        names |= {"backing_file": "File name of a base image", "backing_fmt": "Image format of the base image"}
    print("Supported options:")
    for name in sorted(names):
        print(f"  {name + '=<value>':<22} - {names[name]}")
    return 0


def convert(arguments: Namespace) -> int:
    options = _options(arguments)
    if arguments.target_image_opts and (arguments.target_format is not None or not arguments.no_create):
        raise UserError("goes with -n and without -O", "--target-image-opts")
    if arguments.target_format is None:
        arguments.target_format = "raw"
    if "help" in options:
        return _help(format_named(arguments.target_format))
    if len(arguments.files) < 2:
        raise UserError("name the sources and the new image", None)
    if not 1 <= arguments.workers <= 16:
        raise UserError("is from 1 to 16", "-m")
    _check_offload(arguments)
    if arguments.sparse is None:
        arguments.sparse = 4096
    *names, target_name = arguments.files
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(_open(name, arguments, _how(arguments))) for name in names]
        if arguments.snapshot is not None:
            for source in sources:
                source.show_snapshot(_snapshot_name(arguments.snapshot))
        size = sum(source.size for source in sources)
        backing_name = arguments.backing or options.get("backing_file")
        backing_format = arguments.backing_format or options.get("backing_fmt")
        below = BackingName(backing_name, backing_format) if backing_name else None
        if below is not None and below.format is None:
            raise ImageError("the format of the backing file is missing", target_name, "say -F FORMAT")
        own = {name: value for name, value in options.items() if name not in _BACKING_OPTIONS}
        note, start = None, 0
        if arguments.resume:
            note = _note(arguments, sources, own, below)
            start = note.found() or 0
        if not arguments.no_create and not start:
            _not_a_source(target_name, [source.path for source in sources])
            create_image(
                target_name, arguments.target_format, size, options=own, backing=below, secrets=arguments.secrets
            )
        target = stack.enter_context(_open_target(target_name, arguments, options))
        if target.size < size:
            raise ImageError(f"has room for {target.size} bytes, and the disk has {size}", target_name)
        if target.backing is not None and below is None:
            raise ImageError("lies over another image", target_name, "say -B, or leave -n out")
        if start:
            _say(arguments, f"Going on at {start} of {size} bytes.")
            from skep.block.resuming import prepare

            prepare(sources, target, start)
        how = converting.Conversion(
            compress=arguments.compress,
            sparse=arguments.sparse,
            zero_target=arguments.target_is_zero or (not arguments.no_create and target.new_is_zeros),
            backing_size=None if target.backing is None else target.backing.size,
            salvage=arguments.salvage,
            workers=arguments.workers,
            ordered=not arguments.out_of_order,
            start=start,
            offload=arguments.offload,
        )
        tell = _paced(arguments.rate, size, stack.enter_context(_meter(arguments)))
        lost = converting.convert(sources, target, how, tell, None if note is None else partial(note.settled, target))
        if arguments.bitmaps:
            _copy_bitmaps(sources, target, arguments.skip_broken_bitmaps, again=bool(start))
        if note is not None:
            target.flush()
            note.forget()
        if arguments.cache != "unsafe":
            target.flush()
    if lost:
        print(f"skep image: {lost} sectors could not be read, and are zeros", file=sys.stderr)
    return 0


def _check_offload(arguments: Namespace) -> None:
    """Where the host copies, nobody here sees the data."""
    given = {"-c": arguments.compress, "-S": arguments.sparse is not None, "--salvage": arguments.salvage}
    for option in given:
        if arguments.offload and given[option]:
            raise UserError(f"does not go with {option}", "-C", "leave one of them out")


def _note(arguments: Namespace, sources: Sequence[Image], options: dict[str, str], below: BackingName | None) -> Note:
    """Of the copy that `convert --resume` makes: what another one would have to have alike."""
    import json  # few copies are noted

    from skep.block.resuming import Note

    if arguments.no_create:
        raise UserError("goes with an image that convert makes", "--resume", "leave -n out")
    if options.get("subformat") == "streamOptimized":
        raise ImageError("a stream is written at once", arguments.files[-1], "leave --resume out")
    how = {
        "format": arguments.target_format,
        "options": options,
        "backing": below,
        "snapshot": arguments.snapshot,
        "compress": arguments.compress,
        "sparse": arguments.sparse,
    }
    return Note(arguments.files[-1], sources, json.loads(json.dumps(how)))


def _open_target(name: str, arguments: Namespace, options: dict[str, str]) -> Image:
    """What `convert` writes to. A password that it was made with is the one that opens it."""
    how = _how(arguments, write=True)._replace(shared=False)
    if arguments.resume and how.cache == "unsafe":  # what is noted is to be there
        how = how._replace(cache="writeback")
    if arguments.target_image_opts:
        return open_by(*described(name, how._replace(format=None)))
    kind = format_named(arguments.target_format)
    keys = {key: value for key, value in options.items() if key in kind.open_options}
    if keys:
        layers = {"driver": arguments.target_format, "file.filename": name, **keys}
        return open_by(name, how._replace(layers=nested(layers)))
    return open_by(name, how._replace(format=arguments.target_format))


def _paced(rate: int | None, size: int, tell: copying.Progress) -> copying.Progress:
    if rate is None:
        return tell
    begun = time.monotonic()

    def wait(done: float) -> None:
        tell(done)
        time.sleep(max(0.0, begun + done * size / rate - time.monotonic()))

    return wait


def _not_a_source(target: str, sources: Sequence[str]) -> None:
    with contextlib.suppress(FileNotFoundError):
        if any(os.path.samefile(target, source) for source in sources):
            raise ImageError("is a source too", target)


def _copy_bitmaps(sources: Sequence[Image], target: Image, skip_broken: bool, again: bool) -> None:
    """``again``: a copy that was killed may have begun that."""
    if len(sources) != 1 or not isinstance(sources[0], Qcow2Image) or not isinstance(target, Qcow2Image):
        raise ImageError("bitmaps are copied from one qcow2 image to another", target.path)
    for one in sources[0].tracker.all:
        if one.flags & 1:
            if skip_broken:
                continue
            raise ImageError(f"bitmap {one.name!r} was in use", sources[0].path, "--skip-broken-bitmaps leaves it out")
        if again and one.name in (marks.name for marks in target.tracker.all):
            target.tracker.remove(one.name)
        target.tracker.add(one.name, 1 << one.granularity_bits)
        target.tracker.merge(one.name, one.granularity_bits, sources[0].tracker.load(one))
        target.tracker.change(one.name, enable=bool(one.flags & 2))


def dd(arguments: Namespace) -> int:
    said = dict(word.partition("=")[::2] for word in arguments.operands)
    unknown = set(said) - {"if", "of", "bs", "count", "skip"}
    if unknown or "if" not in said or "of" not in said:
        raise UserError(f"unknown: {', '.join(sorted(unknown))}" if unknown else "if= and of= are needed", "dd")
    numbers = {key: parse_size(said.get(key, default)) for key, default in (("bs", "512"), ("skip", "0"))}
    block, skip = numbers["bs"], numbers["skip"]
    count = parse_size(said["count"]) if "count" in said else None
    if not block or skip is None or ("count" in said and count is None):
        raise UserError("bs=, count= and skip= are numbers", "dd")
    with _open(said["if"], arguments, _how(arguments)) as source:
        _not_a_source(said["of"], [source.path])
        start = skip * block
        if start > source.size:
            print(f"skep image: {said['if']}: cannot skip to specified offset", file=sys.stderr)
        end = source.size if count is None else min(source.size, start + count * block)
        size = max(0, end - start)
        create_image(said["of"], arguments.target_format, size)
        how = How(arguments.target_format, read_only=False, secrets=arguments.secrets)
        with open_by(said["of"], how) as target:
            for at in range(0, size, copying.PIECE):
                n = min(copying.PIECE, size - at)
                data = read_at(source, start + at, n)
                data += bytes(-n % SECTOR)
                for first, length, zero in converting.zero_runs(data, 4096):
                    if not zero:
                        write_at(target, at + first, memoryview(data)[first : first + length])
    return 0


# Changing.


def resize(arguments: Namespace) -> int:
    text = arguments.size
    number = parse_size(text.lstrip("+-"))
    if number is None or text[:2] in ("++", "--", "+-", "-+"):
        raise UserError(f"{text!r} is not a size", "resize")
    with _open(arguments.file, arguments, _how(arguments, write=True)) as image:
        if Can.RESIZE not in image.can:
            raise image.cannot("cannot be resized")
        size = image.size + number if text[0] == "+" else image.size - number if text[0] == "-" else number
        size = -(-size // SECTOR) * SECTOR
        if size <= 0:
            raise ImageError("New image size must be positive", arguments.file)
        if size < image.size and not arguments.shrink:
            todo = "say --shrink to lose what is beyond the new end"
            raise ImageError("making it smaller loses data", arguments.file, todo)
        old = image.size
        image.resize(size)
        if size > old:
            image.reserve(old, arguments.preallocation)
        image.flush()
    _say(arguments, "Image resized.")
    return 0


def snapshot(arguments: Namespace) -> int:
    changes = arguments.make or arguments.apply or arguments.delete
    with _open(arguments.file, arguments, _how(arguments, write=bool(changes))) as image:
        if changes and Can.SNAPSHOT not in image.can:
            raise image.cannot("has no snapshots")
        if arguments.make:
            image.snapshot_create(arguments.make)
        elif arguments.apply:
            image.snapshot_apply(arguments.apply)
        elif arguments.delete:
            image.snapshot_delete(arguments.delete)
        elif taken := image.snapshots():
            print_snapshots(taken)
    return 0


def _snapshot_name(text: str) -> str:
    """`snapshot.id=ID`, `snapshot.name=NAME`, or either by itself."""
    words = dict(word.partition("=")[::2] for word in text.split(","))
    return words.get("snapshot.id") or words.get("snapshot.name") or text


def commit(arguments: Namespace) -> int:
    with contextlib.ExitStack() as stack:
        top = stack.enter_context(_open(arguments.file, arguments, _how(arguments, write=not arguments.keep)))
        if top.backing is None:
            raise ImageError("Image does not have a backing file", arguments.file)
        target = arguments.base or top.backing.path
        depth = copying.depth_of(top, target)
        below: Image = top
        for _ in range(depth):
            below = below.backing or below
        if not depth:
            raise ImageError("is the image itself", target)
        # What is in the chain is open for reading; the lock would keep ourselves away.
        secrets = arguments.secrets
        base = stack.enter_context(open_image(below.path, format=below.format, lock=False, secrets=secrets))
        meter = stack.enter_context(_meter(arguments))
        pace = _paced(arguments.rate, top.size, meter)
        copying.commit(top, base, empty=not arguments.keep and depth == 1, progress=pace)
    _say(arguments, "Image committed.")
    return 0


def rebase(arguments: Namespace) -> int:
    if arguments.backing is None:
        raise UserError("is missing: name the image below, or '' for none", "-b")
    name = BackingName(arguments.backing, arguments.backing_format) if arguments.backing else None
    if name is not None and name.format is None:
        raise ImageError("the format of the backing file is missing", arguments.file, "say -F FORMAT")
    if arguments.unsafe:
        how = _how(arguments, write=True, backing=False)._replace(may_stay_locked=True)
        with _open(arguments.file, arguments, how) as image:
            image.set_backing(name)
        return 0
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(_open(arguments.file, arguments, _how(arguments, write=True)))
        new = None
        if name is not None:
            path = backing_path(image.path, name.name)
            new = stack.enter_context(open_by(path, How(name.format, secrets=arguments.secrets)))
        copying.rebase(image, new, name, stack.enter_context(_meter(arguments)))
    return 0


def amend(arguments: Namespace) -> int:
    options = _options(arguments)
    if "help" in options:
        return _amend_help(arguments.format)
    _named(arguments)
    backing = not {"backing_file", "backing_fmt"} & set(options)
    how = _how(arguments, write=True, backing=backing)._replace(may_stay_locked=True)
    with _open(arguments.file, arguments, how) as image:
        for name in options:
            if name not in image.amend_options:
                known = ", ".join(image.amend_options) or "none"
                raise ImageError(f"{name!r} of a {image.format} image cannot be changed", image.path, f"known: {known}")
        with _meter(arguments) as meter:
            image.amend(options, arguments.secrets, force=arguments.force)
            meter(1)
    return 0


def _amend_help(format: str | None) -> int:
    kind = format_named(format or "qcow2")
    if not kind.amend_options:
        raise ImageError(f"Format driver '{kind.format}' does not support option amendment")
    print(f"Amend options for '{kind.format}':")
    for name in sorted(kind.amend_options):
        print(f"  {name + '=<value>':<22} - {kind.amend_options[name].doc}")
    return 0


def bitmap(arguments: Namespace) -> int:
    if not arguments.actions:
        raise UserError("say what to do: --add, --remove, --clear, --enable, --disable or --merge", "bitmap")
    with _open(arguments.file, arguments, _how(arguments, write=True)) as image:
        if not isinstance(image, Qcow2Image):
            raise image.cannot("has no bitmaps")
        for action, source in arguments.actions:
            _bitmap_action(image, action, source, arguments)
    return 0


def _bitmap_action(image: Qcow2Image, action: str, source: str | None, arguments: Namespace) -> None:
    tracker, name = image.tracker, arguments.bitmap
    if action == "add":
        tracker.add(name, arguments.granularity)
    elif action == "remove":
        tracker.remove(name)
    elif action == "merge" and source is not None:
        with contextlib.ExitStack() as stack:
            other: Image = image
            if arguments.source is not None:
                how = How(arguments.source_format, secrets=arguments.secrets)
                other = stack.enter_context(open_by(arguments.source, how))
            if not isinstance(other, Qcow2Image):
                raise other.cannot("has no bitmaps")
            one = other.tracker.find(source)
            tracker.merge(name, one.granularity_bits, bytes(other.tracker.load(one)))
    else:
        enable = {"enable": True, "disable": False}.get(action)
        tracker.change(name, enable=enable, clear=action == "clear")


# Measuring.


def bench(arguments: Namespace) -> int:
    from skep.block import load

    step = arguments.buffer if arguments.step is None else arguments.step
    with _open(arguments.file, arguments, _how(arguments, write=arguments.write)) as image:
        if not arguments.quiet:
            what = "write" if arguments.write else "read"
            print(
                f"Sending {arguments.count} {what} requests, {arguments.buffer} bytes each, {arguments.depth} in"
                f" parallel (starting at offset {arguments.offset}, step size {step})"
            )
        begun = time.monotonic()
        load.run(
            image,
            load.Load(
                count=arguments.count,
                depth=arguments.depth,
                size=arguments.buffer,
                offset=arguments.offset,
                step=step,
                write=arguments.write,
                pattern=arguments.pattern,
                flush_interval=arguments.flush_interval,
                threads=arguments.aio == "threads",
            ),
        )
        took = time.monotonic() - begun
        _say(arguments, f"Run completed in {took:.3f} seconds.")
    return 0
