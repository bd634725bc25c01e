"""IRETQ in machine code: what it takes, and that it leaves what Python's does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.tiny import CODE64, DATA0, GDT, STACK, Tiny

ROUNDS = 50
NOT_ACCESSED = 0x00CF92000000FFFF


def text(ss: int) -> str:
    return f"""
        start: mov ebx, {ROUNDS}
        again: mov r12, rsp
        push {ss}
        push r12
        push 2
        push {CODE64}
        lea rcx, [rip + here]
        push rcx
        iretq
        here: dec ebx
        jnz again
        mov edx, ss
        hlt
    """


@pytest.mark.parametrize(
    ("ss", "descriptor", "fast"),
    [
        (0, None, True),
        (DATA0, None, True),  # where a kernel was interrupted in a system call
        (DATA0, 0x008F93000000FFFF, True),
        (DATA0, NOT_ACCESSED, False),
        (DATA0, 0x00CF93000000FFFE, False),
        (DATA0, 0x004F93000000FFFF, False),
        (DATA0, 0x01CF93000000FFFF, False),
        (DATA0, 0x00CF93000100FFFF, False),
    ],
)
def test_to_ring_0(boot: Callable[..., Tiny], ss: int, descriptor: int | None, fast: bool) -> None:
    guest = boot(text(ss))
    if descriptor is not None:
        guest.memory.store_u64(GDT + DATA0, descriptor)
    guest.run()
    assert guest.exception is None, guest.exception
    assert (guest.reg("rbx"), guest.reg("rdx"), guest.reg("rsp")) == (0, ss, STACK)
    segment = guest.vcpu.get_state()["ss"]
    now = guest.memory.load_u64(GDT + DATA0)
    if ss:
        limit = now & 0xFFFF | now >> 32 & 0xF0000
        assert segment == {
            "selector": ss,
            "base": now >> 16 & 0xFFFFFF | now >> 32 & 0xFF000000,
            "limit": limit << 12 | 0xFFF if now >> 55 & 1 else limit,
            "attributes": now >> 40 & 0xF0FF,
        }
        assert now >> 40 & 1, "accessed"
    in_machine_code: int = guest.vcpu.st.n_iret  # type: ignore[attr-defined]
    python = 0 if fast else 1 if descriptor == NOT_ACCESSED else ROUNDS  # Python sets the bit at the first
    assert in_machine_code == ROUNDS - python
