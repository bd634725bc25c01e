"""Tables that a loop reads are checked before it, and nobody can tell."""

from __future__ import annotations

import pytest

from skep.engine.amd64.registers import Pte
from skep.engine.translate import TranslateEngine
from skep.engine.translate.hoisting import tables
from skep.engine.translate.layout import Mode
from tests.engine.assemble import assemble
from tests.engine.place import PAGE
from tests.engine.tiny import MMIO, Tiny
from tests.engine.translate.composed import composed

V, G, H = 0x400000, 0x300000, 0x330000
"""Two pages side by side for the guest, at G and H."""
CRC = """
    start: lea rsi, [rip + text]
    lea rdx, [rip + end]
    mov rbx, {base}
    mov eax, -1
    top: movzx ecx, byte [rsi]
    inc rsi
    xor ecx, eax
    shr eax, 8
    movzx ecx, cl
    xor eax, [rbx + rcx * 4 + {disp}]
    cmp rsi, rdx
    jne top
    hlt
    text: space 200
    end: dq 0
"""
WORDS = [n * 0x9E3779B1 & 0xFFFFFFFF for n in range(256)]
TEXT = bytes((n * 7 + 3) % 256 for n in range(200))


def crc() -> int:
    value = 0xFFFFFFFF
    for byte in TEXT:
        value = value >> 8 ^ WORDS[(value ^ byte) & 255]
    return value


def found(body: str) -> list[tuple[int, int, int, list[int]]]:
    """The tables of the loop that ``body`` and a jump back are."""
    with Tiny(TranslateEngine(), "start: hlt\n") as guest:
        vcpu = guest.vcpu
        guest.memory.write(0x140000, assemble(f"top: {body}\ndec rdi\njne top\nhlt", 0x140000, {}).code)
        made = composed(vcpu.cache, 0x140000, vcpu.st.mode & ~Mode.USER)  # type: ignore[attr-defined]
        return [tuple(table) for table in tables(made.items[: made.loop], made.data, 0)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("movzx ecx, al\nxor eax, [rbx + rcx * 4 - 0x78]", [(3, -0x78, 1024, [1])]),
        ("movzx ecx, byte [rsi]\nmov rax, [rbx + rcx * 8]\nadd rax, [rbx + rcx * 8]", [(3, 0, 2048, [1, 2])]),
        ("movzx ecx, al\nmov al, [rbx + rcx + 5]\nmov dl, [r9 + rcx]", [(3, 5, 256, [1]), (9, 0, 256, [2])]),
        ("movzx ecx, al\nmov eax, [rbx + rcx * 4]\nadd rbx, 4", []),
        ("movzx ecx, al\nmov eax, [rbx + rcx * 4]\nmov bl, 4", []),
        ("movzx ecx, al\ninc rcx\nmov eax, [rbx + rcx * 4]", []),
        ("movzx ecx, al\nmov cl, dl\nmov eax, [rbx + rcx * 4]\nmovzx ecx, al", []),
        ("mov eax, [rbx + rcx * 4]\nmovzx ecx, al", []),  # the first time it is no byte
        ("movzx ecx, ax\nmov eax, [rbx + rcx * 4]", []),
        ("movzx cx, al\nmov eax, [rbx + rcx * 4]", []),
        ("movzx ecx, al\nmov [rbx + rcx * 4], eax", []),
        ("movzx ecx, al\nadd [rbx + rcx * 4], eax", []),
        ("movzx ecx, al\nmov eax, fs:[rbx + rcx * 4]", []),
        ("movzx ecx, al\nmov eax, [ebx + ecx * 4]", []),
        ("movzx ecx, al\nmovdqu xmm0, [rbx + rcx * 4]", []),
    ],
)
def test_tables(body: str, expected: list[tuple[int, int, int, list[int]]]) -> None:
    assert found(body) == expected


def machine(at: int, second: int | None, disp: int = 0) -> Tiny:
    """A CRC whose table lies ``at`` bytes into the first page; ``second``: where the next page is."""
    guest = Tiny(TranslateEngine(), CRC.format(base=V + at - disp, disp=disp))
    guest.map(V, G)
    if second is not None:
        guest.map(V + PAGE, second)
    guest.memory.write(guest.program["text"], TEXT)
    data = b"".join(word.to_bytes(4, "little") for word in WORDS)
    room = PAGE - at
    guest.memory.write(G + at, data[:room])
    if second is not None and len(data) > room and second != MMIO:
        guest.memory.write(second, data[room:])
    return guest


