"""Faults of the host CPU in translated code.

A copied instruction may fault by itself: #DE of a division, #XM and #MF of unmasked floating-point exceptions, #GP of a
misaligned MOVAPS. The host kernel turns that into a signal. One handler in machine code for the whole process looks
whether the faulting address lies in a code buffer; if so it notes address and kind in the vCPU's state block and
resumes at the buffer's ``fault_exit``, else it goes on to the handler that was there before. It is installed with the
first code buffer and taken back with the last.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

from skep.engine.amd64.registers import Vector
from skep.engine.translate.asm import R8, R9, RAX, RCX, RDI, RDX, RSI, RSP, Assembler, Cond, Mem
from skep.engine.translate.stubs import field

SIGILL, SIGBUS, SIGFPE, SIGSEGV = 4, 7, 8, 11
_SIGNALS = (SIGILL, SIGBUS, SIGFPE, SIGSEGV)
_SA_SIGINFO, _SA_ONSTACK, _SA_NODEFER, _SA_RESTORER = 4, 0x08000000, 0x40000000, 0x04000000
_SLOTS = 64
_RIP = 0xA8  # of ucontext_t: uc_mcontext.gregs[REG_RIP]
_TRAPNO = 0xC8
_SYS_RT_SIGACTION, _SYS_RT_SIGRETURN = 13, 15
_libc = ctypes.CDLL(None, use_errno=True)


class _Sigaction(ctypes.Structure):
    """struct sigaction as the kernel has it."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("handler", "flags", "restorer", "mask")]


class HostFault:
    """What the handler noted: the trap number and the signal's code."""

    def __init__(self, info: int) -> None:
        self.signal = info & 0xFF
        self.trap = info >> 8 & 0xFF

    @property
    def vector(self) -> int | None:
        """The guest's exception, None where it must have been our mistake."""
        if self.trap in (Vector.DE, Vector.MF, Vector.XM, Vector.GP):
            return self.trap
        return None

    def __str__(self) -> str:
        return f"signal {self.signal} (trap {self.trap})"


class _Catcher:
    """The process's handler and the code buffers it knows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self, start: int, size: int, exit_stub: int) -> None:
        with self._lock:
            if self._count == 0:
                self._install()
            for i in range(_SLOTS):
                if self._table[3 * i + 1] == 0:
                    self._table[3 * i], self._table[3 * i + 2] = start, exit_stub
                    self._table[3 * i + 1] = size
                    self._count += 1
                    return
        raise MemoryError("too many translators in one process")

    def remove(self, start: int) -> None:
        with self._lock:
            for i in range(_SLOTS):
                if self._table[3 * i] == start and self._table[3 * i + 1]:
                    self._table[3 * i + 1] = 0
                    self._count -= 1
                    break
            if self._count == 0:
                self._uninstall()

    def _install(self) -> None:
        self._memory = mmap.mmap(-1, 8192)
        pin = ctypes.c_char.from_buffer(self._memory)
        base = ctypes.addressof(pin)
        self._table = (ctypes.c_uint64 * (3 * _SLOTS + 16)).from_buffer(self._memory, 4096)
        self._old = {}
        for number in _SIGNALS:
            old = _Sigaction()
            _sigaction(number, None, old)
            self._old[number] = old
        code, restorer = self._assemble(base + 4096)
        self._memory[: len(code)] = code
        if _libc.mprotect(ctypes.c_void_p(base), 4096, mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "mprotect")
        for number in _SIGNALS:
            flags = _SA_SIGINFO | _SA_ONSTACK | _SA_NODEFER | _SA_RESTORER
            _sigaction(number, _Sigaction(base, flags, base + restorer, 0), None)
        self._base = base
        del pin

    def _uninstall(self) -> None:
        for number in _SIGNALS:
            now = _Sigaction()
            _sigaction(number, None, now)
            if now.handler == self._base:  # else somebody came after us and may call us still
                _sigaction(number, self._old[number], None)
            else:
                self._kept = self._memory

    def _assemble(self, table: int) -> tuple[bytes, int]:
        """handler(rdi = signal, rsi = siginfo, rdx = ucontext)."""
        a = Assembler()
        loop, other, found = a.label(), a.label(), a.label()
        a.mov(RAX, Mem(RDX, disp=_RIP))
        a.mov(R8, table)
        a.mov(RCX, _SLOTS)
        a.bind(loop)
        a.mov(R9, RAX)
        a.sub(R9, Mem(R8))
        a.cmp(R9, Mem(R8, disp=8))
        a.jcc(Cond.B, found)
        a.add(R8, 24)
        a.dec(RCX)
        a.jcc(Cond.NE, loop)
        for number in _SIGNALS:
            following = a.label()
            a.cmp(RDI, number, size=32)
            a.jcc(Cond.NE, following)
            old = self._old[number]
            if old.handler > 1:
                a.mov(RAX, old.handler)
                a.jmp(RAX)
            else:  # default: take it again without us
                a.mov(RAX, table + 8 * (3 * _SLOTS))
                a.jmp(other)
            a.bind(following)
        a.bind(other)
        # Restore the default action and return: the instruction faults again.
        a.sub(RSP, 32)
        a.mov(Mem(RSP), 0)
        a.mov(Mem(RSP, disp=8), _SA_RESTORER)
        a.mov(Mem(RSP, disp=16), 0)
        a.mov(Mem(RSP, disp=24), 0)
        a.mov(RSI, RSP)
        a.xor(RDX, RDX, size=32)
        a.raw(b"\x41\xba\x08\x00\x00\x00")  # mov r10d, 8
        a.mov(RAX, _SYS_RT_SIGACTION)
        a.raw(b"\x0f\x05")
        a.add(RSP, 32)
        a.ret()
        a.bind(found)
        a.mov(field("va"), RAX)
        a.mov(RAX, Mem(RDX, disp=_TRAPNO))
        a.shl(RAX, 8)
        a.movzx(RDI, RDI)
        a.or_(RAX, RDI)
        a.mov(field("info"), RAX)
        a.mov(RAX, Mem(R8, disp=16))
        a.mov(Mem(RDX, disp=_RIP), RAX)
        a.ret()
        a.align(16)
        restorer = len(a)
        a.mov(RAX, _SYS_RT_SIGRETURN)
        a.raw(b"\x0f\x05")
        return a.code(0), restorer



def _sigaction(number: int, new: _Sigaction | None, old: _Sigaction | None) -> None:
    pointers = [ctypes.byref(action) if action else None for action in (new, old)]
    if _libc.syscall(_SYS_RT_SIGACTION, number, *pointers, 8):
        raise OSError(ctypes.get_errno(), f"sigaction({number})")


CATCHER = _Catcher()
"""The only thing that a process has once: signal handlers are the process's."""
