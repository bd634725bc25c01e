"""The encryption of a disk's sectors: AES in XTS, CBC or ECB mode, each sector by itself.

Ciphers come from the package ``cryptography``. To begin one takes it as long as 50 KiB of AES, and a sector has 512
bytes. So what can be done for many sectors at once is done by its ECB mode and by integers as long as the data.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from skep.errors import UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

Buffer = bytes | bytearray | memoryview
SECTOR = 512
_BLOCK = 16
_BLOCKS = SECTOR // _BLOCK
_MOST_SECTORS = 256
"""That are worked on at once."""

IV_GENERATORS = ("plain64", "plain", "essiv")
MODES = ("xts", "cbc", "ecb")


def check_library() -> None:
    """Raises UserError where the package that encrypts is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        what = "encrypted images need the Python package cryptography"
        raise UserError(what, None, "pip install 'skep[luks]' installs it") from None


class SectorCipher:
    """Encrypts whole sectors by their numbers. It may be called from several threads at once.

    ``key`` has 16, 24 or 32 bytes, twice as many for XTS. ``iv_hash`` is ESSIV's, of which the digest is a key of AES.
    Raises ValueError for what cannot be.
    """

    def __init__(self, key: bytes, mode: str, iv_generator: str, iv_hash: str = "sha256") -> None:
        check_library()
        if mode not in MODES or iv_generator not in IV_GENERATORS:
            raise ValueError(f"no such encryption: {mode}-{iv_generator}")
        half = len(key) // 2 if mode == "xts" else len(key)
        self._key, self._tweak_key = key[:half], key[half:]
        self._mode = mode
        self._ivs = {"plain64": _plain64, "plain": _plain, "essiv": self._essiv}[iv_generator]
        self._essiv_key = hashlib.new(iv_hash, key).digest() if iv_generator == "essiv" else b""
        for one in filter(None, (self._key, self._tweak_key, self._essiv_key)):
            _aes(one, decrypt=False)
        if mode == "xts" and self._key == self._tweak_key:
            raise ValueError("the two keys of XTS are the same")

    def encrypt(self, data: Buffer, sector: int) -> bytes:
        """``data`` is whole sectors, the first of which is number ``sector``."""
        return b"".join(self._encrypt(piece, ivs) for piece, ivs in self._pieces(data, sector))

    def decrypt(self, data: Buffer, sector: int) -> bytes:
        return b"".join(self._decrypt(piece, ivs) for piece, ivs in self._pieces(data, sector))

    def _pieces(self, data: Buffer, sector: int) -> Iterator[tuple[bytes, bytes]]:
        size = _MOST_SECTORS * SECTOR
        view = memoryview(data)
        for at in range(0, len(view), size):
            piece = bytes(view[at : at + size])
            yield piece, self._ivs(sector + at // SECTOR, len(piece) // SECTOR)

    def _encrypt(self, data: bytes, ivs: bytes) -> bytes:
        if self._mode == "cbc":
            return _encrypt_cbc(self._key, data, ivs)
        aes = _aes(self._key, decrypt=False)
        return aes.update(data) if self._mode == "ecb" else self._xts(aes, data, ivs)

    def _decrypt(self, data: bytes, ivs: bytes) -> bytes:
        aes = _aes(self._key, decrypt=True)
        if self._mode == "xts":
            return self._xts(aes, data, ivs)
        if self._mode == "ecb":
            return aes.update(data)
        before = bytearray(_BLOCK) + data[:-_BLOCK]
        with memoryview(before).cast("Q") as to, memoryview(ivs).cast("Q") as of:
            to[:: 2 * _BLOCKS], to[1 :: 2 * _BLOCKS] = of[::2], of[1::2]
        return _xor(aes.update(data), before)

    def _xts(self, aes: CipherContext, data: bytes, ivs: bytes) -> bytes:
        tweaks = _tweaks(_aes(self._tweak_key, decrypt=False).update(ivs))
        return _xor(aes.update(_xor(data, tweaks)), tweaks)

    def _essiv(self, first: int, count: int) -> bytes:
        return _aes(self._essiv_key, decrypt=False).update(_plain64(first, count))


def _plain64(first: int, count: int) -> bytes:
    return b"".join(struct.pack("<QQ", (first + i) & (1 << 64) - 1, 0) for i in range(count))


def _plain(first: int, count: int) -> bytes:
    return b"".join(struct.pack("<QQ", (first + i) & (1 << 32) - 1, 0) for i in range(count))


def _aes(key: bytes, *, decrypt: bool) -> CipherContext:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(key), modes.ECB())
    return cipher.decryptor() if decrypt else cipher.encryptor()


def _encrypt_cbc(key: bytes, data: bytes, ivs: bytes) -> bytes:
    """One after another: each block waits for the one before."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    aes = algorithms.AES(key)
    done = []
    for i in range(len(data) // SECTOR):
        cipher = Cipher(aes, modes.CBC(ivs[i * _BLOCK : (i + 1) * _BLOCK])).encryptor()
        done.append(cipher.update(data[i * SECTOR : (i + 1) * SECTOR]))
    return b"".join(done)


@cache
def _lanes() -> tuple[int, int]:
    """In each 128 bits of a long integer, the lowest bit, and all but the highest."""
    ones = int.from_bytes((b"\1" + bytes(15)) * _MOST_SECTORS, "little")
    return ones, ones * ((1 << 127) - 1)


def _tweaks(firsts: bytes) -> bytearray:
    """IEEE 1619, 5.1: what is added to each block of the sectors whose first blocks have these added: each is the one
    before it times x, in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1. All sectors' at once."""
    ones, low = _lanes()
    tweaks = bytearray(len(firsts) * _BLOCKS)
    now = int.from_bytes(firsts, "little")
    with memoryview(tweaks).cast("Q") as to:
        for j in range(_BLOCKS):
            with memoryview(now.to_bytes(len(firsts), "little")).cast("Q") as of:
                to[2 * j :: 2 * _BLOCKS], to[2 * j + 1 :: 2 * _BLOCKS] = of[::2], of[1::2]
            now = (now & low) << 1 ^ (now >> 127 & ones) * 0x87
    return tweaks


def _xor(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")
