"""Where the bytes of a qcow2 image's disk are, and reading them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from skep.block.backend import Buffers, Extent, File, Located, fill_zeroes, read_at, read_padded, split
from skep.block.format import BackingName, Can, DamagedImage, Image
from skep.block.qcow2.compression import decompress
from skep.block.qcow2.header import Extension, Incompatible, read_header
from skep.block.qcow2.refcounts import Refcounts
from skep.block.qcow2.tables import ALL_SUBCLUSTERS, COMPRESSED, COPIED, OFFSET, ZERO, Slice, Tables
from skep.block.tables import first_in_use
from skep.locks import Lock, Order

if TYPE_CHECKING:
    from skep.block.qcow2.encryption import Encryption

_UNPACKED_BYTES = 1 << 20
"""Of compressed clusters that are kept unpacked."""


class Kind(IntEnum):
    NONE = 0
    """Not in this image: in the backing file, or zeros."""
    DATA = 1
    ZERO = 2
    COMPRESSED = 3


class Run(NamedTuple):
    """Bytes of the disk that are kept in one way."""

    kind: Kind
    host: int
    """Where in the file, for data and for zeros that have a place; -1: nowhere. Of a compressed cluster its entry."""
    length: int


class Mapped(Image):
    """The tables of an open image, and what can be done by looking at them."""

    format = "qcow2"
    locks_tables = True
    key_option = "encrypt.key-secret"

    def __init__(self, file: File, cache: int | None, refcount_cache: int | None) -> None:
        self.file = self._data = self._stored = file
        """``_data`` has the disk's clusters, through the cipher where there is one, ``_stored`` as they are kept."""
        self._apart = False
        """The disk's data is in a file of its own."""
        self._encryption: Encryption | None = None
        self.path = file.path
        self.read_only = file.read_only
        self.write_cache = file.write_cache
        self.header = read_header(file)
        if self.header.crypt_method:
            from skep.block.qcow2.encryption import Encryption  # few images are

            self.encrypt(Encryption(file, self.header))
        self.size = self.header.size
        self._cache, self._refcount_cache = cache, refcount_cache
        self._bits = self.header.cluster_bits
        self._cluster = self.header.cluster_size
        self._subcluster = self._cluster // 32 if self.header.extended_l2 else self._cluster
        self._unusual = ((1 << 64) - 1) & ~(COPIED | OFFSET) | (self._cluster - 1)
        """Bits that the entry of a cluster of data does not have."""
        self._lock = Lock(f"qcow2 {self.path}", Order.IMAGE)
        self._serial = itertools.count()
        self._transfers: set[int] = set()
        """Transfers under way, by the serial number of their beginning. Adding and removing one is atomic."""
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        self._load()
        self._data_name = self.header.extensions.get(Extension.DATA_FILE)

    def _load(self) -> None:
        self._refcounts = Refcounts(self.file, self.header, self._refcount_cache)
        self._tables = Tables(self.file, self.header, self._cache)
        self._highest = -(-self.file.size // self._cluster)
        """Clusters of the file from here on were never written."""
        self._unpacked.clear()

    def preadv(self, buffers: Buffers, offset: int) -> None:
        serial = next(self._serial)
        self._transfers.add(serial)
        try:
            length = sum(map(len, buffers))
            host = self._known_host(offset, length, 0) if self._encryption is None else None
            if host is not None and host + length <= self._data.size:
                self._data.preadv(buffers, host)
            else:
                self._read(buffers, offset)
        finally:
            self._transfers.discard(serial)

    def read_now(self, buffers: Buffers, offset: int) -> bool:
        serial = next(self._serial)
        self._transfers.add(serial)
        try:
            host = self._known_host(offset, sum(map(len, buffers)), 0)
            return host is not None and self._data.read_now(buffers, host)
        finally:
            self._transfers.discard(serial)

    def locate(self, offset: int, length: int, write: bool) -> Located | None:
        serial = next(self._serial)
        self._transfers.add(serial)
        host = self._place_to_write(offset, length) if write else self._known_host(offset, length, 0)
        place = None if host is None else self._data.locate(host, length, write)
        if place is None:
            self._transfers.discard(serial)
            return None
        return Located(place.file, place.offset, partial(self._transfers.discard, serial))

    def _place_to_write(self, offset: int, length: int) -> int | None:
        """Where these bytes are in the file, if they may be written there and nothing else is to be done."""
        return None

    def _read(self, buffers: Buffers, offset: int) -> None:
        end = offset + sum(map(len, buffers))
        with self._lock:
            runs = self._map(offset, end)
        if len(runs) == 1:
            self._read_run(runs[0], buffers, offset)
            return
        rest = buffers
        for run in runs:
            piece, rest = split(rest, run.length)
            self._read_run(run, piece, offset)
            offset += run.length

    def _read_run(self, run: Run, buffers: Buffers, offset: int) -> None:
        if run.kind is Kind.DATA:
            if self._encryption is not None and self._encryption.by_disk:
                self._encryption.read(self._stored, buffers, run.host, offset)
            elif self._data.size - run.host >= run.length:
                self._data.preadv(buffers, run.host)
            else:  # the file may end before its last cluster is full
                read_padded(self._data, buffers, run.host)
        elif run.kind is Kind.NONE:
            read_padded(self.backing, buffers, offset)
        elif run.kind is Kind.ZERO:
            fill_zeroes(buffers)
        else:
            data = self._unpack(run.host)
            at = offset & (self._cluster - 1)
            for buffer in buffers:
                buffer[:] = data[at : at + len(buffer)]
                at += len(buffer)

    def _map(self, offset: int, end: int) -> list[Run]:
        """How these bytes are kept, all of them. With the lock."""
        runs: list[Run] = []
        bits, cluster, tables = self._bits, self._cluster, self._tables
        kind, host, length = Kind.NONE, -1, 0
        while offset < end:
            index, inside = offset >> bits, offset & (cluster - 1)
            found = tables.find(index)
            if found is None:
                beyond = ((index // tables.entries + 1) * tables.entries) << bits
                new = Run(Kind.NONE, -1, min(end, beyond) - offset)
            else:
                words, at = found[0].words, found[1]
                word = words[at]
                n = min(end - offset, cluster - inside)
                if not word and not words[at + tables.words - 1]:
                    if n < end - offset and not any(rest := words[at:]):
                        n = min(end - offset, (len(rest) // tables.words << bits) - inside)
                    new = Run(Kind.NONE, -1, n)
                elif tables.words == 2:
                    new = self._subclusters(found, inside, end - offset)
                elif word & COMPRESSED:
                    new = Run(Kind.COMPRESSED, word, n)
                else:
                    place = self._place(word)
                    kind_here = Kind.ZERO if word & ZERO else Kind.DATA if place >= 0 else Kind.NONE
                    if kind_here is Kind.DATA and n < end - offset:
                        n = min(end - offset, (self._row(found) << bits) - inside)
                    new = Run(kind_here, place + inside if place >= 0 else -1, n)
            offset += new.length
            if kind is new.kind and kind is not Kind.COMPRESSED and new.host == (host + length if host >= 0 else -1):
                length += new.length
                continue
            if length:
                runs.append(Run(kind, host, length))
            kind, host, length = new
        if length:
            runs.append(Run(kind, host, length))
        return runs

    def _row(self, found: tuple[Slice, int]) -> int:
        """How many clusters from this entry on, of this slice, are in a row in the file, with the same flags."""
        words, at = found[0].words, found[1]
        word, first = words[at], at
        while at < len(words) and words[at] == word:
            at += 1
            word += self._cluster
        return at - first

    def _subclusters(self, found: tuple[Slice, int], inside: int, most: int) -> Run:
        """The subclusters from ``inside`` a cluster on that are kept in one way."""
        word, bitmap = found[0].words[found[1]], found[0].words[found[1] + 1]
        if word & COMPRESSED:
            return Run(Kind.COMPRESSED, word, min(most, self._cluster - inside))
        place = self._place(word)
        number = inside // self._subcluster
        kind = _subcluster_kind(bitmap, number, place)
        if kind is None:
            raise DamagedImage(self.path, f"subclusters {bitmap:#x} of the cluster at {place:#x}")
        last = number + 1
        while last < 32 and _subcluster_kind(bitmap, last, place) is kind:
            last += 1
        n = min(most, last * self._subcluster - inside)
        return Run(kind, place + inside if place >= 0 and kind is not Kind.NONE else -1, n)

    def _place(self, word: int) -> int:
        """Where a cluster is; -1 if it has no place."""
        place = word & OFFSET
        if word & ZERO and (self.header.version < 3 or self._tables.words == 2):
            raise DamagedImage(self.path, f"an L2 entry {word:#x}")
        if place & (self._cluster - 1):
            raise DamagedImage(self.path, f"a cluster is at {place:#x}")
        if not place:  # a data file may have a cluster at its very beginning
            return 0 if word & COPIED and self._apart else -1
        return place

    def _known_host(self, offset: int, length: int, flags: int) -> int | None:
        """Where the bytes are, if they are all data, in a row, their entries have all these flags, and nobody has to
        wait to find it out.

        Without the lock: an entry is one word, and whoever takes a cluster out of the tables changes its entry before
        he draws the number by which :meth:`_flush` knows which transfers may have seen the old one. Who calls this has
        his own number already.
        """
        first, last, host = offset >> self._bits, (offset + length - 1) >> self._bits, None
        if first == last and self._tables.words == 1:  # most are
            if (found := self._tables.cached(first)) is None:
                return None
            word = found[0].words[found[1]]
            place = word & OFFSET
            if word & self._unusual or not place or word & flags != flags:
                return None
            return place + (offset & (self._cluster - 1))
        for index in range(first, last + 1):
            found = self._tables.cached(index)
            if found is None:
                return None
            word = found[0].words[found[1]]
            place = word & OFFSET
            if word & self._unusual or not place or word & flags != flags:
                return None
            if self._tables.words == 2 and found[0].words[found[1] + 1] != ALL_SUBCLUSTERS:
                return None
            if host is None:
                host = place
            elif place != host + ((index - first) << self._bits):
                return None
        return None if host is None else host + (offset & (self._cluster - 1))

    def _unpack(self, word: int) -> bytes:
        data = self._unpacked.get(word)
        if data is not None:
            return data
        host, size = self.packed_extent(word)
        try:
            data = decompress(self.header.compression_type, read_at(self.file, host, size), self._cluster)
        except ValueError as error:
            raise DamagedImage(self.path, f"a compressed cluster at {host:#x}: {error}") from None
        with self._lock:
            self._unpacked[word] = data
            if len(self._unpacked) * self._cluster > _UNPACKED_BYTES and len(self._unpacked) > 1:
                self._unpacked.popitem(last=False)
        return data

    def packed_extent(self, word: int) -> tuple[int, int]:
        """Offset and length in the file of a compressed cluster, by its entry."""
        shift = 62 - (self._bits - 8)
        host = word & ((1 << shift) - 1)
        sectors = ((word & (COMPRESSED - 1)) >> shift) + 1
        return host, sectors * 512 - host % 512

    # How it is kept.

    def layer(self, offset: int, length: int) -> Iterator[Extent]:
        for extent in self.kept(offset, length):
            yield extent if self._encryption is None else extent._replace(host=None)

    def kept(self, offset: int, length: int) -> Iterator[Extent]:
        """As ``layer``, but what is encrypted has a place in the file too."""
        end = offset + length
        step = max(1 << 30, self._cluster)
        self._tables.check_room()
        while offset < end:
            with self._lock:
                nothing = self._without_tables(offset, end)
                runs = [Run(Kind.NONE, -1, nothing)] if nothing else self._map(offset, min(end, offset + step))
            for run in runs:
                host = run.host if run.host >= 0 and run.kind is not Kind.COMPRESSED else None
                yield Extent(
                    offset,
                    run.length,
                    data=run.kind in (Kind.DATA, Kind.COMPRESSED),
                    zero=run.kind is Kind.ZERO,
                    host=host,
                    present=run.kind is not Kind.NONE,
                    compressed=run.kind is Kind.COMPRESSED,
                    file=self._data.path if self._apart and host is not None else None,
                )
                offset += run.length

    def _without_tables(self, offset: int, end: int) -> int:
        """So many bytes from here on no L2 table knows of."""
        each, l1 = self._tables.entries << self._bits, self._tables.l1
        following = first_in_use(l1, offset // each, min(len(l1), -(-end // each)))
        return max(0, min(following * each, end) - offset)

    @property
    def cluster_size(self) -> int:
        return self._cluster

    @property
    def tables_in_memory(self) -> int:
        """How many slices of L2 tables are."""
        return len(self._tables)

    @property
    def zero_unit(self) -> int:
        return self._subcluster

    @property
    def dirty(self) -> bool:
        return bool(self.header.incompatible & Incompatible.DIRTY)

    @property
    def corrupted(self) -> bool:
        return bool(self.header.incompatible & Incompatible.CORRUPT)

    # Encryption.

    @property
    def encryption(self) -> Encryption | None:
        return self._encryption

    def encrypt(self, encryption: Encryption) -> None:
        """Data is encrypted so from now on."""
        self._encryption = encryption
        self.can = type(self).can & ~Can.COMPRESS
        self._see_through()

    def unlock(self, password: bytes) -> None:
        """Raises UserError for a wrong one."""
        if self._encryption is not None:
            self._encryption.unlock(password)
            self._see_through()

    def _see_through(self) -> None:
        if self._encryption is not None:
            self._data = self._encryption.over(self._stored)

    @property
    def encrypted(self) -> bool:
        return self._encryption is not None

    @property
    def locked(self) -> bool:
        return self._encryption is not None and self._encryption.key is None

    @property
    def data_file(self) -> File:
        """Where the disk's data is: this file, or another."""
        return self._data

    @property
    def has_data_file(self) -> bool:
        return self._data_name is not None

    def backing_name(self) -> BackingName | None:
        name = self.header.backing_name
        kind = self.header.extensions.get(Extension.BACKING_FORMAT)
        return None if name is None else BackingName(name, None if kind is None else kind.decode(errors="replace"))

    def open_files(self, opener: Callable[[str], File]) -> None:
        if self._data_name is not None:
            self._data = self._stored = opener(self._data_name.decode(errors="surrogateescape"))
            self._apart = True
            self._see_through()


def _subcluster_kind(bitmap: int, number: int, place: int) -> Kind | None:
    """None: it is said to be both data and zeros, or data nowhere."""
    data, zero = bitmap >> number & 1, bitmap >> (32 + number) & 1
    if data:
        return None if zero or place < 0 else Kind.DATA
    return Kind.ZERO if zero else Kind.NONE
