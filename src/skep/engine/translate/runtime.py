"""The routines that guest code must not leave machine code for: fill, look up, deliver, return.

Written in the subset of Python that :mod:`compiler` turns into machine code; all numbers are unsigned 64-bit words.
Stubs (stubs.py) call them with the guest's registers saved in ``st``. A routine that decides where the guest goes on
returns the host address to enter at, with ``st.tag`` and ``st.set`` for its checked entry, or 0 to leave for Python,
with ``st.kind`` saying why.
"""

from __future__ import annotations

from skep.engine.amd64.registers import Cr0, Cr4, Efer, Pte, Rflags
from skep.engine.translate.block_runtime import BLOCK_ROUTINES, find
from skep.engine.translate.compiler import (
    fence,
    ld64,
    sar,
    st,
    st8,
    st32,
    st64,
)
from skep.engine.translate.forms import Legality
from skep.engine.translate.layout import (
    ARMED,
    BRK_STI,
    JC,
    JC_ARRAY,
    JC_SET,
    KEPT_SLOTS,
    OFFSETS,
    TLB,
    TLB_ARRAY,
    TLB_ENTRIES,
    TLB_ENTRY,
    TLB_EXEC,
    TLB_HOST,
    TLB_READ,
    TLB_WRITE,
    TWINS,
    TWINS_MASK,
    Kind,
    Mode,
)
from skep.engine.translate.tlb_runtime import (
    TLB_ROUTINES,
    enter_page,
    enter_space,
    flush_tlb,
    global_mark,
    invalidate,
    jump_set,
    leave_space,
    list_jumps,
    page_mark,
    slot_of,
    watched,
)
from skep.engine.translate.walk_runtime import (
    FETCH,
    RESERVED,
    SUPERVISOR,
    WALK_ROUTINES,
    WRITE,
    announce,
    is_code,
    mask_at,
    reaches,
    walk,
)

AM, PG = Cr0.AM, Cr0.PG
PCIDE, LMA, SCE = Cr4.PCIDE, Efer.LMA, Efer.SCE
TF, IF, NT, RF, VM, AC = Rflags.TF, Rflags.IF, Rflags.NT, Rflags.RF, Rflags.VM, Rflags.AC
PCID = 0xFFF
NO_FLUSH = 1 << 63
FRAME = Pte.ADDRESS

ALIGNED = 1 << 29  # in a descriptor: the operand's alignment is checked first
RANGE = 1 << 30  # in a descriptor: of a range that several operands share
STRING = 1 << 28  # in a descriptor: a REP string instruction's
SUPERVISOR_AC = 2
ALIGNING = Legality.ALIGNED << Mode.CLASS_SHIFT
STACK = OFFSETS["stack0_page"]
ATTR_CODE64 = 0xA09B
ATTR_UNUSABLE = 0x10000
FLAT_DATA0 = 0x008F93000000FFFF  # writable data of ring 0, accessed, all 4 GiB
FLAT_MASK = 0xFF8FFFFFFFFFFFFF  # D and AVL, and L, say nothing in a data segment of 64-bit mode


def page_fault(va: int, rip: int) -> int:
    """Deliver #PF with ``st.w_error``: 1 with ``st.target`` set, or 0 for Python to do it."""
    st.va = va
    st.rip = rip
    error = st.w_error
    if st.single or deliver(14, error, 1, rip) == 0:
        st.w_error = error
        st.kind = Kind.EXCEPTION
        return 0
    st.cr2 = va
    st.n_pf = st.n_pf + 1
    target = lookup(st.rip)
    if target == 0:
        return 0
    st.target = target
    return 1


