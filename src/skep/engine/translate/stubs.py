"""Hand-written machine code: the way into guest code, out of it, and from it to the routines of runtime.py.

In guest code the guest's rax, rcx, rdx, rbx, rsi, rdi, rbp, r8 and r12 to r15 are in the host registers of the same
name, its rsp is in host r9, its r9 to r11 are in the state block, and so is everything else. Host r10 and r11 are
temporaries, rsp is the host's stack.

Templates reach a stub by ``call gs:[name]`` or ``jmp gs:[name]`` with these conventions:

=====================  ==========================================================================
slow, range            ``push desc; call``: r10 is address ^ tag, r11 the TLB offset;
                       returns with r10 the operand's host address; ``range`` if several share the check
link                   ``mov r11, key; call; dd site``: patch the jump whose displacement is
                       ``site`` bytes from that word, and go
miss                   ``jmp``: r10 is the target's tag
brk_exit               ``jmp``: r10 is the guest address to go on at
emu_exit               ``jmp``: r10 is the address of an instruction for Python
iret, syscall, sysret  ``jmp``: r10 is the instruction's address
cr3_load, invlpg       ``push offset; call``: r10 is the operand
invpcid                ``push offset; call``: r10 is the descriptor's host address, r11 the type
span                   ``push offset; call``: r10 is the host address of the block's second page
load_segment           ``push desc; call``: r10 is the selector
cpuid, rdmsr, wrmsr    ``push offset; call``
rep_stos, rep_movs, rep_cmps, narrow_string  ``push desc; call``
yield_                 ``call``: only r11 may change
=====================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from skep.engine.translate.apic_runtime import FOR_PYTHON, NOTHING
from skep.engine.translate.asm import (
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RSI,
    RSP,
    Assembler,
    Cond,
    Label,
    Mem,
    gs,
)
from skep.engine.translate.layout import (
    BRK_TURN,
    EMPTY_JC,
    HALTED,
    JC,
    JC_ARRAY,
    OFFSETS,
    TLB,
    TWINS,
    TWINS_MASK,
    WAKES,
    XSAVE_AREA,
    Kind,
    Mode,
)
from skep.engine.translate.parking import WAIT, WAKE, futex, go_all, kick, park, say_in, say_out, stop_all
from skep.engine.translate.ticks import SYS_TIMERFD_SETTIME, watch_ticks
from skep.engine.translate.turns import HAS_TURN, IDLE, give, give_way, take, watch_turns

CALLER_SAVED = {"rax": RAX, "rcx": RCX, "rdx": RDX, "rsi": RSI, "rdi": RDI, "r8": R8, "rsp": R9}
"""Guest registers (by name) in host registers that a routine may change."""
CALLEE_SAVED = {"rbx": RBX, "rbp": RBP, "r12": R12, "r13": R13, "r14": R14, "r15": R15}
SAVED_RAX = "t6"
"""Where a template keeps rax while rax holds its saved flags."""


def field(name: str) -> Mem:
    return gs(OFFSETS[name])


def save_flags(a: Assembler) -> None:
    """Flags to rax without a flag changed: SF ZF AF PF CF in ah, OF in al. DF is left alone."""
    a.mov(field(SAVED_RAX), RAX)
    a.lahf()
    a.setcc(Cond.O, RAX)


def restore_flags(a: Assembler) -> None:
    a.add(RAX, 0x7F, size=8)
    a.sahf()
    a.mov(RAX, field(SAVED_RAX))


def jump_set(a: Assembler) -> None:
    """r11 = the offset of the jump cache's set for the tag in r10 (as runtime.jump_set does). No flag changes."""
    a.rorx(R11, R10, 14, size=32)
    a.lea(R11, Mem(R11, R10), size=32)
    a.pdep(R11, R11, field("pdep_mask"), size=32)


