"""System instructions in machine code: what they leave to Python, and that nobody can tell who did the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from skep.contracts.constantports import ConstantPorts
from skep.engine.amd64.cpuid import INTEL_VENDOR, SUBLEAVES, host_vendor, make
from skep.engine.amd64.registers import Cr4
from skep.engine.translate.layout import Kind
from skep.engine.translate.port import GuestFault
from tests.engine.assemble import assemble
from tests.engine.tiny import CODE32, CODE64, DATA0, GDT, SEGMENTS, USER_DATA, Tiny

Boot = Callable[..., Tiny]
ROUNDS = 20
SPARE = 0x48
"""A selector whose descriptor tests write: the GDT's last place, the TSS being loaded already."""
FLAT, FLAT_USER = 0x00CF93000000FFFF, 0x00CFF3000000FFFF
AT = 0x180000
"""Where programs find and leave tables of numbers."""


def left_to_python(guest: Tiny) -> int:
    """One HLT ends each program; in ring 3 it needs an exception that is Python's, too."""
    counts: list[int] = guest.vcpu.counts  # type: ignore[attr-defined]
    return counts[Kind.EMULATE] + counts[Kind.MSR] + counts[Kind.HALT]


# CPUID

ABSENT = (3, 5, 6, 8, 0xC, 0x17, 0x40000001, 0xFFFFFFFF)
LEAVES = sorted({*(leaf for leaf, _ in make("host", 1).table), *SUBLEAVES, *ABSENT})
ASKED = [
    (leaf, subleaf)
    for leaf in LEAVES
    for subleaf in ((0, 1, 2, 3, 4, 5, 0x105, 0xFFFFFFFF) if leaf in SUBLEAVES else (0, 7))
]
IDENTIFY = f"""
    start: mov r15d, {len(ASKED)}
    mov rsi, {AT}
    mov r14, 0x1122334400000000
    again: mov eax, [rsi]
    mov ecx, [rsi + 4]
    or rax, r14             ; the upper halves say nothing, and become zero
    or rcx, r14
    mov rbx, r14
    mov rdx, r14
    cpuid
    mov [rsi + 8], rax
    mov [rsi + 16], rbx
    mov [rsi + 24], rcx
    mov [rsi + 32], rdx
    add rsi, 40
    dec r15d
    jnz again
"""


