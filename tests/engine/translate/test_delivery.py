"""Exceptions, interrupts and IRET against the Intel SDM's own words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from skep.engine.amd64.registers import Attr, Cr0, Efer, Pte, Rflags, Vector
from skep.engine.translate import delivery
from skep.engine.translate.port import GuestFault, TripleFault
from tests.engine.translate.plain import (
    ABSENT,
    CODE,
    CODE32,
    CODE64,
    CONFORMING,
    DATA0,
    EXECUTE_ONLY,
    GDT,
    HANDLER,
    IST_STACK,
    KERNEL_STACK,
    PML4,
    READ_ONLY,
    SIZE,
    STACK,
    TSS,
    USER32,
    USER64,
    USER_DATA,
    PlainCpu,
    descriptor,
)


@pytest.fixture
def cpu() -> Iterator[PlainCpu]:
    cpu = PlainCpu()
    yield cpu
    cpu.close()


def snapshot(cpu: PlainCpu) -> tuple[bytes, bytes]:
    return bytes(cpu.st.bytes[:0x800]), bytes(cpu.memory)


def raises(cpu: PlainCpu, vector: int, error: int | None, event: delivery.Event) -> GuestFault:
    """Delivering ``event`` faults so, and changes nothing."""
    before = snapshot(cpu)
    with pytest.raises(GuestFault) as caught:
        delivery._deliver_once(cpu, event)
    assert (caught.value.vector, caught.value.error) == (vector, error)
    assert snapshot(cpu) == before
    return caught.value


# Long mode


def test_interrupt_at_the_same_level_aligns_and_saves_five_words(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.gate(32, 0xFFFF_8000_0123_4567)
    st = cpu.st
    st.rsp, st.rflags = STACK - 4, Rflags.IF | Rflags.TF | Rflags.NT | Rflags.CF
    delivery.deliver_interrupt(cpu, 32)
    top = (STACK - 4 & ~15) - 40
    assert cpu.get64(top, 5) == [CODE, CODE64, 2 | Rflags.IF | Rflags.TF | Rflags.NT | Rflags.CF, STACK - 4, DATA0]
    assert (st.rip, st.rsp, st.cs_sel, st.ss_sel, st.cpl) == (0xFFFF_8000_0123_4567, top, CODE64, DATA0, 0)
    assert st.rflags == 2 | Rflags.CF
    assert cpu.changes


def test_trap_gate_keeps_if(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.gate(3, kind=15)
    cpu.st.rflags = Rflags.IF
    delivery.software_interrupt(cpu, 3, CODE + 1)
    assert cpu.st.rflags == 2 | Rflags.IF
    assert cpu.get64(cpu.st.rsp) == [CODE + 1]


def test_from_user_takes_the_kernel_stack_and_a_null_ss(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.gate(14)
    st = cpu.st
    delivery.deliver_exception(cpu, GuestFault(Vector.PF, 6, 0x1234))
    assert st.rsp == KERNEL_STACK - 48
    assert cpu.get64(st.rsp, 6) == [6, CODE, USER64, 2 | Rflags.RF, STACK, USER_DATA]
    assert (st.cs_sel, st.ss_sel, st.cpl, st.cr2) == (CODE64, 0, 0, 0x1234)
    assert not st.ss_attr & Attr.P


def test_from_compatibility_mode(cpu: PlainCpu) -> None:
    cpu.set_up(-32, cpl=3)
    cpu.gate(0x80, dpl=3)
    cpu.st.rsp = STACK
    delivery.software_interrupt(cpu, 0x80, CODE + 2)
    assert cpu.get64(cpu.st.rsp, 5) == [CODE + 2, USER32, 2, STACK, USER_DATA]
    assert cpu.st.cs_attr & Attr.L


def test_ist_replaces_the_stack_at_any_level(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.gate(2, ist=1)
    delivery.deliver_interrupt(cpu, 2)
    assert cpu.st.rsp == IST_STACK - 40
    assert cpu.get64(cpu.st.rsp + 24) == [STACK]
    assert cpu.st.ss_sel == DATA0


def test_conforming_handler_runs_at_the_callers_level(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.gate(32, selector=CONFORMING)
    delivery.deliver_interrupt(cpu, 32)
    assert (cpu.st.cpl, cpu.st.cs_sel, cpu.st.rsp) == (3, CONFORMING | 3, STACK - 40)


@pytest.mark.parametrize(
    ("vector", "error", "gate", "software"),
    [
        (Vector.GP, 32 << 3 | 2 | 1, {"kind": 5}, False),
        (Vector.GP, 32 << 3 | 2, {"kind": 5}, True),
        (Vector.GP, 32 << 3 | 2, {"dpl": 0}, True),
        (Vector.NP, 32 << 3 | 3, {"present": 0}, False),
        (Vector.GP, 1, {"selector": 0}, False),
        (Vector.GP, 0x400 | 1, {"selector": 0x400}, False),
        (Vector.GP, DATA0 | 1, {"selector": DATA0}, False),
        (Vector.GP, CODE32 | 1, {"selector": CODE32}, False),
        (Vector.GP, USER64 & ~3 | 1, {"selector": USER64}, False),
        (Vector.GP, 1, {"handler": 1 << 47}, False),
    ],
)
def test_bad_gates(cpu: PlainCpu, vector: int, error: int, gate: dict[str, int], software: bool) -> None:
    cpu.set_up(cpl=3 if "dpl" in gate else 0)
    cpu.gate(32, **gate)
    raises(cpu, vector, error, delivery.Event(32, software=software))


def test_idt_limit(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.gate(32)
    cpu.st.idt_limit = 32 * 16 + 14
    raises(cpu, Vector.GP, 32 << 3 | 3, delivery.Event(32))


def test_absent_code_segment(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.put64(GDT + CODE64, descriptor(0x1B, flags=0xA, present=0))
    cpu.gate(32)
    raises(cpu, Vector.NP, CODE64 | 1, delivery.Event(32))


def test_stack_outside_the_tss_and_not_canonical(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.gate(32)
    cpu.st.tr_limit = 10
    raises(cpu, Vector.TS, cpu.st.tr_sel | 1, delivery.Event(32))
    cpu.st.tr_limit = 0x7FF
    cpu.put64(TSS + 4, 1 << 50)
    raises(cpu, Vector.SS, 1, delivery.Event(32))
    cpu.set_up()
    cpu.st.rsp = 1 << 50
    raises(cpu, Vector.SS, 1, delivery.Event(32))


def test_stack_that_is_not_mapped_changes_nothing(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.gate(32)
    cpu.st.rsp = 0x31010  # the frame lies on two pages, the lower one absent
    cpu.holes.add(0x30000)
    fault = raises(cpu, Vector.PF, 2, delivery.Event(32))
    assert fault.address == 0x31010 - 40


def test_kernel_stack_is_written_as_supervisor(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    for page in range(0, SIZE, 4096):
        cpu.map(page, page, Pte.P | Pte.RW)  # nothing is the user's
    cpu.st.cr3, cpu.paged = PML4, True
    cpu.gate(14)
    delivery.deliver_exception(cpu, GuestFault(Vector.PF, 5, CODE))
    assert cpu.st.rip == HANDLER


# Nested faults: SDM 3, table 6-5


def frames(cpu: PlainCpu) -> int:
    return cpu.get64(cpu.st.rsp)[0]


def test_contributory_on_contributory_is_a_double_fault(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.gate(8, 0x18080, ist=1)
    delivery.deliver_exception(cpu, GuestFault(Vector.GP, 0))  # its gate is absent: #GP on #GP
    assert cpu.st.rip == 0x18080
    assert frames(cpu) == 0


def test_page_fault_on_contributory_is_delivered_itself(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.gate(13)
    cpu.gate(14, 0x18140, ist=1)
    cpu.holes.add(KERNEL_STACK - 4096)
    delivery.deliver_exception(cpu, GuestFault(Vector.GP, 0x50))
    assert cpu.st.rip == 0x18140
    assert cpu.st.cr2 == KERNEL_STACK - 48
    assert frames(cpu) == 2


def test_contributory_on_page_fault_is_a_double_fault(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.gate(8, 0x18080)
    delivery.deliver_exception(cpu, GuestFault(Vector.PF, 0, 0x5000))
    assert (cpu.st.rip, cpu.st.cr2) == (0x18080, 0x5000)


def test_page_fault_on_page_fault_is_a_double_fault(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.gate(14)
    cpu.gate(8, 0x18080, ist=1)
    cpu.holes.add(KERNEL_STACK - 4096)
    delivery.deliver_exception(cpu, GuestFault(Vector.PF, 4, 0x5000))
    assert (cpu.st.rip, cpu.st.cr2) == (0x18080, KERNEL_STACK - 48)


def test_fault_on_a_benign_event_is_delivered_itself(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.gate(13, 0x180D0)
    delivery.deliver_interrupt(cpu, 32)  # no gate: #GP, EXT set
    assert cpu.st.rip == 0x180D0
    assert frames(cpu) == 32 << 3 | 3


def test_fault_on_double_fault_is_a_triple_fault(cpu: PlainCpu) -> None:
    cpu.set_up()
    with pytest.raises(TripleFault) as raised:
        delivery.deliver_exception(cpu, GuestFault(Vector.UD))
    assert [fault.vector for fault in raised.value.faults] == [Vector.UD, Vector.GP, Vector.DF]
    with pytest.raises(TripleFault):
        delivery.deliver_interrupt(cpu, 32)


def test_traps_do_not_set_rf(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.gate(1)
    delivery.deliver_exception(cpu, GuestFault(Vector.DB))
    assert cpu.get64(cpu.st.rsp + 16) == [2]


# 32-bit protected mode


def test_protected_same_level(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.gate(13)
    delivery.deliver_exception(cpu, GuestFault(Vector.GP, 0x18))
    assert cpu.get32(cpu.st.rsp, 4) == [0x18, CODE, CODE32, 2 | Rflags.RF]
    assert (cpu.st.rip, cpu.st.rsp) == (HANDLER, STACK - 16)


def test_protected_inner_level(cpu: PlainCpu) -> None:
    cpu.set_up(32, cpl=3)
    cpu.gate(0x80, dpl=3, kind=15)
    cpu.st.rflags = Rflags.IF
    delivery.software_interrupt(cpu, 0x80, CODE + 2)
    assert cpu.st.rsp == KERNEL_STACK - 20
    assert cpu.get32(cpu.st.rsp, 5) == [CODE + 2, USER32, 2 | Rflags.IF, STACK, USER_DATA]
    assert (cpu.st.ss_sel, cpu.st.cs_sel, cpu.st.cpl, cpu.st.iflag) == (DATA0, CODE32, 0, Rflags.IF)


def test_protected_sixteen_bit_gate(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.gate(33, handler=0x8000, kind=6)
    cpu.st.rip = 0x4321
    delivery.deliver_interrupt(cpu, 33)
    assert bytes(cpu.memory[STACK - 6 : STACK]) == bytes.fromhex("2143 1800 0200")
    assert cpu.st.rip == 0x8000


@pytest.mark.parametrize(
    ("ss", "vector", "error"),
    [(0, Vector.TS, 1), (USER_DATA, Vector.TS, USER_DATA & ~3 | 1), (READ_ONLY, Vector.TS, READ_ONLY | 1),
     (ABSENT, Vector.SS, ABSENT | 1), (0x400, Vector.TS, 0x401), (EXECUTE_ONLY, Vector.TS, EXECUTE_ONLY | 1)],
)  # fmt: skip
def test_protected_bad_inner_stack(cpu: PlainCpu, ss: int, vector: int, error: int) -> None:
    cpu.set_up(32, cpl=3)
    cpu.gate(32)
    cpu.memory[TSS + 8 : TSS + 10] = ss.to_bytes(2, "little")
    raises(cpu, vector, error, delivery.Event(32))


def test_protected_limits(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.gate(32)
    cpu.st.ss_limit = STACK - 5  # the first word pushed ends past it
    raises(cpu, Vector.SS, 1, delivery.Event(32))
    cpu.st.ss_limit = 0xFFFF_FFFF
    cpu.put64(GDT + CODE32, descriptor(0x1B, limit=HANDLER - 1, flags=4))
    raises(cpu, Vector.GP, 1, delivery.Event(32))


def test_expand_down_stack(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    cpu.gate(32)
    cpu.st.ss_attr |= Attr.EXPAND_DOWN
    cpu.st.ss_limit = STACK - 13
    delivery.deliver_interrupt(cpu, 32)
    assert cpu.st.rip == HANDLER
    cpu.st.ss_limit = cpu.st.rsp - 12
    raises(cpu, Vector.SS, 1, delivery.Event(32))


def test_accessed_bit_is_set_in_the_table(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.put64(GDT + CODE64, descriptor(0x1A, flags=0xA))
    cpu.gate(32)
    delivery.deliver_interrupt(cpu, 32)
    assert cpu.get64(GDT + CODE64)[0] >> 40 & 1
    assert cpu.st.cs_attr & Attr.ACCESSED


def test_real_mode(cpu: PlainCpu) -> None:
    cpu.set_up(32)
    st = cpu.st
    st.cr0, st.idt_base, st.idt_limit = Cr0.ET, 0, 0x3FF
    st.cs_sel, st.cs_base, st.cs_limit, st.rip = 0x1000, 0x10000, 0xFFFF, 0x55
    st.ss_sel, st.ss_base, st.ss_attr, st.rsp = 0x3000, 0x30000, 0x93, 0x100
    st.rflags = Rflags.IF | Rflags.CF
    cpu.memory[0x80:0x84] = bytes.fromhex("3412 0080")
    delivery.deliver_interrupt(cpu, 0x20)
    assert (st.cs_sel, st.cs_base, st.rip, st.rsp) == (0x8000, 0x80000, 0x1234, 0xFA)
    assert bytes(cpu.memory[0x300FA:0x30100]) == bytes.fromhex("5500 0010 0302")
    delivery.iret(cpu, 2, 0)
    assert (st.cs_sel, st.cs_base, st.rip, st.rsp) == (0x1000, 0x10000, 0x55, 0x100)
    assert st.rflags == 2 | Rflags.IF | Rflags.CF


# IRET


def frame64(cpu: PlainCpu, rip: int, cs: int, flags: int, rsp: int, ss: int) -> None:
    cpu.st.rsp = STACK - 40
    cpu.put64(STACK - 40, rip, cs, flags, rsp, ss)


def iret_raises(cpu: PlainCpu, vector: int, error: int, size: int = 8) -> None:
    before = snapshot(cpu)
    with pytest.raises(GuestFault) as caught:
        delivery.iret(cpu, size, 0)
    assert (caught.value.vector, caught.value.error) == (vector, error)
    assert snapshot(cpu) == before


def test_iret_to_user(cpu: PlainCpu) -> None:
    cpu.set_up()
    st = cpu.st
    flags = Rflags.IF | Rflags.IOPL | Rflags.AC | Rflags.RF | Rflags.ID | Rflags.OF
    frame64(cpu, 0x40_0000, USER64, flags, 0x7FFF_F000, USER_DATA)
    delivery.iret(cpu, 8, 0)
    assert (st.rip, st.cs_sel, st.rsp, st.ss_sel, st.cpl) == (0x40_0000, USER64, 0x7FFF_F000, USER_DATA, 3)
    assert st.rflags == flags | 2
    assert (st.ds_sel, st.es_sel) == (0, 0)  # DPL 0 data is the kernel's


def test_iret_same_level_takes_the_stack_too(cpu: PlainCpu) -> None:
    cpu.set_up()
    frame64(cpu, CODE + 8, CODE64, 0, STACK - 0x101, 0)
    delivery.iret(cpu, 8, 0)
    assert (cpu.st.rip, cpu.st.rsp, cpu.st.ss_sel, cpu.st.ds_sel) == (CODE + 8, STACK - 0x101, 0, DATA0)


def test_iret_to_compatibility_mode(cpu: PlainCpu) -> None:
    cpu.set_up()
    frame64(cpu, 0x8000, USER32, 0, 0xFFFF_FFF0, USER_DATA)
    delivery.iret(cpu, 8, 0)
    assert (cpu.st.rip, cpu.st.rsp, cpu.st.cpl) == (0x8000, 0xFFFF_FFF0, 3)
    assert not cpu.st.cs_attr & Attr.L


def test_iret_from_user_cannot_raise_privileged_flags(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    cpu.st.rflags = Rflags.IF
    frame64(cpu, CODE, USER64, Rflags.IOPL | Rflags.CF | Rflags.VIP, STACK, USER_DATA)
    delivery.iret(cpu, 8, 0)
    assert cpu.st.rflags == 2 | Rflags.IF | Rflags.CF


def test_iretd_in_64_bit_mode_pops_words_of_four_bytes(cpu: PlainCpu) -> None:
    cpu.set_up()
    cpu.st.rsp = STACK - 20
    for n, word in enumerate((CODE, USER64, 2, 0x9000, USER_DATA)):
        cpu.memory[STACK - 20 + 4 * n : STACK - 16 + 4 * n] = word.to_bytes(4, "little")
    delivery.iret(cpu, 4, 0)
    assert (cpu.st.rip, cpu.st.rsp, cpu.st.ss_sel) == (CODE, 0x9000, USER_DATA)


@pytest.mark.parametrize(
    ("cs", "ss", "rip", "vector", "error"),
    [
        (0, DATA0, CODE, Vector.GP, 0),
        (0x400, DATA0, CODE, Vector.GP, 0x400),
        (DATA0, DATA0, CODE, Vector.GP, DATA0),
        (CODE64 | 3, USER_DATA, CODE, Vector.GP, CODE64),
        (USER64, 0x400 | 3, CODE, Vector.GP, 0x400),
        (USER64, 0, CODE, Vector.GP, 0),
        (USER64, 3, CODE, Vector.GP, 0),
        (USER64, DATA0, CODE, Vector.GP, DATA0),
        (USER64, USER64, CODE, Vector.GP, USER64 & ~3),
        (CODE32, 0, CODE, Vector.GP, 0),
        (CODE64, ABSENT, CODE, Vector.SS, ABSENT),
        (USER64, USER_DATA, 1 << 47, Vector.GP, 0),
        (USER32, USER_DATA, 1 << 32, Vector.GP, 0),
    ],
)
def test_iret_checks(cpu: PlainCpu, cs: int, ss: int, rip: int, vector: int, error: int) -> None:
    cpu.set_up()
    frame64(cpu, rip, cs, 2, STACK, ss)
    iret_raises(cpu, vector, error)


def test_iret_inward_is_refused(cpu: PlainCpu) -> None:
    cpu.set_up(cpl=3)
    frame64(cpu, CODE, CODE64, 2, STACK, DATA0)
    iret_raises(cpu, Vector.GP, CODE64)


def test_iret_with_nt(cpu: PlainCpu) -> None:
    cpu.set_up()
    frame64(cpu, CODE, CODE64, 2, STACK, DATA0)
    cpu.st.rflags = Rflags.NT
    iret_raises(cpu, Vector.GP, 0)


def test_iret_frame_on_an_absent_page(cpu: PlainCpu) -> None:
    cpu.set_up()
    frame64(cpu, CODE, CODE64, 2, STACK, DATA0)
    cpu.st.rsp = 0x30FF0
    cpu.holes.add(0x31000)
    iret_raises(cpu, Vector.PF, 0)


def test_iret_protected_mode_there_and_back(cpu: PlainCpu) -> None:
    cpu.set_up(32, cpl=3)
    cpu.gate(0x80, dpl=3)
    st = cpu.st
    st.rflags = Rflags.IF | Rflags.SF
    before = [getattr(st, name) for name in ("cs_sel", "ss_sel", "rsp", "rflags", "cpl", "ds_sel")]
    delivery.software_interrupt(cpu, 0x80, CODE + 2)
    delivery.iret(cpu, 4, 0)
    assert [getattr(st, name) for name in ("cs_sel", "ss_sel", "rsp", "rflags", "cpl", "ds_sel")] == before
    assert st.rip == CODE + 2


def test_every_exception_and_iret_round_trip_in_long_mode(cpu: PlainCpu) -> None:
    for vector in (0, 1, 3, 6, 8, 10, 11, 12, 13, 14, 17):
        error = 0 if vector in (8, 10, 11, 12, 13, 14, 17) else None
        cpu.set_up(cpl=3)
        cpu.gate(vector)
        st = cpu.st
        st.rflags = Rflags.IF | Rflags.DF
        delivery.deliver_exception(cpu, GuestFault(vector, error, 0))
        assert st.efer & Efer.LMA and st.cpl == 0
        if error is not None:
            st.rsp += 8
        delivery.iret(cpu, 8, 0)
        assert (st.rip, st.rsp, st.cpl, st.rflags & ~Rflags.RF) == (CODE, STACK, 3, 2 | Rflags.IF | Rflags.DF)
