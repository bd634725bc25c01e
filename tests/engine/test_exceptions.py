"""Exceptions and system instructions: what is pushed where, what a double and a triple fault are, who may do what."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from skep.engine.amd64.registers import Cr0, Cr4, Efer, Pte
from skep.engine.contract import ExitReason
from tests.engine.assemble import assemble
from tests.engine.place import PAGE
from tests.engine.tiny import (
    CODE64,
    GDT,
    IDT,
    IST,
    PROGRAM,
    RSP0,
    STACK,
    TSS,
    TSS_SELECTOR,
    USER64,
    USER_DATA,
    USER_STACK,
    Frame,
    Tiny,
)

Boot = Callable[..., Tiny]
RF = 1 << 16


def fault(guest: Tiny) -> Frame:
    guest.run()
    frame = guest.exception
    assert frame is not None
    return frame


def at_end(guest: Tiny) -> None:
    guest.run()
    assert guest.exception is None, guest.exception


class TestDelivery:
    @pytest.mark.parametrize(
        ("text", "vector", "error"),
        [
            ("ud2", 6, 0),
            ("mov ax, 0x50\nmov ds, ax", 13, 0x50),  # beyond the GDT
            ("mov ax, 0x57\nmov es, ax", 13, 0x54),
            ("mov ax, 0x40\nmov fs, ax", 13, 0x40),  # a TSS is no data segment
            ("xor eax, eax\nmov ss, ax\nmov ax, 0x50\nmov ss, ax", 13, 0x50),
            ("mov rax, 1\nmov cr4, rax", 13, 0),  # long mode needs PAE
            ("mov rax, 0x80000000\nmov cr0, rax", 13, 0),  # PG without PE
            ("mov rax, -1\nmov cr3, rax", 13, 0),
            ("mov ecx, 0x12345\nrdmsr", 13, 0),
            ("mov ecx, 0x12345\nwrmsr", 13, 0),
            ("mov ecx, 0xc0000100\nmov edx, 0x8000\nwrmsr", 13, 0),  # a base that is not canonical
            ("mov eax, 2\nxor edx, edx\nxor ecx, ecx\nxsetbv", 13, 0),  # SSE without x87
            ("mov eax, 15\nxor edx, edx\nxor ecx, ecx\nxsetbv", 13, 0),
            ("push 0\npush 0x50\npush 0\npush 0x50\npush 0\niretq", 13, 0x50),
            ("push 0x50\npush 0\nretfq", 13, 0x50),
            ("ltr [rip + sel]\nsel: dw 0x10", 13, 0x10),
            ("db 0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1", 6, 0),  # AVX-512: CPUID says no
            ("rdpkru", 6, 0),
            ("wrpkru", 6, 0),
            ("rsm", 6, 0),
            ("db 0xf0, 0x90", 6, 0),
            ("db 0x0f, 0x20, 0xc8", 6, 0),  # MOV from CR1
            ("db 0x0f, 0x22, 0xf8", 6, 0),  # MOV to CR7
        ],
    )  # fmt: skip
    def test_faults(self, boot: Boot, text: str, vector: int, error: int) -> None:
        frame = fault(boot(f"{text}\nhlt"))
        assert (frame.vector, frame.error) == (vector, error)
        assert frame.cs == CODE64 and frame.rflags & RF

    def test_frame_without_a_change_of_ring(self, boot: Boot) -> None:
        """RSP is aligned to 16 and pushed all the same (SDM 3, 6.14.2)."""
        guest = boot("mov rsp, STACK - 0x103\nstd\nstc\nwhere: ud2")
        frame = fault(guest)
        assert frame == Frame(6, 0, guest.program["where"], CODE64, frame.rflags, STACK - 0x103, frame.ss, frame.cr2)
        assert frame.rflags & 0x401 == 0x401
        assert guest.reg("rsp") == (STACK - 0x103 & ~15) - 7 * 8
        assert guest.state["rflags"] & 0x200 == 0

    def test_frame_from_ring_3(self, boot: Boot) -> None:
        guest = boot("mov rsp, USER_STACK - 24\nwhere: ud2", user=True)
        frame = fault(guest)
        assert (frame.rip, frame.cs, frame.rsp, frame.ss) == (
            guest.program["where"],
            USER64,
            USER_STACK - 24,
            USER_DATA,
        )
        state = guest.state
        assert state["rsp"] == RSP0 - 7 * 8
        assert state["cs"]["selector"] == CODE64
        assert state["ss"]["selector"] == 0  # a null selector with RPL 0

    def test_ist(self, boot: Boot) -> None:
        guest = boot("ud2", ist={6: 3})
        assert fault(guest).rsp == STACK
        assert guest.reg("rsp") == IST[2] - 7 * 8

    def test_traps_have_no_rf_and_point_behind(self, boot: Boot) -> None:
        guest = boot("int3\nbehind: nop")
        frame = fault(guest)
        assert (frame.vector, frame.rip, frame.rflags & RF) == (3, guest.program["behind"], 0)

    def test_trap_gate_keeps_if(self, boot: Boot) -> None:
        text = "start: sti\nnop\nint 0x40\nhandler: pushfq\npop rax\ncli\nhlt"
        for kind, flag in ((0x8F, 0x200), (0x8E, 0)):
            guest = boot(text, handlers={0x40: "handler"})
            guest.memory.store_u8(IDT + 16 * 0x40 + 5, kind)
            at_end(guest)
            assert guest.reg("rax") & 0x200 == flag

    def test_iretq_gives_all_back(self, boot: Boot) -> None:
        text = """
            start: mov rax, 0x1234
            stc
            int 0x41
            setc bl
            mov rdx, rsp
            hlt
            handler: add rax, 1
            clc
            iretq
        """
        guest = boot(text, handlers={0x41: "handler"})
        at_end(guest)
        assert (guest.reg("rax"), guest.reg("rbx"), guest.reg("rdx")) == (0x1235, 1, STACK)

    def test_double_fault(self, boot: Boot) -> None:
        """An exception whose frame cannot be pushed, once; #DF has a stack of its own."""
        guest = boot("mov rsp, 0x700000\nwhere: push rax", ist={8: 1})
        frame = fault(guest)
        assert (frame.vector, frame.error, frame.cr2 & -PAGE) == (8, 0, 0x6FF000)

    def test_double_fault_by_a_gate_that_is_not_there(self, boot: Boot) -> None:
        guest = boot("where: ud2", ist={8: 1})
        guest.memory.store_u8(IDT + 16 * 6 + 5, 0x0E)  # #UD gives #NP, which can be delivered
        frame = fault(guest)
        assert (frame.vector, frame.error, frame.rip) == (11, 6 << 3 | 2 | 1, guest.program["where"])
        guest = boot("where: ud2", ist={8: 1})
        guest.memory.store_u64(IDT + 16 * 6, 0)  # no gate at all: #GP
        frame = fault(guest)
        assert (frame.vector, frame.error, frame.rip) == (13, 6 << 3 | 2 | 1, guest.program["where"])
        guest = boot("mov ax, 0x50\nwhere: mov ds, ax", ist={8: 1})
        guest.memory.store_u64(IDT + 16 * 13, 0)  # #GP, then #NP: both contributory
        frame = fault(guest)
        assert (frame.vector, frame.error, frame.rip) == (8, 0, guest.program["where"])

    def test_triple_fault(self, boot: Boot) -> None:
        guest = boot("mov rsp, 0x700000\npush rax")
        left = guest.run()
        assert left.reason is ExitReason.SHUTDOWN
        guest = boot("lidt [rip + table]\nint3\ntable: dw 0\ndq 0")
        assert guest.run().reason is ExitReason.SHUTDOWN

    def test_a_gate_beyond_the_limit(self, boot: Boot) -> None:
        guest = boot(f"lidt [rip + table]\nint 0x20\ntable: dw 0x1ff\ndq {IDT}")
        frame = fault(guest)
        assert (frame.vector, frame.error) == (13, 0x20 << 3 | 2)

    def test_page_fault_in_a_handler_is_no_double_fault(self, boot: Boot) -> None:
        guest = boot("ud2\nhandler: mov rax, [0x700000]", handlers={6: "handler"})
        frame = fault(guest)
        assert (frame.vector, frame.cr2, frame.rip) == (14, 0x700000, guest.program["handler"])

    def test_interrupts_through_a_tss_with_a_bad_stack(self, boot: Boot) -> None:
        guest = boot("ud2", user=True, ist={8: 1})
        guest.memory.write(TSS + 4, struct.pack("<Q", 1 << 63))  # RSP0 is not canonical: #SS, then #DF
        assert fault(guest).vector == 8