class Stubs:
    """The stubs' code, and where each begins (offset from the code's start)."""

    def __init__(self, routines: Mapping[str, int]) -> None:
        """``routines``: host addresses of runtime.py's routines."""
        self._routines = routines
        self._labels: dict[str, Label] = {}
        a = self.asm = Assembler()
        self._park, self._hand_on, self._give_turn, self._take_turn = (a.label() for _ in range(4))
        self._enter(a)
        self._exits(a)
        self._slow(a)
        self._jumps(a)
        self._calls(a)

    def code(self, base: int) -> tuple[bytes, dict[str, int]]:
        """The bytes for address ``base``, and the host address of each stub."""
        data = self.asm.code(base)
        return data, {name: self.asm.address_of(label) for name, label in self._labels.items()}

    def _begin(self, name: str) -> Label:
        self.asm.align(16)
        label = self._labels[name] = self.asm.here()
        return label

    def _enter(self, a: Assembler) -> None:
        """``void enter(void)``: run guest code from st.rip until something leaves it, as soon as nobody keeps the vCPU
        out; ``enter_at``: from st.target, or not at all."""
        here, enter, refused, waits, inside, resume, decided, nowhere = (a.label() for _ in range(8))
        for name in ("enter", "enter_at"):
            self._begin(name)
            for reg in (RBX, RBP, R12, R13, R14, R15):
                a.push(reg)
            a.mov(field("host_rsp"), RSP)
            a.stmxcsr(field("host_mxcsr"))
            if name == "enter":
                self._take_part(a, enter)
                a.bind(enter)
            say_in(a, waits if name == "enter" else refused)
            a.jmp(resume if name == "enter" else here)
        # The turn is over, or there was no time to wait for one: among those that wait.
        a.bind(self._hand_on)
        say_out(a)
        self._change_turns(a)
        say_in(a, self._park)
        a.jmp(inside)
        a.bind(waits)
        a.cmp(field("inject"), 0)
        a.mov(field("kind"), Kind.DELIVER)  # no part of the state: first it is delivered
        a.jcc(Cond.NE, nowhere)
        # Everything is in the state block, for whoever freezes the VM to see.
        a.bind(self._park)
        park(a)
        a.bind(inside)
        a.cmp(field("brk"), 0, size=16)
        a.jcc(Cond.E, resume)
        a.mov(field("kind"), Kind.BREAK)
        self._attend(a)
        a.jmp(decided)
        a.bind(resume)
        self._call(a, "resume")
        a.bind(decided)
        a.test(RAX, RAX)
        a.jcc(Cond.E, nowhere)
        a.mov(field("target"), RAX)
        a.bind(here)
        a.mov(RAX, 7)
        a.xor(RDX, RDX, size=32)
        a.xrstor64(gs(XSAVE_AREA))
        a.push(field("flags"))
        a.popfq()
        for name, reg in (CALLER_SAVED | CALLEE_SAVED).items():
            a.mov(reg, field(name))
        self._to_target(a)
        a.bind(refused)
        a.mov(field("kind"), Kind.STOPPED)
        a.bind(nowhere)
        self._leave(a)
        self._halt(a, decided, nowhere)

    def _halt(self, a: Assembler, decided: Label, nowhere: Label) -> None:
        """HLT: asleep until an interrupt comes that may be taken, or Python has something for the vCPU. Who wakes it
        sets ``brk`` and then looks at ``asleep``; here it is the other way round."""
        mine, doze, sleep, woken, own, park_, awake, out = (a.label() for _ in range(8))
        self._begin("halt_exit")
        a.mov(field("rip"), R10)
        a.mov(field("kind"), Kind.HALT)
        self._save(a)
        a.cmp(field("apic"), 0, size=32)
        a.jcc(Cond.E, self._exit_saved())
        for name in ("wanted", "single"):
            a.cmp(field(name), 0, size=32)
            a.jcc(Cond.NE, self._exit_saved())
        a.cmp(field("iflag"), 0, size=32)
        a.jcc(Cond.NE, mine)
        a.jmp(self._exit_saved())
        a.bind(mine)
        self._save_rest(a)
        a.add(field("n_halt"), 1)
        a.bind(doze)
        a.mov(RAX, 1, size=32)
        a.xchg(field("asleep"), RAX, size=32)
        a.cmp(field("brk"), 0, size=16)
        a.jcc(Cond.NE, awake)
        a.cmp(field("irq"), 0, size=32)
        a.jcc(Cond.NE, awake)
        a.mov(field("parked"), HALTED)
        say_out(a)
        a.call(self._give_turn)
        self._timestamp(a)
        a.sub(field("slept"), RDI)
        a.bind(sleep)
        a.cmp(field("asleep"), 0, size=32)
        a.jcc(Cond.E, woken)
        a.mov(RDI, field("self_"))
        futex(a, OFFSETS["asleep"], WAIT, 1)
        a.jmp(sleep)
        a.bind(woken)
        self._timestamp(a)
        a.add(field("slept"), RDI)
        a.cmp(field("seat"), 0)
        a.jcc(Cond.E, own)
        a.mov(gs(BRK_TURN), 0, size=8)
        a.mov(RSI, IDLE, size=32)
        a.call(self._take_turn)
        a.bind(own)
        say_in(a, park_)
        a.mov(field("parked"), 0)
        a.jmp(awake)
        a.bind(park_)
        park(a)
        a.bind(awake)
        a.mov(field("asleep"), 0)
        self._timestamp(a)
        self._call(a, "halted")
        a.mov(field("target"), RAX)
        self._set_tick(a)
        a.mov(RAX, field("target"))
        a.cmp(RAX, NOTHING)
        a.jcc(Cond.E, doze)
        a.cmp(RAX, FOR_PYTHON)
        a.jcc(Cond.E, out)
        a.mov(field("kind"), Kind.BREAK)
        self._call(a, "resume")
        a.jmp(decided)
        a.bind(out)
        a.jmp(nowhere)

    def _take_part(self, a: Assembler, enter: Label) -> None:
        """To ``enter`` with a turn, where turns are taken; or with one to be had at the first look, behind the delivery
        of an interrupt: the block must be all of the state while it waits."""
        wait, later = a.label(), a.label()
        a.mov(RDI, field("seat"))
        a.test(RDI, RDI)
        a.jcc(Cond.E, enter)
        a.cmp(gs(BRK_TURN), 0, size=8)
        a.jcc(Cond.NE, wait)
        a.cmp(Mem(RDI, disp=HAS_TURN), 0, size=32)
        a.jcc(Cond.NE, enter)
        a.bind(wait)
        a.cmp(field("inject"), 0)
        a.jcc(Cond.NE, later)
        self._change_turns(a)
        a.jmp(enter)
        a.bind(later)
        a.mov(gs(BRK_TURN), 1, size=8)

    def _change_turns(self, a: Assembler) -> None:
        """Give the turn away, if the vCPU has one, and wait for another."""
        a.mov(gs(BRK_TURN), 0, size=8)
        a.mov(RDI, field("seat"))
        a.mov(RSI, IDLE, size=32)
        a.sub(RSI, Mem(RDI, disp=HAS_TURN), size=32)
        a.push(RSI)
        a.call(self._give_turn)
        a.pop(RSI)
        a.call(self._take_turn)

    def _leave(self, a: Assembler) -> None:
        """Back to the caller of ``enter``, with the host's registers."""
        say_out(a)
        a.mov(RSP, field("host_rsp"))
        for reg in (R15, R14, R13, R12, RBP, RBX):
            a.pop(reg)
        a.ret()

    def _to_target(self, a: Assembler) -> None:
        a.mov(R10, field("tag"))
        a.mov(R11, field("set"))
        a.jmp(field("target"))

    def _exits(self, a: Assembler) -> None:
        self._begin("brk_exit")
        a.mov(field("rip"), R10)
        a.mov(field("kind"), Kind.BREAK)
        self._save(a)
        for mine, where in ((gs(OFFSETS["stop"]), self._park), (gs(BRK_TURN), self._hand_on)):
            other = a.label()
            a.cmp(mine, 0, size=8)
            a.jcc(Cond.E, other)
            self._save_rest(a)
            a.jmp(where)
            a.bind(other)
        self._attend(a)
        self._finish(a)
        for name, kind in (("emu_exit", Kind.EMULATE), ("segment_exit", Kind.SEGMENT)):
            self._begin(name)
            a.mov(field("rip"), R10)
            a.mov(field("kind"), kind)
            self._save(a)
            a.jmp(self._exit_saved())
        self._begin("port_exit")
        a.mov(field("rip"), R10)
        a.mov(field("kind"), Kind.PORT)
        self._save(a)
        self._call(a, "port")
        self._finish(a)
        self._begin("done_exit")  # a single instruction has been executed
        a.mov(field("rip"), R10)
        a.mov(field("kind"), Kind.JUMP)
        self._save(a)
        a.jmp(self._exit_saved())
        self._begin("fault_exit")  # the signal handler's way out: info, va and rip are set
        a.mov(field("kind"), Kind.FAULT)
        self._save(a)
        a.jmp(self._exit_saved())
        self._begin("exit_saved")
        a.bind(self._exit_label)
        self._save_rest(a)
        inside = a.label()
        a.cmp(field("kind"), Kind.FAULT)
        a.jcc(Cond.E, inside)
        self._leave(a)
        # The translation that faulted must stay until Python has looked it up: still in, until ``leave``.
        a.bind(inside)
        a.mov(RSP, field("host_rsp"))
        for reg in (R15, R14, R13, R12, RBP, RBX):
            a.pop(reg)
        a.ret()
        self._begin("leave")
        say_out(a)
        a.ret()
        self._begin("yield_")
        give_way(a)
        self._begin("stop_all")
        stop_all(a)
        self._begin("go_all")
        go_all(a)
        self._begin("kick")
        kick(a)
        self._begin("watch_ticks")
        watch_ticks(a)
        self._begin("watch_turns")
        watch_turns(a)
        a.bind(self._give_turn)
        self._labels["give_turn"] = self._give_turn
        give(a)
        a.bind(self._take_turn)
        take(a)

    @staticmethod
    def _save_rest(a: Assembler) -> None:
        """After ``_save``: what routines leave alone, to the state block; the host's MXCSR again. Uses rax and rdx."""
        wide = a.label()
        a.test(field("mode"), Mode.NARROW, size=8)
        a.jcc(Cond.E, wide)
        a.mov(RAX, field("rip"), size=32)
        a.mov(field("rip"), RAX)
        a.bind(wide)
        for name, reg in CALLEE_SAVED.items():
            a.mov(field(name), reg)
        a.cld()
        a.mov(RAX, 7)
        a.xor(RDX, RDX, size=32)
        a.xsave64(gs(XSAVE_AREA))
        a.vzeroupper()
        a.fninit()
        a.ldmxcsr(field("host_mxcsr"))

    def _attend(self, a: Assembler) -> None:
        """rax = where to enter, or 0 to leave, for a vCPU that somebody wants."""
        self._timestamp(a)
        self._call(a, "attend")
        a.mov(field("target"), RAX)
        self._set_tick(a)
        a.mov(RAX, field("target"))

    @staticmethod
    def _timestamp(a: Assembler) -> None:
        """rdi = the host's counter. Uses rax and rdx."""
        a.rdtsc()
        a.shl(RDX, 32)
        a.lea(RDI, Mem(RAX, RDX))

    @staticmethod
    def _set_tick(a: Assembler) -> None:
        """timerfd_settime, if a routine wants it. Uses rax, rcx, rdx, rsi, rdi, r10, r11."""
        over = a.label()
        a.cmp(field("tick_set"), 0, size=32)
        a.jcc(Cond.E, over)
        a.mov(field("tick_set"), 0)
        a.mov(RDI, field("tick"))
        a.xor(RSI, RSI, size=32)
        a.mov(RDX, field("self_"))
        a.lea(RDX, Mem(RDX, disp=OFFSETS["tick_spec"]))
        a.xor(R10, R10, size=32)
        a.mov(RAX, SYS_TIMERFD_SETTIME, size=32)
        a.syscall()
        a.bind(over)

    @staticmethod
    def _wake(a: Assembler) -> None:
        """The vCPUs that a routine has posted to and that sleep. Uses what futex uses."""
        more, over = a.label(), a.label()
        a.bind(more)
        a.mov(RCX, field("wakes"))
        a.jrcxz(over)
        a.sub(RCX, 1)
        a.mov(field("wakes"), RCX)
        a.shl(RCX, 3)
        a.mov(RDI, Mem(RCX, disp=WAKES, gs=True))
        futex(a, OFFSETS["asleep"], WAKE, 1)
        a.jmp(more)
        a.bind(over)

    _exit_label: Label

    def _exit_saved(self) -> Label:
        if not hasattr(self, "_exit_label"):
            self._exit_label = self.asm.label()
        return self._exit_label

    @staticmethod
    def _save(a: Assembler) -> None:
        """What a routine may change, to the state block. DF stays as the guest has it: routines never look at it."""
        for name, reg in CALLER_SAVED.items():
            a.mov(field(name), reg)
        a.pushfq()
        a.pop(field("flags"))

    @staticmethod
    def _restore(a: Assembler) -> None:
        """Back from the state block; popfq is slow, sahf is not."""
        a.mov(RAX, field("flags"), size=32)
        a.bt(RAX, 11, size=32)
        a.raw(b"\x88\xc4")  # mov ah, al
        a.setcc(Cond.C, RAX)
        a.add(RAX, 0x7F, size=8)
        a.sahf()
        for name, reg in reversed(CALLER_SAVED.items()):
            a.mov(reg, field(name))

    def _jump_out(self, a: Assembler) -> None:
        """Enter the guest at st.target with everything from the state block, DF included."""
        down = a.label()
        a.cld()
        a.test(field("flags"), 0x400, size=32)
        a.jcc(Cond.NE, down)
        self._restore(a)
        self._to_target(a)
        a.bind(down)
        a.std()
        self._restore(a)
        self._to_target(a)

    def _finish(self, a: Assembler) -> None:
        """After a routine that returns a host address to enter at, or 0 to leave."""
        a.test(RAX, RAX)
        a.jcc(Cond.E, self._exit_saved())
        a.mov(field("target"), RAX)
        self._jump_out(a)

    def _call(self, a: Assembler, routine: str) -> None:
        a.call_abs(self._routines[routine])

    def _not_done(self, a: Assembler, leave: Label) -> None:
        """At ``leave``, with the flags of fill's result compared with 1: equal enters the guest at st.target, below
        leaves for Python. Either way the template that called is not gone back to."""
        fault = a.label()
        a.bind(leave)
        a.lea(RSP, Mem(RSP, disp=16))
        a.jcc(Cond.E, fault)
        a.jmp(self._exit_saved())
        a.bind(fault)
        self._jump_out(a)

    def _slow(self, a: Assembler) -> None:
        slow = self._begin("slow")
        leave = a.label()
        self._save(a)
        a.mov(RSI, Mem(RSP, disp=8), size=32)
        a.mov(RAX, RSI, size=32)
        a.shr(RAX, 8, size=32)
        a.and_(RAX, 3 << 16, size=32)  # the array's number times TLB_ARRAY
        a.xor(RCX, RCX, size=32)
        a.test(RSI, 3 << 22, size=32)
        a.setcc(Cond.NE, RCX)
        a.lea(RAX, Mem(RAX, RCX, 8))  # write tags stand behind read tags
        a.mov(R11, R11, size=32)
        a.add(RAX, R11)
        a.xor(R10, Mem(RAX, disp=TLB, gs=True))
        a.mov(RDI, R10)
        self._call(a, "fill")
        a.cmp(RAX, 1)
        a.jcc(Cond.BE, leave)
        a.mov(R10, RAX)
        self._restore(a)
        a.ret(8)
        self._not_done(a, leave)

        # A range of which the TLB has the page and which goes on in the next: into the plain twin where that was found
        # from here before (runtime.fill_range), else as any.
        self._begin("range")
        save_flags(a)
        other = a.label()
        a.push(R10)
        a.push(R11)
        a.mov(R11, Mem(RSP, disp=16))
        a.mov(field("failed"), R11)
        a.cmp(R10, 4096)
        a.jcc(Cond.AE, other)
        a.mov(R10, R11)
        a.shl(R11, 4, size=32)
        a.and_(R11, TWINS_MASK, size=32)
        a.cmp(R10, Mem(R11, disp=TWINS, gs=True))
        a.jcc(Cond.NE, other)
        a.lea(RSP, Mem(RSP, disp=32))
        restore_flags(a)
        a.jmp(Mem(R11, disp=TWINS + 8, gs=True))
        a.bind(other)
        a.pop(R11)
        a.pop(R10)
        restore_flags(a)
        a.jmp(slow)

    def _jumps(self, a: Assembler) -> None:
        self._begin("link")
        self._save(a)
        a.mov(RDI, R11)
        a.pop(RSI)
        a.movsxd(RAX, Mem(RSI))
        a.add(RSI, RAX)
        self._call(a, "link")
        a.test(RAX, RAX)
        a.jcc(Cond.E, self._exit_saved())
        a.mov(field("target"), RAX)
        self._restore(a)
        a.jmp(field("target"))

        miss = self._begin("miss")
        self._save(a)
        wide = a.label()
        a.mov(RDI, R10)
        a.test(field("mode"), Mode.NARROW, size=8)
        a.jcc(Cond.E, wide)
        a.mov(RDI, RDI, size=32)
        a.bind(wide)
        self._call(a, "lookup")
        self._finish(a)

        # A checked entry that was not meant, or none: try the set's second way, then look up.
        for array in range(3):
            self._begin(f"second{array}")
            meant = a.label()
            jump_set(a)
            a.push(RCX)
            a.mov(RCX, Mem(R11, disp=JC + array * JC_ARRAY + 16, gs=True))
            a.lea(RCX, Mem(RCX, R10))
            a.jrcxz(meant)
            a.pop(RCX)
            a.jmp(miss)
            a.bind(meant)
            a.pop(RCX)
            a.lea(R11, Mem(R11, disp=16))
            a.jmp(Mem(R11, disp=JC + array * JC_ARRAY + 8, gs=True))
            # The checked entry of a block that is no more: forget the way that led there.
            self._begin(f"dead{array}")
            a.push(RAX)
            a.push(RCX)
            a.pext(RAX, R11, field("pdep_mask"))  # the number of its set; no flag changes here
            a.not_(RAX)
            a.mov(RCX, EMPTY_JC + 1)
            a.lea(RAX, Mem(RAX, RCX))
            a.mov(Mem(R11, disp=JC + array * JC_ARRAY, gs=True), RAX)
            a.pop(RCX)
            a.pop(RAX)
            a.jmp(miss)
            # Its plain entry: the offset in the page is on the stack.
            self._begin(f"away{array}")
            a.mov(R10, field("page"))
            a.pop(R11)
            a.lea(R10, Mem(R10, R11))
            jump_set(a)
            a.jmp(Mem(R11, disp=JC + array * JC_ARRAY + 8, gs=True))
        self._begin("away_narrow")
        a.mov(R10, field("page"))
        a.pop(R11)
        a.lea(R10, Mem(R10, R11), size=32)
        a.mov(field("rip"), R10)
        self._save(a)
        self._call(a, "resume")
        self._finish(a)

    def _calls(self, a: Assembler) -> None:
        for name, routine in (("iret", "interrupt_return"), ("syscall", "system_call"), ("sysret", "system_return")):
            self._begin(name)
            self._save(a)
            a.mov(RDI, R10)
            self._call(a, routine)
            self._finish(a)
        for name, routine in (
            ("cr3_load", "load_cr3"),
            ("invlpg", "invalidate"),
            ("invpcid", "invalidate_pcid"),
            ("span", "second_page"),
            ("load_segment", "load_segment"),
            ("cpuid", "identify"),
            ("rdmsr", "read_msr"),
            ("wrmsr", "write_msr"),
        ):
            self._begin(name)
            leave = a.label()
            self._save(a)
            if routine == "write_msr":
                self._timestamp(a)
            else:
                a.mov(RDI, R10)
            a.mov(RSI, Mem(RSP, disp=8), size=32)
            if routine in ("load_cr3", "invalidate", "invalidate_pcid"):
                a.add(RSI, field("page"))
            if routine == "invalidate_pcid":
                a.mov(RDX, R11)
            self._call(a, routine)
            if routine != "invalidate":
                a.test(RAX, RAX)
                a.jcc(Cond.E, leave)
            if routine == "write_msr":
                self._set_tick(a)
                self._wake(a)
            if routine == "identify":
                a.mov(RBX, field("rbx"))
            self._restore(a)
            a.ret(8)
            a.bind(leave)
            a.lea(RSP, Mem(RSP, disp=16))
            a.jmp(self._exit_saved())
        for name, routine in (
            ("rep_stos", "rep_store"),
            ("rep_movs", "rep_move"),
            ("rep_cmps", "rep_compare"),
            ("narrow_string", "narrow_string"),
        ):
            self._begin(name)
            down, done, leave = a.label(), a.label(), a.label()
            self._save(a)
            a.mov(RDI, Mem(RSP, disp=8), size=32)
            a.mov(RSI, RDI, size=32)
            a.shr(RSI, 24, size=32)
            a.and_(RSI, 3, size=32)
            both_ways = routine in ("rep_store", "rep_move")
            if both_ways:
                a.test(field("flags"), 0x400, size=32)
                a.jcc(Cond.NE, down)
            self._call(a, routine)
            a.bind(done)
            a.cmp(RAX, 1)
            a.jcc(Cond.BE, leave)
            self._restore(a)
            a.ret(8)
            self._not_done(a, leave)
            if not both_ways:
                continue
            a.bind(down)
            if routine == "rep_move":
                a.or_(RDI, 1 << 14)
            self._call(a, "rep_down")
            a.jmp(done)