def fill(va: int, desc: int) -> int:
    """What a failed TLB check calls: the host address of the operand at ``va``, however it has to be made.

    ``desc`` is the access descriptor (emitter.py): instruction offset, size, kind, array, number. 0 leaves for Python;
    1 enters the guest at ``st.target`` instead of going on.
    """
    size = (desc >> 12) & 1023
    kind = (desc >> 22) & 3
    array = (desc >> 24) & 3
    write = 0
    if kind:
        write = WRITE
    st.n_fill = st.n_fill + 1
    rip = st.page + (desc & 4095)
    if desc & RANGE and desc & ALIGNED:
        return fill_table(va, size * 8, array, rip)
    if desc & RANGE:
        return fill_range(va, size, write, array, rip)
    if (va & 4095) + size > 4096:
        return fill_crossing(va, desc, size, write, array, rip)
    failed = walk(va, write, array)
    if failed == 14:
        if desc & ALIGNED and va & (size - 1):
            return to_python(va, desc, rip)
        return page_fault(va, rip)
    if failed:
        return to_python(va, desc, rip)
    gpa = st.w_pa
    if reaches(gpa, write) == 0 or (st.watch and watched(va, size, write)):
        return to_python(va, desc, rip)
    if write:
        announce(gpa)
        mask = mask_at(gpa)
        if mask:
            if is_code(gpa, size):
                return to_python(va, desc, rip)
            enter_page(va, array, TLB_READ)
            return st.ram + gpa
        enter_page(va, array, TLB_WRITE)
    else:
        enter_page(va, array, TLB_READ)
    return st.ram + gpa


def fill_range(va: int, size: int, write: int, array: int, rip: int) -> int:
    """As fill, for a range that several operands share (sharing_runtime.py); what is not plain RAM on one page is left
    to the block's plain twin."""
    if (va & 4095) + size <= 4096 and walk(va, write, array) == 0:
        gpa = st.w_pa
        if reaches(gpa, write) and (st.watch == 0 or watched(va, size, write) == 0):
            if write == 0:
                enter_page(va, array, TLB_READ)
                return st.ram + gpa
            announce(gpa)
            if mask_at(gpa) == 0:
                enter_page(va, array, TLB_WRITE)
                return st.ram + gpa
            if is_code(gpa, size) == 0:
                enter_page(va, array, TLB_READ)
                return st.ram + gpa
    st.rip = rip
    if fetch_page(rip) == 0:
        entry = find(st.hash, (st.w_pa << Mode.BITS) | st.mode | Mode.PLAIN)
        if entry:
            st.target = ld64(entry + 16)
            slot = st.self_ + TWINS + ((st.failed << 4) & TWINS_MASK)
            st64(slot, st.failed)
            st64(slot + 8, st.target)
            return 1
    st.kind = Kind.PLAIN
    return 0


def fill_table(va: int, size: int, array: int, rip: int) -> int:
    """As fill_range, for a loop's table (hoisting.py), which may lie on two pages."""
    first = 4096 - (va & 4095)
    if first < size and walk(va, 0, array) == 0:
        low = st.w_pa
        if walk(va + first, 0, array) == 0:
            high = st.w_pa
            if reaches(low, 0) and reaches(high, 0) and (st.watch == 0 or watched(va, size, 0) == 0):
                return side_by_side(low, high, rip)
    return fill_range(va, size, 0, array, rip)


def to_python(va: int, desc: int, rip: int) -> int:
    st.kind = Kind.MEM
    st.va = va
    st.desc = desc
    st.rip = rip
    return 0


def fill_crossing(va: int, desc: int, size: int, write: int, array: int, rip: int) -> int:
    """An operand on two pages. Frames that are no neighbours are seen through a window that has them side by side."""
    first = 4096 - (va & 4095)
    second_va = va + first
    if st.efer & LMA == 0:
        second_va = second_va & 0xFFFFFFFF
    if desc & ALIGNED or (st.efer & LMA and sar(second_va, 47) + 1 > 1):
        return to_python(va, desc, rip)
    failed = walk(va, write, array)
    if failed == 14:
        return page_fault(va, rip)
    if failed:
        return to_python(va, desc, rip)
    low = st.w_pa
    failed = walk(second_va, write, array)
    if failed == 14:
        return page_fault(second_va, rip)
    if failed:
        return to_python(va, desc, rip)
    high = st.w_pa
    if reaches(low, write) == 0 or reaches(high, write) == 0 or (st.watch and watched(va, size, write)):
        return to_python(va, desc, rip)
    if write:
        announce(low)
        announce(high)
        if is_code(low, first) or is_code(high, size - first):
            return to_python(va, desc, rip)
    return side_by_side(low, high, rip)


