"""The page walk, and what guest memory is: RAM, translated code, stored to; in the compiled language (runtime.py)."""

from __future__ import annotations

from skep.engine.amd64.registers import Cr0, Cr4, Efer, PfError, Pte
from skep.engine.translate.compiler import cas64, fence, inline, ld8, ld64, sar, st, st8
from skep.engine.translate.layout import PDPTE

WP, PG = Cr0.WP, Cr0.PG
PSE, PAE, PGE, SMEP, SMAP = Cr4.PSE, Cr4.PAE, Cr4.PGE, Cr4.SMEP, Cr4.SMAP
LMA, NXE = Efer.LMA, Efer.NXE
P, RW, US, ACCESSED, DIRTY, PS, GLOBAL = Pte.P, Pte.RW, Pte.US, Pte.A, Pte.D, Pte.PS, Pte.G
FRAME = Pte.ADDRESS
NX = Pte.NX
RESERVED = 0x000FFF0000000000  # MAXPHYADDR is 40 (engine/amd64/cpuid.py)
UPPER = 0xFFFFFFFFFFFFFFFF

# Access kinds of walk, and the page-fault error code's bits
WRITE, FETCH = 1, 2
PF_P, PF_W, PF_U, PF_RSVD, PF_I = PfError.P, PfError.W, PfError.U, PfError.RSVD, PfError.FETCH
SUPERVISOR, USER = 0, 1


def walk(va: int, access: int, array: int) -> int:
    """Translate ``va`` (SDM 3, 4.5 and 4.6): 0 and ``st.w_pa``; 14 with ``st.w_error``; 13 where not canonical.

    ``array`` is the privilege: supervisor, user, or supervisor with RFLAGS.AC. Accessed and dirty bits are set as the
    hardware sets them. Without paging the address is physical.
    """
    if st.cr0 & PG == 0:
        st.w_pa = va & 0xFFFFFFFF
        st.w_flags = 0
        return 0
    if st.efer & LMA == 0:
        return walk_legacy(va & 0xFFFFFFFF, access, array)
    top = sar(va, 47)
    if top + 1 > 1:
        return 13
    error = 0
    if access & WRITE:
        error = PF_W
    if array == USER:
        error = error | PF_U
    if (access & FETCH) != 0 and (st.efer & NXE or st.cr4 & SMEP):
        error = error | PF_I
    st.w_error = error
    reserved = RESERVED
    if st.efer & NXE == 0:
        reserved = RESERVED | NX
    while True:
        table = st.cr3 & FRAME
        shift = 39
        rights = RW | US
        nx = 0
        flags = 0
        while True:
            gpa = table + ((va >> shift) & 511) * 8
            if gpa >= st.low_end and gpa - st.high_base >= st.high_size and reaches(gpa, WRITE) == 0:
                return 14
            slot = st.ram + gpa
            entry = ld64(slot)
            if entry & P == 0:
                return 14
            if entry & reserved or (entry & PS and shift == 39):  # whatever the entries below it are
                st.w_error = error | PF_P | PF_RSVD
                return 14
            rights = rights & entry
            nx = nx | entry
            if shift == 12:
                break
            if entry & PS:
                break
            if entry & ACCESSED == 0:
                cas64(slot, entry, entry | ACCESSED)
                announce(gpa)
            table = entry & FRAME
            shift = shift - 9
        size = 1 << shift
        if shift != 12:
            flags = 2
            if entry & FRAME & (size - 1) & 0xFFFFFFFFFFFFE000:
                st.w_error = error | PF_P | PF_RSVD
                return 14
            if shift == 30:
                flags = 6
        st.w_error = error | PF_P
        if refused(rights, access, array) or (access & FETCH and nx >> 63):
            return 14
        wanted = entry | ACCESSED
        if access & WRITE:
            wanted = wanted | DIRTY
        if wanted == entry:
            break
        if cas64(slot, entry, wanted):
            announce(gpa)
            break
        st.w_error = error
    if entry & GLOBAL and st.cr4 & PGE:
        flags = flags | 1
    st.w_pa = (entry & FRAME & (0 - size)) | (va & (size - 1))
    st.w_flags = flags
    return 0


STORED, WRITTEN = 1, 2
"""Marks of a page: some vCPU may store to it without asking; one could since the marks were last taken."""


@inline
def refused(rights: int, access: int, array: int) -> int:
    """Whether US and RW of all levels together forbid the access (SDM 3, 4.6)."""
    no = 0
    if array == USER:
        if rights & US == 0:
            no = 1
    elif rights & US:
        if access & FETCH:
            if st.cr4 & SMEP:
                no = 1
        elif array == SUPERVISOR and st.cr4 & SMAP:
            no = 1
    if access & WRITE and rights & RW == 0 and (array == USER or st.cr0 & WP):
        no = 1
    return no


