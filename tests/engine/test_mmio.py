"""Device memory: every instruction form may be pointed at it, and each access happens once, whole, in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.engines import EVERYWHERE
from tests.engine.place import PAGE
from tests.engine.tiny import MMIO, Tiny

Boot = Callable[..., Tiny]
RAM_PAGE = 0x180000
"""RAM that the same instruction works on, for comparison."""
PATTERN = bytes((i * 37 + 11) & 0xFF for i in range(256))


def at_end(guest: Tiny) -> None:
    guest.run()
    assert guest.exception is None, guest.exception


@pytest.mark.parametrize(
    "text",
    [
        "mov al, [rbx]",
        "mov ax, [rbx]",
        "mov eax, [rbx]",
        "mov rax, [rbx]",
        "mov [rbx], al",
        "mov [rbx], cx",
        "mov [rbx], ecx",
        "mov [rbx], rcx",
        "mov byte [rbx], 5",
        "mov word [rbx], 0x1234",
        "mov dword [rbx], 0x12345678",
        "mov qword [rbx], -5",
        "mov ah, [rbx]",
        "mov [rbx], ch",
        "mov r9, [rbx + 8]",
        "mov [rbx + rsi*4], r10",
        "mov r11d, [rbx]",
        "movzx eax, byte [rbx]",
        "movsx rax, word [rbx]",
        "movsxd rax, dword [rbx]",
        "movbe eax, [rbx]",
        "movbe [rbx], rcx",
        "movnti [rbx], ecx",
        "add [rbx], ecx",
        "add ecx, [rbx]",
        "adc byte [rbx], 3",
        "sub qword [rbx], 77",
        "cmp [rbx], ecx",
        "cmp byte [rbx], 0x0b",
        "test [rbx], ecx",
        "test byte [rbx], 8",
        "and dword [rbx], 0xff",
        "or byte [rbx], 0x80",
        "xor [rbx], rcx",
        "not dword [rbx]",
        "neg qword [rbx]",
        "inc word [rbx]",
        "dec byte [rbx]",
        "shl dword [rbx], 3",
        "sar qword [rbx], cl",
        "rcr byte [rbx], 1",
        "shld [rbx], rcx, 5",
        "bt dword [rbx], 3",
        "bts dword [rbx], 3",
        "btr qword [rbx], rsi",
        "lock btc dword [rbx], 1",
        "lock add [rbx], ecx",
        "lock inc byte [rbx]",
        "xchg [rbx], eax",
        "xchg [rbx], cl",
        "lock xadd [rbx], rcx",
        "lock cmpxchg [rbx], ecx",
        "mov eax, [rbx]\nlock cmpxchg [rbx], ecx",
        "cmpxchg8b [rbx]",
        "lock cmpxchg16b [rbx]",
        "imul eax, [rbx], 7",
        "mul dword [rbx]",
        "xor edx, edx\ndiv dword [rbx]",
        "cmovz eax, [rbx]",
        "cmovnz eax, [rbx]",
        "setz byte [rbx]",
        "bsf eax, [rbx]",
        "popcnt rax, [rbx]",
        "lzcnt eax, [rbx]",
        "andn eax, ecx, [rbx]",
        "pdep rax, rcx, [rbx]",
        "mulx rax, rdx, [rbx]",
        "shlx eax, [rbx], ecx",
        "crc32 eax, dword [rbx]",
        "push qword [rbx]\npop rax",
        "push rcx\npop qword [rbx]",
        "call f\njmp over\nf: pop qword [rbx]\npush qword [rbx]\nret\nover: mov qword [rbx], 0",
        "mov rdi, rbx\nstosd",
        "mov rdi, rbx\nmov ecx, 5\nrep stosw",
        "mov rsi, rbx\nlodsq",
        "mov rsi, rbx\nlea rdi, [rip + buffer]\nmov ecx, 9\nrep movsd",
        "lea rsi, [rip + buffer]\nmov rdi, rbx\nmov ecx, 20\nrep movsb",
        "mov rsi, rbx\nlea rdi, [rbx + 64]\nmovsq",
        "lea rsi, [rbx]\nlea rdi, [rbx + 8]\ncmpsd",
        "mov rsi, rbx\nlea rdi, [rbx + 16]\nmov ecx, 6\nrep movsb",
        "mov rdi, rbx\nmov al, 0x7a\nmov ecx, 30\nrepne scasb",
        "std\nlea rdi, [rbx + 32]\nmov ecx, 4\nrep stosd\ncld",
        "movups xmm0, [rbx]",
        "movups [rbx], xmm1",
        "movaps xmm0, [rbx + 16]",
        "movd xmm0, dword [rbx]",
        "movq [rbx], xmm1",
        "movhps xmm1, [rbx]",
        "movss xmm0, [rbx]",
        "movsd [rbx], xmm1",
        "paddd xmm1, [rbx]",
        "vpaddd ymm1, ymm2, [rbx]",
        "vmovdqu ymm0, [rbx]",
        "vmovdqu [rbx], ymm1",
        "pextrw word [rbx], xmm1, 2",
        "pinsrd xmm1, [rbx], 1",
        "cvtsi2sd xmm0, dword [rbx]",
        "movq mm0, [rbx]\nmovd ecx, mm0\nemms",
        "fld dword [rbx]\nfstp tbyte [rbx + 32]",
        "fild qword [rbx]\nfistp qword [rbx + 16]",
        "fnstcw [rbx]",
        "fldcw [rip + word_]\nfnstsw [rbx]",
        "stmxcsr [rbx]",
        "vbroadcastss ymm0, [rbx]",
        "vpmovzxbd ymm0, qword [rbx]",
        "mov al, 5\nxlatb",
        "mov rax, [rbx + 1]",
        "mov [rbx + 3], ecx",
        "lock add [rbx + 5], ecx",
        "jmp go\ngo: mov eax, [ebx]",
        "lea rax, [rip + f]\nmov [rbx], rax\ncall qword [rbx]\njmp over\nf: inc esi\nret\nover: mov qword [rbx], 0",
        "vpcmpeqd ymm2, ymm2, ymm2\nvpxor ymm1, ymm1, ymm1\nvpgatherdd ymm3, [rbx + ymm1*4], ymm2",
        "vpcmpeqd xmm2, xmm2, xmm2\nvmaskmovps [rbx], xmm2, xmm1",
        "mov rdi, rbx\npcmpeqd xmm2, xmm2\nmaskmovdqu xmm1, xmm2",
        "xor eax, eax\nclflush [rbx]\nprefetcht0 [rbx]",
    ],
)
def test_as_with_ram(boot: Boot, text: str) -> None:
    """Registers, flags, FPU and the memory come out as they do when RBX points to RAM."""
    program = f"start: movups xmm1, [rip + buffer]\nmovups xmm2, [rip + buffer + 16]\n{text}\nhlt\nalign 16\n"
    program += (
        "buffer: dq 0x1111111122222222, 0x3333333344444444, 0x1234567855aa55aa, 0x0f0e0d0c0b0a0908, 1, 2, 3, 4, 5\n"
    )
    program += "word_: dw 0x37f\n"
    results = []
    for place in (RAM_PAGE, MMIO):
        guest = boot(program)
        guest.memory.write(RAM_PAGE, PATTERN)
        guest.io.device[:256] = PATTERN
        guest.set(rbx=place, rsi=2, rcx=0x89ABCDEF, rax=0x0102030405060708, r10=0xDEADBEEF12345678)
        at_end(guest)
        state = guest.state
        memory = guest.memory.read(RAM_PAGE, 256) if place == RAM_PAGE else bytes(guest.io.device[:256])
        registers = {}
        for name in ("rax", "rcx", "rdx", "rsi", "rdi", "r9", "r10", "r11", "rsp", "rbx", "rbp"):
            value = state[name]
            registers[name] = value - place if place <= value < place + PAGE else value
        results.append(
            (registers, state["rflags"], state["xsave"][:8], state["xsave"][32:416], state["xsave"][576:832], memory)
        )
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours == theirs


@EVERYWHERE
@pytest.mark.parametrize(
    ("text", "accesses"),
    [
        ("mov eax, [rbx]", [("read", 0, 4)]),
        ("mov [rbx + 4], cl", [("write", 4, 1)]),
        ("mov rax, [rbx]", [("read", 0, 8)]),
        ("add dword [rbx], 1", [("read", 0, 4), ("write", 0, 4)]),
        ("lock inc word [rbx + 2]", [("read", 2, 2), ("write", 2, 2)]),
        ("xchg [rbx], eax", [("read", 0, 4), ("write", 0, 4)]),
        ("cmp byte [rbx + 1], 0", [("read", 1, 1)]),
        ("mov rdi, rbx\nmov ecx, 3\nrep stosd", [("write", 0, 4), ("write", 4, 4), ("write", 8, 4)]),
        ("mov rsi, rbx\nmov ecx, 2\nlea rdi, [rip + b]\nrep movsw", [("read", 0, 2), ("read", 2, 2)]),
        ("lea rsi, [rip + b]\nmov rdi, rbx\nmov ecx, 2\nrep movsq", [("write", 0, 8), ("write", 8, 8)]),
        ("mov rsi, rbx\nlodsd\nlodsd", [("read", 0, 4), ("read", 4, 4)]),
        ("mov rsi, rbx\nlea rdi, [rbx + 8]\nmovsd", [("read", 0, 4), ("write", 8, 4)]),
        ("push qword [rbx]", [("read", 0, 8)]),
        ("movups xmm0, [rbx]", [("read", 0, 8), ("read", 8, 8)]),
        ("movups [rbx], xmm0", [("write", 0, 8), ("write", 8, 8)]),
    ],
)
def test_each_access_once(boot: Boot, text: str, accesses: list[tuple[str, int, int]]) -> None:
    guest = boot(f"{text}\nhlt\nb: space 64")
    guest.set(rbx=MMIO)
    at_end(guest)
    assert [(kind, where - MMIO, size) for kind, where, size, _ in guest.io.log] == accesses


@EVERYWHERE
def test_a_device_that_answers_differently_each_time(boot: Boot) -> None:
    """Nothing is read twice, and no value is kept: a register that counts its reads."""
    guest = boot("mov ecx, 100\nagain: mov eax, [rbx]\nadd rdx, rax\ndec ecx\njnz again\nhlt")
    guest.set(rbx=MMIO)
    reads = 0

    def read(gpa: int, size: int) -> int:
        nonlocal reads
        reads += 1
        return reads

    guest.io.mmio_read = read  # type: ignore[method-assign]
    at_end(guest)
    assert (guest.reg("rdx"), reads) == (5050, 100)


@EVERYWHERE
def test_a_value_read_decides_the_next_access(boot: Boot) -> None:
    """movs from a device to where the device says; an interrupt status that clears by reading."""
    guest = boot("poll: mov eax, [rbx]\ntest eax, eax\njz poll\nmov [rbx + 8], eax\nhlt")
    guest.set(rbx=MMIO)
    answers = iter((0, 0, 0, 0x80000001))
    guest.io.mmio_read = lambda gpa, size: next(answers)  # type: ignore[method-assign]
    at_end(guest)
    assert guest.io.log == [("write", MMIO + 8, 4, 0x80000001)]


@EVERYWHERE
def test_between_ram_and_device(boot: Boot) -> None:
    """An operand that begins in RAM and ends in the device, or the other way round."""
    guest = boot("mov rbx, 0x400000 + 4096 - 4\nmov rax, [rbx]\nmov rcx, 0x1122334455667788\nmov [rbx], rcx\nhlt")
    guest.map(0x400000, 0x300000)
    guest.map(0x401000, MMIO)
    guest.memory.write(0x300FFC, b"\x01\x02\x03\x04")
    guest.io.device[:4] = b"\x05\x06\x07\x08"
    at_end(guest)
    assert guest.reg("rax") == 0x0807060504030201
    assert guest.memory.read(0x300FFC, 4) == bytes.fromhex("88776655")
    assert bytes(guest.io.device[:4]) == bytes.fromhex("44332211")


class TestPorts:
    @EVERYWHERE
    def test_sizes_and_order(self, boot: Boot) -> None:
        text = """
            mov eax, 0x11223344
            out 0x80, al
            out 0x80, ax
            out 0x80, eax
            mov edx, 0x3f8
            out dx, al
            in al, dx
            in ax, dx
            in eax, dx
            mov rcx, rax
            in al, 0x60
            hlt
        """
        guest = boot(text)
        guest.io.inputs.update({0x3F8: 0xAABBCCDD, 0x60: 0x5A})
        guest.set(rax=-1 & (1 << 64) - 1)
        at_end(guest)
        assert [entry[:3] for entry in guest.io.log] == [
            ("out", 0x80, 1),
            ("out", 0x80, 2),
            ("out", 0x80, 4),
            ("out", 0x3F8, 1),
            ("in", 0x3F8, 1),
            ("in", 0x3F8, 2),
            ("in", 0x3F8, 4),
            ("in", 0x60, 1),
        ]
        assert guest.io.outs(0x80) == [0x44, 0x3344, 0x11223344]
        assert guest.reg("rcx") == 0xAABBCCDD  # a 32-bit result clears the upper half
        assert guest.reg("rax") == 0xAABBCC5A

    @EVERYWHERE
    def test_strings(self, boot: Boot) -> None:
        text = (
            "mov edx, 0x1f0\nlea rsi, [rip + b]\nmov ecx, 3\nrep outsw\nlea rdi, [rip + c]\nmov ecx, 2\nrep insd\nhlt\n"
        )
        guest = boot(text + "b: dw 1, 2, 3\nc: dd 0, 0, 7")
        guest.io.inputs[0x1F0] = 0x12345678
        at_end(guest)
        assert guest.io.outs(0x1F0) == [1, 2, 3]
        assert guest.read("c", 12) == bytes.fromhex("7856341278563412 07000000")
        assert guest.reg("rcx") == 0 and guest.reg("rdi") == guest.program["c"] + 8

    def test_a_fault_in_the_middle_of_ins(self, boot: Boot) -> None:
        """What was read before the fault is stored, and the registers say how far it came."""
        guest = boot("mov edx, 0x60\nmov rdi, 0x400000 - 2\nmov ecx, 5\nrep insb\nhlt")
        guest.map(0x3FF000, 0x300000)
        guest.io.inputs[0x60] = 0x77
        guest.run()
        frame = guest.exception
        assert frame is not None and (frame.vector, frame.cr2) == (14, 0x400000)
        assert guest.reg("rcx") == 3 and guest.memory.read(0x300FFE, 2) == b"\x77\x77"
        assert len(guest.io.log) == 2  # nothing was taken from the port that had nowhere to go


def test_code_in_a_device(boot: Boot) -> None:
    """Instructions fetched from outside RAM: slow, but they run, a CALL there and its RET included."""
    guest = boot("start: mov rbx, MMIO\nmov ecx, 5\ncall rbx\nhlt")
    guest.io.device[:6] = bytes.fromhex("48 01 c9 ff c1 c3")  # add rcx, rcx; inc ecx; ret
    at_end(guest)
    assert guest.reg("rcx") == 11