class TestSingleStep:
    def test_every_instruction_traps(self, boot: Boot) -> None:
        text = """
            start: lea rdi, [rip + list]
            pushfq
            or qword [rsp], 0x100
            popfq               ; TF counts from the next instruction on
            nop
            a: mov ecx, 2
            b: jmp c
            c: loop c
            d: pushfq
            e: and qword [rsp], ~0x100
            f: popfq
            g: nop
            hlt
            handler: mov rbx, [rsp]
            mov [rdi], rbx
            add rdi, 8
            mov rbx, dr6
            or rbp, rbx
            iretq
            list: space 400
        """
        guest = boot(text, handlers={1: "handler"})
        at_end(guest)
        p = guest.program
        count = (guest.reg("rdi") - p["list"]) // 8
        stops = struct.unpack(f"<{count}Q", guest.read("list", 8 * count))
        assert stops == (*(p[x] for x in "abccdefg"),)
        assert guest.reg("rbp") & 1 << 14  # DR6.BS

    def test_ports_and_returns_trap(self, boot: Boot) -> None:
        """IN, OUT and IRETQ leave translated code in ways of their own."""
        text = """
            start: mov dx, 0x80
            push 0x102
            popfq
            out dx, al
            a: in al, dx
            b: mov rax, rsp
            c: push 0x18
            d: push rax
            e: push 2
            f: push 0x10
            g: lea rax, [rip + end]
            h: push rax
            i: iretq
            end: hlt
            handler: inc ebx
            iretq
        """
        guest = boot(text, handlers={1: "handler"})
        at_end(guest)
        assert guest.reg("rbx") == 10
        assert [kind for kind, *_ in guest.io.log] == ["out", "in"]

    def test_rep_traps_after_each_iteration(self, boot: Boot) -> None:
        text = """
            start: mov ecx, 3
            lea rdi, [rip + buffer]
            push 0x102
            popfq
            rep stosb
            after: hlt
            handler: inc ebx
            mov rdx, [rsp]
            lea rax, [rip + after]
            cmp rdx, rax
            jne go
            mov qword [rsp + 16], 2
            go: iretq
            buffer: dq 0
        """
        guest = boot(text, handlers={1: "handler"})
        at_end(guest)
        assert guest.reg("rbx") == 3

    def test_the_handler_runs_without_tf(self, boot: Boot) -> None:
        guest = boot("push 0x102\npopfq\nnop\nhlt\nhandler: pushfq\npop rax\nhlt", handlers={1: "handler"})
        at_end(guest)
        assert guest.reg("rax") & 0x100 == 0


