"""Turns: of a VM's vCPUs no more compete for the host's CPUs than there are such CPUs, where it has more vCPUs.

Without this a host with two CPUs would share them out among 48 threads that are all runnable: whoever wants all vCPUs
out of guest code would wait for each to get a slice of its own, and so would every thread that wakes up. So a vCPU
takes a turn on its way into guest code, keeps it while Python works for it, and gives it back when it halts; when it
had its slice, or spins by PAUSE, it hands the turn to one that waits, in machine code.

A vCPU has a *seat*: ``turn`` (1: it has one; a futex), ``queued`` (it waits for one: 2 if it was idle before, 1 if its
slice was over). The *head* counts turns that are free, and who waits. Who gives a turn back first makes it free, then
looks who is queued; who wants one queues first, then looks whether one is free: one of them sees the other. Whoever
changes ``queued`` to 0 owns the consequence: to hand over a turn, or to have taken one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

from skep.engine.translate.asm import R8, R9, RAX, RBX, RCX, RDI, RDX, RSI, RSP, Assembler, Cond, Label, Mem, gs
from skep.engine.translate.layout import BRK_TURN, OFFSETS, StateBlock
from skep.engine.translate.parking import SYS_FUTEX, WAIT, WAKE, futex

_SYS_SCHED_YIELD, _SYS_NANOSLEEP = 24, 35
PATIENCE = 64
"""PAUSE instructions until a vCPU gives way."""
_SLICE_NS = 2_000_000
"""A turn ends at the second tick that sees it, if somebody waits."""
_SPARE = 1
"""Turns beyond the host's CPUs: some of those who have one wait for the interpreter."""
_FREE, _WAITING, _NEXT, _COUNT, _END = range(0, 20, 4)
_HEAD = 64
HAS_TURN, _QUEUED, _AGED, _BLOCK = 0, 4, 8, 16
_SEAT_SHIFT = 6
IDLE, EXPIRED = 2, 1
"""What a vCPU was before it waits: 2 less its turns. Every fourth turn is given without looking at that, so that nobody
starves."""


def give(a: Assembler) -> None:
    """``void give(void)``: this vCPU's turn, if it has one, to whoever waits. Uses what a call may use."""
    put, over = a.label(), a.label()
    a.mov(RDI, gs(OFFSETS["seat"]))
    a.test(RDI, RDI)
    a.jcc(Cond.E, over)
    a.cmp(Mem(RDI, disp=HAS_TURN), 0, size=32)
    a.jcc(Cond.E, over)
    a.mov(Mem(RDI, disp=HAS_TURN), 0, size=32)
    a.mov(R8, gs(OFFSETS["turns"]))
    _put(a, put, over)


def _put(a: Assembler, put: Label, over: Label) -> None:
    """A turn that nobody holds, of the head at r8, to somebody; returns from the routine, as ``over`` does."""
    scan, look, inside, next_, candidate = (a.label() for _ in range(5))
    a.bind(put)
    a.lock()
    a.inc(Mem(R8, disp=_FREE), size=32)
    a.cmp(Mem(R8, disp=_WAITING), 0, size=32)
    a.jcc(Cond.E, over)
    a.mov(RAX, 1, size=32)
    a.xadd(Mem(R8, disp=_NEXT), RAX, size=32, lock=True)
    a.mov(RSI, EXPIRED, size=32)
    a.test(RAX, 3, size=32)
    a.jcc(Cond.E, scan)
    a.mov(RSI, IDLE, size=32)
    a.bind(scan)  # for those queued as rsi or more, from another seat each time
    a.xor(RDX, RDX, size=32)
    a.div(Mem(R8, disp=_COUNT), size=32)
    a.mov(RCX, Mem(R8, disp=_COUNT), size=32)
    a.bind(look)
    a.add(RDX, 1, size=32)
    a.cmp(RDX, Mem(R8, disp=_COUNT), size=32)
    a.jcc(Cond.B, inside)
    a.xor(RDX, RDX, size=32)
    a.bind(inside)
    a.mov(RDI, RDX)
    a.shl(RDI, _SEAT_SHIFT)
    a.lea(RDI, Mem(R8, RDI, disp=_HEAD))
    a.mov(R9, Mem(RDI, disp=_QUEUED), size=32)
    a.cmp(R9, RSI, size=32)
    a.jcc(Cond.AE, candidate)
    a.bind(next_)
    a.sub(RCX, 1, size=32)
    a.jcc(Cond.NE, look)
    a.mov(RAX, RDX)
    a.sub(RSI, 1, size=32)
    a.jcc(Cond.NE, scan)
    a.jmp(over)
    a.bind(candidate)
    a.mov(RAX, Mem(R8, disp=_FREE), size=32)
    a.test(RAX, RAX, size=32)
    a.jcc(Cond.E, over)  # somebody has taken it
    a.lea(RCX, Mem(RAX, disp=-1), size=32)
    a.cmpxchg(Mem(R8, disp=_FREE), RCX, size=32, lock=True)
    a.jcc(Cond.NE, candidate)
    a.mov(RAX, R9)
    a.xor(RCX, RCX, size=32)
    a.cmpxchg(Mem(RDI, disp=_QUEUED), RCX, size=32, lock=True)
    a.jcc(Cond.NE, put)  # that one has taken another
    a.lock()
    a.dec(Mem(R8, disp=_WAITING), size=32)
    a.mov(Mem(RDI, disp=HAS_TURN), 1, size=32)
    futex(a, HAS_TURN, WAKE, 1)
    a.bind(over)
    a.ret()


