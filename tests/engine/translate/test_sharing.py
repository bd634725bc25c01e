"""Operands that share a check."""

from __future__ import annotations

import pytest

from skep.engine.amd64.registers import Pte
from skep.engine.translate import TranslateEngine
from skep.engine.translate.blocks import PIECES
from skep.engine.translate.layout import TWINS, TWINS_MASK, Kind, Mode
from skep.engine.translate.sharing_runtime import REACH
from tests.engine.assemble import assemble
from tests.engine.place import PAGE
from tests.engine.tiny import MMIO, Tiny
from tests.engine.translate.composed import composed

V, G, H = 0x400000, 0x300000, 0x330000
"""Two pages side by side for the guest, at G and H."""


def shared(text: str) -> dict[int, tuple[int, int, tuple[int, int, int, bool] | None]]:
    """By instruction: slot, place and check."""
    with Tiny(TranslateEngine(), "start: hlt\n") as guest:
        vcpu = guest.vcpu
        cache = vcpu.cache  # type: ignore[attr-defined]
        code = assemble(text + "\nhlt", 0x140000, {}).code
        guest.memory.write(0x140000, code)
        return composed(cache, 0x140000, vcpu.st.mode & ~Mode.USER).shares  # type: ignore[attr-defined]


def test_pushes_and_pops() -> None:
    found = shared("push rbx\npush r12\nsub rsp, 0x20\nmov [rsp + 8], rax\nadd rsp, 0x20\npop r12\npop rbx\nret")
    lead = found[0][2]
    assert lead is not None
    base, disp, length, write = lead
    assert base == 4 and write and disp == -0x28 and length == 0x30
    places = {i: found[i][1] + disp for i in found}  # relative to the first RSP
    assert places == {0: -8, 1: -16, 3: -0x28, 5: -16, 6: -8, 7: 0}


def test_a_write_does_not_rest_on_a_read() -> None:
    """Its page may be read-only, and its dirty bit is not set yet."""
    found = shared("mov eax, [rbx]\nmov [rbx + 8], eax\nmov ecx, [rbx + 4]\nmov [rbx + 12], ecx")
    assert 0 not in found
    assert {found[i][0] for i in (1, 2, 3)} == {0}
    lead = found[1][2]
    assert lead == (3, 4, 12, True)


@pytest.mark.parametrize(
    "between",
    ["mov rbx, [rcx]", "lea rbx, [rbx + rcx]", "shr rbx, 1", "xchg rbx, rcx", "add ebx, 4", "pop rbx", "mov bl, 1"],
)
def test_another_value(between: str) -> None:
    found = shared(f"mov eax, [rbx]\n{between}\nmov edx, [rbx + 4]")
    assert found == {}


@pytest.mark.parametrize("to", ["add rbx, 8", "sub rbx, -8", "lea rbx, [rbx + 8]", "mov rcx, rbx\nlea rbx, [rcx + 8]"])
def test_a_value_and_a_constant(to: str) -> None:
    found = shared(f"mov eax, [rbx]\n{to}\nmov edx, [rbx + 4]")
    places = [place for _, place, _ in found.values()]
    assert places == [0, 12]


def test_what_is_not_shared() -> None:
    assert shared(f"mov eax, [rbx]\nmov eax, [rbx + {REACH}]\nmov eax, fs:[rbx]\nmov eax, [rbx + rcx]") == {}
    assert shared("movaps xmm0, [rbx]\nmovaps xmm1, [rbx + 16]\nmov eax, [ebx]\nmov eax, [ebx + 4]") == {}


BODY = """
    start: mov rbx, {base}
    mov ecx, 3
    again: mov rax, [rbx]
    add rax, [rbx + 8]
    add dword [rbx + 16], 5
    mov [rbx + 24], rax
    xor dword [rbx + 32], ecx
    mov r10, [rbx + 32]
    add r15, r10
    dec ecx
    jne again
    hlt
"""