def walk_legacy(va: int, access: int, array: int) -> int:
    """As walk, for 32-bit paging and PAE paging (SDM 3, 4.3 and 4.4): two levels of tables under CR3 or a PDPTE.

    Entries of 4 bytes are changed in the 8 bytes that hold them; what else changes there makes the walk begin anew.
    """
    error = 0
    if access & WRITE:
        error = PF_W
    if array == USER:
        error = error | PF_U
    if access & FETCH and (st.cr4 & SMEP or (st.efer & NXE and st.cr4 & PAE)):
        error = error | PF_I
    st.w_error = error
    reserved = 0
    if st.cr4 & PAE:
        reserved = RESERVED | 0x7FF0000000000000
        if st.efer & NXE == 0:
            reserved = reserved | NX
    while True:
        rights = RW | US
        nx = 0
        flags = 0
        bad = 0
        shift = 22
        table = st.cr3 & 0xFFFFF000
        if st.cr4 & PAE:
            table = ld64(st.self_ + PDPTE + (va >> 30) * 8)
            if table & P == 0:
                return 14
            table = table & FRAME
            shift = 21
        while True:
            part = 0
            gpa = table + ((va >> shift) & 511) * 8
            if st.cr4 & PAE == 0:
                gpa = table + ((va >> shift) & 1023) * 4
                part = (gpa & 4) * 8
            if reaches(gpa, WRITE) == 0:
                return 14
            slot = st.ram + (gpa & ~7)
            whole = ld64(slot)
            entry = whole
            if st.cr4 & PAE == 0:
                entry = (whole >> part) & 0xFFFFFFFF
            if entry & P == 0:
                return 14
            if entry & reserved:  # whatever the entry below it is
                st.w_error = error | PF_P | PF_RSVD
                return 14
            rights = rights & entry
            if st.cr4 & PAE:
                nx = nx | entry
            if shift == 12:
                break
            if entry & PS and st.cr4 & (PAE | PSE):
                break
            if entry & ACCESSED == 0:
                cas64(slot, whole, whole | (ACCESSED << part))
                announce(gpa)
            table = entry & FRAME
            shift = 12
        size = 1 << shift
        frame = entry & FRAME
        if shift != 12:
            flags = 2
            if st.cr4 & PAE:
                if frame & (size - 1) & ~0x1000:
                    bad = 1
            else:  # PSE-36: bits 39 to 32 of the address stand in bits 20 to 13
                flags = 6  # INVLPG finds pages of 2 MiB and of more than that
                if entry & 0x200000:
                    bad = 1
                frame = frame | (((entry >> 13) & 0xFF) << 32)
        if bad:
            st.w_error = error | PF_P | PF_RSVD
            return 14
        st.w_error = error | PF_P
        if refused(rights, access, array) or (access & FETCH and nx >> 63):
            return 14
        wanted = entry | ACCESSED
        if access & WRITE:
            wanted = wanted | DIRTY
        if wanted == entry:
            break
        if cas64(slot, whole, whole | (wanted << part)):
            announce(gpa)
            break
        st.w_error = error
    if entry & GLOBAL and st.cr4 & PGE:
        flags = flags | 1
    st.w_pa = (frame & (0 - size)) | (va & (size - 1))
    st.w_flags = flags
    return 0


def reaches(gpa: int, write: int) -> int:
    """Whether what is at ``gpa`` may be read, or (WRITE) written to as well: RAM, unless something lies over it."""
    if st.overlays and gpa >> 12 < st.frames:
        known = ld8(st.overlays + (gpa >> 12))
        if known:
            return (known >> write) & 1
    if gpa < st.low_end:
        return 1
    if gpa - st.high_base < st.high_size:
        return 1
    return 0


@inline
def lines(gpa: int, size: int) -> int:
    """The bits of a page's code mask that [gpa, gpa + size) touches; it lies within one page."""
    first = (gpa >> 6) & 63
    last = ((gpa + size - 1) >> 6) & 63
    return (UPPER << first) & (UPPER >> (63 - last))


def is_code(gpa: int, size: int) -> int:
    """Whether a byte of [gpa, gpa + size), which lies in one page, was translated."""
    if mask_at(gpa) & lines(gpa, size) == 0:
        return 0
    while size != 0:
        n = 64 - (gpa & 63)
        if n > size:
            n = size
        if (ld64(st.codebytes + (gpa >> 6) * 8) >> (gpa & 63)) & (UPPER >> (64 - n)):
            return 1
        gpa = gpa + n
        size = size - n
    return 0


@inline
def mask_at(gpa: int) -> int:
    return ld64(st.codemask + (gpa >> 12) * 8)


@inline
def announce(gpa: int) -> int:
    """A page is going to be stored to, or was by the walk: who translates from it after we looked for code there will
    see this, and who asks what was written."""
    mark = st.wmapped + (gpa >> 12)
    if ld8(mark) & STORED == 0:
        st8(mark, STORED | WRITTEN)
        fence()
    return 0


WALK_ROUTINES = [walk, refused, walk_legacy, reaches, lines, is_code, mask_at, announce]