class TestProcessorState:
    @pytest.mark.parametrize(
        ("text", "cr0", "cr4", "xcr0", "vector"),
        [
            ("fld1", Cr0.TS, 0, 7, 7),
            ("fld1", Cr0.EM, 0, 7, 7),
            ("addps xmm0, xmm1", Cr0.TS, 0, 7, 7),
            ("addps xmm0, xmm1", Cr0.EM, 0, 7, 6),
            ("vaddps ymm0, ymm1, ymm2", Cr0.TS, 0, 7, 7),
            ("paddb mm0, mm1", Cr0.TS, 0, 7, 7),
            ("addps xmm0, xmm1", 0, Cr4.OSFXSR, 7, 6),
            ("vaddps ymm0, ymm1, ymm2", 0, Cr4.OSXSAVE, 7, 6),
            ("xor ecx, ecx\nxgetbv", 0, Cr4.OSXSAVE, 7, 6),
            ("vaddps ymm0, ymm1, ymm2", 0, 0, 3, 6),
            ("rdfsbase rax", 0, Cr4.FSGSBASE, 7, 6),
            ("fxsave [rip + area]", Cr0.TS, 0, 7, 7),
            ("xsave [rip + area]", Cr0.TS, 0, 7, 7),
            ("wait", Cr0.TS | Cr0.MP, 0, 7, 7),
            ("popcnt eax, ecx\npause\nsfence\nprefetcht0 [rip + area]\nud2", Cr0.TS | Cr0.EM, Cr4.OSFXSR, 7, 6),
        ],
    )
    def test_what_is_switched_off(self, boot: Boot, text: str, cr0: int, cr4: int, xcr0: int, vector: int) -> None:
        """``cr0`` bits set, ``cr4`` bits cleared."""
        guest = boot(f"{text}\nhlt\nalign 64\narea: space 1024")
        state = guest.state
        guest.set(cr0=state["cr0"] | cr0, cr4=state["cr4"] & ~cr4, xcr0=xcr0)
        assert fault(guest).vector == vector

    def test_switching_at_run_time(self, boot: Boot) -> None:
        """The same code, legal, then not, then legal again: a translation does not outlive its rules."""
        text = """
            start: call use
            mov rax, cr0
            or rax, 8
            mov cr0, rax
            call use
            hlt
            use: fld1
            fstp st0
            inc ebx
            ret
            handler: clts
            inc ecx
            iretq
        """
        guest = boot(text, handlers={7: "handler"})
        at_end(guest)
        assert (guest.reg("rbx"), guest.reg("rcx")) == (2, 1)

    def test_a_refused_xrstor_changes_no_register(self, boot: Boot) -> None:
        text = "mov rax, 0xf\nmov rdx, 1\nmov qword [rip + area + 520], 1\nstc\nxrstor [rip + area]\nhlt\nalign 64\n"
        guest = boot(text + "area: space 1024")
        frame = fault(guest)
        assert (frame.vector, guest.reg("rax"), guest.reg("rdx")) == (13, 0xF, 1)
        assert frame.rflags & 0x8D5 == 1

    def test_x87_error(self, boot: Boot) -> None:
        guest = boot("fldcw [rip + w]\nfldz\nfldz\nfdivp st1, st0\nwhere: fnop\nhlt\nw: dw 0x37e")
        frame = fault(guest)
        assert (frame.vector, frame.rip) == (16, guest.program["where"])

    def test_simd_exception_without_osxmmexcpt_is_ud(self, boot: Boot) -> None:
        guest = boot("ldmxcsr [rip + w]\nxorps xmm0, xmm0\ndivss xmm0, xmm0\nhlt\nw: dd 0x1f00")
        guest.set(cr4=guest.state["cr4"] & ~Cr4.OSXMMEXCPT)
        assert fault(guest).vector == 6

    def test_control_registers_read_back(self, boot: Boot) -> None:
        text = "mov rax, cr0\nmov rbx, cr3\nmov rcx, cr4\nmov rdx, 0x123000\nmov cr2, rdx\nmov rsi, cr2\nsmsw edi\nhlt"
        guest = boot(text)
        before = guest.state
        at_end(guest)
        for register, name in (("rax", "cr0"), ("rbx", "cr3"), ("rcx", "cr4")):
            assert guest.reg(register) == before[name]
        assert guest.reg("rsi") == 0x123000
        assert guest.reg("rdi") & 0xFFFF == before["cr0"] & 0xFFFF

    def test_debug_registers_read_back(self, boot: Boot) -> None:
        guest = boot("mov rax, 0x123456\nmov dr0, rax\nmov dr3, rax\nmov rbx, dr3\nmov rcx, dr6\nmov rdx, dr7\nhlt")
        at_end(guest)
        assert guest.reg("rbx") == 0x123456
        assert guest.reg("rcx") & 0xFFFF0FF0 == 0xFFFF0FF0
        assert guest.reg("rdx") == 0x400

    def test_descriptor_tables_are_the_guests(self, boot: Boot) -> None:
        text = "sgdt [rip + g]\nsidt [rip + i]\nstr ax\nsldt bx\nhlt\ng: space 16\ni: space 16"
        for user in (False, True):
            guest = boot(text if not user else text.replace("hlt", "ud2"), user=user)
            guest.run()
            assert struct.unpack("<HQ", guest.read("g", 10)) == (0x4F, GDT)
            assert struct.unpack("<HQ", guest.read("i", 10)) == (0xFFF, IDT)
            assert (guest.reg("rax"), guest.reg("rbx")) == (TSS_SELECTOR, 0)

    @pytest.mark.parametrize("text", ["sgdt [rip + g]", "sidt [rip + g]", "str ax", "sldt bx", "smsw ecx"])
    def test_umip(self, boot: Boot, text: str) -> None:
        guest = boot(f"{text}\nud2\ng: space 16", user=True)
        guest.set(cr4=guest.state["cr4"] | Cr4.UMIP)
        frame = fault(guest)
        assert (frame.vector, frame.error, frame.rip) == (13, 0, PROGRAM)

    def test_segment_loads(self, boot: Boot) -> None:
        text = """
            mov eax, 0x18
            mov ds, eax
            mov es, ax
            mov fs, ax
            xor ecx, ecx
            mov gs, cx
            mov dx, ds
            mov r8, fs
            mov r9w, gs
            push fs
            pop r10
            hlt
        """
        guest = boot(text)
        at_end(guest)
        assert [guest.reg(r) for r in ("rdx", "r8", "r9", "r10")] == [0x18, 0x18, 0, 0x18]
        state = guest.state
        assert state["fs"]["selector"] == 0x18 and state["fs"]["base"] == 0
        assert guest.memory.load_u64(GDT + 0x18) & 1 << 40  # accessed

    def test_fs_and_gs_base_msrs(self, boot: Boot) -> None:
        text = """
            mov ecx, 0xc0000100
            lea rax, [rip + data]
            xor edx, edx
            wrmsr
            mov rbx, fs:[0]
            mov ecx, 0xc0000102     ; KERNEL_GS_BASE
            add eax, 8
            wrmsr
            mov ecx, 0xc0000101
            add eax, 8
            wrmsr
            mov rsi, gs:[0]
            swapgs
            mov rdi, gs:[0]
            rdmsr
            mov r8, rax
            swapgs
            mov r9, gs:[0]
            hlt
            data: dq 11, 22, 33
        """
        guest = boot(text)
        at_end(guest)
        assert [guest.reg(r) for r in ("rbx", "rsi", "rdi", "r9")] == [11, 33, 22, 33]
        assert guest.reg("r8") == guest.program["data"] + 8

    def test_nx_can_be_off(self, boot: Boot) -> None:
        """With EFER.NXE clear bit 63 of an entry is reserved."""
        guest = boot("mov rax, [0x400000]\nhlt")
        guest.map(0x400000, 0x300000, Pte.NX)
        guest.set(efer=guest.state["efer"] & ~Efer.NXE)
        frame = fault(guest)
        assert (frame.vector, frame.error) == (14, 9)


