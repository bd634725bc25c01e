"""One vCPU under KVM: the run loop, and its state in architectural names.

A kick is never lost: ``immediate_exit`` is cleared before anything is looked at, and set before the signal is sent, so
a kick between the look and the entry makes the entry return at once.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any, TypeVar

from skep.contracts.constantports import ConstantPorts
from skep.contracts.interrupts import HostedInterrupts, LocalInterrupts
from skep.contracts.io import IoSpace
from skep.engine.amd64 import kvmclock, msrs
from skep.engine.amd64.cpuid import AVX_OFFSET, AVX_SIZE
from skep.engine.amd64.kvmclock import WallClock
from skep.engine.amd64.registers import SEGMENTS, Rflags
from skep.engine.contract import Activity, Exit, ExitReason
from skep.engine.debug import Debug
from skep.engine.exits import Exits
from skep.engine.kvm import failures, uapi
from skep.engine.kvm.counted import Counted, by_cause
from skep.engine.kvm.debugger import Debugger
from skep.engine.kvm.entry import Entry
from skep.engine.kvm.interrupts import Hosted, Injected, KvmApic, Way
from skep.engine.kvm.posted import EMPTY, Posted
from skep.engine.kvm.streams import Streams
from skep.engine.kvm.uapi import ioctl
from skep.errors import InternalError
from skep.locks import Lock

KICK_SIGNAL = signal.SIGRTMIN + 5
XSAVE_SIZE = AVX_OFFSET + AVX_SIZE
"""Of the standard format, what the CPU models offer."""

_SEGMENT_FIELDS = {name: name for name in SEGMENTS} | {"tr": "tr", "ldtr": "ldt"}
_TABLE_FIELDS = {"gdtr": "gdt", "idtr": "idt"}
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
_ATTRIBUTE_BITS = (("type", 0, 15), ("s", 4, 1), ("dpl", 5, 3), ("present", 7, 1), ("avl", 12, 1), ("l", 13, 1),
                   ("db", 14, 1), ("g", 15, 1))  # fmt: skip
_PRESENT = 1 << 7
_ACTIVITY = {
    uapi.MP_STATE_RUNNABLE: Activity.ACTIVE,
    uapi.MP_STATE_HALTED: Activity.HALTED,
    uapi.MP_STATE_UNINITIALIZED: Activity.WAITING,
    uapi.MP_STATE_INIT_RECEIVED: Activity.WAITING,
    uapi.MP_STATE_SIPI_RECEIVED: Activity.WAITING,
}
_MP_STATE = {
    Activity.ACTIVE: uapi.MP_STATE_RUNNABLE,
    Activity.HALTED: uapi.MP_STATE_HALTED,
    Activity.WAITING: uapi.MP_STATE_INIT_RECEIVED,
}

# Where things are in the shared page: bytes, or as many units of the size of what is there.
_WANTED = uapi.Run.request_interrupt_window.offset // 2
"""With immediate_exit behind it: whether anything is wanted but to go on."""
_CR8 = uapi.Run.cr8.offset // 8
_REASON = uapi.Run.exit_reason.offset // 4
_LEFT = uapi.Run.exit.offset
_exit_io = struct.Struct("<BBHIQ").unpack_from
"""ExitIo, at once."""
_MMIO_ADDRESS, _MMIO_DATA = (_LEFT + uapi.ExitMmio.phys_addr.offset) // 8, _LEFT + uapi.ExitMmio.data.offset
_MMIO_LENGTH, _MMIO_IS_WRITE = (_LEFT + uapi.ExitMmio.len.offset) // 4, _LEFT + uapi.ExitMmio.is_write.offset
_OUT = uapi.EXIT_IO_OUT
_IO = uapi.EXIT_IO
_NONE_KNOWN = bytes(0x10000)
_SYNCED_RIP = (uapi.Run.s.offset + uapi.Regs.rip.offset) // 8

_UNFINISHED = frozenset((uapi.EXIT_IO, uapi.EXIT_MMIO, uapi.EXIT_X86_RDMSR, uapi.EXIT_X86_WRMSR))
"""Reasons with an instruction that the next KVM_RUN finishes, perhaps by an exception: KVM would forget an interrupt
that was injected before that. So where one waits, it is finished first."""
_REASONS = 64
"""More than KVM has for leaving the guest."""

_S = TypeVar("_S", bound=ctypes.Structure)


class KvmVcpu:
    """See :class:`skep.engine.contract.Vcpu`."""

    def __init__(
        self,
        index: int,
        fd: int,
        run_size: int,
        io: IoSpace,
        interrupts: LocalInterrupts,
        gate: Lock,
        posted: Posted | None,
        streams: Streams | None,
        constants: ConstantPorts | None,
        wall: WallClock | None,
        *,
        hosted: bool,
        synced: bool,
        guest_debug: int,
        counted: bool,
    ) -> None:
        """``gate`` is held by who keeps all vCPUs out of the guest. ``constants``: what reading a byte from a port
        gives, as :class:`skep.contracts.constantports.ConstantPorts` has it. ``wall`` is there where guests have
        kvm-clock. ``hosted``: KVM has its local APIC; ``synced``: it can leave the registers in the shared page;
        ``guest_debug``: what it can do for a debugger; ``counted``: it counts for us."""
        self.index = index
        self._fd = fd
        self._io = io
        self._interrupts = interrupts
        self._way: Way = Injected(fd, interrupts)
        self._hosted = hosted
        if hosted:
            if not isinstance(interrupts, HostedInterrupts):
                raise InternalError("a board that has the local APICs, with an engine that has them")
            self._way = Hosted(fd, interrupts)
        self._apic = KvmApic(fd)
        self._wall = wall
        self.counted = Counted(fd, offered=counted)
        """What KVM counts."""
        self._debugger = Debugger(fd, guest_debug)
        self._map = mmap.mmap(fd, run_size)
        self._entry = Entry(fd, self._map)
        self._kvm_run = self._entry.run
        self._run = uapi.Run.from_buffer(self._map)
        # The same page for what is done at every exit: a field of a ctypes structure costs three times as much.
        self._bytes = memoryview(self._map)
        self._posted = posted
        self._ring = EMPTY if posted is None else posted.ring(self._map)
        self._streams = streams
        self._stream_ports: Container[int] = ()
        if posted is not None and streams is not None:
            self._stream_ports = posted.streams
            streams.adopt(fd)
        self._constants: Sequence[int] = constants.words if constants is not None else _NONE_KNOWN
        # Where the TPR is ours, it is looked at after each exit.
        self._table = constants.address if constants is not None and hosted else 0
        self._entry.answer(self._table)
        self._halves, self._words, self._quads = (self._bytes.cast("H"), self._bytes.cast("I"), self._bytes.cast("Q"))
        self._run.kvm_valid_regs = uapi.SYNC_X86_REGS if synced else 0
        self._guard = threading.Lock()  # of _thread, and of the signal to it
        self._thread: int | None = None
        self._gate = gate
        self.inside = False
        """Whether it may be in guest code, as long as nobody kicks it."""
        self._exit_requested = False
        self._halted = False
        self._kept: Exit | None = None
        """Why it left the guest when an access was to be finished: what the next run says."""
        self.exits = Exits()
        self._note, self._port_read, self._port_write = self.exits.note, io.port_read, io.port_write
        self.counts = [0] * _REASONS
        """Exits by KVM's reason."""
        self._handlers: list[Callable[[], Exit | None]] = [self._unknown] * _REASONS
        handlers: dict[int, Callable[[], Exit | None]] = {
            uapi.EXIT_IO: self._port,
            uapi.EXIT_MMIO: self._mmio,
            uapi.EXIT_X86_RDMSR: self._read_msr,
            uapi.EXIT_X86_WRMSR: self._write_msr,
            uapi.EXIT_DEBUG: self._debug,
            uapi.EXIT_HLT: self._halt,
            uapi.EXIT_IOAPIC_EOI: self._end_of_interrupt,
            uapi.EXIT_SHUTDOWN: self._shutdown,
            uapi.EXIT_FAIL_ENTRY: self._failed_entry,
            uapi.EXIT_INTERNAL_ERROR: self._internal_error,
            uapi.EXIT_IRQ_WINDOW_OPEN: _go_on,
            uapi.EXIT_INTR: _go_on,
            uapi.EXIT_SET_TPR: _go_on,
        }
        for reason, handler in handlers.items():
            self._handlers[reason] = handler

    # Running

    def run(self) -> Exit:
        with self._guard:
            self._thread = threading.get_ident()
        self._debugger.begin()
        try:
            left, self._kept = self._kept or self._look(), None
            while left is None:
                left = self._enter()
            if self._ring[0] != self._ring[1]:  # it was at a read of what is known, which does not wait for them
                self._make_posted()
            return left
        finally:
            with self._guard:
                self._thread = None

    def handle(self, reason: int, handler: Callable[[], None]) -> None:
        """What is to be done at exits for one of KVM's reasons."""
        self._handlers[reason] = handler

    def _look(self) -> Exit | None:
        """What is wanted: to leave, or to offer the guest an interrupt."""
        with self._gate:
            self._run.immediate_exit = 0
        if self._exit_requested:
            self._exit_requested = False
            return Exit(ExitReason.KICKED)
        if self._debugger.stepping and not self._halted:
            return None
        if self._words[_REASON] in _UNFINISHED:
            if self._run.if_flag and self._interrupts.pending():
                self._complete_io()
                left, self._kept = self._kept, None
                return left
            self._run.ready_for_interrupt_injection = 0  # one that comes only now waits for a window
        if not self._way.offer(self._run, self._halted):
            return self._halted_exit()
        self._halted = False
        return None

    def kick(self) -> None:
        with self._guard:
            self._run.immediate_exit = 1
            if self._thread is not None and self._thread != threading.get_ident():
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    @property
    def activity(self) -> Activity:
        kernels = self.counted.read("blocking", "exits")
        if not kernels.get("blocking"):
            return Activity.ACTIVE
        return Activity.HALTED if kernels["exits"] else Activity.WAITING  # the same to KVM, but for what came before

    def tally(self) -> dict[str, int]:
        told = self.told()
        alone = self.counted.read("exits").get("exits", 0) - sum(told.values())
        return told | ({"in the kernel": alone} if alone > 0 else {})

    def told(self) -> dict[str, int]:
        """Exits that the kernel did not see to, by cause."""
        answered = self._entry.answered
        return by_cause(self.counts) | ({"ports whose value is known": answered} if answered else {})

    def frozen(self) -> bool:
        return False

    def request_exit(self) -> None:
        self._exit_requested = True
        self.kick()

    def _enter(self) -> Exit | None:
        """KVM_RUN, and what it left for, again and again until there is something to look at."""
        kvm_run, halves, words, quads = self._kvm_run, self._halves, self._words, self._quads
        counts, handlers, ring = self.counts, self._handlers, self._ring
        interrupts, injected, tpr = self._interrupts, not self._hosted, 0
        while True:
            if injected:
                tpr = quads[_CR8] = interrupts.read_tpr()
            self.inside = True
            failed = kvm_run()
            self.inside = False
            if not failed:
                reason = words[_REASON]
            elif failed in (-errno.EINTR, -errno.EAGAIN):  # kicked; started by another processor
                reason = words[_REASON] = uapi.EXIT_INTR  # KVM leaves the one before
            else:
                self._make_posted()
                return self._failure(f"KVM_RUN: {os.strerror(-failed)}")
            if injected and quads[_CR8] != tpr:
                interrupts.write_tpr(quads[_CR8])
            counts[reason] += 1
            if reason != _IO and ring[0] != ring[1]:
                self._make_posted()
            left = handlers[reason]()
            if left is not None:
                return left
            if halves[_WANTED]:  # nothing begins to wait without a kick
                return self._look()

    def _make_posted(self) -> None:
        if self._posted is not None:
            self._posted.make(self._ring, self._note)

    def _port(self) -> None:
        data = self._bytes
        direction, size, port, count, at = _exit_io(data, _LEFT)
        if direction != _OUT and size == count == 1 and (known := self._constants[port]):
            data[at] = known & 0xFF
            return
        if self._ring[0] != self._ring[1]:
            self._make_posted()
        while count > 0:
            if direction == _OUT:
                value = data[at] if size == 1 else int.from_bytes(data[at : at + size], "little")
                self._note("out", port, size, value)
                self._port_write(port, size, value)
                if port in self._stream_ports and self._streams is not None:
                    self._streams.written()
            else:
                value = self._port_read(port, size)
                self._note("in", port, size, value)
                data[at : at + size] = value.to_bytes(size, "little")
            count -= 1
            at += size

    def _mmio(self) -> None:
        """KVM cuts accesses at 8 bytes and at page ends, so ``len`` need not be a power of two; a device's size is."""
        data, gpa = self._bytes, self._quads[_MMIO_ADDRESS]
        at, end = _MMIO_DATA, _MMIO_DATA + self._words[_MMIO_LENGTH]
        write = data[_MMIO_IS_WRITE]
        rip = self._quads[_SYNCED_RIP] or None
        while at < end:
            size = 1 << (end - at).bit_length() - 1
            if write:
                value = int.from_bytes(data[at : at + size], "little")
                self._note("write", gpa, size, value, rip)
                self._io.mmio_write(gpa, size, value)
            else:
                value = self._io.mmio_read(gpa, size)
                self._note("read", gpa, size, value, rip)
                data[at : at + size] = value.to_bytes(size, "little")
            at += size
            gpa += size

    def _read_msr(self) -> None:
        msr = self._run.msr
        if self._wall is not None and msr.index in kvmclock.WALL_CLOCK:
            value: int | None = self._wall.msr
        else:
            value = self._interrupts.read_msr(msr.index)
        self._note("rdmsr", msr.index, 0, value)
        msr.error, msr.data = value is None, value or 0
        if value is None:
            self.exits.note_refused("rdmsr", msr.index)

    def _write_msr(self) -> None:
        msr = self._run.msr
        self._note("wrmsr", msr.index, 0, msr.data)
        if self._wall is not None and msr.index in kvmclock.WALL_CLOCK:
            msr.error = not self._wall.write_msr(msr.data)
        else:
            msr.error = not self._interrupts.write_msr(msr.index, msr.data)
        if msr.error:
            self.exits.note_refused("wrmsr", msr.index)

    def _unknown(self) -> Exit:
        return self._failure(f"KVM left the guest for a reason unknown to Skep: {self._run.exit_reason}")

    def _end_of_interrupt(self) -> None:
        if isinstance(self._interrupts, HostedInterrupts):
            self._interrupts.end_of_interrupt(self._run.eoi.vector)

    def _debug(self) -> Exit | None:
        return self._debugged(self._debugger.left(self._run.debug))

    def _debugged(self, left: Exit | None) -> Exit | None:
        self._run.immediate_exit = left is None  # a look: interrupts may have been held back
        return left

    def _access_debugged(self, access: Callable[[], None]) -> Exit | None:
        """Stepping, KVM does not always stop behind what its emulator wrote to a device."""
        access()
        if self._debugger.stepping:
            self._complete_io()
        left, self._kept = self._kept, None
        if left is None and self._debugger.stepping:
            return self._debugged(self._debugger.stepped())
        return left

    def _halt(self) -> Exit:
        self._halted = True
        return self._halted_exit()

    def _halted_exit(self) -> Exit:
        return Exit(ExitReason.HALTED, {"interrupts": bool(self._run.if_flag)})

    def _shutdown(self) -> Exit:
        return Exit(ExitReason.SHUTDOWN)

    def _failed_entry(self) -> Exit:
        reason = self._run.fail_entry.hardware_entry_failure_reason
        return self._failure(failures.entry(reason))

    def _internal_error(self) -> Exit:
        cs = self._get(uapi.GET_SREGS, uapi.Sregs()).cs
        return self._failure(failures.internal(self._run.internal, 64 if cs.l else 32 if cs.db else 16))

    def _failure(self, message: str) -> Exit:
        rip = self._get(uapi.GET_REGS, uapi.Regs()).rip
        return Exit(ExitReason.FAILED, {"message": f"{message}, at rip {rip:#x}"})

    # State

    def get_state(self) -> dict[str, Any]:
        self._complete_io()
        regs, sregs = self._get(uapi.GET_REGS, uapi.Regs()), self._get(uapi.GET_SREGS, uapi.Sregs())
        debug, events = self._get(uapi.GET_DEBUGREGS, uapi.Debugregs()), self._events()
        state: dict[str, Any] = {name: getattr(regs, name) for name in uapi.Regs.NAMES}
        state |= {name: getattr(sregs, name) for name in _CONTROL}
        for name, theirs in _SEGMENT_FIELDS.items():
            state[name] = _segment(getattr(sregs, theirs))
        for name, theirs in _TABLE_FIELDS.items():
            table = getattr(sregs, theirs)
            state[name] = {"base": table.base, "limit": table.limit}
        state |= {f"dr{i}": debug.db[i] for i in range(4)} | {"dr6": debug.dr6, "dr7": debug.dr7}
        xcrs = self._get(uapi.GET_XCRS, uapi.Xcrs())
        state["xcr0"] = next((x.value for x in xcrs.xcrs[: xcrs.nr_xcrs] if x.xcr == 0), 1)
        state["xsave"] = bytes(self._get(uapi.GET_XSAVE, uapi.Xsave()).region)[:XSAVE_SIZE]
        state["msrs"] = self._get_msrs(msrs.SAVED)
        if self._wall is not None:
            state["msrs"] |= self._get_msrs((msrs.KVM_SYSTEM_TIME_NEW,)) | {msrs.KVM_WALL_CLOCK_NEW: self._wall.msr}
        if events.interrupt_injected and not events.interrupt_soft:
            state["interrupt"] = events.interrupt_nr
        if events.nmi_masked and not events.nmi_injected:
            state["nmi_blocked"] = 1
        if events.nmi_pending or events.nmi_injected:
            state["nmi_pending"] = 1
        if self._hosted:
            state["activity"] = _ACTIVITY[self._get(uapi.GET_MP_STATE, uapi.MpState()).mp_state].value
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """A state with ``rip`` is a new beginning: what was on its way into the guest is dropped."""
        self._complete_io()
        if any(name in state for name in (*_CONTROL, *_SEGMENT_FIELDS, *_TABLE_FIELDS)):
            self._set_sregs(state)
        if any(name in state for name in uapi.Regs.NAMES):
            regs = self._get(uapi.GET_REGS, uapi.Regs())
            for name in uapi.Regs.NAMES:
                setattr(regs, name, state.get(name, getattr(regs, name)))
            ioctl(self._fd, uapi.SET_REGS, regs)
            self._run.if_flag = bool(regs.rflags & Rflags.IF)
        if any(f"dr{i}" in state for i in range(8)):
            debug = self._get(uapi.GET_DEBUGREGS, uapi.Debugregs())
            for i in range(4):
                debug.db[i] = state.get(f"dr{i}", debug.db[i])
            debug.dr6, debug.dr7 = state.get("dr6", debug.dr6), state.get("dr7", debug.dr7)
            ioctl(self._fd, uapi.SET_DEBUGREGS, debug)
        if "xcr0" in state:
            xcrs = uapi.Xcrs(nr_xcrs=1)
            xcrs.xcrs[0].value = state["xcr0"] | 1  # x87 cannot be off; 0 is a CPU without XSAVE
            ioctl(self._fd, uapi.SET_XCRS, xcrs)
        if "xsave" in state:
            area = uapi.Xsave()
            ctypes.memmove(area.region, state["xsave"], min(len(state["xsave"]), len(area.region)))
            ioctl(self._fd, uapi.SET_XSAVE, area)
        if "msrs" in state:
            self._set_msrs(state["msrs"])
        if "rip" in state:
            self._halted = False
            events = self._events()
            ctypes.memset(ctypes.addressof(events), 0, ctypes.sizeof(events))
            events.flags = uapi.VCPUEVENT_VALID_NMI_PENDING | uapi.VCPUEVENT_VALID_SHADOW
            events.interrupt_injected, events.interrupt_nr = "interrupt" in state, state.get("interrupt", 0)
            events.nmi_masked = bool(state.get("nmi_blocked", 0))
            events.nmi_pending = bool(state.get("nmi_pending", 0))
            ioctl(self._fd, uapi.SET_VCPU_EVENTS, events)
            if self._hosted:
                activity = state.get("activity", Activity.ACTIVE)
                ioctl(self._fd, uapi.SET_MP_STATE, uapi.MpState(_MP_STATE[activity]))
        self._complete_io()  # which says anew whether an interrupt could be taken

    def set_debug(self, debug: Debug) -> None:
        self._debugger.set(debug)
        self._entry.answer(0 if debug else self._table)
        for reason, access in ((uapi.EXIT_IO, self._port), (uapi.EXIT_MMIO, self._mmio)):
            self._handlers[reason] = access if not debug else partial(self._access_debugged, access)

    def set_cpuid(self, rows: Sequence[uapi.CpuidEntry]) -> None:
        table = uapi.cpuid2(len(rows))
        table.entries[:] = rows
        ioctl(self._fd, uapi.SET_CPUID2, table)

    def attach_apic(self) -> None:
        """The CPUID, which says what APIC it may be, and the TSC are set: KVM's local APIC gets the board's state."""
        self._way.attach()

    def set_tsc_offset(self, offset: int) -> None:
        """The guest's TSC is the host's plus ``offset``, and what the guest itself added. KVM's timer for the deadline
        is set for the old one, until the deadline is written anew."""
        offset += self._apic.read_msr(msrs.IA32_TSC_ADJUST)
        value = (ctypes.c_uint64 * 1)(offset & (1 << 64) - 1)
        attribute = uapi.DeviceAttr(0, uapi.VCPU_TSC_CTRL, uapi.VCPU_TSC_OFFSET, ctypes.addressof(value))
        deadline = self._apic.read_msr(msrs.IA32_TSC_DEADLINE) if self._hosted else 0
        ioctl(self._fd, uapi.SET_DEVICE_ATTR, attribute)
        if deadline:
            self._apic.write_msr(msrs.IA32_TSC_DEADLINE, deadline)

    def stood_still(self) -> None:
        """Tell the guest that it did, if it asked for the time."""
        try:
            ioctl(self._fd, uapi.KVMCLOCK_CTRL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def close(self) -> None:
        with self._guard:  # a late kick finds a page of its own
            if self._fd < 0:
                return
            fd, self._fd = self._fd, -1
            self._run = uapi.Run()
            for view in (self._halves, self._words, self._quads):
                view.release()
            if self._posted is not None:
                self._ring.release()
        self._way.close()
        self.counted.close()
        self._bytes.release()
        self._entry.close()
        self._map.close()
        os.close(fd)

    def _complete_io(self) -> None:
        """An access that left the guest is finished by the next KVM_RUN; before that the registers are not final, and
        whether an interrupt can be taken is not known. The one behind this returns at once, to look anew."""
        while True:
            self._run.immediate_exit = 1
            try:
                ioctl(self._fd, uapi.RUN)
            except OSError as error:
                if error.errno == errno.EINTR:
                    self._words[_REASON] = uapi.EXIT_INTR
                    return self._make_posted()
                raise
            match self._run.exit_reason:
                case uapi.EXIT_IO:  # the next piece of the same access
                    self._port()
                case uapi.EXIT_MMIO:
                    self._mmio()
                case reason:
                    self._kept = self._handlers[reason]() or self._kept

    def _get(self, request: int, into: _S) -> _S:
        ioctl(self._fd, request, into)
        return into

    def _events(self) -> uapi.VcpuEvents:
        return self._get(uapi.GET_VCPU_EVENTS, uapi.VcpuEvents())

    def _set_sregs(self, state: dict[str, Any]) -> None:
        sregs = self._get(uapi.GET_SREGS, uapi.Sregs())
        for name in _CONTROL:
            setattr(sregs, name, state.get(name, getattr(sregs, name)))
        for name, theirs in _SEGMENT_FIELDS.items():
            if name in state:
                _fill_segment(getattr(sregs, theirs), state[name])
        for name, theirs in _TABLE_FIELDS.items():
            if name in state:
                table = getattr(sregs, theirs)
                table.base, table.limit = state[name]["base"], state[name]["limit"]
        if not self._hosted:
            sregs.cr8 = self._interrupts.read_tpr()
        try:
            ioctl(self._fd, uapi.SET_SREGS, sregs)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise failures.not_set(sregs.cr4) from None
            raise

    def _get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Those that this KVM knows."""
        found: dict[int, int] = {}
        while indices:
            table = uapi.msrs(len(indices))
            for entry, index in zip(table.entries, indices, strict=True):
                entry.index = index
            done = ioctl(self._fd, uapi.GET_MSRS, table)  # it stops at the first that it does not know
            found |= {entry.index: entry.data for entry in table.entries[:done]}
            indices = indices[done + 1 :]
        return found

    def _set_msrs(self, values: dict[int, int]) -> None:
        left = [one for one in values.items() if one[0] not in kvmclock.SAVED]
        if self._wall is not None:
            self._wall.msr = values.get(msrs.KVM_WALL_CLOCK_NEW, self._wall.msr)
            left += [one for one in values.items() if one[0] == msrs.KVM_SYSTEM_TIME_NEW]
        while left:
            table = uapi.msrs(len(left))
            for entry, (index, value) in zip(table.entries, left, strict=True):
                entry.index, entry.data = index, value
            left = left[ioctl(self._fd, uapi.SET_MSRS, table) + 1 :]


def _go_on() -> None:
    return None


def _segment(segment: uapi.Segment) -> dict[str, int]:
    attributes = 0
    for name, shift, mask in _ATTRIBUTE_BITS:
        attributes |= (getattr(segment, name) & mask) << shift
    if segment.unusable:
        attributes &= ~_PRESENT
    return {"selector": segment.selector, "base": segment.base, "limit": segment.limit, "attributes": attributes}


def _fill_segment(segment: uapi.Segment, value: dict[str, int]) -> None:
    segment.selector, segment.base, segment.limit = value["selector"], value["base"], value["limit"]
    for name, shift, mask in _ATTRIBUTE_BITS:
        setattr(segment, name, value["attributes"] >> shift & mask)
    segment.unusable = not value["attributes"] & _PRESENT
