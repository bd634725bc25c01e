"""UUIDs as firmware's tables have them. (The library's module takes longer to import than all tables to make.)"""

from __future__ import annotations


def guid(text: str) -> bytes:
    """``01234567-89ab-cdef-...``: the first three groups with their least byte first (UEFI 2.10, appendix A)."""
    raw = bytes.fromhex(text.replace("-", ""))
    return raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]


def named(namespace: str, name: str) -> str:
    """Always the same for the same two, and never for others (RFC 9562, 5.3: version 3)."""
    raw = bytearray(_md5(bytes.fromhex(namespace.replace("-", "")) + name.encode()))
    raw[6] = raw[6] & 0x0F | 0x30
    raw[8] = raw[8] & 0x3F | 0x80
    digits = raw.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _md5(data: bytes) -> bytes:
    try:
        from _md5 import md5  # type: ignore[import-not-found]  # hashlib loads OpenSSL first
    except ImportError:  # a Python that was built without its own
        from hashlib import md5
    digest: bytes = md5(data, usedforsecurity=False).digest()
    return digest
