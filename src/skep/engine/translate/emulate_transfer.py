"""Control transfers through segments and gates: far JMP, CALL, RET; INT n, IRET; SYSCALL, SYSENTER and their returns.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, Mnemonic, OpKind

from skep.engine.amd64.debugregisters import DR6_BS, DR6_HITS
from skep.engine.amd64.registers import Attr, Cr0, Efer, Rflags, SystemType, Vector, canonical
from skep.engine.translate import delivery, segments, tasks
from skep.engine.translate.context import M32, M64, MASK, RCX, RDX, RSP, Context, Handler
from skep.engine.translate.emulate_integer import require_virtual_iopl
from skep.engine.translate.port import DebuggerStop, GuestFault
from skep.engine.translate.segments import FLAT, Loaded

R11 = 11
SYSRET_FLAGS = 0x3C_7FD7  # RFLAGS that SYSRET takes from R11: not RF, not VM

_FAR_SIZE = {
    Code.JMP_M1616: 2, Code.JMP_M1632: 4, Code.JMP_M1664: 8, Code.JMP_PTR1616: 2, Code.JMP_PTR1632: 4,
    Code.CALL_M1616: 2, Code.CALL_M1632: 4, Code.CALL_M1664: 8, Code.CALL_PTR1616: 2, Code.CALL_PTR1632: 4,
    Code.RETFW: 2, Code.RETFD: 4, Code.RETFQ: 8,
    Code.RETFW_IMM16: 2, Code.RETFD_IMM16: 4, Code.RETFQ_IMM16: 8,
}  # fmt: skip
_COUNT_SIZE = {
    value: 8 if "RCX" in name else 4 if "ECX" in name else 2
    for name, value in vars(Code).items()
    if isinstance(value, int) and name.startswith(("LOOP", "JCXZ", "JECXZ", "JRCXZ"))
}
_NEAR_SIZE = {
    Code.JMP_RM16: 2, Code.JMP_RM32: 4, Code.JMP_RM64: 8, Code.CALL_RM16: 2, Code.CALL_RM32: 4, Code.CALL_RM64: 8,
}  # fmt: skip


def _far_pointer(e: Context, i: Instruction, size: int) -> tuple[int, int]:
    """(selector, offset) of a far JMP or CALL."""
    if i.op0_kind == OpKind.FAR_BRANCH16:
        return i.far_branch_selector, i.far_branch16
    if i.op0_kind == OpKind.FAR_BRANCH32:
        return i.far_branch_selector, i.far_branch32
    raw = e.read(i, size + 2)
    return int.from_bytes(raw[size:], "little"), int.from_bytes(raw[:size], "little")


def _check_far(e: Context, code: Loaded, offset: int) -> Loaded:
    """The code segment of a far JMP or CALL, at the current privilege."""
    st = e.st
    selector, error = code.selector, code.selector & 0xFFFC
    if not code.is_code or not segments.valid_code_size(st, code):
        raise GuestFault(Vector.GP, error)
    if code.dpl > st.cpl if code.conforming else selector & 3 > st.cpl or code.dpl != st.cpl:
        raise GuestFault(Vector.GP, error)
    if not code.present:
        raise GuestFault(Vector.NP, error)
    segments.check_code_target(e.cpu, code, offset)
    return code.with_rpl(st.cpl)


def _go_far(e: Context, code: Loaded, offset: int) -> None:
    segments.put(e.st, "cs", code)
    e.next_rip = offset
    e.cpu.state_changed()


def _far(e: Context, i: Instruction, size: int, *, call: bool) -> None:
    """A far JMP or CALL with an offset of ``size`` bytes: to code, through a call gate, to another task."""
    st = e.st
    selector, offset = _far_pointer(e, i, size)
    if segments.paragraphs(st):
        if offset > st.cs_limit:
            raise GuestFault(Vector.GP, 0)
        code = Loaded(selector, selector << 4, st.cs_limit, st.cs_attr)
    elif segments.is_null(selector):
        raise GuestFault(Vector.GP, 0)
    else:
        target = segments.fetch(e.cpu, selector)
        if not target.attributes & Attr.S:
            _through_system_descriptor(e, target, call=call)
            return
        code = _check_far(e, target, offset)
        segments.mark_accessed(e.cpu, code)
    if call:
        mask = (1 << 8 * size) - 1
        e.push((e.next_rip & mask | st.cs_sel << 8 * size).to_bytes(2 * size, "little"), size)
    _go_far(e, code, offset)


def _through_system_descriptor(e: Context, target: Loaded, *, call: bool) -> None:
    kind, selector, long = target.attributes & Attr.TYPE, target.selector, segments.long_mode(e.st)
    gate = kind == SystemType.CALL_GATE or (kind in (SystemType.CALL_GATE16, SystemType.TASK_GATE) and not long)
    task = kind in (SystemType.TSS, SystemType.TSS16) and not long
    if not (gate or task) or target.dpl < max(e.st.cpl, selector & 3):
        raise GuestFault(Vector.GP, selector & 0xFFFC)
    if not target.present:
        raise GuestFault(Vector.NP, selector & 0xFFFC)
    if kind in (SystemType.CALL_GATE, SystemType.CALL_GATE16):
        _call_gate(e, selector, call=call)
        return
    if gate:
        selector = _descriptor(e, selector, 8) >> 16 & 0xFFFF
    tasks.switch(e.cpu, selector, tasks.By.CALL if call else tasks.By.JMP, e.next_rip)
    e.next_rip = e.st.rip


def _descriptor(e: Context, selector: int, size: int) -> int:
    address = segments.in_table(e.cpu, selector, size)
    if address is None:
        raise GuestFault(Vector.GP, selector & 0xFFFC)
    return int.from_bytes(e.cpu.read(address, size, True), "little")


def _call_gate(e: Context, selector: int, *, call: bool) -> None:
    """SDM 3, 5.8.3 to 5.8.5. The gate's own rights have been checked."""
    st, long = e.st, segments.long_mode(e.st)
    gate = _descriptor(e, selector, 16 if long else 8)
    if long and gate >> 104 & 0x1F:
        raise GuestFault(Vector.GP, selector & 0xFFFC)
    slot = 8 if long else 4 if gate >> 43 & 1 else 2
    offset = gate & 0xFFFF | (gate >> 32 & 0xFFFF_0000 if slot > 2 else 0) | (gate >> 64 & M32) << 32
    code_selector = gate >> 16 & 0xFFFF
    if segments.is_null(code_selector):
        raise GuestFault(Vector.GP, 0)
    code = segments.fetch(e.cpu, code_selector)
    error = code_selector & 0xFFFC
    wrong_size = long and code.attributes & (Attr.L | Attr.D) != Attr.L
    outer_only = not call and not code.conforming and code.dpl != st.cpl
    if not code.is_code or code.dpl > st.cpl or wrong_size or outer_only:
        raise GuestFault(Vector.GP, error)
    if not code.present:
        raise GuestFault(Vector.NP, error)
    cpl = st.cpl if code.conforming else code.dpl
    segments.check_code_target(e.cpu, code, offset)
    segments.mark_accessed(e.cpu, code)
    if call and cpl < st.cpl:
        _call_inwards(e, cpl, slot, gate >> 32 & 0x1F)
    elif call:
        mask = (1 << 8 * slot) - 1
        e.push((e.next_rip & mask | st.cs_sel << 8 * slot).to_bytes(2 * slot, "little"), slot)
    st.cpl = cpl
    _go_far(e, code.with_rpl(cpl), offset)


