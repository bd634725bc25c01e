"""LZFSE, Apple's compression, unpacked: what newer DMG images are made with.

Apple's reference implementation (github.com/lzfse/lzfse) tells the format, and has the names. A stream is blocks of
one of four kinds: bytes as they are, LZVN, and LZFSE proper, which has literals and the lengths and distances of
matches in two bit streams, entropy-coded by finite state machines.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_END, _RAW, _PACKED, _LZVN = b"bvx$", b"bvx-", b"bvx2", b"bvxn"
_HEADER = struct.Struct("<4sIQQQ")

_L_BITS = (*[0] * 16, 2, 3, 5, 8)
_L_BASE = (*range(16), 16, 20, 28, 60)
_M_BITS = (*[0] * 16, 3, 5, 8, 11)
_M_BASE = (*range(16), 16, 24, 56, 312)
_D_BITS = tuple(i // 4 for i in range(64))
_D_BASE = tuple(sum(1 << bits for bits in _D_BITS[:i]) for i in range(64))
_L_STATES, _M_STATES, _D_STATES, _LITERAL_STATES = 64, 64, 256, 1024
_SHORT_CODES = {1: 2, 2: 1, 3: 4, 5: 3, 11: 5, 19: 6, 27: 7}

Entry = tuple[int, int, int, int]
"""Of a state: how many bits are pulled, of those the lowest that belong to the value, what is added to the others for
the next state, and what is added to the value."""


def unpack(data: bytes | bytearray, size: int) -> bytes:
    """At most ``size`` bytes. Raises ValueError for what is no LZFSE stream, or needs more."""
    out = bytearray()
    at = 0
    try:
        while (magic := bytes(data[at : at + 4])) != _END:
            if magic == _RAW:
                (n,) = struct.unpack_from("<I", data, at + 4)
                out += data[at + 8 : at + 8 + n]
                at += 8 + n
            elif magic == _LZVN:
                n, length = struct.unpack_from("<II", data, at + 4)
                _check_room(out, n, size)
                _unpack_lzvn(data[at + 12 : at + 12 + length], out, len(out) + n)
                at += 12 + length
            elif magic == _PACKED:
                at = _unpack_block(data, at, out, size)
            else:
                raise ValueError(f"a block of the unknown kind {magic!r}")
            _check_room(out, 0, size)
    except (IndexError, struct.error):
        raise ValueError("it ends too early") from None
    return bytes(out)


def _check_room(out: bytearray, more: int, size: int) -> None:
    if len(out) + more > size:
        raise ValueError("it has more bytes than it should")


def _copy(out: bytearray, distance: int, length: int) -> None:
    """Of what was unpacked, so many bytes from so far back; it may reach into itself."""
    start = len(out) - distance
    if distance <= 0 or start < 0:
        raise ValueError("a copy of what is before the beginning")
    if distance >= length:
        out += out[start : start + length]
    else:
        piece = out[start:]
        out += (piece * (length // distance + 1))[:length]


# LZFSE proper.


class _Bits:
    """A bit stream, read from its end: the bits that were written last come first."""

    def __init__(self, data: bytes | bytearray, spare: int) -> None:
        """``spare``: minus how many of the last byte's highest bits are unused."""
        self._data = data
        self._at = len(data)
        self._bits = 0
        self._count = 0
        if self.pull(-spare):
            raise ValueError("a bit stream that does not begin with zeros")

    def pull(self, n: int) -> int:
        while self._count < n:
            if not self._at:
                raise ValueError("a bit stream that ends too early")
            start = max(0, self._at - 4)
            self._bits = self._bits << 8 * (self._at - start) | int.from_bytes(self._data[start : self._at], "little")
            self._count += 8 * (self._at - start)
            self._at = start
        self._count -= n
        value = self._bits >> self._count
        self._bits &= (1 << self._count) - 1
        return value


def _table(states: int, weights: Sequence[int], value_bits: Sequence[int], base: Sequence[int]) -> list[Entry]:
    """fse_init_value_decoder_table: a symbol has as many states as it weighs."""
    if sum(weights) != states:
        raise ValueError("weights that are not those of all states")
    table = []
    for weight, bits, first in zip(weights, value_bits, base, strict=True):
        if not weight:
            continue
        k = states.bit_length() - weight.bit_length()
        longer = (2 * states >> k) - weight
        for j in range(weight):
            if j < longer:
                table.append((k + bits, bits, ((weight + j) << k) - states, first))
            else:
                table.append((k - 1 + bits, bits, (j - longer) << (k - 1), first))
    return table