@pytest.mark.parametrize("model", ["baseline", "host"])
@pytest.mark.parametrize(("user", "xsave"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("xcr0", [1, 3, 7])
def test_cpuid(boot: Boot, model: str, user: bool, xsave: bool, xcr0: int) -> None:
    guest = boot(IDENTIFY + ("syscall" if user else "hlt"), user=user, cpu_model=model, cpus=3)
    state = guest.state
    cr4 = state["cr4"] & ~Cr4.OSXSAVE | (Cr4.OSXSAVE if xsave else 0)
    guest.set(cr4=cr4, xcr0=xcr0, efer=state["efer"] & ~1)  # the SYSCALL that ends it is #UD
    for i, (leaf, subleaf) in enumerate(ASKED):
        guest.memory.write(AT + 40 * i, leaf.to_bytes(4, "little") + subleaf.to_bytes(4, "little"))
    guest.run()
    frame = guest.exception
    assert frame is None if not user else frame is not None and frame.vector == 6
    told = guest.vcpu.emulator.cpuid  # type: ignore[attr-defined]
    for i, (leaf, subleaf) in enumerate(ASKED):
        got = tuple(guest.load(AT + 40 * i + 8 * k) for k in range(1, 5))
        assert got == told.read(leaf, subleaf, cr4, xcr0), (hex(leaf), hex(subleaf))
    assert left_to_python(guest) == 1 + user


# MOV to a segment register

LOADS = [
    (0, None, True),
    (3, None, True),
    (DATA0, None, True),
    (SPARE, FLAT, True),
    (SPARE | 3, FLAT_USER, True),
    (USER_DATA, None, True),
    (SPARE, 0x12409345_67890123, True),  # a base, a limit in bytes
    (SPARE, 0x00CF910000_00FFFF, True),  # read-only
    (SPARE, 0x00CF970000_00FFFF, True),  # expand-down
    (SPARE, FLAT & ~(1 << 40), False),  # not accessed: Python sets the bit
    (SPARE, FLAT & ~(1 << 47), False),  # absent
    (SPARE, FLAT & ~(1 << 44), False),  # a system segment
    (SPARE | 1, FLAT, False),  # beyond the requested privilege
    (SPARE, 0x00CF9B000000FFFF, False),  # code that may be read
    (SPARE, 0x00CF99000000FFFF, False),  # code that may not
    (CODE64, None, False),
    (SPARE | 4, FLAT, False),  # the LDT, and there is none
    (0x50, FLAT, False),  # behind the GDT's end
    (0xFFF8, FLAT, False),
]


@pytest.mark.parametrize(("selector", "descriptor", "fast"), LOADS)
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("form", ["ds, ecx", "es, cx", "fs, rcx", "gs, word [rip + number]"])
def test_mov_to_a_segment_register(
    boot: Boot, form: str, selector: int, descriptor: int | None, fast: bool, user: bool
) -> None:
    """Against the emulator in Python, which executes the same instruction in the same state."""
    text = f"mov ecx, {selector | 0x12340000}\nat: mov {form}\n{'ud2' if user else 'hlt'}\nnumber: dw {selector}"
    name = form[:2]
    results = []
    for emulated in (False, True):
        guest = boot(text, user=user)
        if descriptor is not None:
            guest.memory.store_u64(GDT + SPARE, descriptor)
        fault = None
        if emulated:
            guest.set(rip=guest.program["at"], rcx=selector | 0x12340000)
            guest.vcpu._arrive()  # type: ignore[attr-defined]
            try:
                guest.vcpu.emulator.step()  # type: ignore[attr-defined]
            except GuestFault as e:
                fault = e.vector, e.error or 0
        else:
            guest.run()
            frame = guest.exception
            if frame is not None and frame.vector != 6:
                fault = frame.vector, frame.error
            if fast and fault is None:
                assert left_to_python(guest) == 1 + user
        results.append((fault, guest.state[name], guest.memory.load_u64(GDT + SPARE)))
    assert results[0] == results[1]


# The MSRs of segment bases

BASES = {0xC0000100: "fs", 0xC0000101: "gs", 0xC0000102: None}


@pytest.mark.parametrize("index", BASES)
@pytest.mark.parametrize("value", [0, 0x7FFFFFFFF123, 0xFFFF800000000000, 0x123456789])
def test_segment_bases_by_msr(boot: Boot, index: int, value: int) -> None:
    text = f"""
        start: mov r15d, {ROUNDS}
        again: mov ecx, {index}
        mov rax, {value & 0xFFFFFFFF} | 0xABCD << 32
        mov rdx, {value >> 32} | 0xABCD << 32
        wrmsr
        mov rax, -1
        mov rdx, -1
        rdmsr
        shl rdx, 32
        add rax, rdx
        dec r15d
        jnz again
        hlt
    """
    guest = boot(text)
    guest.run()
    assert guest.exception is None and guest.reg("rax") == value
    segment = BASES[index]
    held = guest.state[segment]["base"] if segment else guest.state["msrs"][index]
    assert held == value
    assert left_to_python(guest) == 1  # HLT


@pytest.mark.parametrize("index", BASES)
@pytest.mark.parametrize("value", [1 << 47, 1 << 63, 0xFFFF7FFFFFFFFFFF])
def test_a_base_that_is_not_canonical(boot: Boot, index: int, value: int) -> None:
    guest = boot(f"mov ecx, {index}\nmov eax, {value & 0xFFFFFFFF}\nmov edx, {value >> 32}\nat: wrmsr\nhlt")
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.error, frame.rip) == (13, 0, guest.program["at"])


@pytest.mark.parametrize(("value", "vector"), [(0, None), (1, None), (2, 13), (1 << 32, 13)])
def test_prediction_commands(boot: Boot, value: int, vector: int | None) -> None:
    guest = boot(f"mov ecx, 0x49\nmov eax, {value & 0xFFFFFFFF}\nmov edx, {value >> 32}\nwrmsr\nhlt")
    guest.run()
    assert (guest.exception.vector if guest.exception is not None else None) == vector


@pytest.mark.parametrize("prefix", ["", "db 0x66\n", "db 0x48, 0xF2\n"])
@pytest.mark.parametrize("known", [True, False])
def test_msrs_of_pythons(boot: Boot, prefix: str, known: bool) -> None:
    """IA32_PAT, and one that there is not; prefixes that mean nothing are part of the instruction."""
    index = 0x277 if known else 0x12345
    write, read = f"at: {prefix}wrmsr\n", f"{prefix}rdmsr\n"
    guest = boot(f"mov ecx, {index}\nmov eax, 0x01040600\nmov edx, 0x05060107\n{write}xor eax, eax\n{read}hlt")
    guest.run()
    if known:
        assert guest.exception is None
        assert (guest.reg("rax"), guest.reg("rdx")) == (0x01040600, 0x05060107)
    else:
        assert guest.exception is not None and guest.exception.vector == 13
        assert guest.exception.rip == guest.program["at"]


@pytest.mark.parametrize("text", ["mov ecx, 0xC0000100\nat: wrmsr", "mov ecx, 0xC0000100\nat: rdmsr"])
def test_msrs_are_the_kernels(boot: Boot, text: str) -> None:
    guest = boot(text, user=True)
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.error, frame.rip) == (13, 0, guest.program["at"])


