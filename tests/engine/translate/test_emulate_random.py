"""Whatever a guest executes, in whatever state: a guest's fault at most, never an exception of ours."""

from __future__ import annotations

import random

import pytest
from iced_x86 import Decoder, Mnemonic

from skep.engine.amd64.cpuid import AMD_VENDOR, INTEL_VENDOR
from skep.engine.amd64.registers import Vector
from skep.engine.translate import delivery, emulate_string, emulate_vector
from skep.engine.translate.emulate import HANDLERS
from skep.engine.translate.layout import OFFSETS, SEGMENTS
from skep.engine.translate.port import GuestFault, TripleFault
from skep.engine.translate.segments import code_bits
from tests.engine.translate.plain import CODE, DATA, GDT, IDT, SIZE, PlainCpu

INTERESTING = (0, 1, 7, 0x7FF, 0xFFF, DATA, DATA + 0xFFD, GDT, SIZE - 3, 1 << 31, (1 << 32) - 1, 1 << 47, (1 << 64) - 8)
PREFIXES = (b"", b"", b"", b"\x66", b"\x67", b"\xf3", b"\xf2", b"\x64", b"\x2e", b"\xf0", b"\x36", b"\x66\x67")


ESCAPES = ("", "0f", "0f01", "0fae", "0f38", "c4e2 41", "c4e2 45", "c4e2 c1", "c4e2 c5", "c4e1 79")
"""Opcode maps, among them VEX ones with the vector lengths and W bits that matter."""


def forms() -> dict[int, list[bytes]]:
    """Opcodes with a ModRM byte, by mnemonic, of every instruction that has a handler, in 64- or 32-bit code: all maps,
    all opcodes, each ModRM reg field with a register and with memory operands, each mandatory prefix."""
    found: dict[int, list[bytes]] = {}
    for bits in (64, 32):
        for prefix in ("", "66", "f3", "f2", "48", "6648", "f348") if bits == 64 else ("", "66", "67", "f3"):
            for escape in ESCAPES:
                start = bytes.fromhex(prefix + escape)
                for opcode in range(256):
                    for modrm in MODRM:
                        data = start + bytes((opcode, modrm))
                        mnemonic = Decoder(bits, data + TAIL).decode().mnemonic
                        if mnemonic in HANDLERS:
                            found.setdefault(mnemonic, []).append(data)
    return found


# [rbx], [rdi + disp8], [rip + disp32], [rbx + vector * 4], registers, with every reg field
MODRM = [mod << 6 | reg << 3 | rm for reg in range(8) for mod, rm in ((0, 3), (1, 7), (0, 5), (0, 4), (3, 1))]
TAIL = b"\x93" * 8


@pytest.fixture(scope="module")
def instructions() -> dict[int, list[bytes]]:
    return forms()


def scramble(cpu: PlainCpu, rng: random.Random) -> None:
    st = cpu.st
    bits, cpl = rng.choice(((64, 0), (64, 0), (64, 3), (32, 0), (32, 3), (-32, 3)))
    cpu.set_up(bits, cpl)
    for n in range(16):
        st.q[n] = rng.choice(INTERESTING) if rng.random() < 0.7 else rng.getrandbits(64)
    if rng.random() < 0.7:
        st.rsp = 0x30000 + rng.choice((0, 4, 0xFFC, 0x800))
    st.rflags = rng.getrandbits(22) & ~(1 << 17)
    if rng.random() < 0.2:
        name = rng.choice(SEGMENTS[2:])
        setattr(st, f"{name}_attr", rng.getrandbits(16))
        setattr(st, f"{name}_limit", rng.choice(INTERESTING) & 0xFFFF_FFFF)
    for table in (GDT, IDT):
        at = table + rng.randrange(0x90)
        cpu.memory[at] = rng.getrandbits(8)
    st.cr4 = cpu.cpuid.cr4_bits & rng.getrandbits(24) | st.cr4
    st.xcr0 = rng.choice((1, 3, cpu.cpuid.xcr0_bits))
    if rng.random() < 0.1:
        st.cr0 &= ~1 & 0xFFFF_FFFF  # real mode
        st.cr0 &= ~(1 << 31) & 0xFFFF_FFFF
        st.efer = 0
    cpu.holes = {rng.choice((DATA, 0x30000, 0x2F000, CODE + 0x1000))} if rng.random() < 0.2 else set()


def step(cpu: PlainCpu, restarts: bool) -> bool:
    """Whether the instruction at rip was executed. One that faults has left everything alone, but for what ``restarts``
    in the middle, and but for #DB, which says why in DR6."""
    before = bytes(cpu.st.bytes[: 8 * len(OFFSETS)])
    try:
        cpu.emulator.step()
        return True
    except TripleFault:
        return True
    except GuestFault as fault:
        if not restarts and fault.vector != Vector.DB:
            assert bytes(cpu.st.bytes[: 8 * len(OFFSETS)]) == before
        try:
            delivery.deliver_exception(cpu, fault)
        except TripleFault:
            pass
        return False


@pytest.mark.parametrize("vendor", [INTEL_VENDOR, AMD_VENDOR])
def test_random_instructions_in_random_states(vendor: bytes, instructions: dict[int, list[bytes]]) -> None:
    rng = random.Random(vendor)
    cpu = PlainCpu(vendor=vendor)
    executed = set()
    for n in range(12000):
        mnemonic = list(instructions)[n % len(instructions)]
        scramble(cpu, rng)
        rip = cpu.st.rip = CODE + rng.choice((0, 0xFFB, 0x100))
        code = rng.choice(PREFIXES) + rng.choice(instructions[mnemonic]) + rng.randbytes(8)
        at = rip if code_bits(cpu.st) == 64 else cpu.st.cs_base + rip
        cpu.memory[at : at + len(code)] = code
        if step(cpu, mnemonic in RESTARTING):
            executed.add(mnemonic)
    assert len(executed) > 0.85 * len(instructions)  # others need a frame or a selector that is not made at random
    cpu.close()


RESTARTING = {*emulate_string.HANDLERS, *emulate_vector.HANDLERS}


def test_every_handler_is_among_them(instructions: dict[int, list[bytes]]) -> None:
    """The random test is only as good as what it draws from."""
    names = {number: name for name, number in vars(Mnemonic).items() if isinstance(number, int)}
    assert not [names[mnemonic] for mnemonic in HANDLERS if mnemonic not in instructions]
