"""What a disk image format is: the base class of all of them, and what they say of themselves.

A format is a :class:`skep.block.backend.Storage` over one file, or several, and lives in a module of its own, which
:mod:`skep.block.registry` names. To write one:

- derive from :class:`Image`; ``__init__`` opens, from a file that is open already, and raises :class:`ImageError` for
  what is wrong with it, having checked every length and offset that it is going to use;
- data calls (``preadv`` and so on) raise :class:`DamagedImage`, an OSError, for what turns out to be wrong only then;
- ``layer`` says what this image itself holds; ``extents`` looks through the whole chain;
- derive a test class from ``tests.block.conformance.ImageConformance``.
"""

from __future__ import annotations

import enum
import errno
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from mmap import mmap
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from skep.block.backend import Buffers, Extent, File, Located, write_zeroes_as_data
from skep.block.bytewise import Bytewise
from skep.block.closing import Closing
from skep.block.secrets import NO_SECRETS, Secrets
from skep.errors import UserError

SECTOR = 512
"""The unit of disk addresses in every protocol that we speak, whatever a disk's block size."""


PREALLOCATION = ("off", "metadata", "falloc", "full")
"""Of the host's space for a disk: none, its place in the file, that and the space, all of it written."""


if TYPE_CHECKING:
    Buffer = bytes | bytearray | memoryview | mmap | array[Any]
    """Memory of the caller's."""


Write = Callable[[Buffers], None]
"""Writes the buffers to where they have their place."""


class ImageError(UserError):
    """An image that cannot be opened or made, or that cannot do what was asked of it."""


class DamagedImage(OSError):
    """A transfer met tables that cannot be right. The device makes an I/O error of it."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(errno.EIO, f"the image is damaged: {what}", path)


class Can(enum.Flag):
    """What an image may be asked for, as it is opened."""

    NOTHING = 0
    WRITE = enum.auto()
    DISCARD = enum.auto()
    """Discards give space back, and read as zeros or as the backing file."""
    ZERO = enum.auto()
    """Zeros are noted, not written."""
    RESIZE = enum.auto()
    COMPRESS = enum.auto()
    """``write_compressed``."""
    CHECK = enum.auto()
    REPAIR = enum.auto()
    SNAPSHOT = enum.auto()
    BITMAP = enum.auto()
    BACKING = enum.auto()
    """An image may lie over another."""


class Option(NamedTuple):
    """Of creation, as ``-o NAME=VALUE``."""

    doc: str
    default: str | None = None
    told: bool = False
    """`skep image create` tells its value even if nobody chose it."""


class CheckResult:
    """What a check found. A leak costs space, a corruption data."""

    corruptions: int = 0
    leaks: int = 0
    errors: int = 0
    """What could not be looked at."""
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    end: int = 0
    """Bytes of the file that are in use."""
    clusters: int = 0
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0

    MOST_MESSAGES: ClassVar[int] = 1000

    def __init__(self) -> None:
        self.messages: list[str] = []
        """At most ``MOST_MESSAGES``; a hostile image could have millions."""

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.leaks or self.errors)

    def corrupt(self, message: str) -> None:
        self.corruptions += 1
        self.say(f"ERROR {message}")

    def leak(self, message: str, count: int = 1) -> None:
        self.leaks += count
        self.say(f"Leaked {message}")

    def say(self, message: str) -> None:
        if len(self.messages) < self.MOST_MESSAGES:
            self.messages.append(message)


class Snapshot(NamedTuple):
    """An earlier state of the disk, kept inside the image."""

    id: str
    name: str
    size: int
    """Of the disk then, bytes."""
    state_size: int
    """Of the VM's state that is kept with it, bytes."""
    seconds: int
    nanoseconds: int
    """When it was taken, since 1970."""
    vm_clock: int
    """The guest's clock, nanoseconds."""
    icount: int | None = None


class Bitmap(NamedTuple):
    """A persistent dirty bitmap."""

    name: str
    granularity: int
    flags: tuple[str, ...] = ()
    """Of ``in-use`` and ``auto``."""


class BackingName(NamedTuple):
    """What an image says of the one it lies over."""

    name: str
    """As it is written there: relative to the directory of the image."""
    format: str | None