def side_by_side(low: int, high: int, rip: int) -> int:
    """The host address of ``low``, in a page that the one of ``high`` is seen to follow."""
    if (low & ~4095) + 4096 == high & ~4095:
        return st.ram + low
    tag = (low >> 12 << 32) | (high >> 12)
    number = (tag * 0x9E3779B97F4A7C15) >> 52
    if ld64(st.pair_tags + number * 8) != tag:
        st.kind = Kind.PAIR
        st.info = tag
        st.rip = rip
        return 0
    return st.pairs + number * 8192 + (low & 4095)


def supervisor_pointer(va: int, size: int, write: int) -> int:
    """Host address of a structure the CPU itself uses (descriptor tables, TSS, stacks); 0 where that is Python's."""
    if (va & 4095) + size > 4096:
        return 0
    entry = st.self_ + TLB + ((va >> 12) & (TLB_ENTRIES - 1)) * TLB_ENTRY
    tag = ld64(entry + TLB_READ)
    if write:
        tag = ld64(entry + TLB_WRITE)
    if tag ^ va < 4096:
        return ld64(entry + TLB_HOST) + (va & 4095)
    if walk(va, write, SUPERVISOR):
        return 0
    gpa = st.w_pa
    if reaches(gpa, write) == 0 or (st.watch and watched(va, size, write)):
        return 0
    if write:
        announce(gpa)
        if mask_at(gpa):
            return 0
        enter_page(va, SUPERVISOR, TLB_WRITE)
    else:
        enter_page(va, SUPERVISOR, TLB_READ)
    return st.ram + gpa


def deliver(vector: int, error: int, has_error: int, rip: int) -> int:
    """Deliver an exception or interrupt through a long-mode gate (SDM 3, 6.14): 1 with ``st.rip`` at the handler.

    0 and nothing changed where anything is unusual; Python's delivery.py then does the same with every check and every
    nested fault.
    """
    if st.efer & LMA == 0 or st.mode & ALIGNING or vector * 16 + 15 > st.idt_limit:
        return 0
    gate = supervisor_pointer(st.idt_base + vector * 16, 16, 0)
    if gate == 0:
        return 0
    low = ld64(gate)
    high = ld64(gate + 8)
    kind = (low >> 40) & 0xFF
    if kind & 0x9E != 0x8E:
        return 0
    selector = (low >> 16) & 0xFFFF
    if selector & 4 or selector & ~3 == 0 or (selector | 7) > st.gdt_limit:
        return 0
    segment = supervisor_pointer(st.gdt_base + (selector & ~7), 8, 0)
    if segment == 0:
        return 0
    descriptor = ld64(segment)
    if (descriptor >> 40) & 0xFC != 0x98 or (descriptor >> 53) & 3 != 1:
        return 0
    cpl = st.cpl
    stack = st.rsp
    ist = (low >> 32) & 7
    slot = 0
    if ist:
        slot = 28 + ist * 8
    elif cpl:
        slot = 4
    if slot:
        if slot + 7 > st.tr_limit:
            return 0
        pointer = supervisor_pointer(st.tr_base + slot, 8, 0)
        if pointer == 0:
            return 0
        stack = ld64(pointer)
    target = (low & 0xFFFF) | ((low >> 48) << 16) | ((high & 0xFFFFFFFF) << 32)
    if sar(target, 47) + 1 > 1:
        return 0
    size = 40 + has_error * 8
    stack = (stack & ~15) - size
    frame = supervisor_pointer(stack, size, WRITE)
    if frame == 0:
        return 0
    flags = (st.flags & 0xCD5) | 2 | st.iflag | st.sysfl
    if has_error:
        st64(frame, error)
        frame = frame + 8
        flags = flags | RF
    st64(frame, rip)
    st64(frame + 8, st.cs_sel)
    st64(frame + 16, flags)
    st64(frame + 24, st.rsp)
    st64(frame + 32, st.ss_sel)
    if cpl:
        st.ss_sel = 0
        st.ss_attr = ATTR_UNUSABLE
        st.cpl = 0
    st.rsp = stack
    st.cs_sel = selector & ~3
    st.cs_attr = ATTR_CODE64
    st.cs_base = 0
    if kind & 1 == 0:
        st.iflag = 0
    st.sysfl = st.sysfl & ~(TF | NT | RF | VM)
    set_mode()
    st.rip = target
    return 1


