"""The bench itself: a judge that cannot find anything is worth nothing."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections import Counter

import pytest
from iced_x86 import Code, Decoder

from tests.engine.assemble import AssemblyError, assemble, op_kinds
from tests.engine.compare import Mismatch, differences, minimize, run_sequences, stored_nothing
from tests.engine.forms import BASELINE, HOST, features, forms
from tests.engine.generate import Generator, data_image
from tests.engine.oracle import Oracle, OracleError
from tests.engine.place import (
    CODE,
    DATA,
    DATA_SIZE,
    FIRST_DATA,
    GPRS,
    LOW_DATA,
    PAGE,
    READ_ONLY,
    SAVE,
    STACK,
    XSAVE_SIZE,
    Batch,
    Case,
    Outcome,
    comparable_fpu,
)
from tests.engine.sequence import Item, flag_use


def xsave() -> bytes:
    image = bytearray(XSAVE_SIZE)
    struct.pack_into("<H", image, 0, 0x37F)
    struct.pack_into("<I", image, 24, 0x1F80)
    struct.pack_into("<Q", image, 512, 7)
    return bytes(image)


def case(text: str, **registers: int) -> Case:
    start = {"rsp": DATA + STACK + PAGE, "rbx": DATA + FIRST_DATA, "rsi": LOW_DATA + FIRST_DATA, **registers}
    values = tuple(start.get(name, 0x1111 * i) for i, name in enumerate(GPRS))
    fs, gs = DATA + FIRST_DATA + 0x100, DATA + FIRST_DATA + 0x200
    return Case(CODE, assemble(text + "\nud2", CODE).code, values, 0x202, fs, gs, xsave())


def outcome(host: Oracle, text: str, data: bytes = bytes(DATA_SIZE), **registers: int) -> Outcome:
    return host.run(Batch(data, (case(text, **registers),)))[0]


class TestAssembler:
    @pytest.mark.parametrize(
        ("text", "machine"),
        [
            ("mov rax, [rip + 0x1010]", "488b0509000000"),
            ("lock add qword [rbx + rcx*8 + 16], 1", "f04883 44cb10 01"),
            ("mov rax, -1", "48c7c0ffffffff"),
            ("mov eax, 5", "b805000000"),
            ("push 0x1234", "6834120000"),
            ("mov ah, [rcx]", "8a21"),
            ("rep stosb", "f3aa"),
            ("movsd", "a5"),
            ("movsd xmm1, xmm2", "f20f10ca"),
            ("mov eax, [eax + 4]", "678b4004"),
            ("mov byte fs:[0x10], 5", "64c604251000000005"),
            ("vgatherdps xmm1, [rax + xmm2*4], xmm3", "c4e261920c90"),
            ("shl rax, cl", "48d3e0"),
            ("jmp short 0x1000", "ebfe"),
            ("jmp 0x1000", "e9fbffffff"),
            ("ADD_R64_RM64 rax, rcx", "4803c1"),
            ("xor al, al\nloop 0x1000", "30c0e2fc"),
        ],
    )
    def test_lines(self, text: str, machine: str) -> None:
        assert assemble(text, 0x1000).code == bytes.fromhex(machine)

    def test_labels_and_data(self) -> None:
        program = assemble("jmp over\ntable: dq table, over, 7\ndb 1, 2\nalign 8\nover: ret", 0x1000)
        assert program.labels == {"table": 0x1005, "over": 0x1020}
        assert program.code[5:29] == struct.pack("<3Q", 0x1005, 0x1020, 7)
        assert program.code[0x20:] == b"\xc3"

    def test_32_bit_code(self) -> None:
        program = assemble("start: jmp far 0x33:start\npush eax\npushad", 0x1000, bits=32)
        assert program.code == bytes.fromhex("ea 00100000 3300 50 60")

    @pytest.mark.parametrize(
        "text", ["bogus rax", "mov rax, nowhere", "inc [rax]", "mov rax, word [rcx]", "shl rax, dl"]
    )
    def test_nonsense_is_refused(self, text: str) -> None:
        with pytest.raises(AssemblyError, match="line 1"):
            assemble(text, 0x1000)


class TestOracle:
    """What the host CPU is seen to do agrees with the manual, fault for fault."""

    def test_registers_memory_flags(self, host: Oracle) -> None:
        text = "mov rax, -1\nadd rax, 2\nmov [rbx + 8], rax\nmov rcx, fs:[0]\nmov gs:[0], r9\npush r10\n"
        text += "mov [esi + 16], r11d"
        data = bytearray(DATA_SIZE)
        struct.pack_into("<Q", data, FIRST_DATA + 0x100, 0x1234567890)
        seen = outcome(host, text, bytes(data))
        values = dict(zip(GPRS, seen.registers, strict=True))
        assert (seen.vector, values["rax"], values["rcx"]) == (6, 1, 0x1234567890)
        assert values["rsp"] == DATA + STACK + PAGE - 8
        assert seen.rflags & 0x8D5 == 0x11  # CF, AF
        assert seen.rip == CODE + len(case(text).code) - 2
        assert struct.unpack_from("<QQ", seen.pages[1], 8) == (1, 0xBBBB)
        assert struct.unpack_from("<Q", seen.pages[1], 0x200) == (0x9999,)
        assert struct.unpack_from("<Q", seen.pages[7], PAGE - 8) == (0xAAAA,)
        assert set(seen.pages) == {1, 7}

    @pytest.mark.parametrize(
        ("text", "vector", "error", "cr2"),
        [
            ("xor ecx, ecx\ndiv ecx", 0, 0, 0),
            ("int3", 3, 0, 0),
            ("mov rax, [rbx - 8]", 14, 4, DATA + FIRST_DATA - 8),
            (f"mov [rbx + {READ_ONLY - FIRST_DATA - 4}], rax", 14, 7, DATA + READ_ONLY),
            ("jmp rbx", 14, 0x15, DATA + FIRST_DATA),
            ("mov rax, 0x8000000000000000\nmov [rax], al", 13, 0, 0),
            ("movaps xmm0, [rbx + 8]", 13, 0, 0),
            ("hlt", 13, 0, 0),
            ("int 0x21", 13, 0x10A, 0),
            ("mov rsp, 0x8000000000000000\npush rax", 12, 0, 0),
            ("fldcw [rip + cw]\nfldz\nfld1\nfdiv st0, st1\nwait\nud2\ncw: dw 0x37b", 16, 0, 0),
            ("ldmxcsr [rip + mx]\nxorps xmm0, xmm0\ndivss xmm0, xmm0\nud2\nmx: dd 0x1f00", 19, 0, 0),
        ],
    )
    def test_faults(self, host: Oracle, text: str, vector: int, error: int, cr2: int) -> None:
        seen = outcome(host, text)
        assert (seen.vector, seen.error, seen.cr2) == (vector, error, cr2)

    def test_vector_state(self, host: Oracle) -> None:
        seen = outcome(host, "fld1\nmovq xmm3, rbx\nvpcmpeqd ymm5, ymm5, ymm5\nldmxcsr [rip + mx]\nud2\nmx: dd 0x3f80")
        fpu = seen.fpu
        assert struct.unpack_from("<HHBI", fpu) == (0x37F, 7 << 11, 0x80, 0x3F80)
        assert fpu[9:19] == struct.pack("<QH", 1 << 63, 0x3FFF)
        assert struct.unpack_from("<QQ", fpu, 89 + 3 * 16) == (DATA + FIRST_DATA, 0)
        assert fpu[345 + 5 * 16 : 345 + 6 * 16] == b"\xff" * 16

    def test_nothing_is_left_over(self, host: Oracle) -> None:
        """A case's AC, NT, DF, FS and FPU state do not reach the next, nor the worker."""
        wild = "push 0x44602\npopfq\nfninit\nmov ax, [rbx + 1]"
        cases = (case(wild), dataclasses.replace(case("nop"), address=CODE + 0x100))
        for _ in range(3):
            quiet = host.run(Batch(bytes(DATA_SIZE), cases))[1]
            assert quiet == host.run(Batch(bytes(DATA_SIZE), cases[1:]))[0]

    def test_a_hang_is_an_error(self) -> None:
        with Oracle(timeout=0.5) as impatient:
            with pytest.raises(OracleError, match="did not finish"):
                outcome(impatient, "again: jmp again")
            impatient.timeout = 30  # a new worker, on a busy machine
            assert outcome(impatient, "nop").vector == 6

    def test_initial_components_are_written_out(self) -> None:
        image = bytearray(b"\xaa" * XSAVE_SIZE)
        struct.pack_into("<Q", image, 512, 0)
        struct.pack_into("<I", image, 24, 0x1F80)
        assert comparable_fpu(bytes(image)) == comparable_fpu(xsave())