def take(a: Assembler) -> None:
    """rsi: what the vCPU was before, IDLE or EXPIRED. Returns when it has a turn, with the state block's ``parked`` set
    while it waited. Uses what a call may use."""
    queue, look, sleep, surplus, both, got, put, over = (a.label() for _ in range(8))

    def free(otherwise: Label) -> None:
        """One that is free, in exchange for nothing."""
        again = a.here()
        a.mov(RAX, Mem(R8, disp=_FREE), size=32)
        a.test(RAX, RAX, size=32)
        a.jcc(Cond.E, otherwise)
        a.lea(RCX, Mem(RAX, disp=-1), size=32)
        a.cmpxchg(Mem(R8, disp=_FREE), RCX, size=32, lock=True)
        a.jcc(Cond.NE, again)

    def until_given(then: Label) -> None:
        again = a.here()
        a.mov(RDI, gs(OFFSETS["seat"]))
        a.cmp(Mem(RDI, disp=HAS_TURN), 0, size=32)
        a.jcc(Cond.NE, then)
        futex(a, HAS_TURN, WAIT, 0)
        a.jmp(again)

    a.mov(RDI, gs(OFFSETS["seat"]))
    a.mov(R8, gs(OFFSETS["turns"]))
    a.mov(Mem(RDI, disp=_AGED), 0, size=32)
    free(queue)
    a.mov(Mem(RDI, disp=HAS_TURN), 1, size=32)
    a.ret()
    a.bind(queue)
    a.mov(gs(OFFSETS["parked"]), 2)
    a.xchg(Mem(RDI, disp=_QUEUED), RSI, size=32)
    a.mov(RAX, 1, size=32)
    a.xadd(Mem(R8, disp=_WAITING), RAX, size=32, lock=True)
    a.test(RAX, RAX, size=32)
    a.jcc(Cond.NE, look)
    a.mov(RDI, R8)
    futex(a, _WAITING, WAKE, 1)  # whoever ends slices
    a.mov(RDI, gs(OFFSETS["seat"]))
    a.bind(look)
    free(sleep)
    a.xor(RCX, RCX, size=32)
    a.xchg(Mem(RDI, disp=_QUEUED), RCX, size=32)
    a.test(RCX, RCX, size=32)
    a.jcc(Cond.E, surplus)
    a.lock()
    a.dec(Mem(R8, disp=_WAITING), size=32)
    a.mov(Mem(RDI, disp=HAS_TURN), 1, size=32)
    a.jmp(got)
    a.bind(sleep)
    until_given(got)
    a.bind(surplus)  # somebody gives us one, too
    until_given(both)
    a.bind(both)
    a.mov(gs(OFFSETS["parked"]), 0)
    _put(a, put, over)
    a.bind(got)
    a.mov(gs(OFFSETS["parked"]), 0)
    a.ret()


def give_way(a: Assembler) -> None:
    """The guest spins: the vCPU's turn is over at its next look, or the host's CPU is offered to others; every register
    of the guest's and the flags are as they were."""
    nobody, done = a.label(), a.label()
    for reg in (RAX, RCX):
        a.push(reg)
    a.mov(RCX, gs(OFFSETS["seat"]))
    a.jrcxz(nobody)
    a.mov(RCX, gs(OFFSETS["turns"]))
    a.mov(RCX, Mem(RCX, disp=_WAITING), size=32)
    a.jrcxz(nobody)
    a.mov(gs(BRK_TURN), 1, size=8)
    a.jmp(done)
    a.bind(nobody)
    a.mov(RAX, _SYS_SCHED_YIELD, size=32)
    a.syscall()
    a.bind(done)
    for reg in (RCX, RAX):
        a.pop(reg)
    a.mov(gs(OFFSETS["spins"]), PATIENCE)
    a.ret()