def set_mode() -> int:
    """The mode of 64-bit code at ``st.cpl``; the legality class stays."""
    mode = st.mode & ~Mode.SHAPE
    if st.cpl:
        mode = mode | Mode.USER
    elif st.sysfl & AC:
        mode = mode | Mode.AC
    st.mode = mode
    return 0


def fetch_page(va: int) -> int:
    """The guest-physical address of code at ``va``, through the execute tags: 0 and ``st.w_pa``, or walk's failure; 255
    where it is no RAM, 254 (and ``st.w_pa``) where a breakpoint is armed in the page."""
    array = st.mode & 3
    entry = st.self_ + TLB + array * TLB_ARRAY + ((va >> 12) & (TLB_ENTRIES - 1)) * TLB_ENTRY
    tag = ld64(entry + TLB_EXEC)
    if tag & ~1 == va & ~4095:
        st.w_pa = ld64(entry + TLB_HOST) - st.ram + (va & 4095)
        st.w_flags = tag & 1
        return 0
    failed = walk(va, FETCH, array)
    if failed:
        return failed
    if reaches(st.w_pa, 0) == 0:
        return 255
    if st.watch_code:
        i = 0
        while i < 4:
            here = (ld64(st.self_ + ARMED + i * 8) ^ va) >> 12 == 0
            if here and (st.armed7 >> (i * 2)) & 3 and (st.armed7 >> (16 + i * 4)) & 3 == 0:
                return 254
            i = i + 1
    enter_page(va, array, TLB_EXEC)
    return 0


def second_page(host: int, offset: int) -> int:
    """Whether the block at ``offset`` of this page, which goes on in the next, may be run: that page's execute tag was
    not in the TLB, but it is mapped to ``host`` still. 0: that is Python's to see."""
    st.rip = st.page + offset
    st.kind = Kind.SPAN
    va = st.page + 4096
    if st.mode & Mode.NARROW:
        va = va & 0xFFFFFFFF
    if st.mode & Mode.SEGMENTED:
        if va >= st.code_end:
            return 0
        va = (st.cs_base + va) & 0xFFFFFFFF
    if fetch_page(va):
        return 0
    st.n_span = st.n_span + 1
    if st.ram + st.w_pa == host:
        return 1
    return 0


def barrier() -> int:
    fence()
    return 0


def resume() -> int:
    """On the way in: deliver what waits in ``st.inject``, then as :func:`lookup` for where the guest goes on."""
    if st.mode & Mode.NARROW:
        st.rip = st.rip & 0xFFFFFFFF
    if st.inject:
        if deliver(st.inject & 0xFF, 0, 0, st.rip) == 0:
            st.kind = Kind.DELIVER
            return 0
        st.inject = 0
    if st.mode & Mode.SEGMENTED:
        if st.rip >= st.code_end:
            st.kind = Kind.JUMP
            st.site = 0
            return 0
        return lookup((st.cs_base + st.rip) & 0xFFFFFFFF)
    return lookup(st.rip)


def lookup(va: int) -> int:
    """Where the guest goes on at the linear address ``va`` in this mode: a checked entry, with ``st.tag`` and
    ``st.set``; or 0, JUMP."""
    me = st.self_
    mode = st.mode
    tag = va + ((mode & Mode.TAGGED) << Mode.TAG_SHIFT)
    array = JC + (mode & 3) * JC_ARRAY
    offset = jump_set(va) * JC_SET
    jc = me + array + offset
    st.tag = tag
    if ld64(jc) == 0 - tag:
        st.set = offset
        return ld64(jc + 8)
    if ld64(jc + 16) == 0 - tag:
        st.set = offset + 16
        return ld64(jc + 24)
    st.n_miss = st.n_miss + 1
    failed = fetch_page(va)
    if failed == 0:
        entry = find(st.hash, (st.w_pa << Mode.BITS) | mode)
        if entry:
            if st.w_flags & 1:
                st8(global_mark(va), 1)
            else:
                list_jumps(array - JC + offset)
                st8(page_mark(va), 1)
            st64(jc + 16, ld64(jc))
            st64(jc + 24, ld64(jc + 8))
            target = ld64(entry + 8)
            st64(jc, 0 - tag)
            st64(jc + 8, target)
            st.set = offset
            return target
    rip = va
    if mode & Mode.SEGMENTED:
        rip = (va - st.cs_base) & 0xFFFFFFFF
    if failed == 14:
        error = st.w_error
        if deliver(14, error, 1, rip):
            st.cr2 = va
            st.n_pf = st.n_pf + 1
            return lookup(st.rip)
        st.w_error = error
    st.rip = rip
    st.kind = Kind.JUMP
    st.site = 0
    return 0


