"""The key slots of LUKS: the master key, split so that it can be made to vanish, under keys made of passwords."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import time
import uuid

from skep.block.backend import File, read_at, write_at
from skep.block.format import ImageError
from skep.block.luks.cipher import SECTOR, SectorCipher
from skep.block.luks.header import (
    SLOTS,
    STRIPES,
    Encryption,
    Header,
    Slot,
    material_sectors,
    read_header,
    write_header,
)

_SALT = 32
_DIGEST = 20
_LEAST_ITERATIONS = 1000
_OVERWRITES = 3


def make_header(encryption: Encryption, hash_spec: str, iter_time: int) -> tuple[Header, bytes]:
    """A new header with no password yet, and a new master key. ``iter_time``: see :func:`add_key`. Raises ValueError
    for an encryption that cannot be."""
    key = os.urandom(encryption.key_bytes)
    sector_cipher(encryption, key)
    each = material_sectors(encryption.key_bytes)
    slots = tuple(Slot(8 + number * each) for number in range(SLOTS))
    salt = os.urandom(_SALT)
    iterations = max(_LEAST_ITERATIONS, _iterations(hash_spec, encryption.key_bytes, iter_time) // 8)
    digest = hashlib.pbkdf2_hmac(hash_spec, key, salt, iterations, _DIGEST)
    header = Header(encryption, hash_spec, 8 + SLOTS * each, digest, salt, iterations, str(uuid.uuid4()), slots)
    return header, key


def sector_cipher(encryption: Encryption, key: bytes) -> SectorCipher:
    """Raises ValueError."""
    return SectorCipher(key, encryption.mode, encryption.iv_generator, encryption.iv_hash)


class KeySlots:
    """The header of an open image, from ``start`` of ``file`` on."""

    def __init__(self, file: File, start: int = 0) -> None:
        """Raises ImageError."""
        self._file = file
        self._start = start
        self.header = read_header(file, start)

    def unlock(self, password: bytes) -> bytes:
        """The master key. Raises UserError for a password that no slot knows."""
        key = next((key for _, key in self._matching(password)), None)
        if key is None:
            raise ImageError("Invalid password, cannot unlock any keyslot", self._file.path)
        return key

    def slots_of(self, password: bytes) -> list[int]:
        """The slots that know it."""
        return [number for number, _ in self._matching(password)]

    def _matching(self, password: bytes) -> list[tuple[int, bytes]]:
        found = ((number, self._try(slot, password)) for number, slot in enumerate(self.header.slots) if slot.active)
        return [(number, key) for number, key in found if key is not None]

    def _try(self, slot: Slot, password: bytes) -> bytes | None:
        header = self.header
        slot_key = hashlib.pbkdf2_hmac(header.hash_spec, password, slot.salt, slot.iterations, header.key_bytes)
        sectors = -(-header.key_bytes * STRIPES // SECTOR)
        packed = read_at(self._file, self._start + slot.offset * SECTOR, sectors * SECTOR)
        try:
            split = sector_cipher(header.encryption, slot_key).decrypt(packed, 0)
        except ValueError as error:
            raise ImageError(f"cannot be decrypted: {error}", self._file.path) from None
        key = _merge(split[: header.key_bytes * STRIPES], header.key_bytes, header.hash_spec)
        digest = hashlib.pbkdf2_hmac(header.hash_spec, key, header.mk_digest_salt, header.mk_digest_iter, _DIGEST)
        return key if hmac.compare_digest(digest, header.mk_digest) else None

    def add(self, key: bytes, password: bytes, *, number: int | None = None, iter_time: int = 2000) -> None:
        """Put the master key under a password too. ``iter_time``: milliseconds that trying one is to take. Raises
        UserError where no slot is free, or the one that is wanted is not."""
        header = self.header
        if number is None:
            number = next((i for i, slot in enumerate(header.slots) if not slot.active), None)
            if number is None:
                raise ImageError("Can't add a keyslot - all keyslots are in use", self._file.path)
        elif header.slots[number].active:
            todo = "make it inactive first"
            raise ImageError(f"Can't update keyslot {number}: it is in use", self._file.path, todo)
        iterations = max(_LEAST_ITERATIONS, _iterations(header.hash_spec, header.key_bytes, iter_time) // 2)
        salt = os.urandom(_SALT)
        slot_key = hashlib.pbkdf2_hmac(header.hash_spec, password, salt, iterations, header.key_bytes)
        split = _split(key, header.hash_spec)
        split += bytes(-len(split) % SECTOR)
        slot = Slot(header.slots[number].offset, True, iterations, salt)
        write_at(self._file, self._place(slot), sector_cipher(header.encryption, slot_key).encrypt(split, 0))
        self._file.flush()
        self._change(number, slot)

    def erase(self, numbers: list[int], *, force: bool = False) -> None:
        """Forget what these slots know, for good as far as the host's storage does. Raises UserError where none would
        be left, without ``force``."""
        left = [i for i, slot in enumerate(self.header.slots) if slot.active and i not in numbers]
        if not left and not force:
            what = "All the active keyslots would be erased, and all the data in the image lost with them"
            raise ImageError(what, self._file.path, "--force does it")
        for number in numbers:
            slot = Slot(self.header.slots[number].offset)
            self._change(number, slot)
            for _ in range(_OVERWRITES):
                write_at(self._file, self._place(slot), os.urandom(self.header.key_bytes * STRIPES))
                self._file.flush()

    def _place(self, slot: Slot) -> int:
        return self._start + slot.offset * SECTOR

    def _change(self, number: int, slot: Slot) -> None:
        self.header = self.header.with_slot(number, slot)
        write_header(self._file, self._start, self.header)
        self._file.flush()


def _iterations(hash_spec: str, length: int, milliseconds: int) -> int:
    """Of PBKDF2 that take so long here, by this thread's own time."""
    count = 1 << 12
    while True:
        begun = time.thread_time_ns()
        hashlib.pbkdf2_hmac(hash_spec, b"password", b"salt", count, length)
        took = time.thread_time_ns() - begun
        if took > 20_000_000:
            return count * milliseconds * 1_000_000 // took
        count *= 4


def _split(key: bytes, hash_spec: str) -> bytes:
    """AFsplit of the specification, 2.4: all of the stripes are needed to know any of the key."""
    stripes = [os.urandom(len(key)) for _ in range(STRIPES - 1)]
    block = bytes(len(key))
    for stripe in stripes:
        block = _diffuse(_xor(block, stripe), hash_spec)
    return b"".join([*stripes, _xor(block, key)])


def _merge(split: bytes, length: int, hash_spec: str) -> bytes:
    """AFmerge."""
    block = bytes(length)
    last = len(split) - length
    for at in range(0, last, length):
        block = _diffuse(_xor(block, split[at : at + length]), hash_spec)
    return _xor(block, split[last:])


def _diffuse(block: bytes, hash_spec: str) -> bytes:
    size = hashlib.new(hash_spec).digest_size
    parts = []
    for number, at in enumerate(range(0, len(block), size)):
        part = block[at : at + size]
        parts.append(hashlib.new(hash_spec, struct.pack(">I", number) + part).digest()[: len(part)])
    return b"".join(parts)


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")
