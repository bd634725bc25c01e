"""CRC-32C (Castagnoli), as VHDX, iSCSI and others use it: polynomial 0x1EDC6F41, reflected."""

from __future__ import annotations

from functools import cache
from struct import unpack_from

_POLYNOMIAL = 0x82F63B78


@cache
def _tables() -> list[list[int]]:
    """For each of a word's four bytes, what it makes of the checksum."""
    first = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        first.append(crc)
    tables = [first]
    for _ in range(3):
        tables.append([crc >> 8 ^ first[crc & 0xFF] for crc in tables[-1]])
    return tables


@cache
def _zeroes(power: int) -> list[int]:
    """What ``2 ** power`` bytes of zeros make of each bit of the checksum's register: a matrix over GF(2)."""
    if power == 0:
        first = _tables()[0]
        return [first[1 << bit] if bit < 8 else 1 << bit - 8 for bit in range(32)]
    half = _zeroes(power - 1)
    return [_times(half, column) for column in half]


def _times(matrix: list[int], register: int) -> int:
    product = 0
    for column in matrix:
        if register & 1:
            product ^= column
        register >>= 1
    return product


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """The checksum, going on from that of what was before. 64 KiB take some milliseconds, zeros at their end nothing:
    it is for metadata."""
    t0, t1, t2, t3 = _tables()
    crc ^= 0xFFFFFFFF
    stripped = bytes(data).rstrip(b"\0")
    words = len(stripped) // 4
    for word in unpack_from(f"<{words}I", stripped):
        crc ^= word
        crc = t3[crc & 0xFF] ^ t2[crc >> 8 & 0xFF] ^ t1[crc >> 16 & 0xFF] ^ t0[crc >> 24]
    for byte in stripped[words * 4 :]:
        crc = crc >> 8 ^ t0[(crc ^ byte) & 0xFF]
    rest = len(data) - len(stripped)
    for power in range(rest.bit_length()):
        if rest >> power & 1:
            crc = _times(_zeroes(power), crc)
    return crc ^ 0xFFFFFFFF
