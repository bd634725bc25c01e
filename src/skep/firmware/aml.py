"""ACPI Machine Language: the few terms that a DSDT of ours is made of (ACPI 6.5, chapter 20).

Each function encodes one term and returns its bytes; a term inside another is passed as bytes. Names of functions
are those of ASL (chapter 19), in lower case.
"""

from __future__ import annotations

import struct

from skep.firmware.guid import guid

ZERO_OP, ONE_OP, NAME_OP = b"\x00", b"\x01", b"\x08"
BYTE_PREFIX, WORD_PREFIX, DWORD_PREFIX, STRING_PREFIX, QWORD_PREFIX = b"\x0a", b"\x0b", b"\x0c", b"\x0d", b"\x0e"
SCOPE_OP, BUFFER_OP, PACKAGE_OP = b"\x10", b"\x11", b"\x12"
DUAL_NAME_PREFIX, MULTI_NAME_PREFIX = b"\x2e", b"\x2f"
DEVICE_OP = b"\x5b\x82"
METHOD_OP, IF_OP, RETURN_OP, NOTIFY_OP = b"\x14", b"\xa0", b"\xa4", b"\x86"
AND_OP, OR_OP, LNOT_OP, LEQUAL_OP, CREATE_DWORD_FIELD_OP = b"\x7b", b"\x7d", b"\x92", b"\x93", b"\x8a"
LOCAL0, ARG0 = 0x60, 0x68


def pkg_length(size: int) -> bytes:
    """PkgLength (20.2.4) of ``size`` bytes that follow it; the length counts itself."""
    if size + 1 < 1 << 6:
        return bytes((size + 1,))
    for more in (1, 2, 3):
        total = size + 1 + more
        if total < 1 << (4 + 8 * more):
            return bytes((more << 6 | total & 0xF,)) + (total >> 4).to_bytes(more, "little")
    raise ValueError(f"an AML term of {size} bytes")


def name_string(path: str) -> bytes:
    r"""NameString (20.2.2): ``\_SB_.PCI0``; segments are padded with underscores to four characters."""
    root = b""
    while path[:1] in ("\\", "^"):
        root += path[:1].encode()
        path = path[1:]
    segments = [segment.ljust(4, "_").encode() for segment in path.split(".")] if path else []
    if any(len(segment) != 4 for segment in segments):
        raise ValueError(f"no ACPI name: {path}")
    match len(segments):
        case 0:
            prefix = b"\x00"
        case 1:
            prefix = b""
        case 2:
            prefix = DUAL_NAME_PREFIX
        case n:
            prefix = MULTI_NAME_PREFIX + bytes((n,))
    return root + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    """The shortest constant (20.2.3)."""
    if value == 0:
        return ZERO_OP
    if value == 1:
        return ONE_OP
    if value < 1 << 8:
        return BYTE_PREFIX + bytes((value,))
    if value < 1 << 16:
        return WORD_PREFIX + struct.pack("<H", value)
    if value < 1 << 32:
        return DWORD_PREFIX + struct.pack("<I", value)
    return QWORD_PREFIX + struct.pack("<Q", value)


def string(text: str) -> bytes:
    return STRING_PREFIX + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """EISAID("PNP0A08"): three letters of five bits, four hexadecimal digits, big end first (19.3.4)."""
    a, b, c = (ord(letter) - 0x40 for letter in text[:3])
    return integer(int.from_bytes(struct.pack(">HH", a << 10 | b << 5 | c, int(text[3:], 16)), "little"))


def package(*elements: bytes) -> bytes:
    body = bytes((len(elements),)) + b"".join(elements)
    return PACKAGE_OP + pkg_length(len(body)) + body


def buffer(data: bytes) -> bytes:
    body = integer(len(data)) + data
    return BUFFER_OP + pkg_length(len(body)) + body


def name(path: str, value: bytes) -> bytes:
    return NAME_OP + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    body = name_string(path) + b"".join(terms)
    return SCOPE_OP + pkg_length(len(body)) + body


def device(path: str, *terms: bytes) -> bytes:
    body = name_string(path) + b"".join(terms)
    return DEVICE_OP + pkg_length(len(body)) + body


# Methods.


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Serialized: it may make names of its own."""
    serialized = 1 << 3
    body = name_string(path) + bytes((arguments | serialized,)) + b"".join(terms)
    return METHOD_OP + pkg_length(len(body)) + body


def arg(number: int) -> bytes:
    return bytes((ARG0 + number,))


def local(number: int) -> bytes:
    return bytes((LOCAL0 + number,))


def if_(predicate: bytes, *terms: bytes) -> bytes:
    body = predicate + b"".join(terms)
    return IF_OP + pkg_length(len(body)) + body


def return_(value: bytes) -> bytes:
    return RETURN_OP + value


def notify(path: str, value: int) -> bytes:
    return NOTIFY_OP + name_string(path) + integer(value)


def l_equal(left: bytes, right: bytes) -> bytes:
    return LEQUAL_OP + left + right


def l_not_equal(left: bytes, right: bytes) -> bytes:
    return LNOT_OP + l_equal(left, right)


def and_(left: bytes, right: bytes, target: bytes) -> bytes:
    return AND_OP + left + right + target


def or_(left: bytes, right: bytes, target: bytes) -> bytes:
    return OR_OP + left + right + target


def create_dword_field(source: bytes, index: int, path: str) -> bytes:
    return CREATE_DWORD_FIELD_OP + source + integer(index) + name_string(path)


def to_uuid(text: str) -> bytes:
    """ToUUID("..."), a buffer with the first three groups little end first (19.6.142)."""
    return buffer(guid(text))


# Resource descriptors (6.4). Ranges are given by their first and last address.

_MIN_FIXED, _MAX_FIXED = 1 << 2, 1 << 3  # and, being 0: producer, positive decode


def resource_template(*descriptors: bytes) -> bytes:
    end_tag = b"\x79\x00"  # a checksum of 0 is taken as right
    return buffer(b"".join(descriptors) + end_tag)


def irq_no_flags(*irqs: int) -> bytes:
    return b"\x22" + struct.pack("<H", sum(1 << irq for irq in irqs))


def io(first: int, length: int) -> bytes:
    """A fixed range of ports, decoding 16 bits."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, length)


def memory32_fixed(base: int, length: int) -> bytes:
    return struct.pack("<BHBII", 0x86, 9, 1, base, length)


def word_bus_number(first: int, last: int) -> bytes:
    return _word(2, 0, first, last)


def word_io(first: int, last: int) -> bytes:
    entire_range = 3
    return _word(1, entire_range, first, last)


def dword_memory(first: int, last: int) -> bytes:
    """Non-cacheable, read and write."""
    body = struct.pack("<BBBIIIII", 0, _MIN_FIXED | _MAX_FIXED, 1, 0, first, last, 0, last - first + 1)
    return b"\x87" + struct.pack("<H", len(body)) + body


def _word(kind: int, specific: int, first: int, last: int) -> bytes:
    flags = _MIN_FIXED | _MAX_FIXED
    body = struct.pack("<BBBHHHHH", kind, flags, specific, 0, first, last, 0, (last - first + 1) & 0xFFFF)
    return b"\x88" + struct.pack("<H", len(body)) + body