def _call_inwards(e: Context, cpl: int, slot: int, parameters: int) -> None:
    """Go to the stack of an inner level, with the old one's address, its top words and the way back on it."""
    st = e.st
    if slot == 8:
        rsp = delivery.task_stack_long(e.cpu, 4 + 8 * cpl, 0)
        words = [st.ss_sel, st.rsp, st.cs_sel, e.next_rip]
        rsp = rsp - 8 * len(words) & M64
        delivery.push_all(e.cpu, rsp, words, 8, cpl)
        segments.put(st, "ss", segments.null(cpl, cpl))
        st.rsp = rsp
        return
    stack, esp = delivery.task_stack_protected(e.cpu, cpl, 0)
    old = e.stack()
    copied = [old.pop(slot) for _ in range(parameters)]
    words = [st.ss_sel, st.rsp, *reversed(copied), st.cs_sel, e.next_rip]
    mask = M32 if stack.attributes & Attr.D else 0xFFFF
    below = esp - slot * len(words) & mask
    delivery.in_limit(stack, below, slot * len(words), stack.selector & 0xFFFC)
    segments.mark_accessed(e.cpu, stack)
    delivery.push_all(e.cpu, stack.base + below & M32, words, slot, cpl)
    segments.put(st, "ss", stack)
    st.rsp = esp & ~mask & M32 | below