class Image(Closing, ABC):
    """An open disk image. Offsets and lengths are bytes and multiples of 512; it may be called from several threads at
    once, but for ``resize``, ``repair``, ``close`` and what changes snapshots or bitmaps, which come alone.

    A context manager, which closes. What it holds open (``file``, ``backing``) is its own.
    """

    format: ClassVar[str]
    create_options: ClassVar[Mapping[str, Option]] = {}
    open_options: ClassVar[Mapping[str, Option]] = {}
    key_option: ClassVar[str] = "key-secret"
    """Which of ``open_options`` names the password of an encrypted image."""
    amend_options: ClassVar[Mapping[str, Option]] = {}

    path: str
    file: File
    """The file below. Of a format with several, the first."""
    size: int
    """Of the disk, bytes."""
    read_only: bool
    write_cache: bool
    can: Can = Can.NOTHING
    fits_devices: ClassVar[bool] = False
    """It can be made in what has a size of its own: a block device, an NBD export."""
    locks_tables: ClassVar[bool] = False
    """It asks the file below while it holds the lock of its tables, so another such image cannot be that file."""
    backing: Image | None = None
    """What is below, read where this layer has nothing. Set by who opens the chain."""

    @classmethod
    def open(cls, file: File, options: Mapping[str, str], secrets: Secrets) -> Self:
        """The image in an open file. The options are of ``open_options``, which the caller has checked, by name.
        Raises UserError."""
        return cls(file)  # type: ignore[call-arg]  # every format is made from a file

    def open_files(self, opener: Callable[[str], File]) -> None:
        """Open what other files the image is in, by the names that it has for them. Before all else; once."""

    # A disk is a File too, of whole sectors (skep.block.backend.File): filters lie over either.

    @property
    def alignment(self) -> int:
        return SECTOR

    @property
    def is_open(self) -> bool:
        return self.file.is_open

    def allocate(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, False)

    # A program's side: any offset and length within the disk, one buffer or several.

    @property
    def block_sizes(self) -> tuple[int, int]:
        """Bytes: the logical and the physical block. What is no multiple of the second costs a read before a write."""
        return SECTOR, max(SECTOR, self.file.alignment)

    def read_into(self, target: Buffer | Sequence[Buffer], offset: int = 0) -> None:
        """Fill a buffer, or several one after the other, with what is on the disk; nothing is copied on the way, but
        for parts of sectors. Raises OSError, and ImageError beyond the end."""
        self._anywhere(views := _views(target), offset).preadv(views, offset)

    def write_from(self, source: Buffer | Sequence[Buffer], offset: int = 0) -> None:
        """Write a buffer, or several one after the other."""
        self._anywhere(views := _views(source), offset).pwritev(views, offset)

    def zero(self, offset: int, length: int) -> None:
        """Make these bytes zeros, and give their space back where that can be."""
        self._check_range(offset, length)
        self._by_bytes.write_zeroes(offset, length, True)

    def _anywhere(self, views: Buffers, offset: int) -> File:
        length = sum(map(len, views))
        self._check_range(offset, length)
        return self if (offset | length) % SECTOR == 0 else self._by_bytes

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            what = f"{length} bytes at {offset} are not within the disk, which has {self.size}"
            raise ImageError(what, self.path)

    @cached_property
    def _by_bytes(self) -> Bytewise:
        return Bytewise(self)

    # A device's side: skep.block.backend.BlockBackend.

    @abstractmethod
    def preadv(self, buffers: Buffers, offset: int) -> None: ...

    def pwritev(self, buffers: Buffers, offset: int) -> None:
        raise OSError(errno.EROFS, f"{self.format} images are only read", self.path)

    def placed(self, offset: int, length: int) -> Write | None:
        """Give bytes that are to be written their place in the file, so that only the order of these calls decides
        where that is. What is returned writes them, may do so beside others, and is to be called once, soon: who
        writes to the same place waits for it. None: writing them gives them their place."""
        return None

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def write_now(self, buffers: Buffers, offset: int) -> bool:
        return False

    def locate(self, offset: int, length: int, write: bool) -> Located | None:
        return None

    def discard(self, offset: int, length: int) -> None:
        """Nothing, in a format that cannot."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        write_zeroes_as_data(self, offset, length)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        if self.backing is not None:
            self.backing.close()

    # How it is kept.

    @abstractmethod
    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        """How this image itself holds the bytes; what it leaves to a backing file is not ``present``."""

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """How the bytes are kept in the chain, in order and without a gap; to the end where no length is given."""
        length = self.size - offset if length is None else min(length, self.size - offset)
        for extent in self.layer(offset, length):
            if extent.present:
                yield extent
            elif self.backing is None:
                yield extent._replace(zero=True)
            else:
                yield from _through(self.backing, extent)

    def allocated(self) -> int | None:
        """Bytes of the host's that its files take."""
        return self.file.allocated()

    def info(self) -> dict[str, Any]:
        """What `qemu-img info` has under ``format-specific.data``: keys and values as its JSON."""
        return {}

    @property
    def cluster_size(self) -> int | None:
        """The unit in which space is given, where there is one."""
        return None

    @property
    def zero_unit(self) -> int:
        """Bytes: fewer zeros than so many, aligned, take as much space as data."""
        return SECTOR

    @property
    def corrupted(self) -> bool:
        """Somebody found it damaged and marked it; it is to be repaired before anything is written."""
        return False

    @property
    def encrypted(self) -> bool:
        return False

    @property
    def locked(self) -> bool:
        """It is encrypted, and its password was not told: its data cannot be read or written."""
        return False

    @property
    def new_is_zeros(self) -> bool:
        """As it was made, it reads as zeros, or as what is below it."""
        return True

    @property
    def dirty(self) -> bool:
        """It was not closed as it should have been."""
        return False

    # What only some can.

    def backing_name(self) -> BackingName | None:
        return None

    @property
    def needs_backing(self) -> bool:
        """It lies over another image, of which it has no name."""
        return False

    def set_backing(self, name: BackingName | None) -> None:
        """Change what the image says is below it. Only the name: the data is the caller's affair."""
        raise self.cannot("lies over no other")

    def check_backing(self, backing: Image) -> None:
        """Raises ImageError if that is not what this image was made over."""

    def resize(self, size: int) -> None:
        raise self.cannot("cannot be resized")

    def amend(self, options: Mapping[str, str], secrets: Secrets = NO_SECRETS, *, force: bool = False) -> None:
        """Change options of creation, those of ``amend_options``. ``force`` does what loses data. Raises UserError."""
        raise self.cannot("has no options to change")

    def reserve(self, start: int, mode: str) -> None:
        """Give what the disk has from ``start`` on, all of it zeros, its place, as ``PREALLOCATION`` says."""
        if mode != "off":
            raise self.cannot(f"has no preallocation {mode!r}")

    @property
    def vm_state_offset(self) -> int:
        """Where the addresses of a VM's state begin, behind those of the disk; 0: there is no room for one."""
        return 0

    def read_vm_state(self, buffers: Buffers, offset: int) -> None:
        """Fill the buffers from the state that a VM saves with its next snapshot."""
        raise OSError(errno.ENOTSUP, "the format keeps no VM's state", self.path)

    def write_vm_state(self, buffers: Buffers, offset: int) -> None:
        raise OSError(errno.ENOTSUP, "the format keeps no VM's state", self.path)

    def make_empty(self) -> None:
        """Hold nothing any more, so that everything is what is below."""
        raise self.cannot("cannot be emptied")

    def show_snapshot(self, name: str) -> None:
        """Read as the disk was then, from now on; the image is open for reading only."""
        raise self.cannot("has no snapshots")

    def pack(self, data: bytes | memoryview) -> bytes | None:
        """Compress a cluster for :meth:`write_compressed`, on any thread. Empty: it gets no smaller. None: that is for
        ``write_compressed`` to do."""
        return None

    def write_compressed(self, data: bytes | memoryview, offset: int, packed: bytes | None = None) -> None:
        """A whole cluster, or the end of the disk, that nobody has written before; ``packed`` is it by ``pack``."""
        raise self.cannot("has no compressed clusters")

    def check(self) -> CheckResult:
        raise self.cannot("cannot be checked")

    def repair(self, *, leaks_only: bool = False) -> CheckResult:
        """As ``check``, and mends. What it returns tells what was found, and how much of that is mended."""
        raise self.cannot("cannot be repaired")

    def snapshots(self) -> Sequence[Snapshot]:
        return ()

    def snapshot_create(self, name: str) -> None:
        raise self.cannot("has no snapshots")

    def snapshot_apply(self, name: str) -> None:
        """Go back to the snapshot with this id or name."""
        raise self.cannot("has no snapshots")

    def snapshot_delete(self, name: str) -> None:
        raise self.cannot("has no snapshots")

    def bitmaps(self) -> Sequence[Bitmap]:
        return ()

    @classmethod
    def create(
        cls,
        path: str,
        size: int,
        options: Mapping[str, str],
        backing: BackingName | None = None,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        """Make an image with a disk of ``size`` zeros, or of what is below. The options are of ``create_options``,
        which the caller has checked, by name. Raises UserError."""
        raise ImageError(f"{cls.format} images are only read, not made", path)

    @classmethod
    def measure(cls, size: int, data: Sequence[tuple[int, int]], options: Mapping[str, str]) -> tuple[int, int]:
        """Bytes that the file takes: for a disk of ``size`` with data at these (offset, length), and when full."""
        raise ImageError(f"what an image takes is not known for {cls.format}", None)

    def cannot(self, what: str) -> ImageError:
        return ImageError(f"a {self.format} image {what}", self.path)


def _views(buffers: Buffer | Sequence[Buffer]) -> Buffers:
    several = [buffers] if isinstance(buffers, bytes | bytearray | memoryview | mmap | array) else buffers
    return [view for one in several if len(view := memoryview(one).cast("B"))]


def _through(backing: Image, hole: Extent) -> Iterator[Extent]:
    there = max(0, min(hole.length, backing.size - hole.offset))
    if there:
        for extent in backing.extents(hole.offset, there):
            yield extent._replace(depth=extent.depth + 1)
    if there < hole.length:  # zeros that the end of the file below stands for
        yield hole._replace(offset=hole.offset + there, length=hole.length - there, zero=True)