@pytest.mark.parametrize("second", [H, G + PAGE, G + 3 * PAGE])
@pytest.mark.parametrize("at", [0, 16, PAGE - 1024, PAGE - 1020, PAGE - 512, PAGE - 4, PAGE - 2])
@pytest.mark.parametrize("disp", [0, -0x78])
def test_a_table_on_two_pages(at: int, second: int, disp: int) -> None:
    with machine(at, second, disp) as guest:
        for _ in range(2):
            before = guest.vcpu.st.n_fill  # type: ignore[attr-defined]
            guest.set(rip=guest.program["start"])
            guest.run()
            assert guest.exception is None
            assert guest.reg("rax") == crc()
            assert guest.vcpu.st.n_fill - before < 60  # type: ignore[attr-defined]


def test_what_is_not_read_does_not_fault() -> None:
    """The second page is not there. The loop ends before it reads from it, or faults where it does."""
    at = PAGE - 512
    with machine(at, None) as guest:
        value, read = 0xFFFFFFFF, 0
        for byte in TEXT:  # what the loop reads until it faults
            if (value ^ byte) & 255 >= 128:
                break
            value = value >> 8 ^ WORDS[(value ^ byte) & 255]
            read += 1
        guest.run()
        frame = guest.exception
        index = (value ^ TEXT[read]) & 255
        assert frame is not None and (frame.vector, frame.cr2) == (14, V + at + 4 * index)
        assert guest.reg("rsi") == guest.program["text"] + read + 1
        assert guest.reg("rax") == value >> 8
    quiet = bytes(n for n in range(256))
    with machine(at, None) as guest:
        guest.memory.write(G + at, bytes(512))  # zeros: the index is the text's byte
        guest.set(rdi=0)
        guest.memory.write(guest.program["text"], bytes(b ^ (0xFF if i < 4 else 0) for i, b in enumerate(quiet[:100])))
        guest.memory.write(guest.program["text"] + 100, bytes(100))
        guest.run()
        assert guest.exception is None and guest.reg("rax") == 0


def test_a_device_is_not_read_early() -> None:
    with machine(PAGE - 512, MMIO) as guest:
        guest.memory.write(G + PAGE - 512, bytes(512))
        text = bytearray(200)
        text[:4] = b"\xff" * 4
        text[50] = 0x80 + 3
        guest.memory.write(guest.program["text"], bytes(text))
        guest.io.device[12:16] = (0).to_bytes(4, "little")
        guest.run()
        assert guest.exception is None and guest.reg("rax") == 0
        assert [(kind, where - MMIO, size) for kind, where, size, _ in guest.io.log] == [("read", 12, 4)]


def test_a_page_that_is_another_later() -> None:
    """A handler of the loop's own fault maps the table's second page elsewhere; from then on that is what is read."""
    text = """
        start: mov rbx, 0x400F00
        mov rdi, 0x500000
        mov ecx, 64
        mov eax, 255
        top: movzx edx, al
        add r9, [rbx + rdx]
        add r9, [rdi]
        add rdi, 128
        dec ecx
        jne top
        hlt
        fault: push rax
        push rdx
        mov rdx, [rip + entry]
        mov rax, [rip + value]
        mov [rdx], rax
        mov rax, 0x401000
        invlpg [rax]
        mov rdx, [rip + entry2]
        or qword [rdx], 1
        pop rdx
        pop rax
        add rsp, 8
        iretq
        entry: dq 0
        value: dq 0
        entry2: dq 0
    """
    with Tiny(TranslateEngine(), text, handlers={14: "fault"}) as guest:
        guest.map(V, G)
        where = guest.map(V + PAGE, H)
        guest.memory.store_u64(H, 0)
        guest.memory.write(G + PAGE - 1, b"\x05" + b"")
        guest.memory.store_u64(H + PAGE, 0x0707070707070707)
        guest.map(0x500000, 0x310000)
        missing = guest.map(0x501000, 0x311000)
        guest.memory.store_u64(missing, 0x311000 | Pte.RW)
        guest.memory.store_u64(guest.program["entry"], where)
        guest.memory.store_u64(guest.program["value"], (H + PAGE) | Pte.RW | Pte.P)
        guest.memory.store_u64(guest.program["entry2"], missing)
        guest.run()
        assert guest.exception is None
        # rbx + 255 is the last byte of the first page
        first = 5
        then = 5 | 0x0707070707070700
        # the fault comes in the 33rd round, behind that round's read of the table
        assert guest.reg("r9") == (33 * first + 31 * then) & (1 << 64) - 1