def jmp(e: Context, i: Instruction) -> None:
    size = _FAR_SIZE.get(i.code)
    if size is None:
        _jmp_near(e, i)
    else:
        _far(e, i, size, call=False)


def call(e: Context, i: Instruction) -> None:
    size = _FAR_SIZE.get(i.code)
    if size is None:
        _call_near(e, i)
    else:
        _far(e, i, size, call=True)


def _near_target(e: Context, i: Instruction) -> tuple[int, int]:
    """(target, operand size in bytes) of a near JMP or CALL, of an offset or through a register or memory."""
    size = _NEAR_SIZE.get(i.code)
    if size is None:
        target = i.near_branch_target
        size = e.bits // 8 if e.bits == 64 or i.op0_kind != OpKind.NEAR_BRANCH16 else 2
    else:
        target = e.load(i, 0)
    code = segments.held(e.st, "cs")
    segments.check_code_target(e.cpu, code, target)
    return target, size


def _holds(condition: int, flags: int) -> bool:
    """Whether a condition code (1 to 16: O, NO, B .. G) holds."""
    pair, negated = divmod(condition - 1, 2)
    less = bool(flags & Rflags.SF) != bool(flags & Rflags.OF)
    tests = (
        flags & Rflags.OF, flags & Rflags.CF, flags & Rflags.ZF, flags & (Rflags.CF | Rflags.ZF),
        flags & Rflags.SF, flags & Rflags.PF, less, less or flags & Rflags.ZF,
    )  # fmt: skip
    return bool(tests[pair]) != bool(negated)


def jcc(e: Context, i: Instruction) -> None:
    if _holds(i.condition_code, e.st.flags):
        _jmp_near(e, i)


def loop(e: Context, i: Instruction) -> None:
    """LOOP and LOOPcc."""
    size = _COUNT_SIZE[i.code]
    count = e.st.q[RCX] - 1 & MASK[size]
    if count and (i.is_loop or _holds(i.condition_code, e.st.flags)):
        _jmp_near(e, i)
    e.put_number(RCX, size, count)


def jcxz(e: Context, i: Instruction) -> None:
    if not e.st.q[RCX] & MASK[_COUNT_SIZE[i.code]]:
        _jmp_near(e, i)


def _jmp_near(e: Context, i: Instruction) -> None:
    e.next_rip, _ = _near_target(e, i)


def _call_near(e: Context, i: Instruction) -> None:
    target, size = _near_target(e, i)
    e.push((e.next_rip & (1 << 8 * size) - 1).to_bytes(size, "little"))
    e.next_rip = target


