"""The worker that runs cases on the host CPU: ``python -m tests.engine.native``, pickles in and out.

It is a process of its own because a case may do anything to it. A case starts by a trampoline that loads all
registers and ends by a fault; the kernel's signal frame then holds everything there is to know (all registers, XSAVE
image, trap number, error code, CR2), and the handler, which is machine code too, copies the frame and leaves by a long
jump.

The code area is a memfd mapped twice, writable here and executable there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import signal
import struct
import sys
from typing import Any, NoReturn

from tests.engine.assemble import assemble
from tests.engine.place import (
    CODE,
    CODE_SIZE,
    DATA,
    DATA_SIZE,
    FILLER,
    GPRS,
    LOW_CODE,
    LOW_DATA,
    PAGE,
    PAGES,
    XSAVE_SIZE,
    Access,
    Batch,
    Case,
    Outcome,
    changed_pages,
    comparable_fpu,
)

CONTEXT = 0x3000_0000_0000  # ours are far from what a bit offset of 32 bits reaches
STUBS = 0x3000_0001_0000
ALTERNATE_STACK = 0x3000_0100_0000
ALTERNATE_SIZE = 1 << 18
OWN = ((CONTEXT, 0x4000), (STUBS, PAGE), (ALTERNATE_STACK, ALTERNATE_SIZE))
"""What a case reaches here that no guest has."""

# offsets in the context page
START, RFLAGS, FS_BASE, GS_BASE = 0x80, 0x88, 0x90, 0x98  # the GPRs stand at 0
FAR, SELECTOR = 0xA0, 0xA6  # a far pointer, and what DS, ES and SS are with it
HOST_RSP, HOST_FS, HOST_GS = 0x100, 0x108, 0x110
FRAME = 0x200  # struct sigcontext's registers: 23 words
IMAGE_IN = 0x1000
IMAGE_OUT = 0x2000

FRAME_ORDER = (
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx", "rsp", "rip",
    "rflags", "selectors", "error", "vector", "mask", "cr2",
)  # fmt: skip
"""Linux's order of registers in struct sigcontext (arch/x86/include/uapi/asm/sigcontext.h)."""

_ENTER = """
enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov rbx, CONTEXT
    rdfsbase rax
    mov [rbx + HOST_FS], rax
    rdgsbase rax
    mov [rbx + HOST_GS], rax
    mov [rbx + HOST_RSP], rsp
    mov eax, 7
    xor edx, edx
    xrstor64 [rbx + IMAGE_IN]
    mov rax, [rbx + FS_BASE]
    wrfsbase rax
    mov rax, [rbx + GS_BASE]
    wrgsbase rax
    push qword [rbx + RFLAGS]
    popfq
    LOAD
    mov rbx, [rbx + 24]
    jmp qword [rip + CONTEXT + START]
handler:                            ; (rdi signal, rsi siginfo, rdx ucontext)
    push 0x202                      ; the case's DF, and worse its AC, stop here
    popfq
    mov rbx, CONTEXT
    lea rsi, [rdx + 40]             ; uc_mcontext
    lea rdi, [rbx + FRAME]
    mov ecx, 23
    rep movsq
    mov rsi, [rsi]                  ; fpstate
    lea rdi, [rbx + IMAGE_OUT]
    mov ecx, XSAVE_SIZE
    rep movsb
    xor eax, eax
    mov ds, ax
    mov es, ax
    mov rax, [rbx + HOST_FS]
    wrfsbase rax
    mov rax, [rbx + HOST_GS]
    wrgsbase rax
    mov rsp, [rbx + HOST_RSP]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
restorer:
    mov eax, 15                     ; rt_sigreturn, which nobody comes to need
    syscall
"""

_SEGMENTS = """
    movzx eax, word [rbx + SELECTOR]
    mov ds, ax
    mov es, ax
    mov ss, ax
    LOAD
"""

MAP_FIXED_NOREPLACE, MAP_POPULATE = 0x100000, 0x8000
SA_SIGINFO, SA_RESTORER, SA_ONSTACK, SA_NODEFER = 4, 0x04000000, 0x08000000, 0x40000000
SYS_RT_SIGACTION, SYS_SIGALTSTACK, SYS_MODIFY_LDT = 13, 131, 154
USER32, USER_DATA = 0x23, 0x2B
"""Linux's (arch/x86/include/asm/segment.h)."""
CODE16, DATA16 = 0x07, 0x0F
"""The first two in the LDT."""

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.syscall.restype = ctypes.c_long


def _fail(what: str) -> NoReturn:
    error = ctypes.get_errno()
    raise OSError(error, f"{what}: {os.strerror(error)}")