def _read_weights(data: bytes | bytearray) -> list[int]:
    """lzfse_decode_v1_freq_value, of all symbols: of L, M, D and literals."""
    bits = int.from_bytes(data, "little")
    weights = []
    used = 0
    for _ in range(len(_L_BITS) + len(_M_BITS) + len(_D_BITS) + 256):
        code = bits >> used & 0x3FFF
        if code & 15 == 15:
            weights.append(24 + (code >> 4 & 0x3FF))
            used += 14
        elif code & 15 == 7:
            weights.append(8 + (code >> 4 & 15))
            used += 8
        elif code & 7 == 3:
            weights.append(_SHORT_CODES[code & 31])
            used += 5
        elif code & 1:
            weights.append(_SHORT_CODES[code & 7])
            used += 3
        else:
            weights.append(_SHORT_CODES.get(code & 3, 0))
            used += 2
    if used > 8 * len(data):
        raise ValueError("weights beyond their end")
    return weights


def _unpack_block(data: bytes | bytearray, at: int, out: bytearray, size: int) -> int:
    """Returns where the next block begins."""
    _, n, first, second, third = _HEADER.unpack_from(data, at)
    _check_room(out, n, size)
    header: int = third & 0xFFFF_FFFF
    if not _HEADER.size <= header <= len(data) - at:
        raise ValueError("a header that is too long")
    weights = _read_weights(data[at + _HEADER.size : at + header])
    at += header
    literals, literal_bytes, matches = (first >> shift & 0xFFFFF for shift in (0, 20, 40))
    match_bytes: int = second >> 40 & 0xFFFFF
    if at + literal_bytes + match_bytes > len(data):
        raise ValueError("a block beyond the end")

    table = _table(_LITERAL_STATES, weights[104:], [0] * 256, range(256))
    pull = _Bits(data[at : at + literal_bytes], (first >> 60 & 7) - 7).pull
    states = [second >> shift & 0x3FF for shift in (0, 10, 20, 30)]
    text = bytearray()
    for i in range(literals):
        bits, _, delta, symbol = table[states[i & 3]]
        states[i & 3] = delta + pull(bits)
        text.append(symbol)
    at += literal_bytes

    tables = (
        _table(_L_STATES, weights[:20], _L_BITS, _L_BASE),
        _table(_M_STATES, weights[20:40], _M_BITS, _M_BASE),
        _table(_D_STATES, weights[40:104], _D_BITS, _D_BASE),
    )
    pull = _Bits(data[at : at + match_bytes], (second >> 60 & 7) - 7).pull
    states = [third >> shift & 0x3FF for shift in (32, 42, 52)]
    end, used, distance = len(out) + n, 0, 0
    for _ in range(matches):
        values = []
        for which, one in enumerate(tables):
            total, bits, delta, base = one[states[which]]
            pulled = pull(total)
            states[which] = delta + (pulled >> bits)
            values.append(base + (pulled & ((1 << bits) - 1)))
        literal, match, new = values
        distance = new or distance
        if literal > literals - used or len(out) + literal + match > end:
            raise ValueError("more than there is")
        out += text[used : used + literal]
        used += literal
        if match:
            _copy(out, distance, match)
    if len(out) != end:
        raise ValueError("fewer bytes than there should be")
    return at + match_bytes


# LZVN.


def _unpack_lzvn(data: bytes | bytearray, out: bytearray, end: int) -> None:
    """lzvn_decode: opcodes of one to three bytes, with literals behind them, up to the one that ends it."""
    at = distance = 0
    while (op := data[at]) != 0x06:
        literal = match = 0
        if op in (0x0E, 0x16):
            at += 1
            continue
        if op >= 0xF0:  # a match at the same distance
            match, at = (op & 15, at + 1) if op & 15 else (data[at + 1] + 16, at + 2)
        elif op >= 0xE0:  # literals alone
            literal, at = (op & 15, at + 1) if op & 15 else (data[at + 1] + 16, at + 2)
        elif op >> 4 in (0x7, 0xD) or (op & 7 == 6 and op < 0x40):
            raise ValueError(f"an unknown opcode {op:#x}")
        elif op >> 5 == 5:
            word = data[at + 1] | data[at + 2] << 8
            literal, match, distance, at = op >> 3 & 3, ((op & 7) << 2 | word & 3) + 3, word >> 2, at + 3
        else:
            literal, match = op >> 6, (op >> 3 & 7) + 3
            if op & 7 == 7:
                distance, at = data[at + 1] | data[at + 2] << 8, at + 3
            elif op & 7 == 6:
                at += 1
            else:
                distance, at = (op & 7) << 8 | data[at + 1], at + 2
        if at + literal > len(data) or len(out) + literal + match > end:
            raise ValueError("more than there is")
        out += data[at : at + literal]
        at += literal
        if match:
            _copy(out, distance, match)
    if len(out) != end:
        raise ValueError("fewer bytes than there should be")