class TestUnprivilegedAndSystem:
    def test_io_needs_iopl_or_the_bitmap(self, boot: Boot) -> None:
        text = "mov al, 7\nout 0xf4, al\nmov dx, 0x80\nin al, dx\nud2"
        assert fault(boot(text, user=True)).vector == 13
        guest = boot(text, user=True)
        guest.set(rflags=0x3002)
        guest.io.inputs[0x80] = 0x5A
        assert fault(guest).vector == 6
        assert guest.io.outs(0xF4) == [7] and guest.reg("rax") & 0xFF == 0x5A
        guest = boot(text, user=True)
        guest.memory.write(TSS + 0x66, struct.pack("<H", 0x68))
        guest.memory.write(TSS + 0x68, bytes(0x40))
        guest.memory.write(GDT + TSS_SELECTOR, struct.pack("<H", 0xA8))
        guest.set(tr={"selector": TSS_SELECTOR, "base": TSS, "limit": 0xA8, "attributes": 0x8B})
        assert fault(guest).vector == 6

    def test_cli_with_iopl_3(self, boot: Boot) -> None:
        guest = boot("cli\nsti\npushfq\npop rax\nud2", user=True)
        guest.set(rflags=0x3002)
        assert fault(guest).vector == 6
        assert guest.reg("rax") & 0x3200 == 0x3200

    def test_popf_in_ring_3_changes_neither_if_nor_iopl(self, boot: Boot) -> None:
        guest = boot("push 0x3000\npopfq\npushfq\npop rax\nud2", user=True)
        guest.set(rflags=0x202)
        fault(guest)
        assert guest.reg("rax") & 0x3200 == 0x200

    def test_system_calls(self, boot: Boot) -> None:
        """SYSCALL to LSTAR with SFMASK, SYSRET back, from ring 3, many times."""
        text = """
            kernel: mov ecx, 0xc0000081
            xor eax, eax
            mov edx, 0x00200010
            wrmsr
            inc ecx
            lea rax, [rip + entry]
            xor edx, edx
            wrmsr
            mov ecx, 0xc0000084
            mov eax, 0x601
            wrmsr
            mov rcx, USER
            mov r11, 0x202
            sysretq
            entry: mov r12, rsp
            swapgs
            pushfq
            pop r13
            mov r14, cs
            swapgs
            add rdi, rax
            sysretq
        """
        user = "start: mov ebx, 1000\nagain: mov eax, ebx\nstc\nsyscall\nsetc r8b\ndec ebx\njnz again\nud2"
        guest = boot(text, symbols={"USER": 0x400000})
        guest.map(0x400000, 0x300000, Pte.US)
        guest.memory.write(0x300000, assemble(user, 0x400000).code)
        guest.set(rsp=STACK - 0x800)
        frame = fault(guest)
        assert (frame.vector, frame.cs, frame.ss) == (6, 0x33, 0x2B)
        state = guest.state
        assert state["rdi"] == sum(range(1001))
        assert state["r12"] == STACK - 0x800
        assert state["r13"] & 0x601 == 0 and state["r14"] == 0x10
        assert state["r8"] & 0xFF == 1  # the flags came back

    def test_sysret_that_sets_tf_traps_at_once(self, boot: Boot) -> None:
        """As if the SYSCALL had just been stepped over (KVM-unit-tests, syscall.c)."""
        guest = boot("mov rcx, 0x400000\nmov r11, 0x102\nsysretq")
        guest.map(0x400000, 0x300000, Pte.US)
        guest.memory.write(0x300000, bytes.fromhex("ffc0 0f0b"))  # inc eax; ud2
        guest.set(msrs={0xC0000081: 0x10 << 32 | 0x20 << 48})
        frame = fault(guest)
        assert (frame.vector, frame.rip, frame.cs, guest.reg("rax")) == (1, 0x400000, 0x33, 0)
        assert guest.state["dr6"] & 1 << 14

    def test_syscall_without_sce_is_ud(self, boot: Boot) -> None:
        guest = boot("syscall", user=True)
        guest.set(efer=guest.state["efer"] & ~Efer.SCE)
        assert fault(guest).vector == 6

    def test_iretq_to_ring_3_and_back(self, boot: Boot) -> None:
        text = """
            push 0x2b
            push USER_STACK
            push 0x202
            push 0x33
            push USER
            iretq
            handler: mov rbx, rsp
            cli
            hlt
        """
        guest = boot(text, handlers={0x80: "handler"}, symbols={"USER": 0x400000})
        guest.map(0x400000, 0x300000, Pte.US)
        guest.memory.write(0x300000, bytes.fromhex("8cc8 cd80"))  # mov eax, cs; int 0x80
        at_end(guest)
        assert guest.reg("rax") == 0x33
        assert guest.reg("rbx") == RSP0 - 40
        words = struct.unpack("<5Q", guest.memory.read(RSP0 - 40, 40))
        assert words == (0x400004, 0x33, 0x202, USER_STACK, 0x2B)

    def test_cpuid_time_and_xcr0(self, boot: Boot) -> None:
        text = """
            mov ecx, 0xc0000103
            mov eax, 0x1234
            xor edx, edx
            wrmsr
            rdtsc
            shl rdx, 32
            lea r8, [rdx + rax]
            rdtscp
            shl rdx, 32
            lea r9, [rdx + rax]
            mov r10, rcx
            rdpid r11
            xor ecx, ecx
            xgetbv
            mov r12, rax
            mov r13, rdx
            mov eax, 1
            cpuid
            mov r14, rcx
            mov eax, 0x40000000
            cpuid
            hlt
        """
        guest = boot(text)
        at_end(guest)
        state = guest.state
        assert 0 < state["r9"] - state["r8"] < 1 << 34
        assert (state["r10"], state["r11"], state["r12"], state["r13"]) == (0x1234, 0x1234, 7, 0)
        assert state["r14"] >> 31 & 1 and state["r14"] >> 27 & 1  # hypervisor, OSXSAVE
        assert all(state[r] < 1 << 32 for r in ("rax", "rbx", "rcx", "rdx"))

    def test_rdtsc_can_be_denied(self, boot: Boot) -> None:
        for text in ("rdtsc", "rdtscp"):
            guest = boot(text, user=True)
            guest.set(cr4=guest.state["cr4"] | Cr4.TSD)
            assert fault(guest).vector == 13

    def test_serialize_and_its_like(self, boot: Boot) -> None:
        guest = boot("serialize\nmov eax, 1\nwbinvd\nclts\nhlt")
        at_end(guest)
        assert guest.reg("rax") == 1

    def test_save_and_load_in_the_middle(self, boot: Boot) -> None:
        """State taken at a halt and put into another VM goes on there."""
        text = """
            start: fldpi
            mov eax, 7
            vpcmpeqd ymm3, ymm3, ymm3
            mov rbx, 0x1122334455667788
            stc
            hlt
            setc cl
            fstp qword [rip + pi]
            vmovups [rip + v], ymm3
            hlt
            pi: dq 0
            v: space 32
        """
        one, two = boot(text), boot(text)
        at_end(one)
        state = one.state
        two.set(**state)
        assert {k: v for k, v in two.state.items() if k not in ("msrs", "xsave")} == {
            k: v for k, v in state.items() if k not in ("msrs", "xsave")
        }
        at_end(two)
        assert struct.unpack("<d", two.read("pi", 8)) == (3.141592653589793,)
        assert two.read("v", 32) == b"\xff" * 32
        assert two.reg("rcx") & 0xFF == 1 and two.reg("rbx") == 0x1122334455667788
        assert one.load("pi") == 0