def link(key: int, site: int) -> int:
    """Patch the jump whose 32-bit displacement is at ``site`` to the block ``key`` of the same page, and go there."""
    entry = find(st.hash, key)
    if entry == 0:
        st.kind = Kind.JUMP
        st.site = site
        st.mode = key & Mode.ALL
        st.rip = st.page + ((key >> Mode.BITS) & 4095)
        return 0
    st.n_link = st.n_link + 1
    target = ld64(entry + 16)
    st32(site + st.rw_delta, target - (site + 4))
    return target


def load_cr3(value: int, rip: int) -> int:
    """MOV CR3 at ``rip``: 1, or 0 where Python must look (reserved bits, PCID rules)."""
    if value & 0x7FF0000000000000 or (value >> 63 and st.cr4 & PCIDE == 0) or value & RESERVED:
        st.kind = Kind.EMULATE
        st.rip = rip
        return 0
    st.n_cr3 = st.n_cr3 + 1
    old = st.cr3
    st.cr3 = value & ~NO_FLUSH
    if st.cr4 & PCIDE and (old ^ value) & PCID:
        leave_space(slot_of(old), old & PCID)
        st.kept = st.kept | (1 << (old & (KEPT_SLOTS - 1)))
        if value >> 63:
            enter_space(slot_of(value), value & PCID)  # whose slot is written anew before it is looked at again
    elif value >> 63 == 0:
        leave_space(0, 0)
    return 1


def invalidate_pcid(descriptor: int, rip: int, kind: int) -> int:
    """INVPCID at ``rip`` (SDM 2): 1, or 0 where Python must look, which faults. ``kind``: an address of a PCID, a PCID,
    everything, everything but global pages."""
    word = ld64(descriptor)
    va = ld64(descriptor + 8)
    current = st.cr3 & PCID
    if st.cr4 & PCIDE == 0:
        current = 0
    if kind > 3 or word > PCID or (kind == 0 and sar(va, 47) + 1 > 1) or (kind < 2 and word and st.cr4 & PCIDE == 0):
        st.kind = Kind.EMULATE
        st.rip = rip
        return 0
    if kind >= 2:
        flush_tlb(kind == 2)
    elif word != current:
        st.kept = st.kept & ~(1 << (word & (KEPT_SLOTS - 1)))
    elif kind == 0:
        invalidate(va)
    else:
        leave_space(0, 0)
    return 1


def descriptor_at(selector: int) -> int:
    """The GDT's descriptor for a selector, or 0 where that is not plain."""
    if selector & 4 or selector & ~3 == 0 or (selector | 7) > st.gdt_limit:
        return 0
    pointer = supervisor_pointer(st.gdt_base + (selector & ~7), 8, 0)
    if pointer == 0:
        return 0
    return ld64(pointer)


