"""The header of LUKS1: how the disk is encrypted, and eight slots, each of which has its key under another password."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from skep.block.backend import File, read_at, write_at
from skep.block.format import ImageError
from skep.block.luks.cipher import IV_GENERATORS, MODES, SECTOR

MAGIC = b"LUKS\xba\xbe"
SLOTS = 8
STRIPES = 4000
HASHES = ("sha256", "sha1", "sha224", "sha384", "sha512", "ripemd160")
ALIGNMENT = 8
"""Sectors: the LUKS_ALIGN_KEYSLOTS of 4096 bytes."""

_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
_LENGTH = _HEADER.size + SLOTS * _SLOT.size
_ACTIVE, _INACTIVE = 0x00AC71F3, 0x0000DEAD
_MOST_WORK = 1 << 28
"""Iterations of a hash that a wrong password costs at most: half a minute, or 20 times what is usual."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A key slot. ``offset`` is in sectors from the beginning of the header."""

    offset: int
    active: bool = False
    iterations: int = 0
    salt: bytes = bytes(32)
    stripes: int = STRIPES


@dataclass(frozen=True, slots=True)
class Encryption:
    """How sectors are encrypted: the header's cipher-name, cipher-mode and key-bytes."""

    mode: str = "xts"
    iv_generator: str = "plain64"
    iv_hash: str = "sha256"
    """Of ESSIV."""
    key_bytes: int = 64

    @property
    def cipher_mode(self) -> str:
        return f"{self.mode}-{self.iv_generator}" + f":{self.iv_hash}" * (self.iv_generator == "essiv")

    @property
    def cipher(self) -> str:
        return f"aes-{self.key_bytes * (4 if self.mode == 'xts' else 8)}"


@dataclass(frozen=True, slots=True)
class Header:
    """The fields by their names in the specification; ``payload_offset`` is in sectors."""

    encryption: Encryption
    hash_spec: str
    payload_offset: int
    mk_digest: bytes
    mk_digest_salt: bytes
    mk_digest_iter: int
    uuid: str
    slots: tuple[Slot, ...] = field(default=())

    @property
    def key_bytes(self) -> int:
        return self.encryption.key_bytes

    @property
    def length(self) -> int:
        """Bytes, with the key slots."""
        return max(slot.offset for slot in self.slots) * SECTOR + material_sectors(self.key_bytes) * SECTOR

    def with_slot(self, number: int, slot: Slot) -> Self:
        return replace(self, slots=(*self.slots[:number], slot, *self.slots[number + 1 :]))

    def pack(self) -> bytes:
        names = ("aes", self.encryption.cipher_mode, self.hash_spec)
        fixed = (self.payload_offset, self.key_bytes, self.mk_digest, self.mk_digest_salt, self.mk_digest_iter)
        parts = [_HEADER.pack(MAGIC, 1, *(name.encode() for name in names), *fixed, self.uuid.encode())]
        for slot in self.slots:
            state = _ACTIVE if slot.active else _INACTIVE
            parts.append(_SLOT.pack(state, slot.iterations, slot.salt, slot.offset, slot.stripes))
        return b"".join(parts)

    def info(self) -> dict[str, Any]:
        """As `qemu-img info` has it."""
        found: dict[str, Any] = {
            "ivgen-alg": self.encryption.iv_generator,
            "hash-alg": self.hash_spec,
            "cipher-alg": self.encryption.cipher,
            "uuid": self.uuid,
        }
        if self.encryption.iv_generator == "essiv":
            found["ivgen-hash-alg"] = self.encryption.iv_hash
        slots = []
        for slot in self.slots:
            one: dict[str, Any] = {"active": slot.active}
            if slot.active:
                one["iters"] = slot.iterations
            one["key-offset"] = slot.offset * SECTOR
            if slot.active:
                one["stripes"] = slot.stripes
            slots.append(one)
        more = {"payload-offset": self.payload_offset * SECTOR, "master-key-iters": self.mk_digest_iter}
        return {**found, "cipher-mode": self.encryption.mode, "slots": slots, **more}


def material_sectors(key_bytes: int) -> int:
    """What the key material of a slot takes."""
    sectors = -(-key_bytes * STRIPES // SECTOR)
    return -(-sectors // ALIGNMENT) * ALIGNMENT


def read_header(file: File, start: int = 0) -> Header:
    """Of the file from ``start`` on. Raises ImageError for what cannot be, or cannot be worked with."""

    def wrong(what: str) -> ImageError:
        return ImageError(f"not a LUKS1 header that we can use: {what}", file.path)

    data = bytes(read_at(file, start, _LENGTH))
    magic, version, *names, payload, key_bytes, digest, salt, iterations, uuid = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise wrong("another beginning")
    if version != 1:
        raise wrong(f"version {version}")
    cipher, mode, hash_spec = (_text(name, wrong) for name in names)
    if cipher != "aes":
        raise wrong(f"cipher {cipher!r}")
    if hash_spec not in HASHES:
        raise wrong(f"hash {hash_spec!r}")
    slots = []
    for number in range(SLOTS):
        state, slot_iterations, slot_salt, offset, stripes = _SLOT.unpack_from(data, _HEADER.size + number * _SLOT.size)
        if state not in (_ACTIVE, _INACTIVE):
            raise wrong(f"key slot {number} is in state {state:#x}")
        slots.append(Slot(offset, state == _ACTIVE, slot_iterations, slot_salt, stripes))
    header = Header(
        _encryption(mode, key_bytes, wrong),
        hash_spec,
        payload,
        digest,
        salt,
        iterations,
        _text(uuid, wrong),
        tuple(slots),
    )
    _check(header, file.size - start, wrong)
    return header


def write_header(file: File, start: int, header: Header) -> None:
    write_at(file, start, header.pack())


def _text(data: bytes, wrong: Callable[[str], ImageError]) -> str:
    text = data.partition(b"\0")[0]
    if not text.isascii():
        raise wrong(f"the name {text!r}")
    return text.decode()


def _encryption(mode: str, key_bytes: int, wrong: Callable[[str], ImageError]) -> Encryption:
    name, _, rest = mode.partition("-")
    generator, _, iv_hash = rest.partition(":")
    wrong_hash = iv_hash not in HASHES if generator == "essiv" else bool(iv_hash)
    if name not in MODES or generator not in IV_GENERATORS or wrong_hash:
        raise wrong(f"mode {mode!r}")
    if key_bytes not in ((32, 64) if name == "xts" else (16, 24, 32)):
        raise wrong(f"a key of {key_bytes} bytes")
    return Encryption(name, generator, iv_hash or "sha256", key_bytes)


def _check(header: Header, size: int, wrong: Callable[[str], ImageError]) -> None:
    active = [slot for slot in header.slots if slot.active]
    if sum(slot.iterations for slot in active) + len(active) * header.mk_digest_iter > _MOST_WORK:
        raise wrong(f"to try a password would take more than {_MOST_WORK} iterations")
    if not header.mk_digest_iter or not all(slot.iterations for slot in active):
        raise wrong("no iterations")
    end = -(-_LENGTH // SECTOR)
    for offset, number in sorted((slot.offset, number) for number, slot in enumerate(header.slots)):
        slot = header.slots[number]
        if slot.stripes != STRIPES:
            raise wrong(f"key slot {number} has {slot.stripes} stripes")
        if offset < end:
            raise wrong(f"key slot {number} is where something else is")
        end = offset + -(-header.key_bytes * STRIPES // SECTOR)
        if slot.active and end * SECTOR > size:
            raise wrong(f"key slot {number} is beyond the end")
    if end > header.payload_offset:
        raise wrong("the payload is where key slots are")
