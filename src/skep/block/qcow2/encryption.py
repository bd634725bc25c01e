"""Encryption of a qcow2 image's data: LUKS, and QEMU's own AES of old.

With LUKS ("Full disk encryption header pointer" of the specification) the file has a LUKS header in clusters of its
own, and each sector of data is encrypted by where in the file it is. QEMU's AES, which it has written no more since
2.x for its weakness, encrypts by where on the disk the sector is, with the password itself as the key: it is read.
Compressed clusters are not encrypted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from skep.block.backend import Buffers, File, read_at, split
from skep.block.choices import choice
from skep.block.format import SECTOR, ImageError
from skep.block.luks import options as said
from skep.block.luks.cipher import SectorCipher
from skep.block.luks.header import Header as LuksHeader
from skep.block.luks.header import write_header
from skep.block.luks.keys import KeySlots, sector_cipher
from skep.block.luks.layer import EncryptedFile, LockedFile
from skep.block.qcow2.header import Extension, Header
from skep.block.secrets import Secrets

if TYPE_CHECKING:
    from skep.block.qcow2.image import Qcow2Image

NONE, AES, LUKS = range(3)
"""The header's crypt_method."""
_POINTER = struct.Struct(">QQ")
_PREFIX = "encrypt."
_AES_KEY = 16
_PIECE = 256 << 10

KEY_SECRET = _PREFIX + "key-secret"


class Encryption:
    """How an open image is encrypted."""

    def __init__(self, file: File, header: Header) -> None:
        """Raises ImageError."""
        self._path = file.path
        self.slots: KeySlots | None = None
        self.offset = self.length = 0
        """Where the LUKS header is, and how many bytes it has with its key slots."""
        self.key: bytes | None = None
        """Of the data; None: locked."""
        self._cipher: SectorCipher | None = None
        if header.crypt_method == AES:
            if not file.read_only:
                what = "it is encrypted by QEMU's AES, which is only read"
                raise ImageError(what, file.path, "skep image convert -o encrypt.format=luks,... makes a safer one")
            return
        pointer = header.extensions.get(Extension.ENCRYPTION, b"")
        if len(pointer) != _POINTER.size:
            raise ImageError("it is encrypted, and does not say where its LUKS header is", file.path)
        self.offset, self.length = _POINTER.unpack(pointer)
        if self.offset % header.cluster_size or self.offset + self.length > file.size:
            raise ImageError(f"its LUKS header is at {self.offset:#x}", file.path)
        self.slots = KeySlots(file, self.offset)
        if self.slots.header.length > self.length:
            raise ImageError("its LUKS header has key slots beyond its end", file.path)

    @property
    def by_disk(self) -> bool:
        """A sector's number is its place on the disk, not in the file: only :meth:`read` reads it."""
        return self.slots is None

    def unlock(self, password: bytes) -> None:
        """Raises UserError for a password that no key slot knows; AES of old takes any."""
        if self.slots is None:
            self.key = password[:_AES_KEY].ljust(_AES_KEY, b"\0")
            self._cipher = SectorCipher(self.key, "cbc", "plain64")
        else:
            self.key = self.slots.unlock(password)
            self._cipher = sector_cipher(self.slots.header.encryption, self.key)

    def over(self, file: File) -> File:
        """The file with the data, decrypted as it is read."""
        return LockedFile(file) if self._cipher is None or self.by_disk else EncryptedFile(file, self._cipher)

    def read(self, file: File, buffers: Buffers, host: int, offset: int) -> None:
        """Of AES of old: what is at ``host`` in the file, and at ``offset`` of the disk."""
        if self._cipher is None:
            LockedFile(file).preadv(buffers, host)
            return
        while buffers:
            now, buffers = split(buffers, _PIECE)
            data = memoryview(self._cipher.decrypt(read_at(file, host, sum(map(len, now))), offset // SECTOR))
            for buffer in now:
                buffer[:], data = data[: len(buffer)], data[len(buffer) :]
            host += _PIECE
            offset += _PIECE

    def info(self) -> dict[str, Any]:
        if self.slots is None:
            return {"format": "aes"}
        found = self.slots.header.info()
        first = ("ivgen-alg", "hash-alg", "cipher-alg", "uuid", "ivgen-hash-alg")
        order = [*(name for name in first if name in found), "format"]
        return {name: found.get(name, "luks") for name in [*order, *(name for name in found if name not in order)]}

    def amend(self, options: Mapping[str, str], secrets: Secrets, force: bool) -> None:
        """Change key slots, by options ``encrypt.*``. Raises UserError."""
        if self.slots is None:
            raise ImageError("QEMU's AES has one password, which stays", self._path)
        said.amend(self.slots, self._path, self.key, _own(options), secrets, force)


def wanted(path: str, options: Mapping[str, str]) -> bool:
    """A new image is to be encrypted. Raises ImageError for what is not done, or would be in vain."""
    kind = choice(path, options, _PREFIX + "format", "", "luks", "aes")
    if kind == "aes":
        raise ImageError("encrypt.format=aes is no longer safe", path, "say encrypt.format=luks")
    if not kind and (others := [name for name in options if name.startswith(_PREFIX)]):
        raise ImageError(f"{others[0]} says nothing without encrypt.format", path, "say encrypt.format=luks")
    return bool(kind)


def check_password(path: str, options: Mapping[str, str], secrets: Secrets) -> None:
    """Raises UserError where it was not told."""
    said.password_of(path, options, secrets, KEY_SECRET)


def encrypt_new(image: Qcow2Image, options: Mapping[str, str], secrets: Secrets) -> None:
    """Give a new image without data a LUKS header; it is unlocked then."""
    own = _own(options)
    luks, key = said.header_of(image.path, own)
    length = luks.payload_offset * SECTOR
    offset = image.place_table(bytes(length))
    write_header(image.file, offset, luks)
    said.add_first_key(KeySlots(image.file, offset), key, image.path, own, secrets)
    image.flush()
    image.header.crypt_method = LUKS
    image.header.extensions[Extension.ENCRYPTION] = _POINTER.pack(offset, length)
    image.write_header()
    image.file.flush()
    image.encrypt(Encryption(image.file, image.header))
    image.unlock(said.password_of(image.path, options, secrets, KEY_SECRET))


def header_length(options: Mapping[str, str]) -> int:
    """Bytes of the LUKS header that a new image has, with its key slots."""
    luks: LuksHeader = said.header_of("measure", {**_own(options), "iter-time": "1"})[0]
    return luks.payload_offset * SECTOR


def _own(options: Mapping[str, str]) -> dict[str, str]:
    """Those of the encryption, by their names in LUKS."""
    found = {name.removeprefix(_PREFIX): value for name, value in options.items() if name.startswith(_PREFIX)}
    found.pop("format", None)
    return found
