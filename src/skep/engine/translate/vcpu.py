"""The translator as an engine: its VM and its vCPU's loop.

:meth:`TranslateVcpu.run` enters guest code, and each time guest code comes back does what it came for: translate a
block, finish an access to a device or to a page of code, emulate a rare instruction, deliver an interrupt. All of a
vCPU but ``kick`` and ``request_exit`` happens on its thread.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from iced_x86 import Decoder, Instruction, Mnemonic, OpKind, Register

from skep.contracts.interrupts import LocalInterrupts
from skep.contracts.io import IoSpace
from skep.engine.amd64 import cpuid as cpuid_models
from skep.engine.amd64 import features
from skep.engine.amd64.registers import GENERAL, SEGMENTS, SYSTEM_SEGMENTS, Cr0, Cr4, Efer, Rflags, Vector, canonical
from skep.engine.amd64.tsc import tsc_hz
from skep.engine.contract import Exit, ExitReason
from skep.engine.exits import Exits
from skep.engine.translate import allowed, delivery
from skep.engine.translate.blocks import Cache
from skep.engine.translate.context import operand_segment
from skep.engine.translate.emulate import Emulator
from skep.engine.translate.faults import CATCHER, HostFault
from skep.engine.translate.forms import Legality, mnemonics
from skep.engine.translate.layout import (
    BOUNCE,
    BOUNCE_SIZE,
    BRK,
    EMPTY_JC,
    JC,
    JC_ARRAY,
    JC_SETS,
    OFFSETS,
    PAIR_SLOTS,
    XSAVE_AREA,
    Kind,
    Mode,
    StateBlock,
)
from skep.engine.translate.modelspecific import ModelSpecific
from skep.engine.translate.port import GuestFault, TripleFault
from skep.errors import HostError, UserError
from skep.memory import GuestMemory

_WRITE, _FETCH = 1, 2
_M64 = 0xFFFF_FFFF_FFFF_FFFF
_X87, _SSE, _AVX = mnemonics(allowed.X87), mnemonics(allowed.SSE), mnemonics(allowed.AVX)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_SYS_ARCH_PRCTL, _ARCH_SET_GS = 158, 0x1001
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_ON_THREAD = threading.local()
"""Whose state block the thread's GS is."""
_DR6_BS = 1 << 14
_BRK, _IRQ, _IFLAG, _SYSFL, _KIND, _RIP, _SITE, _TARGET, _INFO, _RAX, _RDX = (
    OFFSETS[name] >> 3
    for name in ("brk", "irq", "iflag", "sysfl", "kind", "rip", "site", "target", "info", "rax", "rdx")
)
"""Fields of the state block as indices of its words, where every exit comes by."""
_NEAR = 256
"""An instruction that writes code this near may be in the block it overwrites, and be translated again and again."""


class TranslateEngine:
    """Runs guests without hardware virtualization (docs/engine.md)."""

    name = "translate"

    def create_vm(
        self, memory: GuestMemory, io: IoSpace, max_vcpus: int, cpu_model: str, tsc_offset: int
    ) -> TranslateVm:
        features.require()
        if max_vcpus > 1:
            # Another processor starts in real mode, which is not there yet, and one code cache for all needs shootdown.
            raise UserError("the translator runs one CPU only, so far", "cpus", "ask for 1")
        return TranslateVm(memory, io, max_vcpus, cpu_model, tsc_offset)


