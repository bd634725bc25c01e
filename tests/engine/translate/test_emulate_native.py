"""Emulated instructions against the host CPU: the same case through :class:`Emulator` and natively, in ring 3."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from skep.engine.amd64.cpuid import Feature, host_has
from skep.engine.amd64.features import user_fsgsbase
from skep.engine.amd64.registers import Cr4, PfError, Vector, Xcr0, canonical
from skep.engine.translate import segments
from skep.engine.translate.layout import XSAVE_AREA
from skep.engine.translate.port import GuestFault
from tests.engine.assemble import assemble
from tests.engine.compare import SLOT, differences
from tests.engine.oracle import Oracle
from tests.engine.place import (
    ARITHMETIC,
    CODE,
    CODE_SIZE,
    DATA,
    DATA_SIZE,
    DF,
    FIRST_DATA,
    GPRS,
    LAST_DATA,
    LOW_DATA,
    PAGE,
    PAGES,
    STACK,
    STACK_END,
    XSAVE_SIZE,
    Access,
    Batch,
    Case,
    Outcome,
    changed_pages,
    comparable_fpu,
)
from tests.engine.translate.plain import TSS, PlainCpu

MAX_STEPS = 64
CODE_PA, DATA_PA = 0x40000, 0x80000


class Emulated(PlainCpu):
    """Runs cases where :mod:`tests.engine.place` puts them, every instruction of them by the emulator."""

    def _walk(self, va: int, access: int, supervisor: bool) -> int:
        if supervisor and va < CODE_PA:
            return va  # descriptor tables, TSS
        if not canonical(va):
            raise GuestFault(Vector.GP, 0)
        for base in (DATA, LOW_DATA):
            if base <= va < base + DATA_SIZE:
                offset = va - base
                may = PAGES[offset // PAGE]
                if may is not Access.NONE and (may is Access.WRITE or not access & PfError.W):
                    return DATA_PA + offset
                present = PfError.P if may is not Access.NONE else 0
                raise GuestFault(Vector.PF, access | PfError.U | present, va)
        if CODE <= va < CODE + CODE_SIZE and not access & PfError.W:
            return CODE_PA + va - CODE
        raise GuestFault(Vector.PF, access | PfError.U, va)

    def run(self, batch: Batch) -> list[Outcome]:
        for case in batch.cases:
            at = CODE_PA + case.address - CODE
            self.memory[at : at + len(case.code)] = case.code
        return [self._run(case, batch.data) for case in batch.cases]

    def _run(self, case: Case, data: bytes) -> Outcome:
        st = self.st
        self.set_up(cpl=3)
        self.memory[DATA_PA : DATA_PA + DATA_SIZE] = data
        for name in ("ds", "es", "fs", "gs"):
            segments.put(st, name, segments.null(0))
        self.memory[TSS + 102 : TSS + 104] = b"\xff\xff"  # no port bitmap
        st.cr4 |= Cr4.OSXSAVE | Cr4.FSGSBASE
        st.xcr0 = Xcr0.X87 | Xcr0.SSE | Xcr0.AVX
        st.fs_base, st.gs_base = case.fs_base, case.gs_base
        for name, value in zip(GPRS, case.registers, strict=True):
            setattr(st, name, value)
        st.rip, st.rflags = case.address, case.rflags
        st.bytes[XSAVE_AREA : XSAVE_AREA + XSAVE_SIZE] = case.xsave
        fault = self._until_fault()
        return Outcome(
            registers=tuple(st.q[:16]),
            rip=st.rip,
            rflags=st.rflags,
            vector=fault.vector,
            error=fault.error or 0,
            cr2=fault.address or 0,
            fpu=comparable_fpu(bytes(st.bytes[XSAVE_AREA : XSAVE_AREA + XSAVE_SIZE])),
            pages=changed_pages(data, bytes(self.memory[DATA_PA : DATA_PA + DATA_SIZE])),
        )


    def _until_fault(self) -> GuestFault:
        for _ in range(MAX_STEPS):
            try:
                self.emulator.step()
            except GuestFault as fault:
                return fault
        raise AssertionError(f"no exception after {MAX_STEPS} steps")


@pytest.fixture
def emulated() -> Iterator[Emulated]:
    cpu = Emulated()
    yield cpu
    cpu.close()


def xsave(rng: random.Random, index_size: int) -> bytes:
    """Noise; YMM2 holds small indices of ``index_size`` bytes, for gathers."""
    image = bytearray(rng.randbytes(XSAVE_SIZE))
    image[:32] = struct.pack("<HHBxHQQII", 0x37F, 0, 0, 0, 0, 0, 0x1F80, 0)
    for register in range(8):  # 80-bit registers: an MMX value has ones above it
        image[32 + 16 * register + 8 : 48 + 16 * register] = b"\xff\xff" + bytes(6)
    image[416:576] = struct.pack("<96xQ56x", 7)
    indices = (rng.randrange(-20, 300) for _ in range(32 // index_size))
    ymm2 = b"".join(index.to_bytes(index_size, "little", signed=True) for index in indices)
    image[192:208], image[608:624] = ymm2[:16], ymm2[16:]
    return bytes(image)


def address(rng: random.Random, low: bool) -> int:
    """Somewhere in the data, often near the end of what is mapped, or before the read-only page; ``low``: in 31 bits,
    or an offset from FS or GS."""
    if low and rng.random() < 0.3:
        return rng.randrange(0x1000)
    edge = rng.choice((FIRST_DATA, LAST_DATA, LAST_DATA + PAGE))
    base = LOW_DATA if low else rng.choice((DATA, LOW_DATA))
    if rng.random() < 0.3:
        return base + edge + rng.randrange(-40, 40)
    return base + rng.randrange(FIRST_DATA + 256, LAST_DATA - 256)


def make(rng: random.Random, texts: str, index_size: int, low: bool) -> Batch:
    """Cases out of ``texts``, which ``;`` separates; {n} is a random small number, ``/`` separates instructions."""
    cases = []
    for number in range(CODE_SIZE // SLOT):
        text = rng.choice(texts.split(";")).replace("/", "\n").replace("{n}", str(rng.choice((0, 1, 2, 8, 16, 30))))
        at = CODE + number * SLOT + rng.choice((0, 64, SLOT - 16))
        registers = [rng.getrandbits(64) for _ in GPRS]
        for pointer in ("rsi", "rdi", "rbx"):
            registers[GPRS.index(pointer)] = address(rng, low)
        registers[GPRS.index("rcx")] = rng.choice((0, 1, 2, 5, 17, 60, 200))
        registers[GPRS.index("rdx")] = rng.choice((0, 3, 8, (1 << 64) - 8))
        stack = rng.choice((STACK, STACK_END)) + rng.randrange(-48, 48) if rng.random() < 0.3 else STACK + 0x800
        registers[GPRS.index("rsp")] = DATA + stack
        registers[GPRS.index("rbp")] = DATA + STACK + rng.randrange(0x600, 0x1000)
        rflags = 0x202 | rng.getrandbits(32) & ARITHMETIC | rng.choice((0, 0, DF))
        fs, gs = DATA + FIRST_DATA + 0x100, LOW_DATA + FIRST_DATA + 0x200
        code = assemble(text + "\nud2", at).code
        cases.append(Case(at, code, tuple(registers), rflags, fs, gs, xsave(rng, index_size)))
    data = bytearray(rng.randbytes(DATA_SIZE))
    for start in range(0, DATA_SIZE, 2 * PAGE):  # runs of equal bytes, for CMPS and SCAS to go on
        data[start + 0x100 : start + 0xE00] = bytes((0, 0x55)[start // PAGE // 2 % 2] for _ in range(0xD00))
    return Batch(bytes(data), tuple(cases))


def check(
    host: Oracle,
    emulated: Emulated,
    seed: str,
    texts: str,
    *,
    index_size: int = 4,
    low: bool = False,
    ignore: tuple[str, ...] = (),
) -> None:
    """All registers, flags, memory and the fault are the same, but for differences that begin with ``ignore`` where
    there was a page fault."""
    rng = random.Random(seed)
    for _ in range(5):
        batch = make(rng, texts, index_size, low)
        wrong = []
        for case, theirs, ours in zip(batch.cases, host.run(batch), emulated.run(batch), strict=True):
            found = differences(theirs, ours, ARITHMETIC)
            if theirs.vector == Vector.PF:
                found = [text for text in found if not text.startswith(ignore)]
            if found:
                wrong.append(f"{case.code.hex()}: {'; '.join(found)}")
        assert not wrong, "\n".join(wrong[:5])


STRINGS = "; ".join(f"{op}{size}" for op in ("movs", "stos", "lods") for size in "bwdq")
COMPARES = "; ".join(f"{op}{size}" for op in ("cmps", "scas") for size in "bwdq")


def prefixed(prefix: str, texts: str) -> str:
    return "; ".join(f"{prefix} {text}" for text in texts.split("; "))


@pytest.mark.parametrize("seed", "ab")
def test_strings(host: Oracle, emulated: Emulated, seed: str) -> None:
    check(host, emulated, "plain" + seed, f"{STRINGS}; {COMPARES}")
    repeated = "; ".join((prefixed("rep", STRINGS), prefixed("repe", COMPARES), prefixed("repne", COMPARES)))
    check(host, emulated, "rep" + seed, repeated)


def test_strings_with_other_segments_and_sizes(host: Oracle, emulated: Emulated) -> None:
    """FS and GS for the source, 32-bit addresses and counts."""
    codes = "64a4; 65ac; f36465a4; 67a4; f367a5; f367ab; f36766ab; 6467a6; f26767ae; f3486764a5; 65a6"
    texts = "; ".join(f"db {', '.join(map(str, bytes.fromhex(code)))}" for code in codes.split("; "))
    check(host, emulated, "segments", texts, low=True)


def test_stack(host: Oracle, emulated: Emulated) -> None:
    texts = """push rax; push rsp; push qword [rbx]; push word [rbx]; push qword [rsp + 8]; push 5; push fs;
        pop rax; pop rsp; pop qword [rbx]; pop word [rbx]; pop qword [rsp]; pop qword [rsp + 16]; pop word [rsp];
        leave; db 0x66, 0xc9; pushfq; PUSHFW; db 0x66, 0x6a, 0xfd"""
    check(host, emulated, "stack", texts)


def test_enter(host: Oracle, emulated: Emulated) -> None:
    """One that faults may have stored below the stack pointer, on the host."""
    texts = "db 0xc8, {n}, 0, 0; db 0xc8, {n}, 1, 1; db 0xc8, {n}, 0, 3; db 0x66, 0xc8, {n}, 0, 2"
    check(host, emulated, "enter", texts, ignore=("page", "memory"))


def test_flags(host: Oracle, emulated: Emulated) -> None:
    texts = """lahf; sahf; lahf / sahf; sahf / lahf; pushfq / popfq; push 0x55 / popfq;
        push 0x3245 / POPFW / pushfq / pop rax"""
    check(host, emulated, "flags", texts)


def test_moves(host: Oracle, emulated: Emulated) -> None:
    texts = """mov ax, fs; mov eax, es; mov rax, gs; mov [rbx], ds; mov rax, [rbx + rcx*8 - 8]; mov [rbx], cl;
        mov ah, [rbx]; mov [rbx + 3], dh; mov dword [rbx], 0x12345678; mov qword [rbx], -1; mov eax, [ebx + 4];
        mov ecx, fs:[rdx]; mov al, [rip + 0x200001001234]; xlatb; db 0x64, 0xd7"""
    check(host, emulated, "moves", texts)


def test_bases(host: Oracle, emulated: Emulated) -> None:
    if not user_fsgsbase():
        pytest.skip("the host kernel has no FSGSBASE")
    texts = """rdfsbase rax; rdgsbase rcx; rdfsbase eax; wrgsbase rbx / rdgsbase rax; wrfsbase ebx / rdfsbase rax;
        wrgsbase rax"""
    check(host, emulated, "bases", texts)


def test_privileged_instructions_fault_alike(host: Oracle, emulated: Emulated) -> None:
    """What ring 3 may not do, and the order of #UD, #GP and #PF."""
    texts = """hlt; cli; sti; clts; wrmsr; rdmsr; mov rax, cr0; mov cr3, rax; mov rax, cr4; mov cr8, rax; mov rax, dr7;
        mov dr0, rax; invlpg [rbx]; lgdt [rbx]; lidt [rbx]; lldt ax; ltr [rbx]; lmsw ax; wbinvd; invd;
        swapgs; in al, 0x60; out dx, eax; insb; outsd; rep insb; xsetbv; clac; stac; sysretq; rdpmc;
        invpcid rax, [rbx]; int 0x33;
        mov cs, ax"""
    check(host, emulated, "privileged", texts)