def _map_at(address: int, size: int, protection: int, fd: int = -1, offset: int = 0) -> None:
    # populated, so that a store to a read-only page faults on a page that is present
    flags = MAP_FIXED_NOREPLACE | MAP_POPULATE | (mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if libc.mmap(address, size, protection, flags, fd, offset) != address:
        _fail(f"mmap at {address:#x}")


class Native:
    """The host CPU as a judge. One per process, since the places are fixed."""

    def __init__(self) -> None:
        read, write, execute = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
        code = os.memfd_create("code")
        os.ftruncate(code, CODE_SIZE)
        for base in (CODE, LOW_CODE):
            _map_at(base, CODE_SIZE, read | execute, code)
        self.code = mmap.mmap(code, CODE_SIZE)
        self.writable = False
        data = os.memfd_create("data")
        os.ftruncate(data, DATA_SIZE)
        for i, access in enumerate(PAGES):
            if access is not Access.NONE:
                for base in (DATA, LOW_DATA):
                    protection = read | write if access is Access.WRITE else read
                    _map_at(base + i * PAGE, PAGE, protection, data, i * PAGE)
        self.data = mmap.mmap(data, DATA_SIZE)
        _map_at(CONTEXT, 0x4000, read | write)
        _map_at(ALTERNATE_STACK, ALTERNATE_SIZE, read | write)
        self.context = (ctypes.c_char * 0x4000).from_address(CONTEXT)
        stubs = self._stubs()
        self.enter = ctypes.CFUNCTYPE(None)(stubs["enter"])
        self.enter_narrow = ctypes.CFUNCTYPE(None)(stubs["enter_narrow"])
        self._segment(CODE16, LOW_CODE, 0xFFFF, code=True)
        self._segment(DATA16, LOW_DATA, DATA_SIZE - 1, code=False)
        stack = struct.pack("<QQQ", ALTERNATE_STACK, 0, ALTERNATE_SIZE)
        if libc.syscall(SYS_SIGALTSTACK, stack, None):
            _fail("sigaltstack")
        flags = SA_SIGINFO | SA_RESTORER | SA_ONSTACK | SA_NODEFER
        action = struct.pack("<QQQQ", stubs["handler"], flags, stubs["restorer"], 0)
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP):
            if libc.syscall(SYS_RT_SIGACTION, int(number), action, None, 8):
                _fail("rt_sigaction")

    @staticmethod
    def _segment(selector: int, base: int, limit: int, *, code: bool) -> None:
        """A 16-bit segment, code or writable data, in the LDT (modify_ldt(2): struct user_desc)."""
        descriptor = struct.pack("<4I", selector >> 3, base, limit, 2 << 1 if code else 0)
        if libc.syscall(SYS_MODIFY_LDT, 0x11, descriptor, len(descriptor)):
            _fail("modify_ldt")

    @staticmethod
    def _stubs() -> dict[str, int]:
        load = "\n".join(f"mov {r}, [rbx + {8 * i}]" for i, r in enumerate(GPRS) if r != "rbx")
        names = {k: v for k, v in globals().items() if isinstance(v, int)}
        narrow = _ENTER[: _ENTER.index("handler:")].replace("enter:", "enter_narrow:").replace("    LOAD", _SEGMENTS)
        narrow = narrow.replace("jmp qword [rip + CONTEXT + START]", "JMP_M1632 [rip + CONTEXT + FAR]")
        program = assemble((_ENTER + narrow).replace("LOAD", load), STUBS, names)
        fd = os.memfd_create("stubs")
        os.write(fd, program.code)
        _map_at(STUBS, PAGE, mmap.PROT_READ | mmap.PROT_EXEC, fd)
        os.close(fd)
        return program.labels

    def run(self, batch: Batch) -> list[Outcome]:
        self.code[:] = FILLER
        for case in batch.cases:
            self.code[case.offset : case.offset + len(case.code)] = case.code
        return [self._run(case, batch.data) for case in batch.cases]

    def _protect(self, writable: bool) -> None:
        if writable != self.writable:
            self.writable = writable
            protection = mmap.PROT_READ | mmap.PROT_EXEC | (mmap.PROT_WRITE if writable else 0)
            for base in (CODE, LOW_CODE):
                if libc.mprotect(base, CODE_SIZE, protection):
                    _fail("mprotect")

    def _run(self, case: Case, data: bytes) -> Outcome:
        self._protect(case.writable)
        self.data[:] = data
        words = struct.pack("<20Q", *case.registers, case.address, case.rflags, case.fs_base, case.gs_base)
        ctypes.memmove(CONTEXT, words, len(words))
        ctypes.memmove(CONTEXT + IMAGE_IN, case.xsave, XSAVE_SIZE)
        if case.bits == 64:
            self.enter()
        else:
            selectors = (USER32, USER_DATA) if case.bits == 32 else (CODE16, DATA16)
            ctypes.memmove(CONTEXT + FAR, struct.pack("<IHH", case.address, *selectors), 8)
            self.enter_narrow()
        frame = dict(zip(FRAME_ORDER, struct.unpack_from("<23Q", self.context, FRAME), strict=True))
        image = ctypes.string_at(CONTEXT + IMAGE_OUT, XSAVE_SIZE)
        if case.bits != 64:  # the kernel's way back to a 16-bit stack leaves something there
            frame["rsp"] &= 0xFFFFFFFF
        return Outcome(
            registers=tuple(frame[r] for r in GPRS),
            rip=frame["rip"],
            rflags=frame["rflags"],
            vector=frame["vector"],
            error=frame["error"],
            cr2=frame["cr2"] if frame["vector"] == 14 else 0,
            fpu=comparable_fpu(image),
            pages=changed_pages(data, self.data[:]),
        )


def main() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    native = Native()
    while True:
        try:
            batch: Any = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(native.run(batch), replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()


if __name__ == "__main__":
    main()