class Pairs:
    """A window of host addresses that shows any two page frames side by side, for operands that lie on both."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._size = PAIR_SLOTS * 8192
        self.address = _libc.mmap(None, self._size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        self._map = mmap.mmap(-1, PAIR_SLOTS * 8)
        self._pin = ctypes.c_char.from_buffer(self._map)
        self.tags_address = ctypes.addressof(self._pin)
        self._tags = memoryview(self._map).cast("B").cast("Q")

    def close(self) -> None:
        _libc.munmap(self.address, self._size)
        self._tags.release()
        del self._pin
        self._map.close()

    def map(self, tag: int) -> None:
        """Map the two frames of a tag (runtime.fill_crossing) into their slot."""
        slot = (tag * 0x9E3779B97F4A7C15 & _M64) >> 52
        at = self.address + slot * 8192
        for i, frame in enumerate((tag >> 32, tag & 0xFFFFFFFF)):
            gpa = frame << 12
            memory = self._memory
            offset = gpa if gpa < memory.low_size else memory.low_size + gpa - memory.high_base
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
            got = _libc.mmap(at + i * 4096, 4096, protection, flags, memory.fd, offset)
            if got != at + i * 4096:
                self._tags[slot] = 0
                raise OSError(ctypes.get_errno(), "cannot map two guest pages side by side")
        self._tags[slot] = tag


class TranslateVm:
    """A VM's part of the translator: the translations and what they rest on."""

    def __init__(self, memory: GuestMemory, io: IoSpace, max_vcpus: int, cpu_model: str, tsc_offset: int) -> None:
        self.memory = memory
        self.io = io
        self.max_vcpus = max_vcpus
        self.cpu_model = cpu_model
        self.tsc_offset = tsc_offset
        self.cache = Cache(memory)
        self.pairs = Pairs(memory)
        self.vcpus: list[TranslateVcpu] = []
        CATCHER.add(self.cache.buffer.rx, self.cache.buffer.size, self.cache.stubs["fault_exit"])
        memory.add_write_listener(self._written)

    def create_vcpu(self, index: int, interrupts: LocalInterrupts) -> TranslateVcpu:
        vcpu = TranslateVcpu(self, index, interrupts)
        self.vcpus.append(vcpu)
        return vcpu

    def set_tsc_offset(self, offset: int) -> None:
        self.tsc_offset = offset
        for vcpu in self.vcpus:
            vcpu.msrs.set_tsc_offset(offset)

    def _written(self, gpa: int, n: int) -> None:
        """Somebody who is no vCPU has changed memory: its translations go before anybody can know of the change."""
        mask = self.cache.mask
        for frame in range(gpa >> 12, (gpa + n - 1 >> 12) + 1):
            if mask[frame]:
                break
        else:
            return
        for vcpu in self.vcpus:
            vcpu.outside(lambda: self.cache.written(gpa, n))

    def close(self) -> None:
        self.memory.remove_write_listener(self._written)
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        CATCHER.remove(self.cache.buffer.rx)
        self.pairs.close()
        self.cache.close()