def test_two_vms_take_turns_on_one_thread(boot: Boot) -> None:
    """Each time the vCPU's own state is in place, whoever ran before."""
    text = "again: add rax, STEP\nmov [rip + out], rax\nhlt\njmp again\nout: dq 0"
    one, two = (boot(text, symbols={"STEP": step}) for step in (1, 100))
    for turn in range(1, 5):
        for guest, step in ((one, 1), (two, 100)):
            at_end(guest)
            assert guest.load("out") == turn * step == guest.reg("rax")


def test_avx_needs_neither_osfxsr_nor_em_clear(boot: Boot) -> None:
    """VEX instructions look at CR4.OSXSAVE, XCR0 and CR0.TS only (SDM 2, 2.4)."""
    guest = boot("vpxor ymm1, ymm1, ymm1\nvmovd ecx, xmm1\nhlt")
    state = guest.state
    guest.set(cr4=state["cr4"] & ~Cr4.OSFXSR, cr0=state["cr0"] | Cr0.EM, rcx=5)
    guest.run()
    assert guest.exception is None and guest.reg("rcx") == 0


@pytest.mark.parametrize("text", ["lldt ax", "ltr ax"])
def test_system_segments_with_a_base_that_is_not_canonical(boot: Boot, text: str) -> None:
    guest = boot(f"mov eax, 0x30\nlast: {text}\nhlt")
    kind = 0x82 if text == "lldt ax" else 0x89
    guest.memory.store_u64(GDT + 0x30, kind << 40 | 0x67)
    guest.memory.store_u64(GDT + 0x38, 0x00AAAAAA)
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.error, frame.rip) == (13, 0x30, guest.program["last"])