def test_masked_moves(host: Oracle, emulated: Emulated) -> None:
    """Which of its bytes a store that faults names is the CPU's choice."""
    if not host_has(Feature.AVX2):
        pytest.skip("the host has no AVX2")
    texts = """maskmovdqu xmm1, xmm2; vmaskmovdqu xmm3, xmm14;
        vmaskmovps xmm1, xmm2, [rbx]; vmaskmovps ymm1, ymm2, [rbx];
        vmaskmovpd ymm1, ymm2, [rbx + 8]; vmaskmovpd [rbx], xmm2, xmm3; vmaskmovps [rbx], ymm2, ymm3;
        vpmaskmovd ymm9, ymm2, [rbx]; vpmaskmovq [rbx], ymm12, ymm3; vpmaskmovd [rbx - 5], xmm2, xmm1"""
    check(host, emulated, "masked", texts, ignore=("cr2", "error"))


def test_mmx_masked_move(host: Oracle, emulated: Emulated) -> None:
    """It marks the x87 registers valid, too."""
    check(host, emulated, "mmx", "maskmovq mm1, mm2", ignore=("cr2", "error"))


@pytest.mark.parametrize("index_size", [4, 8])
def test_gathers(host: Oracle, emulated: Emulated, index_size: int) -> None:
    """After a fault what is above an XMM destination is the CPU's choice."""
    if not host_has(Feature.AVX2):
        pytest.skip("the host has no AVX2")
    texts = {
        4: """vpgatherdd xmm1, [rbx + xmm2*4], xmm3; vpgatherdd ymm1, [rbx + ymm2*4 + 16], ymm3;
            vpgatherdq ymm1, [rbx + xmm2*8], ymm3; vpgatherdq xmm9, [rbx + xmm2], xmm10;
            vgatherdps ymm1, [rbx + ymm2], ymm3; vgatherdpd ymm4, [rbx + xmm2*1], ymm5""",
        8: """vpgatherqd xmm1, [rbx + ymm2*4], xmm3; vpgatherqq ymm11, [rbx + ymm2*8], ymm13;
            vgatherqpd xmm1, [rbx + xmm2*2], xmm3; vgatherqps xmm1, [rbx + xmm2*2], xmm3;
            vgatherqps xmm4, [rbx + ymm2*2 - 7], xmm5; vpgatherqq ymm1, [ebx + ymm2*8], ymm3""",
    }[index_size]
    check(host, emulated, "gather", texts, index_size=index_size, ignore=("ymm",))


def test_gather_registers_must_differ(host: Oracle, emulated: Emulated) -> None:
    if not host_has(Feature.AVX2):
        pytest.skip("the host has no AVX2")
    check(host, emulated, "same", "vpgatherdd xmm1, [rbx + xmm1*4], xmm3; vpgatherdd xmm2, [rbx + xmm1*4], xmm2")