class TranslateVcpu:
    """One vCPU (:class:`skep.engine.contract.Vcpu`), and what its Python parts ask of it (:class:`port.CpuPort`)."""

    def __init__(self, vm: TranslateVm, index: int, interrupts: LocalInterrupts) -> None:
        self.index = index
        self.vm = vm
        self.io = vm.io
        self.interrupts = interrupts
        self.memory = vm.memory
        self.cache = vm.cache
        st = self.st = StateBlock()
        cache = vm.cache
        st.ram = vm.memory.base
        st.low_end = vm.memory.low_size
        st.high_base = vm.memory.high_base
        st.high_size = vm.memory.high_size
        st.codemask = cache.mask_address
        st.codebytes = cache.bytes_address
        st.wmapped = cache.wmapped_address
        st.hash = cache.hash_address
        st.rw_delta = cache.buffer.rw - cache.buffer.rx
        st.pairs = vm.pairs.address
        st.pair_tags = vm.pairs.tags_address
        st.pdep_mask = 0x3FFE0
        for name, address in cache.stubs.items():
            if name in OFFSETS:
                setattr(st, name, address)
        model = cpuid_models.make(vm.cpu_model, tsc_hz(), apic_id=index, cpus=vm.max_vcpus)
        self.exits = Exits()
        self.msrs = ModelSpecific(st, interrupts, model, self.exits)
        self.emulator = Emulator(self, model, self.msrs)
        self.msrs.set_tsc_offset(vm.tsc_offset)
        routines = cache.routines

        def routine(name: str, arguments: int) -> Any:
            return ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * arguments)(routines[name])

        self._walk = routine("walk", 3)
        self._lookup = routine("lookup", 1)
        self._fetch = routine("fetch_page", 1)
        self._flush = routine("flush_tlb", 1)
        self._flush_jumps = routine("flush_jumps", 0)
        self._invalidate = routine("invalidate", 1)
        self._deliver = routine("deliver", 4)
        self._enter = ctypes.CFUNCTYPE(None)(cache.stubs["enter"])
        self._inside = False
        self._gate = threading.Lock()
        self._requests: deque[tuple[Callable[[], None], threading.Event]] = deque()
        self._exit_requested = False
        self._nmi = False
        self._generation = cache.generation
        self._fresh = True
        self.counts = [0] * 9
        self._empty_jumps()
        st.q[XSAVE_AREA >> 3] = 0x37F
        st.bytes[XSAVE_AREA + 24 : XSAVE_AREA + 28] = (0x1F80).to_bytes(4, "little")
        self._closed = False

    # Called from any thread

    def kick(self) -> None:
        if not self._closed:
            st = self.st
            st.irq = 1
            st.bytes[BRK] = 1

    def request_exit(self) -> None:
        self._exit_requested = True
        if not self._closed:
            self.st.bytes[BRK] = 1

    def outside(self, work: Callable[[], None]) -> None:
        """Do ``work`` while this vCPU is certainly not in guest code, on whichever thread gets there first."""
        done = threading.Event()
        self._requests.append((work, done))
        while not done.is_set():
            self.st.bytes[BRK] = 1
            with self._gate:
                if not self._inside:
                    self._do_requests()
                    return
            done.wait(0.0005)

    def _do_requests(self) -> None:
        while self._requests:
            work, done = self._requests.popleft()
            try:
                work()
            finally:
                done.set()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.st.close()
            del self.emulator  # it knows us: without this the garbage collector would have to find out

    # The loop

    def run(self) -> Exit:
        self._arrive()
        st = self.st
        q = st.q  # a property costs three times as much
        counts = self.counts
        while True:
            try:
                if (q[_BRK] & 0xFFFF or (q[_IRQ] and q[_IFLAG])) and self._service():
                    return Exit(ExitReason.KICKED)
                if q[_SYSFL] & 0x100:  # TF
                    if self._step_and_trap():
                        return self._halted()
                    continue
                self._go()
                kind = q[_KIND]
                counts[kind] += 1
                if kind == Kind.EMULATE:
                    if self._emulate():
                        return self._halted()
                elif kind == Kind.PORT:
                    self._port()
                elif kind == Kind.MEM:
                    self._finish_access()
                elif kind == Kind.BREAK:
                    if st.mode & Mode.CODE32:
                        st.rip &= 0xFFFFFFFF
                elif kind == Kind.EXCEPTION:
                    raise GuestFault(Vector.PF, st.w_error, st.va)
                elif kind == Kind.PAIR:
                    self.vm.pairs.map(st.info)
                elif kind == Kind.SPAN:
                    self._respan()
                elif kind == Kind.FAULT:
                    raise self._host_fault()
            except GuestFault as fault:
                st.site = 0
                self._note(fault)
                try:
                    delivery.deliver_exception(self, fault)
                except TripleFault as triple:
                    return self._shutdown(triple.faults[1:])
            except TripleFault as triple:
                return self._shutdown(triple.faults)
            except _Unsupported as e:
                return Exit(ExitReason.FAILED, {"message": str(e)})

    def _shutdown(self, faults: list[GuestFault]) -> Exit:
        for fault in faults:
            self._note(fault)
        return Exit(ExitReason.SHUTDOWN)

    def _note(self, fault: GuestFault) -> None:
        self.exits.note("fault", fault.vector, 0, fault.error if fault.address is None else fault.address, self.st.rip)

    def _arrive(self) -> None:
        """Make this thread the vCPU's: its GS is the state block."""
        if getattr(_ON_THREAD, "vcpu", None) is not self:
            if _libc.syscall(_SYS_ARCH_PRCTL, _ARCH_SET_GS, ctypes.c_ulong(self.st.address)):
                raise HostError(
                    "the host kernel does not let a program set its GS base", "engine=translate", "use another host"
                )
            _ON_THREAD.vcpu = self
        if self._fresh:
            self._fresh = False
            self._flush(1)
            self.state_changed()

    def _service(self) -> bool:
        """Somebody wants the vCPU. True: leave ``run``."""
        st = self.st
        st.brk = 0
        if self._requests:
            with self._gate:
                self._do_requests()
        if self._exit_requested:
            self._exit_requested = False
            return True
        if not st.irq:
            return False
        st.site = 0  # the jump that led here goes elsewhere than to a handler
        interrupts = self.interrupts
        if self._nmi or interrupts.take_nmi():
            self._nmi = True
            if not st.nmi_blocked:
                self._nmi = False
                st.nmi_blocked = 1
                delivery.deliver_interrupt(self, Vector.NMI)
        if st.iflag:
            st.irq = 0
            if interrupts.pending():
                vector = interrupts.acknowledge()
                if vector is not None:
                    st.n_irq += 1
                    if not self._deliver(vector, 0, 0, st.rip):
                        delivery.deliver_interrupt(self, vector)
                if interrupts.pending():
                    st.irq = 1
        return False

    def _go(self) -> None:
        """Enter guest code at rip, translating what is not there."""
        q = self.st.q
        with self._gate:
            if self._generation != self.cache.generation:
                self._generation = self.cache.generation
                self._empty_jumps()
                q[_SITE] = 0
            site = q[_SITE] if q[_KIND] == Kind.JUMP else 0
            q[_SITE] = 0
            target = 0 if site else self._lookup(q[_RIP])
            if not target:
                if not site and q[_KIND] != Kind.JUMP:
                    return  # lookup left with something else to do
                target = self._translate(site)
            if target:
                q[_TARGET] = target
                self._inside = True
        if target:
            self._enter()
            self._inside = False
        else:
            self._alone()
            q[_KIND] = Kind.BREAK  # all is done for this round

    def _translate(self, site: int) -> int:
        """Find or make the block at rip and give its plain entry's host address; patch the jump at ``site`` to it.
        0 where rip is outside RAM."""
        st = self.st
        cache = self.cache
        va = st.rip
        pa = self._code_address(va)
        if pa is None:
            return 0
        mode = st.mode
        key = pa << 12 | mode
        block = cache.blocks.get(key)
        if block is not None and block.pa2 is not None and block.pa2 != self._second_page(va):
            cache.kill(block)
            block = None
        if block is None:
            generation = cache.generation
            block = cache.translate(pa, mode, lambda: self._second_page(va))
            if cache.generation != generation:
                self._generation = cache.generation
                self._empty_jumps()
                site = 0
        elif block.pa2 is not None:
            self._second_page(va)
        entry = cache.buffer.rx + block.entry
        if site and block.pa2 is None:
            at = site - cache.buffer.rx
            cache.code[at : at + 4] = (entry - (site + 4)).to_bytes(4, "little", signed=True)
        st.page = va & ~4095
        return entry

    def _respan(self) -> None:
        """The block at rip lies on two pages: bring the second into the TLB; if it has changed, drop the block."""
        st = self.st
        with self._gate:
            pa = self._code_address(st.rip)
            block = None if pa is None else self.cache.blocks.get(pa << 12 | st.mode)
            if block is not None and block.pa2 != self._second_page(st.rip):
                self.cache.kill(block)

    def _code_address(self, va: int) -> int | None:
        """Physical address of code at ``va``; None where it is no RAM."""
        st = self.st
        failed = self._fetch(va)
        if failed == 0:
            return st.w_pa
        if failed == 255:
            self._not_legacy()
            return None
        raise self._walk_fault(failed, va)

    def _second_page(self, va: int) -> int:
        """Physical address of the page behind the one that ``va`` is on."""
        st = self.st
        mask = 0xFFFFFFFF if st.mode & Mode.CODE32 else _M64
        pa = self._code_address((va & ~4095) + 4096 & mask)
        if pa is None:
            raise _Unsupported(f"an instruction at {va:#x} continues outside RAM")
        return pa

    def _walk_fault(self, failed: int, va: int) -> GuestFault:
        if failed == Vector.PF:
            return GuestFault(Vector.PF, self.st.w_error, va)
        return GuestFault(Vector.GP, 0)

    def _not_legacy(self) -> None:
        st = self.st
        if st.cr0 & Cr0.PG and not st.efer & Efer.LMA:
            raise _Unsupported("the guest turned on paging outside long mode, which this engine does not have yet")

    def _empty_jumps(self) -> None:
        """A jump cache without targets: every way leads to the stub that tries the next one."""
        st = self.st
        for array in range(3):
            way = EMPTY_JC.to_bytes(8, "little") + self.cache.stubs[f"second{array}"].to_bytes(8, "little")
            at = JC + array * JC_ARRAY
            st.bytes[at : at + JC_ARRAY] = way * (2 * JC_SETS)

    # Rare instructions

    def _halted(self) -> Exit:
        return Exit(ExitReason.HALTED, {"interrupts": bool(self.st.iflag)})

    def _emulate(self) -> bool:
        """The instruction at rip is Python's. True: it was HLT."""
        st = self.st
        if st.nmi_blocked and self._instruction().mnemonic in _IRETS:
            st.nmi_blocked = 0
            self.kick()
        try:
            halted = self.emulator.step()
        except GuestFault as fault:
            if fault.vector == Vector.UD and self._device_not_available():
                raise GuestFault(Vector.NM) from None
            raise
        if self.emulator.shadow and not halted:
            return self._alone()
        return halted

    def _instruction(self) -> Instruction:
        data, offset = self._bytes_at_rip()
        return Decoder(self._bits, data, ip=offset).decode()

    @property
    def _bits(self) -> int:
        return 32 if self.st.mode & Mode.CODE32 else 16 if self.st.mode & Mode.CODE16 else 64

    def _bytes_at_rip(self) -> tuple[bytes, int]:
        """Up to 15 bytes of code at rip, and rip's offset in its page."""
        st = self.st
        va = st.rip
        supervisor = st.cpl < 3
        offset = va & 4095
        room = 4096 - offset
        data = self.read(va, min(15, room), supervisor)
        if room < 15 and Decoder(self._bits, data, ip=offset).decode().is_invalid:
            self.physical(va + room, execute=True)
            data += self.read(va + room, 15 - room, supervisor)
        return data, offset

    def _device_not_available(self) -> bool:
        """Whether the instruction at rip, not lowered in this mode, raises #NM rather than #UD (SDM 3, table 2-2)."""
        st = self.st
        m = self._instruction().mnemonic
        if m in _STATE:
            return bool(st.cr0 & Cr0.TS or (st.cr0 & Cr0.EM and m in _FX))
        if m in _X87:
            return bool(st.cr0 & (Cr0.EM | Cr0.TS))
        if m in _SSE:
            return bool(st.cr0 & Cr0.TS and not st.cr0 & Cr0.EM and st.cr4 & Cr4.OSFXSR)
        return bool(m in _AVX and st.cr0 & Cr0.TS and st.cr4 & Cr4.OSXSAVE and st.xcr0 & 6 == 6)

    def _step_and_trap(self) -> bool:
        """RFLAGS.TF: one instruction, or one iteration of a REP string instruction, then #DB."""
        st = self.st
        ins = self._instruction()
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
        st.dr6 |= _DR6_BS
        delivery.trap(self, Vector.DB, st.rip)
        return halted

    def _alone(self, missed: bool = False) -> bool:
        """Run the one instruction at rip, looking for nothing before or after it. True: it was HLT. ``missed``: its
        access in ``st.desc`` is known to need a buffer."""
        st = self.st
        data, offset = self._bytes_at_rip()
        ins = Decoder(self._bits, data, ip=offset).decode()
        if ins.mnemonic in _LEAVING or (missed and ins.is_string_instruction):
            return self._emulate()
        buffers: dict[int, int] = {}
        pending: dict[int, tuple[int, int]] = {}
        if missed:
            self._fill_bounce(st.desc >> 26 & 3, buffers, pending)
        while True:
            with self._gate:
                st.target = self.cache.single(data, offset, st.mode, buffers)
                st.page = st.rip & ~4095
                st.single = 1
                start = st.rip
                self._inside = True
            self._enter()
            self._inside = False
            st.single = 0
            kind = st.kind
            if kind == Kind.JUMP:
                for number, (va, size) in pending.items():
                    at = BOUNCE + number * BOUNCE_SIZE + buffers[number]
                    self.write(va, bytes(st.bytes[at : at + size]))
                if st.mode & Mode.CODE32:
                    st.rip &= 0xFFFFFFFF
                return False
            if kind == Kind.PORT:
                self._port()
                return False
            st.rip = start
            if kind == Kind.MEM:
                number = st.desc >> 26 & 3
                if number in buffers or ins.is_string_instruction:
                    return self._emulate()
                self._fill_bounce(number, buffers, pending)
            elif kind == Kind.PAIR:
                self.vm.pairs.map(st.info)
            elif kind == Kind.EMULATE:
                return self._emulate()
            elif kind == Kind.EXCEPTION:
                raise GuestFault(Vector.PF, st.w_error, st.va)
            elif kind == Kind.FAULT:
                raise self._host_fault()
            elif kind == Kind.BREAK:
                return False

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
        ins = self._instruction()
        if number == 0 and any(ins.op_kind(i) == OpKind.MEMORY for i in range(ins.op_count)):
            return operand_segment(ins) == Register.SS
        return bool(ins.is_stack_instruction)

    def _finish_access(self) -> None:
        """An operand lies in a device, in code, or nowhere. Code is forgotten and the instruction goes on by itself,
        unless it overwrites itself; else it runs with a buffer in the operand's place."""
        st = self.st
        va, desc = st.va, st.desc
        size = desc >> 12 & 1023
        if desc >> 22 & 3 and (va & 4095) + size <= 4096:
            gpa = self._walk(va, _WRITE, st.mode & 3) or st.w_pa
            if gpa > 255 and self.memory.is_ram(gpa, size):
                here = self._fetch(st.rip) or st.w_pa
                if abs(gpa - here) > _NEAR:
                    if desc >> 28 & 1:  # a string instruction: it will go on over the page
                        size = 4096 - (gpa & 4095)
                    with self._gate:
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
        if info & 0x10:
            value = q[_RAX] & mask
            self.exits.note("out", port, size, value, q[_RIP])
            self.io.port_write(port, size, value)
        else:
            value = self.io.port_read(port, size) & mask
            self.exits.note("in", port, size, value, q[_RIP])
            q[_RAX] = value if size == 4 else q[_RAX] & ~mask | value

    def _host_fault(self) -> GuestFault:
        """The host CPU faulted in translated code: which exception of the guest's that is."""
        st = self.st
        fault = HostFault(st.info)
        offset = self.cache.locate(st.va) if not st.single else st.rip & 4095
        if offset is None or fault.vector is None:
            at = st.va - self.cache.buffer.rx
            raise _Unsupported(f"host {fault} at {at:#x} of the code buffer, guest page {st.page:#x}")
        st.rip = st.page | offset
        if fault.vector == Vector.GP and self._instruction().mnemonic in _MASKED_BY_XCR0:
            st.rax, st.rdx, st.flags = st.t0, st.t1, st.t2 & 0xCD5 | 2
        if fault.vector == Vector.XM and not st.cr4 & Cr4.OSXMMEXCPT:
            return GuestFault(Vector.UD)
        error = 0 if fault.vector == Vector.GP else None
        return GuestFault(fault.vector, error)

    # port.CpuPort

    def physical(self, va: int, *, write: bool = False, execute: bool = False, supervisor: bool = False) -> int:
        st = self.st
        array = 0 if supervisor else st.mode & 3
        failed = self._walk(va, (_WRITE if write else 0) | (_FETCH if execute else 0), array)
        if failed:
            if failed == 255:
                self._not_legacy()
            raise self._walk_fault(failed, va)
        return st.w_pa

    def _pieces(self, va: int, size: int, write: bool, supervisor: bool) -> list[tuple[int, int]]:
        """(physical address, length) of what [va, va + size) is made of; every page has been checked."""
        long = self.st.efer & Efer.LMA
        mask = _M64 if long else 0xFFFFFFFF
        if long and (va & 4095) + size > 4096 and not canonical(va + size - 1 & mask):
            raise GuestFault(Vector.GP, 0)
        pieces = []
        while size:
            n = min(size, 4096 - (va & 4095))
            pieces.append((self.physical(va, write=write, supervisor=supervisor), n))
            va = va + n & mask
            size -= n
        return pieces

    def read(self, va: int, size: int, supervisor: bool = False) -> bytes:
        out = b""
        for gpa, n in self._pieces(va, size, False, supervisor):
            if self.memory.is_ram(gpa, n):
                out += self.memory.read(gpa, n)
            else:
                for at, k in _words(gpa, n):
                    value = self.io.mmio_read(at, k)
                    self.exits.note("read", at, k, value, self.st.rip)
                    out += value.to_bytes(k, "little")
        return out

    def write(self, va: int, data: bytes, supervisor: bool = False) -> None:
        at = 0
        for gpa, n in self._pieces(va, len(data), True, supervisor):
            piece = data[at : at + n]
            if self.memory.is_ram(gpa, n):
                self.memory.write(gpa, piece)
            else:
                for address, k in _words(gpa, n):
                    i = address - gpa
                    value = int.from_bytes(piece[i : i + k], "little")
                    self.exits.note("write", address, k, value, self.st.rip)
                    self.io.mmio_write(address, k, value)
            at += n

    def check_write(self, va: int, size: int, supervisor: bool = False) -> None:
        self._pieces(va, size, True, supervisor)

    def ram(self, va: int, size: int, *, write: bool = False) -> int | None:
        gpa = self.physical(va, write=write)
        return gpa if self.memory.is_ram(gpa, size) else None

    def flush_tlb(self, global_too: bool) -> None:
        self._flush(1 if global_too else 0)

    def invalidate_page(self, va: int) -> None:
        self._invalidate(va)

    def state_changed(self) -> None:
        st = self.st
        cr0, cr4, efer = st.cr0, st.cr4, st.efer
        legality = 0
        if not cr0 & (Cr0.EM | Cr0.TS):
            legality = Legality.X87
            if cr4 & Cr4.OSFXSR:
                legality |= Legality.SSE
                if cr4 & Cr4.OSXSAVE and st.xcr0 & 6 == 6:
                    legality |= Legality.AVX
        if not cr4 & Cr4.TSD:
            legality |= Legality.TSC
        if cr4 & Cr4.OSXSAVE:
            legality |= Legality.OSXSAVE
        mode = legality << Mode.CLASS_SHIFT
        attributes = st.cs_attr
        if not (efer & Efer.LMA and attributes & 0x2000):
            mode |= Mode.CODE32 if attributes & 0x4000 else Mode.CODE16
            if mode & Mode.CODE16 or st.cs_base:
                raise _Unsupported("the guest runs 16-bit code or a segment base, which this engine does not have yet")
        if st.cpl == 3:
            mode |= Mode.USER
        elif st.sysfl & Rflags.AC:
            mode |= Mode.AC
        if mode >> Mode.CLASS_SHIFT != st.mode >> Mode.CLASS_SHIFT and getattr(_ON_THREAD, "vcpu", None) is self:
            self._flush_jumps()  # their tags do not tell legality classes apart
        st.mode = mode

    # State

    def get_state(self) -> dict[str, Any]:
        st = self.st
        state: dict[str, Any] = {name: getattr(st, name) for name in GENERAL}
        state["rip"] = st.rip
        state["rflags"] = st.rflags
        for name in (*SEGMENTS, *SYSTEM_SEGMENTS):
            state[name] = {
                "selector": getattr(st, f"{name}_sel"),
                "base": getattr(st, f"{name}_base"),
                "limit": getattr(st, f"{name}_limit"),
                "attributes": getattr(st, f"{name}_attr"),
            }
        state["gdtr"] = {"base": st.gdt_base, "limit": st.gdt_limit}
        state["idtr"] = {"base": st.idt_base, "limit": st.idt_limit}
        for name in _PLAIN:
            state[name] = getattr(st, name)
        state["xsave"] = bytes(st.bytes[XSAVE_AREA : XSAVE_AREA + 832])
        state["msrs"] = self.msrs.save()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        st = self.st
        for name in (*GENERAL, "rip", "rflags", *_PLAIN):
            if name in state:
                setattr(st, name, state[name])
        for name in (*SEGMENTS, *SYSTEM_SEGMENTS):
            if name in state:
                segment = state[name]
                setattr(st, f"{name}_sel", segment["selector"])
                setattr(st, f"{name}_base", segment["base"])
                setattr(st, f"{name}_limit", segment["limit"])
                setattr(st, f"{name}_attr", segment["attributes"])
        for name, short in (("gdtr", "gdt"), ("idtr", "idt")):
            if name in state:
                setattr(st, f"{short}_base", state[name]["base"])
                setattr(st, f"{short}_limit", state[name]["limit"])
        if "msrs" in state:
            self.msrs.load(state["msrs"])
        if "xsave" in state:
            data = state["xsave"][:832]
            st.bytes[XSAVE_AREA : XSAVE_AREA + len(data)] = data
            st.bytes[XSAVE_AREA + 520 : XSAVE_AREA + 576] = bytes(56)
        if "cs" in state:
            st.cpl = st.cs_sel & 3 if st.cr0 & Cr0.PE else 0
        st.kind = Kind.BREAK
        st.site = 0
        self._fresh = True


_PLAIN = ("cr0", "cr2", "cr3", "cr4", "efer", "xcr0", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
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
_LEAVING = (Mnemonic.IRETQ, Mnemonic.SYSCALL, Mnemonic.SYSRETQ)
"""In translated code these go on in the guest."""
_COMPARES = tuple(getattr(Mnemonic, op + size) for op in ("CMPS", "SCAS") for size in "BWDQ")
_IRETS = (Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ)


class _Unsupported(Exception):
    """The guest needs what this engine does not have."""


def _words(gpa: int, n: int) -> list[tuple[int, int]]:
    """Naturally sized accesses that [gpa, gpa + n) is made of: a device sees what the instruction did where it can."""
    words = []
    while n:
        k = n if n in (1, 2, 4, 8) else 8 if n > 8 else 4 if n > 4 else 2 if n > 2 else 1
        words.append((gpa, k))
        gpa += k
        n -= k
    return words