def retf(e: Context, i: Instruction) -> None:
    st = e.st
    size = _FAR_SIZE[i.code]
    released = i.immediate16 if i.op_count else 0
    stack = e.stack()
    offset, selector = stack.pop(size), stack.pop(size) & 0xFFFF
    if segments.paragraphs(st):
        if offset > st.cs_limit:
            raise GuestFault(Vector.GP, 0)
        stack.skip(released)
        st.rsp = stack.rsp
        _go_far(e, Loaded(selector, selector << 4, st.cs_limit, st.cs_attr), offset)
        return
    code = delivery.check_return_code(e.cpu, selector)
    cpl, outer = selector & 3, selector & 3 > st.cpl
    stack.skip(released)
    rsp, ss = stack.rsp, None
    if outer:
        rsp, ss_selector = stack.pop(size), stack.pop(size) & 0xFFFF
        ss = delivery.check_return_stack(e.cpu, ss_selector, code)
    segments.check_code_target(e.cpu, code, offset)
    segments.mark_accessed(e.cpu, code, *(() if ss is None else (ss,)))
    segments.put(st, "cs", code)
    delivery.return_stack(st, rsp + released if outer else rsp, ss, outer, cpl)
    e.next_rip = offset
    e.cpu.state_changed()


# Through the IDT


def int_n(e: Context, i: Instruction) -> None:
    require_virtual_iopl(e)
    _interrupt(e, i.immediate8)


def int3(e: Context, i: Instruction) -> None:
    if e.cpu.debug.instruction:
        raise DebuggerStop(instruction=True)
    _interrupt(e, Vector.BP)


def into(e: Context, i: Instruction) -> None:
    if e.st.flags & Rflags.OF:
        _interrupt(e, Vector.OF)


def int1(e: Context, i: Instruction) -> None:
    e.st.dr6 = e.st.dr6 & ~DR6_HITS | e.cpu.hits  # one #DB, also for what an instruction before held back
    e.cpu.hits = 0
    delivery.trap(e.cpu, Vector.DB, e.next_rip)
    e.next_rip = e.st.rip
    e.entered = True


def _interrupt(e: Context, vector: int) -> None:
    delivery.software_interrupt(e.cpu, vector, e.next_rip)
    e.next_rip = e.st.rip
    e.entered = True


def iret(e: Context, i: Instruction) -> None:
    delivery.iret(e.cpu, {Mnemonic.IRET: 2, Mnemonic.IRETD: 4, Mnemonic.IRETQ: 8}[i.mnemonic], e.next_rip)
    e.next_rip = e.st.rip


# System calls


def _flat_code(selector: int, dpl: int, *, wide: bool) -> Loaded:
    size = Attr.L if wide else Attr.D
    attributes = Attr.S | Attr.CODE | Attr.READABLE | Attr.ACCESSED | Attr.P | Attr.G | size | dpl << Attr.DPL_SHIFT
    return Loaded(selector & 0xFFFC | dpl, 0, FLAT, attributes)


def _flat_stack(selector: int, dpl: int) -> Loaded:
    attributes = Attr.S | Attr.WRITABLE | Attr.ACCESSED | Attr.P | Attr.G | Attr.D | dpl << Attr.DPL_SHIFT
    return Loaded(selector & 0xFFFC | dpl, 0, FLAT, attributes)


def _switch(e: Context, code: Loaded, stack: Loaded, cpl: int, rip: int) -> None:
    segments.put(e.st, "cs", code)
    segments.put(e.st, "ss", stack)
    e.st.cpl = cpl
    e.next_rip = rip
    e.entered = not cpl
    e.cpu.state_changed()


def syscall(e: Context, i: Instruction) -> None:
    """From compatibility mode on AMD's CPUs only, where CSTAR says where to go."""
    st, q = e.st, e.st.q
    compatible = e.cpuid.is_amd and segments.long_mode(st)
    if not st.efer & Efer.SCE or (e.bits != 64 and not compatible):
        raise GuestFault(Vector.UD)
    selector = st.star >> 32 & 0xFFFC
    target = st.lstar if e.bits == 64 else st.cstar
    q[RCX] = e.next_rip
    q[R11] = st.rflags & ~Rflags.RF
    st.rflags = st.rflags & ~(st.sfmask | Rflags.RF | Rflags.VM)
    _switch(e, _flat_code(selector, 0, wide=True), _flat_stack(selector + 8, 0), 0, target)