def interrupt_return(rip: int) -> int:
    """IRETQ in 64-bit mode at CPL 0 to 64-bit code at CPL 0 or 3 (SDM 2, IRET); everything else is Python's."""
    st.rip = rip
    st.kind = Kind.EMULATE
    if st.sysfl & NT or st.nmi_blocked:
        return 0
    frame = supervisor_pointer(st.rsp, 40, 0)
    if frame == 0:
        return 0
    new_rip = ld64(frame)
    cs = ld64(frame + 8) & 0xFFFF
    flags = ld64(frame + 16)
    ss = ld64(frame + 32) & 0xFFFF
    if flags & (TF | VM | NT) or sar(new_rip, 47) + 1 > 1 or (flags & RF and st.watch_code):
        return 0
    if cs & 3 and flags & AC and st.cr0 & AM:  # legality classes are Python's to change
        return 0
    code = descriptor_at(cs)
    rpl = cs & 3
    if rpl == 0:
        if (code >> 40) & 0xFC != 0x98 or (code >> 53) & 3 != 1 or ss & 3:
            return 0
        if ss:  # a kernel that was interrupted in a system call has the selector that SYSCALL gave it
            data = descriptor_at(ss)
            if data & FLAT_MASK != FLAT_DATA0:
                return 0
            st.ss_attr = (data >> 40) & 0xF0FF
            st.ss_base = 0
            st.ss_limit = 0xFFFFFFFF
        else:
            st.ss_attr = ATTR_UNUSABLE
    else:
        if rpl != 3 or ss & 3 != 3 or (code >> 40) & 0xFC != 0xF8 or (code >> 53) & 3 != 1:
            return 0
        stack = descriptor_at(ss)
        if (stack >> 40) & 0xFE != 0xF2 or (stack >> 40) & 0xF00F == 0:
            return 0
        if (st.ds_sel & ~3 and st.ds_attr & 0x60 != 0x60) or (st.es_sel & ~3 and st.es_attr & 0x60 != 0x60):
            return 0
        if (st.fs_sel & ~3 and st.fs_attr & 0x60 != 0x60) or (st.gs_sel & ~3 and st.gs_attr & 0x60 != 0x60):
            return 0
        st.ss_attr = ((stack >> 40) & 0xF0FF) | 1
        st.ss_base = 0
        st.ss_limit = 0xFFFFFFFF
        st.cpl = 3
    st.cs_sel = cs
    st.cs_attr = ((code >> 40) & 0xF0FF) | 1
    st.ss_sel = ss
    st.rsp = ld64(frame + 24)
    st.flags = flags & 0xCD5
    st.iflag = flags & IF
    st.sysfl = flags & 0x2C3000
    set_mode()
    if flags & IF:
        st8(st.self_ + BRK_STI, st.irq)
    st.n_iret = st.n_iret + 1
    return lookup(new_rip)


def system_call(rip: int) -> int:
    """SYSCALL at ``rip`` in 64-bit code (SDM 2, SYSCALL)."""
    if st.efer & SCE == 0 or st.mode & ALIGNING:
        st.rip = rip
        st.kind = Kind.EMULATE
        return 0
    flags = (st.flags & 0xCD5) | 2 | st.iflag | st.sysfl
    st.rcx = rip + 2
    st.r11 = flags
    flags = flags & ~st.sfmask
    st.flags = flags & 0xCD5
    st.iflag = flags & IF
    st.sysfl = flags & 0x3E7100
    selector = (st.star >> 32) & 0xFFFC
    st.cs_sel = selector
    st.cs_attr = ATTR_CODE64
    st.cs_base = 0
    st.ss_sel = selector + 8
    st.ss_attr = 0xC093
    st.ss_base = 0
    st.ss_limit = 0xFFFFFFFF
    st.cpl = 0
    set_mode()
    st.n_syscall = st.n_syscall + 1
    return lookup(st.lstar)


def system_return(rip: int) -> int:
    """SYSRET to 64-bit code (SDM 2, SYSRET)."""
    target = st.rcx
    flags = st.r11
    if sar(target, 47) + 1 > 1 or flags & TF or st.efer & SCE == 0 or (flags & AC and st.cr0 & AM):
        st.rip = rip
        st.kind = Kind.EMULATE
        return 0
    st.flags = flags & 0xCD5
    st.iflag = flags & IF
    st.sysfl = flags & 0x2C7000
    selector = st.star >> 48
    st.cs_sel = (selector + 16) | 3
    st.cs_attr = 0xA0FB
    st.ss_sel = (selector + 8) | 3
    st.ss_attr = 0xC0F3
    st.ss_base = 0
    st.ss_limit = 0xFFFFFFFF
    st.cpl = 3
    set_mode()
    if flags & IF:
        st8(st.self_ + BRK_STI, st.irq)
    return lookup(target)


ROUTINES = [
    *TLB_ROUTINES,
    *BLOCK_ROUTINES,
    *WALK_ROUTINES,
    page_fault, fill, fill_range, fill_table, to_python,
    fill_crossing, side_by_side, supervisor_pointer, deliver, set_mode, fetch_page, second_page, barrier, resume,
    lookup, link, load_cr3, invalidate_pcid, descriptor_at, interrupt_return, system_call, system_return,
]  # fmt: skip