class TestGenerator:
    def test_same_seed_same_sequences(self) -> None:
        one, two = (Generator("x") for _ in range(2))
        assert [one.sequence().case(CODE) for _ in range(20)] == [two.sequence().case(CODE) for _ in range(20)]
        assert Generator("x").sequence().case(CODE) != Generator("y").sequence().case(CODE)

    def test_the_host_agrees_with_itself(self, host: Oracle) -> None:
        """Nothing in a sequence depends on time or chance; without that, a difference might be the judge's."""
        assert not list(run_sequences(Generator("itself"), 1000, host, host))

    def test_most_sequences_come_to_their_end(self, host: Oracle) -> None:
        generator = Generator("ends")
        sequences = [generator.sequence() for _ in range(400)]
        vectors: Counter[str] = Counter()
        for s in sequences:
            seen = host.run(Batch(data_image(random.Random(1)), (s.case(CODE),)))[0]
            vectors["end" if seen.rip == max(s.comparable_flags(CODE)) else str(seen.vector)] += 1
        assert vectors["end"] > 250
        assert vectors["14"] > 20 and vectors["13"] > 5

    def test_exceptions_are_in_the_mix(self, host: Oracle) -> None:
        """Of each million cases, tens of thousands end by #PF on one half of an operand on two pages, by #AC, by #DE;
        thousands by #MF and #XM."""
        ends = Recording(host)
        for _ in run_sequences(Generator("exceptions"), 2000, ends, ends):
            pass
        vectors = Counter(seen.vector for seen in ends.seen)
        assert all(vectors[vector] >= 3 for vector in (0, 3, 12, 13, 16, 17, 19)), vectors
        faults = [seen.cr2 for seen in ends.seen if seen.vector == 14]
        halves = [cr2 for cr2 in faults if cr2 in (DATA + READ_ONLY, LOW_DATA + READ_ONLY, DATA + READ_ONLY + PAGE)]
        assert len(halves) > 20  # an operand that began below
        assert sum(DATA + FIRST_DATA - 16 < cr2 < DATA + FIRST_DATA for cr2 in faults) > 5  # and one that ends above

    def test_every_form_can_be_drawn(self) -> None:
        """The tables hold no form that the generator never manages to give operands."""
        generator = Generator("forms")
        generator._sequence("forms")
        missing = []
        for members in forms(HOST).values():
            for form in members:
                generator.known = {}
                generator.reserved = set()
                generator._load(53 + 3, DATA + FIRST_DATA + 0x400)  # RBX, for XLAT
                if not any(generator._instance(form) for _ in range(300)):
                    missing.append(form.name)
        assert missing == []

    def test_baseline_leaves_out_what_it_must(self) -> None:
        generator = Generator("small", BASELINE)
        for _ in range(100):
            for item in generator.sequence().items:
                if isinstance(item, Item) and item.instruction is not None:
                    need = features(item.instruction.code)
                    assert not need & {"AVX", "AVX2", "BMI1", "BMI2", "FMA", "AES", "MOVBE"}, item.instruction

    def test_undefined_flags_are_not_read(self) -> None:
        generator = Generator("taint")
        assert all(generator.sequence().tainted_reader() is None for _ in range(200))


