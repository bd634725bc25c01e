"""Plain instructions: their forms and templates from their bytes (reading.py), without iced.

What the plain instructions with the same opcode, prefix and operand size have in common is their :class:`Kind`.
lower.py finds it once, from an instruction with the registers r13, r14 and r15, which no instruction implies; the forms
and templates of all others are made here, with their own registers in place. They are the very same that lower.py makes
(tests/engine/translate/test_plain.py), in a fraction of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from iced_x86 import Decoder, Instruction, Mnemonic, OpAccess, OpKind

from skep.engine.translate.asm import R10, R11, Assembler, Reg, gs
from skep.engine.translate.emitter import PLACE, SAVED_STACK
from skep.engine.translate.forms import (
    BIT_TESTS,
    GPR,
    HOLE_PLACE,
    HOLE_TARGET,
    HOMES,
    IN_STATE,
    INTEGER,
    ONLY_IN_REGISTERS,
    OR_MEMORY,
    READ,
    REVERSED,
    WRITES,
    Ends,
    Form,
    Open,
    Template,
)
from skep.engine.translate.lower import Lowering
from skep.engine.translate.reading import (
    ABSOLUTE,
    BASE,
    INDEXED,
    LOCK,
    NONE,
    OPERAND_SIZE,
    REGISTER,
    RELATIVE,
    SAME,
    SCALED,
    Read,
    read,
)

_REG: Final = 13
_RM: Final = 14
_INDEX: Final = 15
"""The registers of the instruction that a kind is found from."""
_ALIKE = {
    REGISTER: (1, 0xC0, b""), SAME: (1, 0xC0, b""),
    BASE: (1, 0x80, bytes(4)), INDEXED: (3, 0x84, b"\x3e" + bytes(4)), SCALED: (2, 0x04, b"\x3d" + bytes(4)),
    ABSOLUTE: (0, 0x04, b"\x25" + bytes(4)), RELATIVE: (0, 0x05, bytes(4)),
}  # fmt: skip
"""That instruction's operand, by where it is: REX, ModRM without registers, SIB and displacement."""
MAX_KINDS = 1 << 13


class Operand(NamedTuple):
    """A register operand."""

    reg: bool
    """ModRM.reg names it, not ModRM.rm."""
    size: int
    needed: bool
    """Its old value is not replaced as a whole."""
    written: bool
    in_state: int
    """It may stay in the state block, which ModRM.rm names then: 1, with the same opcode; 2, with the one whose
    operands are reversed."""


@dataclass(slots=True)
class Kind:
    """What plain instructions with the same opcode, prefix, operand size and kind of operand have in common."""

    form: Form
    """Of the instruction with the registers 13 to 15, which stand for those of others."""
    open_disp: bool
    open_imm: bool
    imm_size: int
    uses: int
    """Form.uses without those."""
    copied: bool
    """It is the same on the host, with its operands elsewhere."""
    lea: bool
    size: int
    """Of the operand in memory."""
    access: int
    operands: tuple[Operand, ...]
    """In their order."""
    prefix: bytes
    """But for segments."""
    opcode: bytes


@dataclass(slots=True, kw_only=True)
class PlainForm(Form):
    """The form of a plain instruction: all that share it say the same but for constants."""

    read: Read
    kind: Kind


class Address(NamedTuple):
    """Host code: r10 = the linear address of an operand."""

    code: bytes
    disp: int
    """Where an open displacement stands."""
    hole: int
    """Where the target relative to RIP stands, or -1."""
    on_stack: int
    """Emitter.on_stack"""


def _moves(to_state: bool) -> dict[tuple[int, int], bytes]:
    """Host code that moves r10 or r11 to or from a guest register in the state block, by both."""
    found = {}
    for host in (R10, R11):
        for number in IN_STATE:
            a = Assembler()
            if to_state:
                a.mov(gs(number * 8), Reg(host))
            else:
                a.mov(host, gs(number * 8))
            found[int(host), number] = a.code(0)
    return found


_LOAD = _moves(False)
_STORE = _moves(True)
_PLACE = PLACE.to_bytes(4, "little")


