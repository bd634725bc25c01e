"""How vCPUs are kept out of guest code, in machine code: nobody needs the interpreter to stop, to wait or to go on.

Each vCPU's state block says where it is (``where``) and whether it must stop (``stop``). Going in, a vCPU first says
that it is in and then looks whether it may be; who stops it first says so and then looks where it is: one of them sees
the other. A vCPU that meets ``stop`` in guest code says that it is out, and sleeps until ``stop`` ends. Both words are
futexes.
"""

from __future__ import annotations

from skep.engine.translate.asm import (
    R8,
    R9,
    R10,
    R12,
    R13,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RSI,
    Assembler,
    Cond,
    Label,
    Mem,
    gs,
)
from skep.engine.translate.layout import BRK, BRK_STOP, OFFSETS

SYS_FUTEX = 202
WAIT, WAKE = 128, 129  # FUTEX_PRIVATE_FLAG with either
_SPINS = 2000
"""Looks before sleeping: guest code comes by a check within microseconds."""
_WHERE, _STOP, _PARKED, _ASLEEP = (OFFSETS[name] for name in ("where", "stop", "parked", "asleep"))


def futex(a: Assembler, word: int, operation: int, value: int) -> None:
    """FUTEX_WAIT or FUTEX_WAKE on the word at rdi plus ``word``. Uses rax, rcx, rdx, rsi, rdi, r10, r11."""
    a.lea(RDI, Mem(RDI, disp=word))
    a.mov(RSI, operation, size=32)
    a.mov(RDX, value, size=32)
    a.xor(R10, R10, size=32)
    a.mov(RAX, SYS_FUTEX, size=32)
    a.syscall()


def rouse(a: Assembler) -> None:
    """The vCPU of the state block at rdi, whose ``brk`` was set, looks at that even if it sleeps after HLT. Uses what
    futex uses."""
    over = a.label()
    a.mfence()
    a.cmp(Mem(RDI, disp=_ASLEEP), 0, size=32)
    a.jcc(Cond.E, over)
    a.mov(Mem(RDI, disp=_ASLEEP), 0, size=32)
    futex(a, _ASLEEP, WAKE, 1)
    a.bind(over)


def kick(a: Assembler) -> None:
    """``void kick(u64 block)``: Python has something for the vCPU of this state block."""
    a.mov(Mem(RDI, disp=OFFSETS["wanted"]), 1)
    a.mov(Mem(RDI, disp=OFFSETS["irq"]), 1)
    a.mov(Mem(RDI, disp=BRK), 1, size=8)
    rouse(a)
    a.ret()


def say_in(a: Assembler, refused: Label) -> None:
    """The vCPU is in; to ``refused`` (to say that it is out) where it must not be. Uses rax."""
    a.mov(RAX, 1, size=32)
    a.xchg(gs(_WHERE), RAX, size=32)
    a.cmp(gs(_STOP), 0, size=32)
    a.jcc(Cond.NE, refused)


def say_out(a: Assembler) -> None:
    """The vCPU is out; who waits for that is woken. Uses rax, rcx, rdx, rsi, rdi, r10, r11."""
    over = a.label()
    a.xor(RAX, RAX, size=32)
    a.xchg(gs(_WHERE), RAX, size=32)
    a.cmp(gs(_STOP), 0, size=32)
    a.jcc(Cond.E, over)
    a.mov(RDI, gs(OFFSETS["self_"]))
    futex(a, _WHERE, WAKE, 1)
    a.bind(over)


def park(a: Assembler) -> None:
    """Out, until ``stop`` has ended, and in again. Uses what say_out uses."""
    begin, wait, again = a.label(), a.label(), a.label()
    a.bind(begin)
    a.mov(gs(_PARKED), 1)
    say_out(a)
    a.bind(wait)
    a.cmp(gs(_STOP), 0, size=32)
    a.jcc(Cond.E, again)
    a.mov(RDI, gs(OFFSETS["self_"]))
    futex(a, _STOP, WAIT, 1)
    a.jmp(wait)
    a.bind(again)
    a.mov(gs(_PARKED), 0)
    say_in(a, begin)


def stop_all(a: Assembler) -> None:
    """``void stop_all(u64 *blocks, u64 count)``: stop the vCPUs of these state blocks; returns when all are out."""
    for reg in (RBX, R12, R13):
        a.push(reg)
    a.mov(RBX, RDI)
    a.lea(R12, Mem(RDI, RSI, 8))
    tell, told, wait, look, spin, out, done = (a.label() for _ in range(7))
    a.bind(tell)
    a.cmp(RDI, R12)
    a.jcc(Cond.E, told)
    a.mov(RAX, Mem(RDI))
    a.mov(Mem(RAX, disp=_STOP), 1, size=32)
    a.mov(Mem(RAX, disp=BRK_STOP), 1, size=8)
    a.lea(RDI, Mem(RDI, disp=8))
    a.jmp(tell)
    a.bind(told)
    a.mfence()
    a.bind(wait)
    a.cmp(RBX, R12)
    a.jcc(Cond.E, done)
    a.mov(R13, Mem(RBX))
    a.mov(RCX, _SPINS, size=32)
    a.bind(look)
    a.cmp(Mem(R13, disp=_WHERE), 0, size=32)
    a.jcc(Cond.E, out)
    a.sub(RCX, 1, size=32)
    a.jcc(Cond.NE, spin)
    a.mov(RDI, R13)
    futex(a, _WHERE, WAIT, 1)
    a.mov(RCX, 1, size=32)
    a.jmp(look)
    a.bind(spin)
    a.raw(b"\xf3\x90")  # pause
    a.jmp(look)
    a.bind(out)
    a.lea(RBX, Mem(RBX, disp=8))
    a.jmp(wait)
    a.bind(done)
    for reg in (R13, R12, RBX):
        a.pop(reg)
    a.ret()


def go_all(a: Assembler) -> None:
    """``void go_all(u64 *blocks, u64 count)``: what stop_all stopped may go on."""
    more, asleep, done = a.label(), a.label(), a.label()
    a.mov(R8, RDI)
    a.lea(R9, Mem(RDI, RSI, 8))
    a.bind(more)
    a.cmp(R8, R9)
    a.jcc(Cond.E, done)
    a.mov(RDI, Mem(R8))
    a.lea(R8, Mem(R8, disp=8))
    a.mov(Mem(RDI, disp=BRK_STOP), 0, size=8)
    a.xor(RAX, RAX, size=32)
    a.xchg(Mem(RDI, disp=_STOP), RAX, size=32)
    a.cmp(Mem(RDI, disp=_PARKED), 1, size=32)
    a.jcc(Cond.E, asleep)
    a.jmp(more)
    a.bind(asleep)
    futex(a, _STOP, WAKE, 1)
    a.jmp(more)
    a.bind(done)
    a.ret()