def sysret(e: Context, i: Instruction) -> None:
    st, q = e.st, e.st.q
    if not st.efer & Efer.SCE or e.bits != 64:
        raise GuestFault(Vector.UD)
    e.require_cpl0()
    wide = i.mnemonic == Mnemonic.SYSRETQ
    rip = q[RCX] if wide else q[RCX] & M32
    if not canonical(rip):
        raise GuestFault(Vector.GP, 0)
    selector = st.star >> 48
    st.rflags = q[R11] & SYSRET_FLAGS
    if st.sysfl & Rflags.TF:  # #DB at its end, as if SYSCALL had just been done
        e.cpu.hits |= DR6_BS
    code = _flat_code(selector + (16 if wide else 0), 3, wide=wide)
    _switch(e, code, _flat_stack(selector + 8, 3), 3, rip)


def _no_sysenter(e: Context) -> bool:
    """AMD's CPUs have none in IA-32e mode."""
    return e.cpuid.is_amd and segments.long_mode(e.st)


def sysenter(e: Context, i: Instruction) -> None:
    st = e.st
    if _no_sysenter(e):
        raise GuestFault(Vector.UD)
    if not st.cr0 & Cr0.PE or segments.is_null(st.sysenter_cs):
        raise GuestFault(Vector.GP, 0)
    wide = segments.long_mode(st)
    selector = st.sysenter_cs & 0xFFFC
    mask = M64 if wide else M32
    st.rflags = st.rflags & ~(Rflags.IF | Rflags.VM | Rflags.RF)
    st.rsp = st.sysenter_esp & mask
    _switch(e, _flat_code(selector, 0, wide=wide), _flat_stack(selector + 8, 0), 0, st.sysenter_eip & mask)


def sysexit(e: Context, i: Instruction) -> None:
    st, q = e.st, e.st.q
    if _no_sysenter(e):
        raise GuestFault(Vector.UD)
    if not st.cr0 & Cr0.PE or segments.is_null(st.sysenter_cs) or st.cpl:
        raise GuestFault(Vector.GP, 0)
    wide = i.mnemonic == Mnemonic.SYSEXITQ
    mask = M64 if wide else M32
    rip, rsp = q[RDX] & mask, q[RCX] & mask
    if not canonical(rip) or not canonical(rsp):
        raise GuestFault(Vector.GP, 0)
    selector = (st.sysenter_cs & 0xFFFC) + (32 if wide else 16)
    q[RSP] = rsp
    _switch(e, _flat_code(selector, 3, wide=wide), _flat_stack(selector + 8, 3), 3, rip)


_CONDITIONAL = [
    getattr(Mnemonic, "J" + name)
    for name in ("O", "NO", "B", "AE", "E", "NE", "BE", "A", "S", "NS", "P", "NP", "L", "GE", "LE", "G")
]

HANDLERS: dict[int, Handler] = {
    **dict.fromkeys(_CONDITIONAL, jcc),
    **dict.fromkeys((Mnemonic.LOOP, Mnemonic.LOOPE, Mnemonic.LOOPNE), loop),
    **dict.fromkeys((Mnemonic.JCXZ, Mnemonic.JECXZ, Mnemonic.JRCXZ), jcxz),
    Mnemonic.JMP: jmp,
    Mnemonic.CALL: call,
    Mnemonic.RETF: retf,
    Mnemonic.INT: int_n,
    Mnemonic.INT3: int3,
    Mnemonic.INT1: int1,
    Mnemonic.INTO: into,
    Mnemonic.IRET: iret,
    Mnemonic.IRETD: iret,
    Mnemonic.IRETQ: iret,
    Mnemonic.SYSCALL: syscall,
    Mnemonic.SYSRET: sysret,
    Mnemonic.SYSRETQ: sysret,
    Mnemonic.SYSENTER: sysenter,
    Mnemonic.SYSEXIT: sysexit,
    Mnemonic.SYSEXITQ: sysexit,
}