@pytest.mark.parametrize("offset", [0, PAGE - 40, PAGE - 39, PAGE - 36, PAGE - 24, PAGE - 20, PAGE - 8, PAGE - 4])
def test_a_range_on_two_pages(offset: int) -> None:
    """The plain twin does it, with the same results."""
    with Tiny(TranslateEngine(), BODY.format(base=V + offset)) as guest:
        guest.map(V, G)
        guest.map(V + PAGE, H)
        for i in range(PAGE // 8):
            guest.memory.store_u64(G + 8 * i, i * 0x0101010101010101 & (1 << 64) - 1)
            guest.memory.store_u64(H + 8 * i, i * 0x0301050701030205 & (1 << 64) - 1)
        before = bytearray(guest.read(G, PAGE) + guest.read(H, PAGE))
        guest.run()
        assert guest.exception is None

        def number(at: int, size: int) -> int:
            return int.from_bytes(before[offset + at : offset + at + size], "little")

        def put(at: int, size: int, value: int) -> None:
            before[offset + at : offset + at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

        total = 0
        for count in (3, 2, 1):
            put(16, 4, number(16, 4) + 5)
            put(24, 8, number(0, 8) + number(8, 8))
            put(32, 4, number(32, 4) ^ count)
            total += number(32, 8)
        assert guest.read(G, PAGE) + guest.read(H, PAGE) == bytes(before)
        assert guest.reg("r15") == total & (1 << 64) - 1
        assert bool(guest.vcpu.counts[Kind.PLAIN]) == (offset + 40 > PAGE)  # type: ignore[attr-defined]


def test_the_way_to_the_twin_is_known() -> None:
    """A range that goes on in the next page is not looked up each time; when code is dropped, so are the ways."""
    with Tiny(TranslateEngine(), BODY.format(base=V + PAGE - 20).replace("ecx, 3", "ecx, 1000")) as guest:
        guest.map(V, G)
        guest.map(V + PAGE, H)
        st, cache = guest.vcpu.st, guest.vcpu.cache  # type: ignore[attr-defined]
        for _ in range(2):
            before = st.n_fill
            guest.set(rip=guest.program["start"], r15=0)
            guest.run()
            assert guest.exception is None
            assert st.n_fill - before < 20
            assert any(st.bytes[TWINS : TWINS + TWINS_MASK + 16])
            for _ in range(PIECES):
                cache._next_piece()
            assert not any(st.bytes[TWINS : TWINS + TWINS_MASK + 16])


@pytest.mark.parametrize(("second", "offset"), [(True, PAGE - 20), (False, 0), (False, PAGE - 20)])
def test_a_fault_in_a_range(second: bool, offset: int) -> None:
    """CR2 is the operand's own address, and what stood before the fault has been done."""
    with Tiny(TranslateEngine(), BODY.format(base=V + offset)) as guest:
        if second:
            guest.map(V, G)
        guest.run()
        frame = guest.exception
        assert frame is not None and frame.vector == 14
        assert frame.cr2 == V + offset + (24 if second else 0)


def test_a_read_only_page() -> None:
    with Tiny(TranslateEngine(), BODY.format(base=V)) as guest:
        guest.map(V, G, 0)
        guest.run()
        frame = guest.exception
        assert frame is not None and (frame.vector, frame.error, frame.cr2) == (14, 3, V + 16)
        entry = guest.memory.load_u64(guest.entry(V))
        assert entry & Pte.A and not entry & Pte.D


def test_a_device() -> None:
    with Tiny(TranslateEngine(), BODY.format(base=MMIO)) as guest:
        guest.run()
        assert guest.exception is None
        kinds = [(kind, where - MMIO, size) for kind, where, size, _ in guest.io.log[:8]]
        assert kinds == [
            ("read", 0, 8), ("read", 8, 8), ("read", 16, 4), ("write", 16, 4), ("write", 24, 8), ("read", 32, 4),
            ("write", 32, 4), ("read", 32, 8),
        ]  # fmt: skip


def test_code_in_a_range() -> None:
    """A store to code beside data is noticed wherever in the range it is."""
    text = """
        start: lea rbx, [rip + data]
        mov ecx, 3
        again: call function
        add r15, rax
        mov rax, [rbx]
        mov [rbx + 8], rax
        inc byte [rbx + 17]
        mov [rbx + 32], rax
        dec ecx
        jne again
        hlt
        data: dq 1, 2
        function: mov eax, 5
        ret
        align 8
        dq 0, 0, 0
    """
    with Tiny(TranslateEngine(), text) as guest:
        guest.run()
        assert guest.exception is None
        assert guest.reg("r15") == 5 + 6 + 7
