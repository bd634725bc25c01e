"""A vCPU's loop.

:meth:`TranslateVcpu.run` enters guest code, and each time guest code comes back does what it came for: translate a
block, finish an access to a device or to a page of code, emulate a rare instruction, deliver an interrupt. All of a
vCPU but ``kick`` and ``request_exit`` happens on its thread.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from skep.contracts.interrupts import LocalInterrupts
from skep.engine.amd64 import cpuid as cpuid_models
from skep.engine.amd64.debugregisters import DR6_HITS, numbers
from skep.engine.amd64.registers import Attr, Cr0, Cr4, Efer, Rflags, Vector
from skep.engine.amd64.tsc import tsc_hz
from skep.engine.contract import Activity, Exit, ExitReason
from skep.engine.debug import Debug
from skep.engine.exits import Exits
from skep.engine.translate import breakpoints, delivery, identity, saved, segments
from skep.engine.translate.access import Unsupported
from skep.engine.translate.alone import Alone
from skep.engine.translate.emulate import Emulator
from skep.engine.translate.forms import Legality
from skep.engine.translate.layout import BRK, BRK_STI, HALTED, OFFSETS, PDPTE, XSAVE_AREA, Kind, Mode, StateBlock
from skep.engine.translate.loan import ApicLoan
from skep.engine.translate.modelspecific import ModelSpecific
from skep.engine.translate.port import DebuggerStop, GuestFault, TripleFault
from skep.engine.translate.shared import Shared
from skep.engine.translate.statistics import EXITS
from skep.engine.translate.turns import PATIENCE
from skep.engine.translate.watch import Watch
from skep.errors import HostError

RAISED = (GuestFault, TripleFault, DebuggerStop, Unsupported)
"""What running an instruction, or delivering an event, may raise."""
_M64 = 0xFFFF_FFFF_FFFF_FFFF
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_ARCH_PRCTL, _ARCH_SET_GS = 158, 0x1001
_ON_THREAD = threading.local()
"""Whose state block the thread's GS is."""
_BRK, _IRQ, _IFLAG, _SYSFL, _KIND, _INJECT, _APIC = (
    OFFSETS[name] >> 3 for name in ("brk", "irq", "iflag", "sysfl", "kind", "inject", "apic")
)
"""Fields of the state block as indices of its words, where every exit comes by."""


