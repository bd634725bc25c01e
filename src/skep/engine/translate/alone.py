"""Instructions run one at a time: those that are Python's, those with an operand that machine code cannot reach, and
those under RFLAGS.TF."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from iced_x86 import Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register

from skep.contracts.interrupts import LocalInterrupts
from skep.engine.amd64.debugregisters import DR6_BS, DR6_HITS
from skep.engine.amd64.registers import Cr0, Cr4, Rflags, Vector, canonical
from skep.engine.debug import Debug
from skep.engine.translate import allowed, breakpoints, delivery
from skep.engine.translate.access import WRITE, Access, Unsupported
from skep.engine.translate.blocks import Cache
from skep.engine.translate.context import operand_segment
from skep.engine.translate.emulate import Emulator
from skep.engine.translate.faults import HostFault
from skep.engine.translate.forms import mnemonics
from skep.engine.translate.layout import BOUNCE, BOUNCE_SIZE, OFFSETS, Kind, Mode
from skep.engine.translate.modelspecific import ModelSpecific
from skep.engine.translate.pairs import Pairs
from skep.engine.translate.port import DebuggerStop, GuestFault
from skep.memory import Rights

_X87, _SSE, _AVX = mnemonics(allowed.X87), mnemonics(allowed.SSE), mnemonics(allowed.AVX)
_INFO, _RIP, _RAX, _RDX = (OFFSETS[name] >> 3 for name in ("info", "rip", "rax", "rdx"))
"""Fields of the state block as indices of its words, where every exit comes by."""
_NEAR = 256
"""An instruction that writes code this near may be in the block it overwrites, and be translated again and again."""
_FX = (Mnemonic.FXSAVE, Mnemonic.FXSAVE64, Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64)
_STATE = (
    *_FX,
    Mnemonic.XSAVE,
    Mnemonic.XSAVE64,
    Mnemonic.XRSTOR,
    Mnemonic.XRSTOR64,
    Mnemonic.XSAVEOPT,
    Mnemonic.XSAVEOPT64,
)
_MASKED_BY_XCR0 = set(_STATE) - set(_FX)
_LEAVING = (Mnemonic.IRETQ, Mnemonic.SYSCALL, Mnemonic.SYSRETQ, Mnemonic.HLT)
"""In translated code these go on in the guest, or have been done when they leave it."""
_COMPARES = tuple(getattr(Mnemonic, op + size) for op in ("CMPS", "SCAS") for size in "BWDQ")
_IRETS = (Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ)


def _is_locked(ins: Instruction) -> bool:
    """XCHG with memory needs no prefix (SDM 3, 9.1.2.1)."""
    return bool(ins.has_lock_prefix or ins.mnemonic == Mnemonic.XCHG)


class Alone(Access, ABC):
    """A vCPU as far as single instructions need it."""

    interrupts: LocalInterrupts
    cache: Cache
    pairs: Pairs
    emulator: Emulator
    msrs: ModelSpecific
    debug: Debug
    _scratch: int
    counts: list[int]
    """Exits, by Kind."""
    _enter_at: Callable[[], None]
    _leave: Callable[[], None]

    @abstractmethod
    def kick(self) -> None:
        """There may be an interrupt for the vCPU."""

    @abstractmethod
    def breakpoints_changed(self) -> None:
        """As :meth:`port.CpuPort.breakpoints_changed`."""

    @abstractmethod
    def state_changed(self) -> None:
        """As :meth:`port.CpuPort.state_changed`."""

    def _emulate(self, translated: bool = False) -> bool:
        """The instruction at rip is Python's, or (``translated``) was when its block was made. True: it was HLT."""
        st = self.st
        if st.nmi_blocked and self.instruction().mnemonic in _IRETS:
            st.nmi_blocked = 0
            self.kick()
        try:
            halted = self.emulator.step()
        except GuestFault as fault:
            if fault.vector == Vector.UD:
                unknown = self.emulator.unknown
                if translated and unknown is not None and not self._is_python(unknown):
                    return False  # another vCPU has changed it since: a breakpoint of the guest's that is no more
                if self._device_not_available():
                    raise GuestFault(Vector.NM) from None
            raise
        if self.emulator.shadow and not halted:
            return self._alone()
        return halted

    def change(self, va: int, *, to_set: int = 0, to_clear: int = 0) -> None:
        with self.cache.world.stopped():
            old = self.read(va, 1, True)[0]
            self.write(va, bytes((old & ~to_clear | to_set,)), True)

    def _is_python(self, ins: Instruction) -> bool:
        lowering = self.cache.catalog.mode(self.st.mode).lowering
        return lowering.form(ins, ins.is_ip_rel_memory_operand).emulate

    def _device_not_available(self) -> bool:
        """Whether the instruction at rip, not lowered in this mode, raises #NM rather than #UD (SDM 3, table 2-2)."""
        st = self.st
        m = self.instruction().mnemonic
        if m in _STATE:
            return bool(st.cr0 & Cr0.TS or (st.cr0 & Cr0.EM and m in _FX))
        if m in _X87:
            return bool(st.cr0 & (Cr0.EM | Cr0.TS))
        if m in _SSE:
            return bool(st.cr0 & Cr0.TS and not st.cr0 & Cr0.EM and st.cr4 & Cr4.OSFXSR)
        return bool(m in _AVX and st.cr0 & Cr0.TS and st.cr4 & Cr4.OSXSAVE and st.xcr0 & 6 == 6)

    def _step_and_trap(self) -> bool:
        """RFLAGS.TF or RF: one instruction, or one iteration of a REP string instruction, then #DB with TF."""
        st = self.st
        if not st.sysfl & Rflags.TF:
            return self._alone()
        self.stop_at_breakpoint()
        self.emulator.entered = False
        halted = self._one()
        if st.sysfl & Rflags.TF or not self.emulator.entered:
            self.hits |= DR6_BS
        return halted

    def _one(self) -> bool:
        """One instruction, or one iteration of a REP string instruction. True: it was HLT."""
        st = self.st
        ins = self.instruction()
        start, count = st.rip, st.rcx
        one = bool(ins.is_string_instruction and (ins.has_rep_prefix or ins.has_repne_prefix) and count > 1)
        if one:
            st.rcx = 1
        try:
            halted = self._alone()
        finally:
            if one:
                st.rcx = count - 1 + st.rcx
        if one and not (ins.mnemonic in _COMPARES and bool(st.flags & 0x40) == ins.has_repne_prefix):
            st.rip = start
        return halted

    def stop_at_breakpoint(self) -> None:
        """Raise #DB, or what a debugger's is, if one is armed for the instruction at rip. RFLAGS.RF lets it pass."""
        st = self.st
        if st.watch_code and not st.sysfl & Rflags.RF:
            hits = breakpoints.code_hits(st, self.linear_rip)
            if hits and self.debug.places:
                raise DebuggerStop(hits)
            if hits:
                st.dr6 = st.dr6 & ~DR6_HITS | hits
                raise GuestFault(Vector.DB)

    def report_hits(self) -> None:
        """#DB for the breakpoints that the last instruction has hit, and for its single step."""
        self.st.dr6 = self.st.dr6 & ~DR6_HITS | self.hits
        self.hits = 0
        delivery.trap(self, Vector.DB, self.st.rip)

    def _alone(self, missed: bool = False) -> bool:
        """Run the one instruction at rip, looking for nothing before or after it. True: it was HLT. ``missed``: its
        access in ``st.desc`` is known to need a buffer."""
        data, offset = self.bytes_at_rip()
        ins = Decoder(self._bits, data, ip=offset).decode()
        if ins.mnemonic in _LEAVING or (missed and ins.is_string_instruction):
            return self._emulate()
        if self.st.mode & Mode.NARROW and ins.flow_control != FlowControl.NEXT:
            return self._emulate()
        if missed and _is_locked(ins):
            with self.cache.world.alone(self.st):
                if self._operand_is_ram():
                    return self._with_buffers(ins, data, offset, missed)
        return self._with_buffers(ins, data, offset, missed)

    def _with_buffers(self, ins: Instruction, data: bytes, offset: int, missed: bool) -> bool:
        """As :meth:`_alone`, for an instruction that can be translated."""
        st = self.st
        buffers: dict[int, int] = {}
        pending: dict[int, tuple[int, int]] = {}
        if missed:
            self._fill_bounce(st.desc >> 26 & 3, buffers, pending)
        while True:
            st.target = self.cache.single(data, offset, st.mode, buffers, self._scratch)
            st.page = st.rip - offset
            st.single = 1
            start = st.rip
            self._enter_at()
            if st.kind == Kind.STOPPED:  # while others wait for this instruction's end, perhaps: it is begun
                self.counts[Kind.STOPPED] += 1
                with self.cache.world.alone(st):
                    self._enter_at()
            st.single = 0
            kind = st.kind
            if kind == Kind.JUMP:
                for number, (va, size) in pending.items():
                    at = BOUNCE + number * BOUNCE_SIZE + buffers[number]
                    self.write(va, bytes(st.bytes[at : at + size]))
                st.sysfl &= ~Rflags.RF
                return False
            if kind == Kind.PORT:
                self._port()
                return False
            st.rip = start
            if kind == Kind.MEM:
                number = st.desc >> 26 & 3
                if number in buffers or ins.is_string_instruction:
                    return self._emulate()
                if not missed and _is_locked(ins):
                    return self._alone(missed=True)
                self._fill_bounce(number, buffers, pending)
            elif kind == Kind.PAIR:
                self.pairs.map(st.info, self.cache.world)
            elif kind in (Kind.EMULATE, Kind.MSR):
                return self._emulate(True)
            elif kind == Kind.EXCEPTION:
                raise GuestFault(Vector.PF, st.w_error, st.va)
            elif kind == Kind.SEGMENT:
                raise self.refused()
            elif kind == Kind.FAULT:
                raise self._host_fault(st.rip - st.page)
            elif kind == Kind.BREAK:
                return False

    def _operand_is_ram(self) -> bool:
        """Whether the access in ``st.desc`` reaches RAM and nothing else."""
        st = self.st
        try:
            pieces = self._pieces(st.va, st.desc >> 12 & 1023, True, False)
        except GuestFault:  # which is raised again where it belongs
            return False
        return all(self.memory.allows(gpa, n, Rights.WRITE) for gpa, n in pieces)

    def _fill_bounce(self, number: int, buffers: dict[int, int], pending: dict[int, tuple[int, int]]) -> None:
        """Bring the operand that machine code could not reach into its bounce buffer, as far as it is read."""
        st = self.st
        va, desc = st.va, st.desc
        size = desc >> 12 & 1023
        kind = desc >> 22 & 3
        if desc >> 29 & 1 and va & size - 1:
            raise GuestFault(Vector.GP, 0)
        try:
            if kind:
                self.check_write(va, size)
                pending[number] = (va, size)
            align = va & 63
            at = BOUNCE + number * BOUNCE_SIZE + align
            st.bytes[at : at + size] = self.read(va, size) if kind != 1 else bytes(size)
        except GuestFault as fault:
            if fault.vector == Vector.GP and self._stack_access(number):
                raise GuestFault(Vector.SS, 0) from None
            raise
        buffers[number] = align

    def _stack_access(self, number: int) -> bool:
        """Whether the instruction's access goes through SS, whose non-canonical addresses are #SS."""
        ins = self.instruction()
        if number == 0 and any(ins.op_kind(i) == OpKind.MEMORY for i in range(ins.op_count)):
            return operand_segment(ins) == Register.SS
        return bool(ins.is_stack_instruction)

    def refused(self) -> GuestFault:
        """Translated code has refused an operand's address: it is outside its segment, or not aligned. That it is not
        canonical would come first."""
        st = self.st
        vector = st.info
        if vector == Vector.AC and not st.mode & Mode.NARROW and not canonical(st.va):
            vector = Vector.SS if self._stack_access(0) else Vector.GP
        return GuestFault(vector, 0)

    def _beside_the_stack(self) -> bool:
        """Whether the instruction at rip addresses what stands for no stack's page (layout.NO_STACK)."""
        ins = self.instruction()
        memory = any(ins.op_kind(i) == OpKind.MEMORY for i in range(ins.op_count))
        return self._stack_access(0) and not canonical(self.emulator.offset(ins) if memory else self.st.rsp)

    def _finish_access(self) -> None:
        """An operand lies in a device, in code, or nowhere. Code is forgotten and the instruction goes on by itself,
        unless it overwrites itself; else it runs with a buffer in the operand's place."""
        st = self.st
        va, desc = st.va, st.desc
        size = desc >> 12 & 1023
        if desc >> 22 & 3 and (va & 4095) + size <= 4096:
            gpa = self._walk(va, WRITE, st.mode & 3) or st.w_pa
            hit = st.watch and breakpoints.data_hits(st, va, size, write=True)
            if gpa > 255 and self.memory.allows(gpa, size, Rights.WRITE) and not hit:
                here = self._fetch(self.linear_rip) or st.w_pa
                if abs(gpa - here) > _NEAR:
                    if desc >> 28 & 1:  # a string instruction: it will go on over the page
                        size = 4096 - (gpa & 4095)
                    self.cache.written(gpa, size)
                    return
        self._alone(missed=True)

    def _port(self) -> None:
        """IN or OUT with a port that the privilege allows."""
        q = self.st.q
        info = q[_INFO]
        size = info & 0xF
        port = info >> 16 if info & 0x20 else q[_RDX] & 0xFFFF
        mask = (1 << 8 * size) - 1
        if self.st.armed7 & 0xFF:
            self.hits |= breakpoints.port_hits(self.st, port, size)
        if info & 0x10:
            value = q[_RAX] & mask
            self.exits.note("out", port, size, value, q[_RIP])
            self.io.port_write(port, size, value)
        else:
            value = self.io.port_read(port, size) & mask
            self.exits.note("in", port, size, value, q[_RIP])
            q[_RAX] = value if size == 4 else q[_RAX] & ~mask | value

    def _host_fault(self, offset: int | None = None) -> GuestFault:
        """The host CPU faulted in translated code: which exception of the guest's that is. ``offset``: of the
        instruction from ``st.page``, where it ran alone."""
        st = self.st
        fault = HostFault(st.info)
        if offset is None:
            offset = self.cache.locate(st.va)
        self._leave()
        if offset is None or fault.vector is None:
            at = st.va - self.cache.buffer.rx
            raise Unsupported(f"host {fault} at {at:#x} of the code buffer, guest page {st.page:#x}")
        st.rip = st.page + offset & (0xFFFFFFFF if st.mode & Mode.NARROW else -1)
        if fault.vector == Vector.GP and self.instruction().mnemonic in _MASKED_BY_XCR0:
            st.rax, st.rdx, st.flags = st.t0, st.t1, st.t2 & 0xCD5 | 2
        if fault.vector == Vector.XM and not st.cr4 & Cr4.OSXMMEXCPT:
            return GuestFault(Vector.UD)
        if fault.vector == Vector.GP and self._beside_the_stack():
            return GuestFault(Vector.SS, 0)
        error = 0 if fault.vector == Vector.GP else None
        return GuestFault(fault.vector, error)