MISALIGNED = [
    "mov eax, [rbx + 2]",
    "mov [rbx + 1], cx",
    "add [rbx + 4], rcx",
    "push qword [rbx + 2]",
    "lock inc dword [rbx + 62]",
    "fld tbyte [rbx + 4]",
    "movsd xmm0, [rbx + 4]",
    "fldcw [rbx + 1]",
    "lea rdi, [rbx + 2]\nlast: stosd",
    "lea rsi, [rbx + 2]\nmov ecx, 2\nlast: rep lodsd",
    "lea rsp, [rbx + 4]\nlast: push rax",
    "lea rsp, [rbx + 4]\nlast: popfq",
    "lea rsp, [rbx + 4]\nlast: call last",
    "lea rsp, [rbx + 4]\nlast: enter 16, 0",
    "mov rbx, 0x7ff000000002\nlast: mov eax, [rbx]",  # nothing is mapped there
]


class TestAlignment:
    """#AC (SDM 3, 6.15); test_differential.py has every instruction."""

    @staticmethod
    def boot(boot: Boot, text: str, **options: object) -> Tiny:
        guest = boot(f"lea rbx, [rip + data]\n{text}\nud2\nalign 64\ndata: space 256", user=True, **options)
        guest.set(cr0=guest.state["cr0"] | Cr0.AM, rflags=0x40002)
        return guest

    @pytest.mark.parametrize("text", MISALIGNED)
    def test_the_user_asked_for_it(self, boot: Boot, text: str) -> None:
        guest = self.boot(boot, text if "last:" in text else f"last: {text}")
        frame = fault(guest)
        assert (frame.vector, frame.error, frame.rip) == (17, 0, guest.program["last"])
        assert frame.rflags & 0x40000

    @pytest.mark.parametrize(
        "text", ["mov eax, [rbx + 4]", "movups xmm0, [rbx + 1]", "fnstenv [rbx + 4]", "clflush [rbx + 1]"]
    )
    def test_these_are_aligned_enough(self, boot: Boot, text: str) -> None:
        assert fault(self.boot(boot, text)).vector == 6

    def test_nobody_asked(self, boot: Boot) -> None:
        for change in ({"rflags": 2}, {"cr0": 0x80010033}):
            guest = self.boot(boot, "mov eax, [rbx + 2]")
            guest.set(**change)
            assert fault(guest).vector == 6
        guest = boot("mov rbx, STACK - 64\nmov eax, [rbx + 2]\nhlt")
        guest.set(cr0=guest.state["cr0"] | Cr0.AM, rflags=0x40002)
        at_end(guest)

    @pytest.mark.parametrize("address", ["0x800000000001", "rbx"])
    def test_other_exceptions_come_first(self, boot: Boot, address: str) -> None:
        text = f"mov rax, {address}\nlast: mov ecx, [rax]" if address != "rbx" else "last: movaps xmm0, [rbx + 4]"
        guest = self.boot(boot, text)
        frame = fault(guest)
        assert (frame.vector, frame.rip) == (13, guest.program["last"])

    def test_a_string_reads_before_it_writes(self, boot: Boot) -> None:
        """The source is not mapped, the destination misaligned."""
        guest = self.boot(boot, "mov rsi, 0x7ff000000000\nlea rdi, [rbx + 2]\nmov ecx, 3\nlast: rep movsq")
        frame = fault(guest)
        assert (frame.vector, frame.rip, frame.cr2) == (14, guest.program["last"], 0x7FF000000000)

    @pytest.mark.parametrize("back", ["iretq", "sysretq"])
    def test_a_kernel_in_between_is_not_checked(self, boot: Boot, back: str) -> None:
        """Interrupts, system calls and their returns change what is checked, on the way in and on the way out."""
        kernel = "mov [rip + kept + 1], rax\nmov rdx, [rip + kept + 1]\n"
        if back == "iretq":
            text = f"int 0x80\nlast: mov eax, [rbx + 2]\nud2\nkernel: {kernel}iretq\nkept: space 16"
            guest = self.boot(boot, text, handlers={0x80: "kernel"})
        else:
            text = f"mov eax, 1\nsyscall\nlast: mov eax, [rbx + 2]\nud2\nkernel: {kernel}sysretq\nkept: space 16"
            guest = self.boot(boot, text)
            guest.set(msrs={0xC0000081: 0x10 << 32 | 0x20 << 48, 0xC0000082: guest.program["kernel"], 0xC0000084: 0})
        frame = fault(guest)
        assert (frame.vector, frame.rip) == (17, guest.program["last"])
        assert guest.reg("rdx") == guest.load(guest.program["kept"] + 1)

    def test_a_program_asks_and_asks_no_more(self, boot: Boot) -> None:
        """The same code in turn with the check and without it."""
        text = """
            again: pushfq
            xor dword [rsp], 0x40000
            popfq
            inc ecx
            last: mov eax, [rbx + 2]
            jmp again
        """
        guest = self.boot(boot, text)
        frame = fault(guest)
        assert (frame.vector, frame.rip, guest.reg("rcx")) == (17, guest.program["last"], 2)


@pytest.mark.parametrize("rsp", [0xD15EA5ED00000800, 1 << 63, (1 << 47) + 64])
@pytest.mark.parametrize(
    "text", ["push rax", "mov rax, [rsp]", "mov [rsp + 0x10], ecx", "call last", "add qword [rsp + rcx*8 - 8], 1"]
)
def test_a_stack_that_is_not_canonical(boot: Boot, text: str, rsp: int) -> None:
    """#SS, not #GP; one address stands for no page in the stack's check (layout.NO_STACK)."""
    guest = boot(f"last: {text}\nhlt", user=True)
    guest.set(rsp=rsp)
    frame = fault(guest)
    assert (frame.vector, frame.error, frame.rip) == (12, 0, guest.program["last"])