def watch_turns(a: Assembler) -> None:
    """``void watch_turns(u64 head)``: end slices while somebody waits. Returns when ``_END`` was set and ``_WAITING``
    woken."""
    again, sleep, tick, each, next_, over = (a.label() for _ in range(6))
    a.push(RBX)
    a.sub(RSP, 16)
    a.mov(RBX, RDI)
    a.bind(again)
    a.cmp(Mem(RBX, disp=_END), 0, size=32)
    a.jcc(Cond.NE, over)
    a.cmp(Mem(RBX, disp=_WAITING), 0, size=32)
    a.jcc(Cond.NE, tick)
    a.bind(sleep)
    a.mov(RDI, RBX)
    futex(a, _WAITING, WAIT, 0)
    a.jmp(again)
    a.bind(tick)
    a.mov(Mem(RSP), 0)
    a.mov(Mem(RSP, disp=8), _SLICE_NS)
    a.mov(RDI, RSP)
    a.xor(RSI, RSI, size=32)
    a.mov(RAX, _SYS_NANOSLEEP, size=32)
    a.syscall()
    a.mov(RCX, Mem(RBX, disp=_COUNT), size=32)
    a.lea(RDX, Mem(RBX, disp=_HEAD))
    a.bind(each)
    a.cmp(Mem(RDX, disp=HAS_TURN), 0, size=32)
    a.jcc(Cond.E, next_)
    a.mov(RAX, Mem(RDX, disp=_AGED), size=32)
    a.mov(Mem(RDX, disp=_AGED), 1, size=32)
    a.test(RAX, RAX, size=32)
    a.jcc(Cond.E, next_)
    a.mov(RAX, Mem(RDX, disp=_BLOCK))
    a.mov(Mem(RAX, disp=BRK_TURN), 1, size=8)
    a.bind(next_)
    a.lea(RDX, Mem(RDX, disp=1 << _SEAT_SHIFT))
    a.sub(RCX, 1, size=32)
    a.jcc(Cond.NE, each)
    a.jmp(again)
    a.bind(over)
    a.add(RSP, 16)
    a.pop(RBX)
    a.ret()


class Turns:
    """Those of one VM, and the thread that ends slices."""

    def __init__(self, watch: int, vcpus: int) -> None:
        """``watch`` is the host address of the stub."""
        self._memory = mmap.mmap(-1, _HEAD + (vcpus << _SEAT_SHIFT))
        self._pin = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(self._pin)
        self._words = memoryview(self._memory).cast("I")
        self._words[_FREE >> 2] = host_cpus() + _SPARE
        self._words[_COUNT >> 2] = vcpus
        self._blocks: list[StateBlock] = []
        function = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(watch)
        self._thread = threading.Thread(target=function, args=(self.address,), name="skep-turns", daemon=True)
        self._thread.start()

    def seat(self, st: StateBlock, index: int) -> None:
        """The vCPU with this state block, which stays in memory until the end, takes turns from now on."""
        self._blocks.append(st)
        seat = _HEAD + (index << _SEAT_SHIFT)
        self._memory[seat + _BLOCK : seat + _BLOCK + 8] = st.address.to_bytes(8, "little")
        st.seat = self.address + seat
        st.turns = self.address

    def free(self) -> int:
        """How many nobody has; all of them while no vCPU runs."""
        return self._words[_FREE >> 2]

    def taken(self) -> int:
        """How many vCPUs have one."""
        seats = self._words[(_HEAD + HAS_TURN) >> 2 :: (1 << _SEAT_SHIFT) >> 2]
        return sum(seats)

    def close(self) -> None:
        """No vCPU runs any more."""
        self._words[_END >> 2] = 1
        wait = _libc.syscall
        while self._thread.is_alive():
            wait(SYS_FUTEX, ctypes.c_void_p(self.address + _WAITING), WAKE, 1, None)
            self._thread.join(0.001)
        self._words.release()
        self._blocks.clear()


_libc = ctypes.CDLL(None)


def host_cpus() -> int:
    return len(os.sched_getaffinity(0))
