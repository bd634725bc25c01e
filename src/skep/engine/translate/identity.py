"""CPUID as a table in the state block, where machine code looks leaves up (system_runtime.identify)."""

from __future__ import annotations

import struct

from skep.engine.amd64 import cpuid
from skep.engine.translate.language import inline
from skep.engine.translate.layout import IDENTITY, IDENTITY_SIZE, StateBlock

ROWS = IDENTITY
ROW = 32
"""A u64 key: the leaf, the subleaf at bit 32, or ones where the row is free; four registers; a u32 of what is below."""
ROW_REGISTERS, ROW_HOW = 8, 24
HAS_SUBLEAVES = 1
ROW_BITS = 7
assert ROW << ROW_BITS == IDENTITY_SIZE

FEATURES, TOPOLOGY, EXTENDED_STATE = 1, 0xB, 0xD
WITHOUT_AVX = cpuid.XSAVE_LEGACY_SIZE
WITH_AVX = cpuid.AVX_OFFSET + cpuid.AVX_SIZE

_FREE = (1 << 64) - 1
_APIC = 1 << 32 + 9
_row = struct.Struct("<Q5I4x")
assert _row.size == ROW


def write(st: StateBlock, model: cpuid.Cpuid) -> None:
    """Write a vCPU's CPUID to its state block."""
    table = dict(model.table)
    for leaf, _ in model.table:
        table.setdefault((leaf, 0), (0, 0, 0, 0))  # it says that there are subleaves
    for number in range(1 << ROW_BITS):
        _row.pack_into(st.bytes, ROWS + number * ROW, _FREE, 0, 0, 0, 0, 0)
    for (leaf, subleaf), registers in table.items():
        key = leaf | subleaf << 32
        number = _find(st, key)
        how = HAS_SUBLEAVES if leaf in cpuid.SUBLEAVES else 0
        _row.pack_into(st.bytes, ROWS + number * ROW, key, *registers, how)


def show_apic(st: StateBlock, there: bool) -> None:
    """Set the feature bit of the local APIC, or clear it."""
    word = ROWS + _find(st, FEATURES) * ROW + ROW_REGISTERS + 8 >> 3  # ECX, EDX
    st.q[word] = st.q[word] & ~_APIC | (_APIC if there else 0)


def _find(st: StateBlock, key: int) -> int:
    """The number of a key's row, or of the free one where it belongs."""
    number = first_row(key)
    while st.q[ROWS + number * ROW >> 3] not in (_FREE, key):
        number = next_row(number)
    return number


@inline
def first_row(key: int) -> int:
    """The row where the search for a key begins; like next_row, Python and the compiled language."""
    return ((key * 0x9E3779B97F4A7C15) & _FREE) >> (64 - ROW_BITS)


@inline
def next_row(number: int) -> int:
    return (number + 1) & ((1 << ROW_BITS) - 1)