# Ports whose value is known


@pytest.fixture
def constants() -> Iterator[ConstantPorts]:
    ports = ConstantPorts()
    yield ports
    ports.close()


READS = """
    mov rax, 0x1122334455667788
    mov edx, 0x3fd
    stc
    in al, dx
    setc bl
    mov [rsp - 8], rax
    in al, 0x42
    mov [rsp - 16], rax
    mov dx, 0x3fc
    in al, dx
    mov [rsp - 24], rax
    in ax, 0x42
    hlt
"""


def test_a_byte_that_is_known_is_not_asked_for(boot: Boot, constants: ConstantPorts) -> None:
    constants.set(0x3FD, 0x60)
    constants.set(0x42, 0x99)
    guest = boot(READS, constants=constants)
    guest.io.inputs.update({0x3FC: 7, 0x42: 0x1234})
    guest.run()
    stack = guest.state["rsp"]
    assert [guest.load(stack - 8 * i) & 0xFFFF for i in (1, 2, 3)] == [0x7760, 0x7799, 0x7707]
    assert guest.load(stack - 8) >> 16 == 0x112233445566 and guest.reg("rbx") & 0xFF == 1
    assert guest.io.log == [("in", 0x3FC, 1, 7), ("in", 0x42, 2, 0x1234)]


def test_a_byte_that_is_known_no_more_is_asked_for(boot: Boot, constants: ConstantPorts) -> None:
    """Whoever changes it does so while guest code may read it."""
    constants.set(0x42, 1)
    guest = boot("again: in al, 0x42\n cmp al, 1\n je again\n hlt", constants=constants)
    guest.io.inputs[0x42] = 9
    timer = threading.Timer(0.05, constants.set, (0x42, None))
    timer.start()
    guest.run()
    timer.join()
    assert guest.reg("rax") & 0xFF == 9 and len(guest.io.log) == 1


def test_a_known_byte_read_in_single_steps_and_at_a_breakpoint(boot: Boot, constants: ConstantPorts) -> None:
    constants.set(0x42, 5)
    text = "push 0x102\n popfq\n in al, 0x42\n after: nop\n hlt\n step: mov rbx, [rsp]\n hlt"
    guest = boot(text, handlers={1: "step"}, constants=constants)
    guest.io.inputs[0x42] = 5
    guest.run()
    assert (guest.reg("rbx"), guest.reg("rax") & 0xFF) == (guest.program["after"], 5)
    text = "in al, 0x42\n after: nop\n hlt\n stop: mov rbx, [rsp]\n hlt"
    guest = boot(text, handlers={1: "stop"}, constants=constants)
    guest.set(dr0=0x42, dr7=0x20401, cr4=guest.state["cr4"] | Cr4.DE)
    guest.run()
    assert guest.reg("rbx") == guest.program["after"]


@pytest.mark.parametrize("bits", [32, 64])
def test_cpuid_tells_of_the_local_apic_while_it_is_enabled(boot: Boot, bits: int) -> None:
    """SDM 3, 11.4.3. 32-bit code's CPUID is Python's, 64-bit code's machine code's."""
    text = "mov eax, 1\ncpuid\nmov esi, edx\nmov ecx, 0x1b\nrdmsr\nbtc eax, 11\nwrmsr\nmov eax, 1\ncpuid\nhlt"
    guest = boot(text) if bits == 64 else boot("hlt")
    if bits == 32:
        guest.memory.write(0x100000, assemble(text, 0x100000, bits=32).code)
        guest.set(cs=SEGMENTS[CODE32], rip=0x100000)
    for there in (True, False):
        guest.set(rip=guest.program.address)
        guest.run()
        assert guest.exception is None
        assert [guest.reg(name) >> 9 & 1 for name in ("rsi", "rdx")] == [there, not there]


@pytest.mark.parametrize(("user", "result"), [(False, -1000), (True, -1)])
def test_a_hypercall_of_kvms_is_unknown(boot: Boot, user: bool, result: int) -> None:
    """CPUID shows KVM's signature, for guests that look for frequencies there, and no feature."""
    ours, other = ("vmcall", "vmmcall") if host_vendor() == INTEL_VENDOR else ("vmmcall", "vmcall")
    guest = boot(f"mov eax, 9\n{ours}\nlast: {other}", user=user)
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.rip) == (6, guest.program["last"])
    assert guest.reg("rax") == result & (1 << 64) - 1
