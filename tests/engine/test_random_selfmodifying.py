"""Random sequences that change their own code, against the host's CPU (SDM 3, 8.1.3: one linear address for both)."""

from __future__ import annotations

import secrets

import pytest
from iced_x86 import Code, Code_, Register

from tests.engine.assemble import Imm, Mem, Operand, Reg
from tests.engine.compare import minimize, run_sequences
from tests.engine.engines import translate
from tests.engine.generate import Generator
from tests.engine.guestcpu import GuestCpu
from tests.engine.oracle import Oracle
from tests.engine.place import CODE
from tests.engine.sequence import Item, Label, RandomSequence

_LOW = (0, 1, 2, 3, 5, 6, 7)
"""Numbers of the registers that no REX prefix is needed for, RSP left out."""


class Modifying(Generator):
    """Among other instructions: eight bytes, at first ``mov r32, imm32; nop [rax]``, that are stored to before they
    run and after that, once or each time around a loop."""

    def _sequence(self, seed: str) -> RandomSequence:
        made = super()._sequence(seed)
        made.writable = True
        return made

    def _step(self) -> None:
        self.theme = "integer"
        rng = self.rng
        free = [n for n in _LOW if Register.RAX + n not in self.reserved]
        if rng.random() < 0.5 or len(free) < 2:
            self._plain()
            return
        target, value = rng.sample(free, 2)
        rng.choice((self._once, self._once, self._opcode, self._each_time))(target, Register.RAX + value)

    def _once(self, target: int, value: int) -> None:
        """All eight bytes become something else, that leaves flags alone as well: those that the old code would have
        overwritten are not kept for the new (docs/translator.md, the life of a store)."""
        rng = self.rng
        number = rng.getrandbits(32).to_bytes(4, "little")
        moved = bytes([0xB8 + target]) + number
        new = rng.choice((
            moved + b"\x0f\x1f\x00", b"\x66\x90" + moved + b"\x90", moved + b"\xeb\x01\xcc",
            b"\xeb\x06" + moved + b"\xcc", b"\x90" * 8,
            b"\x48\x8d" + bytes([0x80 | target << 3 | target]) + number + b"\x90",
            b"\x0f\x1f\x84\x00" + number, *((moved + b"\x0f\x0b\x90",) if rng.random() < 0.3 else ()),
        ))  # fmt: skip
        place = Label()
        self._load(value, int.from_bytes(new, "little"))
        with self._reserve(value):
            self._body(2)
            self._store(Code.MOV_RM64_R64, place, Reg(value))
            self._body(2)
        self._stored_to(place, target)

    def _opcode(self, target: int, value: int) -> None:
        """Another register is loaded."""
        place, other = Label(), value - Register.RAX
        self._store(Code.MOV_RM8_IMM8, place, Imm(0xB8 + other))
        self._body(2)
        self._stored_to(place, target)
        self.known.pop(value, None)

    def _each_time(self, target: int, value: int) -> None:
        """The constant is another one each time around."""
        rng = self.rng
        counter = Register.R8 + rng.randrange(8)
        if counter in self.reserved:
            return
        place, top = Label(), Label()
        new = bytes([0xB8 + target]) + rng.getrandbits(24).to_bytes(4, "little") + b"\x0f\x1f\x00"
        self._load(value, int.from_bytes(new, "little"))
        self._load(counter, rng.randint(1, 6))
        essential = [self.items[-2], self.items[-1]]
        self.items.append(top)
        self.known.clear()
        before = rng.random() < 0.5
        with self._reserve(value, counter):
            if before:
                self._store(Code.MOV_RM64_R64, place, Reg(value))
                self._body(2)
            self._stored_to(place, target)
            self._body(2)
            if not before:
                self._store(Code.MOV_RM64_R64, place, Reg(value))
            self._make(Code.LEA_R64_M, Reg(value), Mem(value, disp=rng.randrange(1, 1 << 16) << 8))
            self._make(Code.DEC_RM64, Reg(counter))
            essential += self.items[-2:]
        self._emit(self._branch_to(Code.JNE_REL32_64), top)
        for item in essential:
            assert isinstance(item, Item)
            item.keep = True
        self.known.clear()

    def _store(self, code: Code_, place: Label, what: Operand) -> None:
        self._make(code, Mem(Register.RIP, disp=CODE), what, target=place)

    def _stored_to(self, place: Label, target: int) -> None:
        self.items.append(place)
        for code, operands in (
            (Code.MOV_R32_IMM32, (Reg(Register.EAX + target), Imm(self.rng.getrandbits(31)))),
            (Code.NOP_RM32, (Mem(Register.RAX),)),
        ):
            self._make(code, *operands)
            item = self.items[-1]
            assert isinstance(item, Item)
            item.keep, item.prefix = True, b""


def check(host: Oracle, seed: str, count: int) -> None:
    generator = Modifying(seed)
    generator.alignment = 0
    with GuestCpu(translate(), writable=True) as guest:
        failed = list(run_sequences(generator, count, host, guest))
        shown = "\n\n".join(str(minimize(mismatch, host, guest)) for mismatch in failed[:3])
    assert not failed, f"{len(failed)} of {count} sequences differ from the host CPU:\n\n{shown}"


def test_random(host: Oracle) -> None:
    check(host, "selfmodifying", 1000)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many(host: Oracle, part: int) -> None:
    check(host, f"selfmodifying{part}-{secrets.token_hex(4)}", 10_000)