class Kinds:
    """What was found of plain instructions. It is the same in all modes of 64-bit code."""

    def __init__(self) -> None:
        self.kinds: dict[int, Kind | None] = {}
        """By Read.kind; None: there is something special about it."""
        self.addresses: dict[int, Address] = {}
        """By Read.address, of which there are some ten thousand."""
        self.opens: dict[tuple[int, int, int, int], Open] = {}


class Plain(Lowering):
    """Makes the forms and templates of one mode of 64-bit code that does not check alignment."""

    def __init__(self, mode: int, kinds: Kinds) -> None:
        super().__init__(mode)
        self._kinds = kinds.kinds
        self._addresses = kinds.addresses
        self._opens = kinds.opens

    def plain(self, data: bytes) -> tuple[Read, Kind, Open, int] | None:
        """What the instruction says that 15 bytes begin with, which of its constants templates leave open, and its
        length; None: it is not plain, or not one."""
        known = read(data)
        if known is None:
            return None
        try:
            kind = self._kinds[known.kind]
        except KeyError:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            kind = self._kinds[known.kind] = self._find(known, data)
        if kind is None:
            return None
        disp = disp_size = 0
        if known.disp_size and kind.open_disp:
            disp, disp_size = known.disp, known.disp_size
        length = known.imm + kind.imm_size
        imm = imm_size = 0
        if kind.open_imm:
            imm, imm_size = known.imm, kind.imm_size
        name = (disp, disp_size, imm, imm_size)
        open_ = self._opens.get(name)
        if open_ is None:
            open_ = self._opens[name] = Open(*name)
        return known, kind, open_, length

    def _find(self, known: Read, data: bytes) -> Kind | None:
        """The kind of an instruction, from one with other registers."""
        rex, modrm, operand = _ALIKE[known.where]
        rex |= 0x40 | known.wide
        if known.reg == NONE:
            modrm |= known.digit << 3
        else:
            rex |= 4
            modrm |= (_REG & 7) << 3
        if known.where in (REGISTER, BASE):
            modrm |= _RM & 7
        elif known.where == SAME:
            modrm |= _REG & 7
        prefix = bytes((known.prefix,)) if known.prefix else b""
        opcode = bytes((known.opcode,)) if known.opcode < 0x100 else bytes((0x0F, known.opcode & 0xFF))
        alike = prefix + bytes((rex,)) + opcode + bytes((modrm,)) + operand
        imm = len(alike)
        alike += data[known.imm :]
        decoder = Decoder(64, alike)
        ins = decoder.decode()
        m = ins.mnemonic
        if m not in INTEGER:
            return None
        open_ = self.opens(ins, decoder.get_constant_offsets(ins))
        form = self.form(ins, known.where == RELATIVE, open_)
        if form.emulate or form.ends:
            return None
        memory = self.memory_operand(ins)
        copied = m == Mnemonic.MOV or m not in self._handlers
        if m in BIT_TESTS:
            copied = not memory
        info = self.info.info(ins)
        return Kind(
            form,
            open_.disp_size > 0,
            open_.imm_size > 0,
            ins.len - imm,
            form.uses & ~(1 << _REG | 1 << _RM | 1 << _INDEX),
            copied,
            m == Mnemonic.LEA,
            self.size(ins) if memory else 0,
            self._access(info) if memory else READ,
            self._operands(ins),
            prefix if known.prefix in (OPERAND_SIZE, LOCK) else b"",
            opcode,
        )

    def _operands(self, ins: Instruction) -> tuple[Operand, ...]:
        """The register operands that ModRM names, as reencode and _in_state see them."""
        info = self.info.info(ins)
        found = []
        for i in range(ins.op_count):
            if ins.op_kind(i) != OpKind.REGISTER or ins.op_register(i) not in GPR:
                continue
            number, size = GPR[ins.op_register(i)]
            if number not in (_REG, _RM):
                continue
            access = info.op_access(i)
            in_state = 0
            if ins.mnemonic not in ONLY_IN_REGISTERS and (access == OpAccess.READ or (access in WRITES and size == 8)):
                if ins.op_code().op_kind(i) in OR_MEMORY:
                    in_state = 1
                elif ins.code in REVERSED and i == 1:
                    in_state = 2
            needed = access != OpAccess.WRITE or size < 4
            found.append(Operand(number == _REG, size, needed, access in WRITES, in_state))
        return tuple(found)

    def plain_form(self, known: Read, kind: Kind, open_: Open, length: int) -> PlainForm:
        """The form of an instruction of ``length`` bytes."""
        like = kind.form
        names = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, known.reg, known.rm, known.scaled)
        form = PlainForm(like.keeps, like.reads, Ends.NO, 0, like.relative, read=known, kind=kind)
        form.memory = like.memory
        form.open = open_
        form.uses = kind.uses | (1 << known.reg | 1 << known.rm | 1 << known.scaled) & 0xFFFF
        if like.relative:
            form.wrap = 1 << 63
            form.behind = length - known.imm
        if like.reach is not None:
            _, disp, size, written, _, _ = like.reach
            form.reach = (known.rm, disp, size, written, open_.disp, open_.disp_size)
        elif like.table is not None and HOMES[known.scaled] is not None:
            _, _, _, size, disp, _, _ = like.table
            form.table = (known.rm, known.scaled, 1 << known.scale, size, disp, open_.disp, open_.disp_size)
        if like.step is not None:
            to, source, add, sign, _, n = like.step
            where, n = (0, 0) if not n else (open_.disp, open_.disp_size) if kind.lea else (open_.imm, open_.imm_size)
            form.step = (names[to], names[source], add, sign, where, n)
        if like.byte is not None:
            form.byte = names[like.byte]
        if like.spoils:
            form.spoils = tuple({names[n] for n in like.spoils})
        return form

    def plain_template(self, form: PlainForm, data: bytes, live: bool) -> Template | None:
        """As template; None: lower.py has to make it."""
        known, kind, open_ = form.read, form.kind, form.open
        if kind.lea:
            return self._load_address(known, kind, data, open_)
        if not kind.copied:
            return None
        if known.where in (REGISTER, SAME):
            return self._in_registers(known, kind, data, open_)
        address = self._addresses.get(known.address)
        if address is None:
            address = self._addresses[known.address] = self._address(data, open_)
        start, disp, hole, stack = address
        name = (kind.size, kind.access != READ, live, stack > 0)
        check = self._checks.get(name)
        if check is None:
            check = self._checks[name] = self._check_code(*name)
        code = start + check[0]
        descriptor = self.array << 24 | kind.access << 22 | kind.size << 12
        checks = ((len(start) + check[1], len(code), descriptor, live | SAVED_STACK[stack]),)
        instruction, store = self._at_r10(known, kind, 0, b"", data[known.imm :])
        code += instruction
        copies: tuple[tuple[int, int, int], ...] = ()
        if open_.disp_size:
            copies = ((disp, open_.disp, open_.disp_size),)
        if open_.imm_size:
            copies += ((len(code) - open_.imm_size, open_.imm, open_.imm_size),)
        holes = () if hole < 0 else ((hole, HOLE_TARGET, 0),)
        return Template(code + store, checks, holes, copies, True)

    def plain_placed(self, form: PlainForm, data: bytes) -> Template:
        """As placed."""
        known, kind, open_ = form.read, form.kind, form.open
        imm = data[known.imm :]
        code, store = self._at_r10(known, kind, 0x80, _PLACE, imm)
        copies = ((len(code) - open_.imm_size, open_.imm, open_.imm_size),) if open_.imm_size else ()
        hole = len(code) - len(imm) - 4
        return Template(code + store, (), ((hole, HOLE_PLACE, 0),), copies, True, True)

    @staticmethod
    def _at_r10(known: Read, kind: Kind, mod: int, disp: bytes, imm: bytes) -> tuple[bytes, bytes]:
        """The instruction with its operand at r10, or if ``mod`` is not 0, at a displacement or in a table there; and
        what stores the register that it has written."""
        rex = 0x41 | known.wide
        before = after = b""
        reg = known.digit
        if known.reg != NONE:
            home = HOMES[known.reg]
            if home is None:
                home = 11
                if kind.operands[0].needed:
                    before = _LOAD[11, known.reg]
                if kind.operands[0].written:
                    after = _STORE[11, known.reg]
            rex |= home >> 3 << 2
            reg = home & 7
        modrm = mod | reg << 3 | 2
        if mod and known.scaled != NONE:
            index = HOMES[known.scaled]
            assert index is not None  # or it would not be a table
            rex |= index >> 3 << 1
            modrm = mod | reg << 3 | 4
            disp = bytes((known.scale << 6 | (index & 7) << 3 | 2,)) + disp
        return before + kind.prefix + bytes((rex,)) + kind.opcode + bytes((modrm,)) + disp + imm, after

    def _address(self, data: bytes, open_: Open) -> Address:
        """What makes an operand's address, from one instruction that has such an operand."""
        self.begin(data, False, None, open_)
        self.address(Decoder(64, data).decode())
        disp = self.copies[0][0] if self.copies else 0
        hole = self.holes[0][0] if self.holes else -1
        return Address(self.a.code(0), disp, hole, self.on_stack)

    def _load_address(self, known: Read, kind: Kind, data: bytes, open_: Open) -> Template | None:
        """LEA of a base, an index or both."""
        size = kind.operands[0].size
        if known.where not in (BASE, INDEXED, SCALED) or size == 2:
            return None
        for number in (known.reg, known.rm, known.scaled):
            if number != NONE and HOMES[number] != number:
                break
        else:
            copies = ((open_.disp, open_.disp, open_.disp_size),) if open_.disp_size else ()
            return Template(data, (), (), copies, bool(copies), True)
        self.begin(data, False, None, open_)
        base = None if known.rm == NONE else known.rm
        index = None if known.scaled == NONE else known.scaled
        self.lea(known.reg, size, base, index, 1 << known.scale, 0)
        return self.finish()

    def _in_registers(self, known: Read, kind: Kind, data: bytes, open_: Open) -> Template | None:
        """An instruction without memory operand."""
        reg, rm = known.reg, known.rm
        if HOMES[rm] == rm and (reg == NONE or HOMES[reg] == reg):
            copies = ((open_.imm, open_.imm, open_.imm_size),) if open_.imm_size else ()
            return Template(data, (), (), copies, bool(copies), True)
        if known.where == SAME:
            return None
        return self._moved_registers(known, kind, data[known.imm :], open_)

    @staticmethod
    def _moved_registers(known: Read, kind: Kind, imm: bytes, open_: Open) -> Template:
        """As Emitter.reencode: the first operand that can stays in the state block."""
        inside: Operand | None = None
        place = b""
        for operand in kind.operands:
            number = known.reg if operand.reg else known.rm
            if operand.in_state and HOMES[number] is None:
                inside = operand
                place = (number * 8).to_bytes(4, "little")
                break
        reg, rm = known.digit, 0
        rex = known.wide
        free = [10, 11]
        before = after = b""
        for operand in kind.operands:
            if operand is inside:
                continue
            number = known.reg if operand.reg else known.rm
            home = HOMES[number]
            if home is None:
                home = free.pop()
                if operand.needed:
                    before += _LOAD[home, number]
                if operand.written:
                    after += _STORE[home, number]
            elif operand.size == 1 and 4 <= home < 8:
                rex |= 0x40  # or it would be AH to DH
            if operand.reg:
                reg = home
            else:
                rm = home
        opcode = kind.opcode
        if inside is None:
            rex |= rm >> 3
            place = bytes((0xC0 | (reg & 7) << 3 | rm & 7,))
        else:
            before += b"\x65"
            if inside.in_state == 2:
                reg = rm
                opcode = opcode[:-1] + bytes((opcode[-1] ^ 2,))
            place = bytes(((reg & 7) << 3 | 4, 0x25)) + place
        rex |= reg >> 3 << 2
        code = before + kind.prefix + (bytes((0x40 | rex,)) if rex else b"") + opcode + place + imm
        copies = ((len(code) - open_.imm_size, open_.imm, open_.imm_size),) if open_.imm_size else ()
        return Template(code + after, (), (), copies, bool(copies), len(free) > 0)