class TestFlags:
    @pytest.mark.parametrize(
        ("text", "written", "undefined"),
        [
            ("add rax, rcx", 0x8D5, 0),
            ("mul rcx", 0x801, 0xD4),
            ("shl rax, cl", 0, 0x810),
            ("shl rax, 3", 0xC5, 0x810),
            ("shl rax, 1", 0x8C5, 0x10),
            ("shl al, 9", 0xC4, 0x811),
            ("shl rax, 0", 0, 0),
            ("rcl rax, cl", 0, 0x800),
            ("repe cmpsb", 0, 0),
            ("cmpsb", 0x8D5, 0),
            ("bt rax, rcx", 1, 0x894),
            ("inc rax", 0x8D4, 0),
            ("mov rax, rcx", 0, 0),
        ],
    )
    def test_flag_use(self, text: str, written: int, undefined: int) -> None:
        use = flag_use(next(iter(Decoder(64, assemble(text, 0).code))))
        assert (use.written, use.undefined) == (written, undefined)


class Recording:
    """The host's CPU; what came of all cases."""

    def __init__(self, host: Oracle) -> None:
        self.host = host
        self.seen: list[Outcome] = []

    def run(self, batch: Batch) -> list[Outcome]:
        outcomes = self.host.run(batch)
        self.seen += outcomes
        return outcomes


