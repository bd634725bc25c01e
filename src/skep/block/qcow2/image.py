"""A qcow2 image, whole: its size, what is below it, its snapshots and bitmaps, and what tools ask of it."""

from __future__ import annotations

import errno
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from skep.block.backend import Buffers, File, fill_zeroes, split, write_zeroes_as_data
from skep.block.format import BackingName, Bitmap, Can, CheckResult, ImageError, Option, Snapshot
from skep.block.qcow2 import amend, bitmaps, check, create, snapshots
from skep.block.qcow2.header import MOST_L1_BYTES, Autoclear, Compression, Extension, Incompatible
from skep.block.qcow2.refcounts import Refcounts
from skep.block.qcow2.writing import Written
from skep.block.secrets import NO_SECRETS, Secrets, secret_named

_MOST_CACHE = 1 << 30


class Qcow2Image(Written):
    """An open qcow2 image."""

    fits_devices = True
    create_options: ClassVar[Mapping[str, Option]] = create.OPTIONS
    open_options: ClassVar[Mapping[str, Option]] = create.OPEN_OPTIONS
    amend_options: ClassVar[Mapping[str, Option]] = amend.AMEND
    can = (
        Can.WRITE
        | Can.DISCARD
        | Can.ZERO
        | Can.RESIZE
        | Can.COMPRESS
        | Can.CHECK
        | Can.REPAIR
        | Can.SNAPSHOT
        | Can.BITMAP
        | Can.BACKING
    )

    def __init__(self, file: File, *, cache: int | None = None, refcount_cache: int | None = None) -> None:
        """``cache``: bytes of L2 tables that are kept in memory; the other one of refcount blocks."""
        super().__init__(file, cache, refcount_cache)
        self._tracked = bitmaps.Tracker(self)
        if not self.read_only:
            self._open_for_writing()

    @classmethod
    def open(cls, file: File, options: Mapping[str, str], secrets: Secrets) -> Self:
        cache = _cache_size(file, options, "l2-cache-size")
        refcount_cache = _cache_size(file, options, "refcount-cache-size")
        image = cls(file, cache=cache, refcount_cache=refcount_cache)
        secret = options.get(image.key_option)
        if secret is not None and image.encrypted:
            image.unlock(secret_named(secrets, secret))
        return image

    def _open_for_writing(self) -> None:
        known = self.header.autoclear & sum(Autoclear)
        if known != self.header.autoclear:
            self.header.autoclear = known
            self.write_header()
        if self.header.incompatible & Incompatible.DIRTY:
            self.repair()

    def close(self) -> None:
        if not self.read_only and self._lost is None and self.file.is_open:
            try:
                self._tracked.store()
                self.settle()
            except OSError:
                pass  # whoever wants to know has flushed
        if self._apart:
            self._data.close()
        super().close()
        self._tables.close()

    def info(self) -> dict[str, Any]:
        header = self.header
        encrypt = {} if self._encryption is None else {"encrypt": self._encryption.info()}
        if header.version < 3:
            found: dict[str, Any] = {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16, **encrypt}
            return found
        marks = [
            {"flags": list(one.flags), "name": one.name, "granularity": one.granularity} for one in self.bitmaps()
        ]
        found = {
            "compat": "1.1",
            "compression-type": Compression(header.compression_type).name.lower(),
            "lazy-refcounts": bool(header.compatible & 1),
            **({"bitmaps": marks} if marks else {}),
            "refcount-bits": 1 << header.refcount_order,
            **encrypt,
            **self._data_info(),
            "corrupt": self.corrupted,
            "extended-l2": header.extended_l2,
        }
        return found

    def _data_info(self) -> dict[str, Any]:
        if self._data_name is None:
            return {}
        name = self._data_name.decode(errors="surrogateescape")
        return {"data-file": name, "data-file-raw": bool(self.header.autoclear & Autoclear.DATA_FILE_RAW)}

    def set_backing(self, name: BackingName | None) -> None:
        self.header.backing_name = None if name is None else name.name
        self.header.extensions.pop(Extension.BACKING_FORMAT, None)
        if name is not None and name.format is not None:
            first = {int(Extension.BACKING_FORMAT): name.format.encode()}
            self.header.extensions = first | self.header.extensions
        self.write_header()
        self.flush()

    # Its size.

    def resize(self, size: int) -> None:
        """Beyond the old end there are zeros; what is cut off is given back."""
        self._may_write()
        old = self.size
        if size < old:
            if self.header.nb_snapshots:
                raise ImageError("an image with snapshots is not made smaller", self.path)
            self.write_zeroes(size, min(old, -(-size // self._cluster) * self._cluster) - size, True)
            self.settle()
            self._set_size(size)
            self._cut(-(-size // self._cluster), -(-old // self._cluster))
        elif size > old:
            self.settle()
            entries = -(-size // (self._tables.entries << self._bits))
            if entries > len(self._tables.l1):
                self.replace_l1([self._tables.l1], entries, size)
            else:
                self._set_size(size)
            if self._apart:
                self._data.resize(max(size, self._data.size))
            if self.backing is not None and self.backing.size > old:
                self.write_zeroes(old, min(size, self.backing.size) - old, True)
        self._tracked.resize()
        self.settle()

    def _set_size(self, size: int) -> None:
        self.size = self.header.size = size
        self.write_header()
        self.file.flush()

    def _cut(self, first: int, last: int) -> None:
        """Forget these clusters of the disk, and L2 tables that have no others."""
        entries = self._tables.entries
        self._tables.check_room()
        for l1_index in range(first // entries, -(-last // entries)):
            with self._lock:
                if not self._tables.l2_offset(l1_index):
                    continue
                for index in range(max(first, l1_index * entries), min(last, (l1_index + 1) * entries)):
                    self._cut_one(index)
                if l1_index * entries >= first:
                    table = self._tables.l2_offset(l1_index)
                    self._tables.set_l1(l1_index, 0)
                    self._free(table >> self._bits, 1)
            if self._tables.crowded:
                self.flush()

    def _cut_one(self, index: int) -> None:
        found = self._tables.find(index)
        if found is not None and any(found[0].words[found[1] : found[1] + self._tables.words]):
            found = self._l2_to_change(index)
            word = found[0].words[found[1]]
            self._tables.change(found, 0, 0 if self._tables.words == 2 else None)
            self._free_entry(word)

    def moved_l1(self, offset: int) -> None:
        """The L1 table, as it is, was written to another place."""
        self._tables.l1_offset = offset

    def forget_zeroes(self) -> None:
        """Clusters that are noted to be zeros are nowhere instead: the same to an image over no other."""
        self._may_write()
        for extent in self.layer(0, self.size):
            for at in range(extent.offset, extent.offset + extent.length, self._cluster) if extent.zero else ():
                with self._lock:
                    self._cut_one(at >> self._bits)
                if self._tables.crowded:
                    self.flush()

    def make_empty(self) -> None:
        self._may_write()
        self.settle()
        self._cut(0, -(-self.size // self._cluster))
        self.settle()

    def replace_l1(self, parts: Iterable[array[int]], entries: int, size: int) -> None:
        """Another L1 table of so many entries, zeros behind ``parts``, of a disk of another size. Everything has been
        flushed; the old table's tree is the caller's affair."""
        old = (self._tables.l1_offset >> self._bits, -(-len(self._tables.l1) * 8 // self._cluster))
        offset = self.place_words(parts, entries)
        self.flush()
        self.header.l1_table_offset, self.header.l1_size = offset, entries
        self._set_size(size)
        self._tables.load_l1(offset, entries)
        self.give_back(range(old[0], old[0] + old[1]))

    def reserve(self, start: int, mode: str) -> None:
        """Places for whole clusters: one that ``start`` lies in is left as it is."""
        if mode == "off":
            return
        first = offset = -(-start // self._cluster) * self._cluster
        while offset < self.size:
            with self._lock:
                plan = self._plan(offset, min(self.size, offset + (64 << 20)))
            if isinstance(plan, threading.Event):
                raise AssertionError("nobody else writes meanwhile")
            if plan.clusters and (not plan.fresh or self.encrypted):
                self._data.write_zeroes(plan.host, plan.clusters << self._bits, False)
            end = offset + plan.length
            self._settle(plan, (offset, -(-end // self._cluster) * self._cluster))
            offset = end
            if self._tables.crowded or self._refcounts.crowded:
                self.flush()
        self._data.resize(max(self._data.size, self.size if self._apart else self._highest << self._bits))
        self.settle()
        for extent in self.kept(first, max(0, self.size - first)) if mode in ("falloc", "full") else ():
            if extent.host is not None and mode == "falloc":
                self._data.allocate(extent.host, extent.length)
            elif extent.host is not None:
                write_zeroes_as_data(self._data, extent.host, extent.length)

    # The state of a VM is kept like the disk, at addresses behind it.

    @property
    def vm_state_offset(self) -> int:
        return -(-self.size // self._per_l1) * self._per_l1

    @property
    def _per_l1(self) -> int:
        """Bytes of the disk that an entry of L1 stands for."""
        return self._tables.entries << self._bits

    def read_vm_state(self, buffers: Buffers, offset: int) -> None:
        at = self.vm_state_offset + offset
        there, beyond = split(buffers, max(0, len(self._tables.l1) * self._per_l1 - at))
        if there:
            self.preadv(there, at)
        fill_zeroes(beyond)

    def write_vm_state(self, buffers: Buffers, offset: int) -> None:
        self._may_write()
        at = self.vm_state_offset + offset
        entries = -(-(at + sum(map(len, buffers))) // self._per_l1)
        if entries > len(self._tables.l1):
            if entries * 8 > MOST_L1_BYTES:
                raise OSError(errno.EFBIG, "the VM's state is too large", self.path)
            self.settle()
            self.replace_l1([self._tables.l1], entries, self.size)
        self._write(buffers, at)
        self._after_write()

    # What tools ask for.

    def amend(self, options: Mapping[str, str], secrets: Secrets = NO_SECRETS, *, force: bool = False) -> None:
        amend.amend(self, options, secrets, force)

    @property
    def tracker(self) -> bitmaps.Tracker:
        return self._tracked

    def check(self) -> CheckResult:
        if not self.read_only:
            self.settle()
        return check.check(self)

    def repair(self, *, leaks_only: bool = False) -> CheckResult:
        return check.repair(self, leaks_only)

    def forget_tables(self) -> None:
        """L2 tables were changed in the file."""
        self.flush()
        self._tables.forget_all()

    def reload_counts(self) -> None:
        """They are in other places now, as the header says. All else is as it was."""
        self._refcounts = Refcounts(self.file, self.header)
        self._highest = -(-self.file.size // self._cluster)

    def snapshots(self) -> Sequence[Snapshot]:
        return [one.snapshot for one in snapshots.read(self)]

    def snapshot_create(self, name: str) -> None:
        self._may_write()
        snapshots.create(self, name)

    def snapshot_apply(self, name: str) -> None:
        self._may_write()
        try:
            snapshots.apply(self, name)
        finally:
            self._tracked.resize()  # to the size that the disk had then

    def show_snapshot(self, name: str) -> None:
        entry = snapshots.find(self, name)
        length = snapshots.length_of_l1(self, entry)
        self.size = entry.snapshot.size
        self._tables.load_l1(entry.l1_offset, length, entry.l1_size)
        self._unpacked.clear()

    def snapshot_delete(self, name: str) -> None:
        self._may_write()
        snapshots.delete(self, name)

    def bitmaps(self) -> Sequence[Bitmap]:
        return self._tracked.described()

    @classmethod
    def create(
        cls,
        path: str,
        size: int,
        options: Mapping[str, str],
        backing: BackingName | None = None,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        create.create(cls, path, size, options, backing, secrets)

    @classmethod
    def measure(cls, size: int, data: Sequence[tuple[int, int]], options: Mapping[str, str]) -> tuple[int, int]:
        return create.measure(size, data, options)


def _cache_size(file: File, options: Mapping[str, str], name: str) -> int | None:
    if name not in options:
        return None
    size = create.parse_size(options[name])
    if size is None or size > _MOST_CACHE:
        raise ImageError(f"{options[name]!r} will not do for {name}", file.path, "a size up to 1G")
    return size
