"""Vector instructions whose memory accesses depend on register contents: masked moves and gathers.

An element of VMASKMOV or a gather whose mask bit is clear is not accessed and cannot fault. A masked store checks all
its elements before it stores the first; a gather clears the mask of each element it has loaded, so it goes on after a
fault (SDM 2, VPGATHERDD).
"""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic, OpKind, Register, Register_, RegisterExt

from skep.engine.amd64.cpuid import Feature
from skep.engine.amd64.registers import Cr0, Cr4, Vector, Xcr0
from skep.engine.translate.context import GENERAL, M64, MASK, SEGMENT_NAME, Context, Handler, operand_segment
from skep.engine.translate.port import GuestFault
from skep.engine.translate.segments import check_alignment


def require_avx(e: Context, feature: Feature = Feature.AVX) -> None:
    """#UD without AVX state enabled, #NM with CR0.TS."""
    st = e.st
    enabled = Xcr0.SSE | Xcr0.AVX
    if not e.cpuid.has(feature) or not st.cr4 & Cr4.OSXSAVE or st.xcr0 & enabled != enabled:
        raise GuestFault(Vector.UD)
    if st.cr0 & Cr0.TS:
        raise GuestFault(Vector.NM)


# VMASKMOVPS/PD, VPMASKMOVD/Q: the element's own top bit in the mask register

_MASKED = {
    Mnemonic.VMASKMOVPS: (4, Feature.AVX), Mnemonic.VMASKMOVPD: (8, Feature.AVX),
    Mnemonic.VPMASKMOVD: (4, Feature.AVX2), Mnemonic.VPMASKMOVQ: (8, Feature.AVX2),
}  # fmt: skip


def vmaskmov(e: Context, i: Instruction) -> None:
    size, feature = _MASKED[i.mnemonic]
    require_avx(e, feature)
    mask = e.get_vector(i.op1_register)
    chosen = [at for at in range(0, len(mask), size) if mask[at + size - 1] >> 7]
    if i.op0_kind == OpKind.MEMORY:
        source = e.get_vector(i.op2_register)
        addresses = [e.address(i, size, write=True, plus=at) for at in chosen]
        for address in addresses:
            e.cpu.check_write(address, size)
        for at, address in zip(chosen, addresses, strict=True):
            e.cpu.write(address, source[at : at + size])
        return
    result = bytearray(len(mask))
    for at in chosen:
        result[at : at + size] = e.cpu.read(e.address(i, size, plus=at), size)
    e.put_vector(i.op0_register, bytes(result))


# MASKMOVDQU, MASKMOVQ: a byte each, to DS:rDI. All of the operand must be writable, as on Intel's CPUs


def maskmov(e: Context, i: Instruction) -> None:
    vex = i.mnemonic == Mnemonic.VMASKMOVDQU
    if vex:
        require_avx(e)
    elif e.st.cr0 & Cr0.EM or (i.mnemonic == Mnemonic.MASKMOVDQU and not e.st.cr4 & Cr4.OSFXSR):
        raise GuestFault(Vector.UD)
    elif e.st.cr0 & Cr0.TS:
        raise GuestFault(Vector.NM)
    source, mask = _vector(e, i.op1_register), _vector(e, i.op2_register)
    number, address_size = e.string_index(i, 0)
    start = e.st.q[number] & MASK[address_size]
    segment = SEGMENT_NAME[operand_segment(i)]
    if i.mnemonic == Mnemonic.MASKMOVQ:
        e.enter_mmx()
    addresses = [e.linear(segment, start + n & MASK[address_size], 1, write=True) for n in range(len(mask))]
    check_alignment(e.st, addresses[0], 8)
    for address in addresses:
        e.cpu.check_write(address, 1)
    for n, address in enumerate(addresses):
        if mask[n] >> 7:
            e.cpu.write(address, source[n : n + 1])


def _vector(e: Context, register: Register_) -> bytes:
    if register in range(Register.MM0, Register.MM7 + 1):
        return e.get_mmx(register - Register.MM0)
    return e.get_vector(register)


# Gathers

_GATHER = {  # element size, index size
    Mnemonic.VPGATHERDD: (4, 4), Mnemonic.VPGATHERDQ: (8, 4), Mnemonic.VPGATHERQD: (4, 8), Mnemonic.VPGATHERQQ: (8, 8),
    Mnemonic.VGATHERDPS: (4, 4), Mnemonic.VGATHERDPD: (8, 4), Mnemonic.VGATHERQPS: (4, 8), Mnemonic.VGATHERQPD: (8, 8),
}  # fmt: skip


def gather(e: Context, i: Instruction) -> None:
    """The AVX2 forms: destination, memory with a vector index, mask register."""
    size, index_size = _GATHER[i.mnemonic]
    require_avx(e, Feature.AVX2)
    to, mask_register, index_register = i.op0_register, i.op2_register, i.memory_index
    if len({RegisterExt.number(r) for r in (to, mask_register, index_register)}) < 3:
        raise GuestFault(Vector.UD)
    index = e.get_vector(index_register)
    result = bytearray(e.get_vector(to))
    length = max(len(result), len(index))  # the vector length: dword results of qword indices fill half of it
    old_mask = e.get_ymm(RegisterExt.number(mask_register))[:length]
    mask = bytearray(b"".join((b"\xff" if top >> 7 else b"\0") * size for top in old_mask[size - 1 :: size]))
    count = min(len(result) // size, len(index) // index_size)
    loaded = False
    segment = SEGMENT_NAME[operand_segment(i)]
    base = e.get(i.memory_base) if i.memory_base in GENERAL else 0
    address_mask = MASK[e.address_size(i)]
    for n in range(count):
        at = n * size
        if not mask[at]:
            continue
        offset = int.from_bytes(index[n * index_size : (n + 1) * index_size], "little", signed=True)
        place = base + offset * i.memory_index_scale + i.memory_displacement & M64 & address_mask
        try:
            data = e.cpu.read(e.linear(segment, place, size), size)
        except GuestFault:
            if loaded:  # what is loaded stays, and is not loaded again; the half without elements is cleared at the end
                rest = e.get_ymm(RegisterExt.number(to))[count * size : length]
                e.put_vector(to, bytes(result[: count * size]) + rest)
            e.put_vector(mask_register, bytes(mask))
            raise
        result[at : at + size] = data
        mask[at : at + size] = bytes(size)
        loaded = True
    e.put_vector(to, bytes(result[: count * size]))
    e.put_vector(mask_register, b"")


HANDLERS: dict[int, Handler] = {
    **dict.fromkeys(_MASKED, vmaskmov),
    **dict.fromkeys(_GATHER, gather),
    Mnemonic.MASKMOVQ: maskmov,
    Mnemonic.MASKMOVDQU: maskmov,
    Mnemonic.VMASKMOVDQU: maskmov,
}
