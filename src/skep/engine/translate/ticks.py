"""Timers for vCPUs in guest code: when a vCPU's goes off, it looks up at its next check.

A vCPU sets its timer by itself, in machine code (stubs.py); one thread of the VM's sleeps on all of them, and sets the
first byte of ``brk`` in the state block whose timer went off. It is in machine code too, so nobody needs the
interpreter for that.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading

from skep.alarm import Alarm
from skep.engine.translate.asm import R10, RAX, RBX, RDI, RDX, RSI, RSP, Assembler, Cond, Mem
from skep.engine.translate.layout import BRK, OFFSETS, StateBlock
from skep.engine.translate.parking import rouse
from skep.errors import HostError

SYS_TIMERFD_SETTIME = 286
_SYS_EPOLL_WAIT, _EINTR = 232, 4
_CTL_ADD = 1
_libc = ctypes.PyDLL(None, use_errno=True)


class _Event(ctypes.Structure):
    """struct epoll_event, which amd64 packs."""

    _pack_ = 1
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


def watch_ticks(a: Assembler) -> None:
    """``void watch_ticks(u64 epoll)``: for each event whose ``data`` is the address of a state block, tell
    that vCPU. Returns at the event whose ``data`` is 0."""
    again, over = a.label(), a.label()
    a.push(RBX)
    a.sub(RSP, 16)  # one struct epoll_event
    a.mov(RBX, RDI)
    a.bind(again)
    a.mov(RDI, RBX)
    a.mov(RSI, RSP)
    a.mov(RDX, 1, size=32)
    a.mov(R10, -1)
    a.mov(RAX, _SYS_EPOLL_WAIT, size=32)
    a.syscall()
    a.cmp(RAX, -_EINTR)
    a.jcc(Cond.E, again)
    a.cmp(RAX, 1)
    a.jcc(Cond.NE, over)
    a.mov(RAX, Mem(RSP, disp=4))
    a.test(RAX, RAX)
    a.jcc(Cond.E, over)
    a.mov(Mem(RAX, disp=OFFSETS["apic_armed"]), 0)  # first: who sees ``brk`` sets the timer anew
    a.mov(Mem(RAX, disp=BRK), 1, size=8)
    a.mov(RDI, RAX)
    rouse(a)
    a.jmp(again)
    a.bind(over)
    a.add(RSP, 16)
    a.pop(RBX)
    a.ret()


class Ticker:
    """The thread of one VM. Raises HostError where the host has no more files to give."""

    def __init__(self, watch: int) -> None:
        """``watch`` is the host address of the stub."""
        self._blocks: list[StateBlock] = []
        try:
            self._epoll = select.epoll()
            self._end = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError as e:
            raise HostError(f"no timers are to be had: {e.strerror}", "epoll_create", "close files") from e
        self._add(self._end, 0)
        function = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(watch)
        self._thread = threading.Thread(target=function, args=(self._epoll.fileno(),), name="skep-ticks", daemon=True)
        self._thread.start()

    def alarm(self, st: StateBlock) -> Alarm:
        """A timer for the vCPU with this state block, which stays in memory until the ticker closes: an event may be
        on its way."""
        alarm = Alarm()
        self._blocks.append(st)
        self._add(alarm.fileno(), st.address)
        return alarm

    def close(self) -> None:
        """No state block is written to any more."""
        os.eventfd_write(self._end, 1)
        self._thread.join()
        self._epoll.close()
        os.close(self._end)
        self._blocks.clear()

    def _add(self, fd: int, data: int) -> None:
        event = _Event(select.EPOLLIN | select.EPOLLET, data)  # each expiry is one event, nobody reads how many
        if _libc.epoll_ctl(self._epoll.fileno(), _CTL_ADD, fd, ctypes.byref(event)):
            why = os.strerror(ctypes.get_errno())
            raise HostError(f"no timers are to be had: {why}", "epoll_ctl", "close files")