class Liar:
    """A CPU that gets one thing wrong: ADC forgets the carry."""

    def __init__(self, host: Oracle) -> None:
        self.host = host

    def run(self, batch: Batch) -> list[Outcome]:
        return self.host.run(Batch(batch.data, tuple(map(self._lie, batch.cases))))

    @staticmethod
    def _lie(case: Case) -> Case:
        code = bytearray(case.code)
        for instruction in Decoder(64, case.code):
            at = instruction.ip
            if instruction.code in (Code.ADC_R64_RM64, Code.ADC_R32_RM32, Code.ADC_RM64_R64, Code.ADC_RM32_R32):
                opcode = code.index(bytes([0x13 if op_kinds(instruction.code)[0].endswith("REG") else 0x11]), at)
                code[opcode] -= 0x10  # ADD
        return dataclasses.replace(case, code=bytes(code))


class TestJudge:
    def test_a_wrong_cpu_is_found_and_the_case_made_small(self, host: Oracle) -> None:
        liar = Liar(host)
        found = list(run_sequences(Generator("liar"), 1500, host, liar))
        assert found
        smallest: list[Mismatch] = [minimize(m, host, liar) for m in found]
        assert min(len(m.sequence.items) for m in smallest) <= 2
        assert any("adc" in str(m) for m in smallest)

    def test_each_kind_of_difference_is_told(self, host: Oracle) -> None:
        seen = outcome(host, "mov [rbx], r9")
        other = dataclasses.replace(
            seen, registers=(99, *seen.registers[1:]), rflags=seen.rflags ^ 1, rip=1, vector=14, cr2=5,
            fpu=seen.fpu[:100] + b"\xee" + seen.fpu[101:], pages={1: b"\x01" + seen.pages[1][1:], 2: bytes(PAGE)},
        )  # fmt: skip
        told = "\n".join(differences(seen, other, 0x8D5))
        for word in (
            "rax is 0x63",
            "rflags",
            "rip is 0x1",
            "vector is 0xe",
            "cr2",
            "xmm0 differs",
            "memory at 0x200001001000",
        ):
            assert word in told
        assert "page 0x200001002000 changed in the guest only" in told
        assert not differences(seen, dataclasses.replace(seen, rflags=seen.rflags ^ 0x801), 0x8D5 & ~0x801)

    @pytest.mark.parametrize("after", ["", "FNSAVE_M108BYTE [rcx]\nfninit"])
    def test_a_store_whose_own_exception_comes_first(self, host: Oracle, after: str) -> None:
        """The host goes on behind an x87 store to a read-only page, and may have saved and cleared the status."""
        text = f"mov word [rcx + 64], 0x37e\nfldcw [rcx + 64]\nFBSTP_M80BCD [rdx]\n{after}"
        seen = outcome(host, text, rcx=DATA + SAVE, rdx=DATA + READ_ONLY)  # an empty register
        fault = dataclasses.replace(seen, vector=14, fpu=comparable_fpu(xsave()), pages={})
        assert seen.vector == 6
        assert stored_nothing("FBSTP_M80BCD", seen, fault)
        assert not stored_nothing("MOV_RM64_R64", seen, fault)
        assert not stored_nothing("FBSTP_M80BCD", outcome(host, "mov word [rcx], 1", rcx=DATA + SAVE), fault)