class TranslateVcpu(Alone):
    """One vCPU (:class:`skep.engine.contract.Vcpu`), and what its Python parts ask of it (:class:`port.CpuPort`)."""

    def __init__(self, shared: Shared, index: int, interrupts: LocalInterrupts) -> None:
        self.index = index
        self._shared = shared
        self.io = shared.io
        self.interrupts = interrupts
        self.memory = shared.memory
        self.cache = shared.cache
        self.pairs = shared.pairs
        st = self.st = StateBlock()
        cache = shared.cache
        st.ram = shared.memory.base
        st.low_end = shared.memory.low_size
        st.high_base = shared.memory.high_base
        st.high_size = shared.memory.high_size
        st.overlays, st.frames = shared.overlays.address, shared.overlays.frames
        st.codemask = cache.map.mask_address
        st.codebytes = cache.map.bytes_address
        st.wmapped = cache.map.wmapped_address
        st.hash = cache.blocks.hash_address
        st.rw_delta = cache.buffer.rw - cache.buffer.rx
        st.constants = shared.constants
        st.pairs = self.pairs.address
        st.pair_tags = self.pairs.tags_address
        st.spins = PATIENCE
        st.pdep_mask = 0x3FFE0
        for name, address in cache.stubs.items():
            if name in OFFSETS:
                setattr(st, name, address)
        clock = shared.clock
        model = cpuid_models.make(
            shared.cpu_model, tsc_hz(), apic_id=index, cpus=shared.max_vcpus, kvm_clock=clock is not None
        )
        identity.write(st, model)
        self.exits = Exits()
        self.msrs = ModelSpecific(st, interrupts, model, self.exits, None if clock is None else clock.place())
        self.emulator = Emulator(self, model, self.msrs)
        self.msrs.set_tsc_offset(shared.tsc_offset)
        routines = cache.routines

        def routine(name: str, arguments: int) -> Any:
            return ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * arguments)(routines[name])

        self._walk = routine("walk", 3)
        self._fetch = routine("fetch_page", 1)
        self._flush = routine("flush_tlb", 1)
        self._flush_jumps = routine("flush_jumps", 0)
        self._invalidate = routine("invalidate", 1)
        self._enter: Callable[[], Any] = ctypes.CFUNCTYPE(None)(cache.stubs["enter"])
        self._enter_at = ctypes.CFUNCTYPE(None)(cache.stubs["enter_at"])
        self._leave = ctypes.CFUNCTYPE(None)(cache.stubs["leave"])
        self._give_turn = ctypes.CFUNCTYPE(None)(cache.stubs["give_turn"])
        if shared.turns is not None:
            shared.turns.seat(st, index)
        self._scratch = cache.scratch(index)
        self._world = cache.world
        self._world.add(st)
        self._exit_requested = False
        self._nmi = False
        self._loan = ApicLoan(st, shared.ticker, routines)
        self._tell = ctypes.PYFUNCTYPE(None, ctypes.c_uint64)(cache.stubs["kick"])
        self._barrier = ctypes.PYFUNCTYPE(None)(routines["barrier"])
        shared.directory.enter(st, index)
        shared.interrupts.append(interrupts)
        self._fresh = True
        self.hits = 0
        self.debug = Debug()
        self._rearmed = False
        self._stopped_at: int | None = None
        """rip, where it left for a debugger."""
        self.counts = [0] * 15
        self.watch: Watch | None = None
        st.q[XSAVE_AREA >> 3] = 0x37F
        st.bytes[XSAVE_AREA + 24 : XSAVE_AREA + 28] = (0x1F80).to_bytes(4, "little")
        self._closed = False

    # Called from any thread

    def kick(self) -> None:
        if not self._closed:
            self._tell(self.st.address)

    def request_exit(self) -> None:
        self._exit_requested = True
        self.kick()

    def frozen(self) -> bool:
        if self._closed or not self._world.frozen or not self.st.parked:
            return False
        self._loan.rest()
        self.interrupts.settle()
        return True

    @property
    def activity(self) -> Activity:
        return Activity.HALTED if not self._closed and self.st.parked == HALTED else Activity.ACTIVE

    def tally(self) -> dict[str, int]:
        return {name: count for kind, name in EXITS.items() if (count := self.counts[kind])}

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loan.close()
            self._world.remove(self.st)
            self.st.close()
            del self.emulator  # it knows us: without this the garbage collector would have to find out

    # The loop

    def observe(self) -> None:
        """Keep what costs time to keep, from now on."""
        self.watch = Watch(lambda: self.st.slept)
        self._enter = self.watch.entering(self._enter)

    def run(self) -> Exit:
        self._arrive()
        if self._stopped_at is not None:
            if self._stopped_at == self.st.rip and self.debug.places:
                self.st.sysfl |= Rflags.RF
            self._stopped_at = None
        body = self._step if self.debug.step else self._run
        try:
            if self.watch is None:
                return body()
            left: Exit = self.watch.run(body)
            return left
        finally:
            if self._shared.turns is not None:
                self._give_turn()
            self._loan.rest()
            self.interrupts.settle()

    def _run(self) -> Exit:
        st = self.st
        q = st.q  # a property costs three times as much
        counts = self.counts
        while True:
            try:
                if self.hits and (stop := self._hit()):
                    return self._for_debugger(stop)
                if (q[_BRK] & 0xFFFF or (q[_IRQ] and q[_IFLAG])) and self._service():
                    return Exit(ExitReason.KICKED)
                if q[_SYSFL] & 0x10100 and not q[_INJECT]:  # TF, RF
                    if self._step_and_trap():
                        return self._halted()
                    continue
                if not q[_APIC]:
                    self.interrupts.lend(self._loan)
                self._enter()
                kind = q[_KIND]
                counts[kind] += 1
                if kind == Kind.JUMP:
                    if self._translate():
                        return self._halted()
                elif kind == Kind.EMULATE:
                    if self.watch is not None:
                        self.watch.rare[self.instruction().mnemonic] += 1
                    if self._emulate(True):
                        return self._halted()
                elif kind == Kind.PORT:
                    self._port()
                elif kind == Kind.MSR:
                    self.emulator.step_msr(bool(st.info))
                elif kind == Kind.HALT:
                    if not self._interrupted():
                        return self._halted()
                elif kind == Kind.MEM:
                    self._finish_access()
                elif kind == Kind.EXCEPTION:
                    raise GuestFault(Vector.PF, st.w_error, st.va)
                elif kind == Kind.SEGMENT:
                    raise self.refused()
                elif kind == Kind.PAIR:
                    self.pairs.map(st.info, self._world)
                elif kind == Kind.SPAN:
                    self._respan()
                elif kind == Kind.FAULT:
                    raise self._host_fault()
                elif kind == Kind.PLAIN:
                    self._translate_plain()
                elif kind == Kind.DELIVER:
                    self._deliver()
            except RAISED as error:
                left = self._raised(error)
                if left is not None:
                    return left

    def _raised(self, error: Exception) -> Exit | None:
        """What an instruction or a delivery ended with. None: the guest has it."""
        match error:
            case GuestFault():
                self.st.site = self.hits = 0
                self._note(error)
                try:
                    delivery.deliver_exception(self, error)
                except TripleFault as triple:
                    return self._shutdown(triple.faults[1:])
                return None
            case TripleFault():
                return self._shutdown(error.faults)
            case DebuggerStop():
                return self._for_debugger(error.places, instruction=error.instruction)
        return Exit(ExitReason.FAILED, {"message": str(error)})

    def _step(self) -> Exit:
        """One instruction for a debugger."""
        st = self.st
        if self._exit_requested:
            self._exit_requested = False
            return Exit(ExitReason.KICKED)
        stop = 0
        try:
            if st.inject:
                self._deliver()
            if st.sysfl & Rflags.TF:
                halted = self._step_and_trap()
            else:
                self.stop_at_breakpoint()
                halted = self._one()
            stop = self._hit()
            if halted:
                return self._halted()
        except RAISED as error:
            left = self._raised(error)
            if left is not None:
                return left
        return self._for_debugger(stop, step=True)

    def _hit(self) -> int:
        """The breakpoints that the last instruction has hit: #DB for the guest's, and a debugger's, which are it."""
        stop = self.hits & DR6_HITS if self.debug.places else 0
        self.hits &= ~stop
        if self.hits:
            self.report_hits()
        return stop

    def _for_debugger(self, places: int, *, step: bool = False, instruction: bool = False) -> Exit:
        self._stopped_at = self.st.rip
        return Exit(ExitReason.DEBUG, {"places": numbers(places), "step": step, "instruction": instruction})

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
            st = self.st
            self.msrs.apic_changed()
            breakpoints.watch(st, self.debug.places)
            if st.cr0 & Cr0.PG and st.cr4 & Cr4.PAE and not st.efer & Efer.LMA:
                entries = self.read_physical(st.cr3 & 0xFFFFFFE0, 32)
                st.bytes[PDPTE : PDPTE + 32] = entries  # no state of the architecture: taken from memory anew
            self.state_changed()
        if self._rearmed:
            self._rearmed = False
            self.breakpoints_changed()

    def _service(self) -> bool:
        """Somebody wants the vCPU. True: leave ``run``."""
        st = self.st
        st.bytes[BRK] = 0
        st.bytes[BRK_STI] = 0
        self._barrier()  # what other vCPUs post from now on sets it again
        if st.inject:
            self._deliver()
        if self._exit_requested:
            self._exit_requested = False
            return True
        wanted = st.wanted
        st.irq = st.wanted = 0  # before anything is asked: what comes from now on sets it again
        if st.ring:
            st.ring = 0
            for each in tuple(self._shared.interrupts):
                each.collect()
        st.site = 0  # the jump that led here goes elsewhere than to a handler
        interrupts = self.interrupts
        if st.nmi_blocked:  # one waits for IRET, however many come (SDM 3, 6.7.1)
            while interrupts.take_nmi():
                self._nmi = True
        elif self._nmi or interrupts.take_nmi():
            self._nmi = False
            st.irq = st.wanted = st.nmi_blocked = 1
            delivery.deliver_interrupt(self, Vector.NMI)
        if not st.iflag:
            st.irq = 1
            if wanted:
                st.wanted = 1
        elif interrupts.pending():
            vector = interrupts.acknowledge()
            if vector is not None:
                st.n_irq += 1
                st.inject = 0x100 | vector
            if interrupts.pending():
                st.irq = st.wanted = 1
        return False

    def _interrupted(self) -> bool:
        """Whether the vCPU, which executed HLT, need not sleep."""
        st = self.st
        if self._exit_requested or not st.iflag or not self.interrupts.pending():
            return False
        st.irq = 1
        return True

    def _deliver(self) -> None:
        """The interrupt that was to be delivered on the way in, here."""
        vector = self.st.inject & 0xFF
        self.st.inject = 0
        delivery.deliver_interrupt(self, vector)

    def _translate(self) -> bool:
        """Make the block at rip unless it is there, and patch the jump that led to it. Where nothing can be translated,
        run the one instruction; True: it was HLT."""
        st = self.st
        cache = self.cache
        va = self.linear_rip
        if st.mode & Mode.SEGMENTED and self._beyond(va):
            return self._alone()
        if st.watch_code and breakpoints.page_has_code_breakpoint(st, va):
            self.stop_at_breakpoint()
            return self._alone()
        with self._world.lock:
            pa = self.code_address(va)
            if pa is not None:
                mode = st.mode
                block = cache.blocks.get(pa << Mode.BITS | mode)
                if block is not None and block.pa2 is not None and block.pa2 != self.second_page(va):
                    with self._world.stopped():
                        cache.drop(block)
                    block = None
                if block is None:
                    block = cache.translate(pa, mode, lambda: self.second_page(va))
                    if self._shared.names is not None:
                        size = block.end - block.start
                        self._shared.names.block(cache.buffer.rx + block.start, size, bool(mode & Mode.USER), va)
                elif block.pa2 is not None:
                    self.second_page(va)
                site = st.site
                if site and block.pa2 is None:
                    cache.link(site, block)
        return self._alone() if pa is None else False  # outside RAM

    def _beyond(self, va: int) -> bool:
        """Whether rip, at the linear address ``va``, is where its segment lets no whole page be run (narrow.py); so is
        the end of the last page that may be run, because an instruction might go on in the next."""
        st = self.st
        page = st.rip - (va & 4095)
        return st.rip >= st.code_end or (va & 4095 > 4096 - 15 and page + 4096 >= st.code_end)

    def _translate_plain(self) -> None:
        """Make the plain twin of the block at rip, which fill_range will find when it is asked again."""
        st = self.st
        with self._world.lock:
            pa = self.code_address(st.rip)
            mode = st.mode | Mode.PLAIN
            if pa is not None and pa << Mode.BITS | mode not in self.cache.blocks:
                self.cache.translate(pa, mode, lambda: self.second_page(st.rip))

    def _respan(self) -> None:
        """The block at rip lies on two pages: bring the second into the TLB; if it has changed, drop the block."""
        st = self.st
        va = self.linear_rip
        if st.watch_code or (st.mode & Mode.SEGMENTED and self._beyond(va)):
            self._alone()
            return
        with self._world.lock:
            pa = self.code_address(va)
            block = None if pa is None else self.cache.blocks.get(pa << Mode.BITS | st.mode)
            if block is not None and block.pa2 != self.second_page(va):
                with self._world.stopped():
                    self.cache.drop(block)

    def set_debug(self, debug: Debug) -> None:
        self.debug = debug
        self._rearmed = True

    def _halted(self) -> Exit:
        return Exit(ExitReason.HALTED, {"interrupts": bool(self.st.iflag)})

    # What is derived from the state

    def state_changed(self) -> None:
        st = self.st
        cr0, cr4, efer = st.cr0, st.cr4, st.efer
        legality = 0
        if not cr0 & (Cr0.EM | Cr0.TS):
            legality = Legality.X87
            if cr4 & Cr4.OSFXSR:
                legality |= Legality.SSE
        if not cr0 & Cr0.TS and cr4 & Cr4.OSXSAVE and st.xcr0 & 6 == 6:  # neither EM nor OSFXSR counts (SDM 2, 2.4)
            legality |= Legality.AVX
        if not cr4 & Cr4.TSD:
            legality |= Legality.TSC
        if cr4 & Cr4.OSXSAVE:
            legality |= Legality.OSXSAVE
        if st.cpl in (1, 2):
            legality |= Legality.INNER
        if st.watch:
            legality |= Legality.WATCHED
        if st.cpl == 3 and st.sysfl & Rflags.AC and cr0 & Cr0.AM:
            legality |= Legality.ALIGNED
        mode = legality << Mode.CLASS_SHIFT
        attributes = st.cs_attr
        if not (efer & Efer.LMA and attributes & Attr.L):
            mode |= segments.narrow_mode(st)
        if st.cpl == 3:
            mode |= Mode.USER
        elif st.sysfl & Rflags.AC:
            mode |= Mode.AC
        if mode >> Mode.CLASS_SHIFT != st.mode >> Mode.CLASS_SHIFT and getattr(_ON_THREAD, "vcpu", None) is self:
            self._flush_jumps()  # their tags do not tell legality classes apart
        st.mode = mode

    def breakpoints_changed(self) -> None:
        before = self.st.watch | self.st.watch_code
        breakpoints.watch(self.st, self.debug.places)
        if before or self.st.watch or self.st.watch_code:
            self._flush(1)
        self.state_changed()

    # State

    def get_state(self) -> dict[str, Any]:
        state = saved.save(self.st, self.msrs)
        if self._nmi:
            state["nmi_pending"] = 1
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        saved.load(state, self.st, self.msrs)
        if "rip" in state:
            self._nmi = bool(state.get("nmi_pending", 0))
            if self._nmi:
                self.kick()
        self._fresh = True
