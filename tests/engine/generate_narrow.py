"""Random sequences of 16- and 32-bit code: as :mod:`generate`'s, with what such code has not left out.

In 32-bit code the data area is at LOW_DATA; in 16-bit code it is what DS, ES and SS hold, and offsets begin with 0.
Their limit is the area's, so an offset beyond it is #GP or #SS where 32-bit code would find no page.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Code, Code_, Instruction, Register

from tests.engine.assemble import CODE_NAMES, CODES, Imm, Mem, Operand, Reg, build
from tests.engine.forms import HOST, Form
from tests.engine.generate import CONDITIONS, STRINGS, Generator
from tests.engine.place import LAST_DATA, LOW_DATA, PAGE, SAVE, STACK
from tests.engine.sequence import Label

_M32 = 0xFFFFFFFF
_WIDE = tuple(Register.RAX + i for i in range(8))
_RAX, _RCX, _RDX, _RBX, _RSP, _RBP, _RSI, _RDI = _WIDE
_REGISTERS = {
    "R8": tuple(Register.AL + i for i in range(8)),
    "R16": tuple(Register.AX + i for i in range(8)),
    "R32": tuple(Register.EAX + i for i in range(8)),
}
_PAIRS16 = ((_RBX, _RSI), (_RBX, _RDI), (_RBP, _RSI), (_RBP, _RDI), (_RSI, 0), (_RDI, 0), (_RBP, 0), (_RBX, 0))
"""What 16-bit addresses are made of (SDM 2, table 2-1)."""
_NARROW_STRINGS = tuple(code for code in STRINGS if "M64" not in CODE_NAMES[code])


class NarrowGenerator(Generator):
    """``bits`` is 16 or 32."""

    def __init__(self, seed: str, bits: int, offered: frozenset[str] = HOST) -> None:
        self.bits = bits
        self.base = LOW_DATA if bits == 32 else 0
        """Where the data area is for the code's offsets."""
        super().__init__(seed, offered)

    def _initial(self, register: int) -> int:
        if register == _RSP:
            return self.base + STACK + PAGE + 4 * self.rng.randrange(-64, 64)
        if self.rng.random() < 0.4:
            return self.base + self._place(8, 0.6)
        return super()._initial(register) & _M32

    def _load(self, register: int, value: int) -> None:
        value &= _M32
        self._make(Code.MOV_R32_IMM32, Reg(register - _RAX + Register.EAX), Imm(value))
        self.known[register] = value

    def _free(self) -> int:
        return self.rng.choice([r for r in _WIDE if r != _RSP and r not in self.reserved])

    def _step(self) -> None:
        if self.rng.random() < 0.27 and self.theme in ("mixed", "integer"):
            snippets: tuple[tuple[Callable[[], None], int], ...] = (
                (self._branch, 20), (self._jump, 6), (self._call, 8), (self._loop, 10), (self._string, 16),
                (self._flags_on_stack, 8), (self._divide, 6), (self._exchange, 5), (self._shift, 8),
                (self._frame, 4), (self._trap, 2), (self._save, 4),
            )  # fmt: skip
            self.rng.choices([s for s, _ in snippets], [w for _, w in snippets])[0]()
        else:
            self._plain()

    def _operand(self, kind: str, form: Form) -> Operand | None:
        rng = self.rng
        family = kind.split("_")[0]
        if "MEM" in kind and (family == "MEM" or rng.random() < 0.55):
            return self._memory(form)
        if family in _REGISTERS:
            return Reg(rng.choice(_REGISTERS[family]))
        if family in ("XMM", "YMM"):
            return Reg((Register.XMM0 if family == "XMM" else Register.YMM0) + rng.randrange(8))
        return None if family == "R64" else super()._operand(kind, form)

    # Memory operands

    def _points(self, register: int) -> bool:
        value = self.known.get(register)
        return value is not None and self.base + PAGE <= value & _M32 < self.base + LAST_DATA - 256

    def _pointer(self, register: int, size: int = 8) -> None:
        if not self._points(register) or self.rng.random() < 0.5:
            self._load(register, self.base + self._place(size, 0.5))

    def _anything(self) -> Mem:
        rng = self.rng
        index = rng.choice((Register.NONE, *(r for r in _REGISTERS["R32"] if r != Register.ESP)))
        disp = rng.choice((0, rng.randrange(-128, 128), rng.getrandbits(31)))
        return Mem(rng.choice(_REGISTERS["R32"]), index, rng.choice((1, 2, 4, 8)), disp)

    def _aimed(self, offset: int) -> Mem | None:
        rng = self.rng
        address = self.base + offset
        for _ in range(8):
            if rng.random() < 0.15:
                break
            if self.bits == 16 and rng.random() < 0.6:
                base, index = rng.choice(_PAIRS16)
                if base not in self.known or (index and index not in self.known):
                    continue
                disp = address - self.known[base] - self.known.get(index, 0) & 0xFFFF
                narrow = index - _RAX + Register.AX if index else Register.NONE
                return Mem(base - _RAX + Register.AX, narrow, 1, disp - (disp >> 15 << 16))
            known = [r for r in self.known if r in _WIDE]
            if not known:
                break
            base = rng.choice(known)
            index = rng.choice(known) if rng.random() < 0.45 else 0
            if index == _RSP:
                continue
            scale = rng.choice((1, 2, 4, 8)) if index else 1
            disp = address - self.known[base] - self.known.get(index, 0) * scale & _M32
            wide = index - _RAX + Register.EAX if index else Register.NONE
            return Mem(base - _RAX + Register.EAX, wide, scale, disp - (disp >> 31 << 32))
        return Mem(disp=address)

    def _make(self, code: Code_, *operands: Operand, target: Label | None = None) -> None:
        ins = build(code, operands, self.bits)
        assert ins is not None, (code, operands)
        self._emit(ins, target)

    # Snippets

    def _branch(self) -> None:
        end = Label()
        condition = self.rng.choice(CONDITIONS)
        short = self.rng.random() < 0.4
        code = CODES[f"J{condition}_REL8_{self.bits}"] if short else self._near(f"J{condition}")
        self._emit(self._branch_to(code), end)
        before = dict(self.known)
        self._body(3)
        self._forget(before)
        self.items.append(end)

    def _near(self, name: str) -> Code_:
        """A near branch by its name: CALL, JMP, JNE."""
        return CODES[f"{name}_REL32_32" if self.bits == 32 else f"{name}_REL16"]

    def _jump(self) -> None:
        over = Label()
        self._emit(self._branch_to(self._near("JMP")), over)
        before = dict(self.known)
        self._body(2)
        self.known = before
        self.items.append(over)

    def _call(self) -> None:
        function, over = Label(), Label()
        self._emit(self._branch_to(self._near("CALL")), function)
        self._emit(self._branch_to(self._near("JMP")), over)
        self.items.append(function)
        self._body(3)
        self._make(Code.RETND if self.bits == 32 else Code.RETNW)
        self.items.append(over)

    def _loop(self) -> None:
        counter = self._free()
        top = Label()
        self._load(counter, self.rng.randint(1, 6))
        essential = [self.items[-1]]
        self.items.append(top)
        with self._reserve(counter):
            self._body(4)
        if counter == _RCX:
            self._emit(self._branch_to(CODES["LOOP_REL8_32_ECX" if self.bits == 32 else "LOOP_REL8_16_CX"]), top)
        else:
            self._make(Code.DEC_RM32, Reg(counter - _RAX + Register.EAX))
            essential.append(self.items[-1])
            self._emit(self._branch_to(self._near("JNE")), top)
        for item in essential:
            assert not isinstance(item, Label)
            item.keep = True
        self.known.pop(counter, None)

    def _string(self) -> None:
        rng = self.rng
        if {_RSI, _RDI, _RCX, _RAX} & self.reserved:
            return
        for register in (_RSI, _RDI):
            self._pointer(register, 64)
        ins = build(rng.choice(_NARROW_STRINGS), (), 32)
        assert ins is not None
        if rng.random() < 0.7:
            self._load(_RCX, rng.choice((0, 1, 2, 3, rng.randrange(64), rng.randrange(700))))
            ins.has_rep_prefix = True
            if "cmps" in str(ins) or "scas" in str(ins):
                ins.has_rep_prefix = rng.random() < 0.5
                ins.has_repne_prefix = not ins.has_rep_prefix
        if rng.random() < 0.2:
            self._make(Code.STD)
        self._emit(ins)
        if rng.random() < 0.5:
            self._make(Code.CLD)

    def _flags_on_stack(self) -> None:
        if self.rng.random() < 0.5:
            self._make(Code.PUSHFD)
            self._make(Code.POP_R32, Reg(self._free() - _RAX + Register.EAX))
        else:
            self._make(Code.PUSHFD)
            with self._reserve(_RSP):
                self._body(2)
            self._make(Code.POPFD)

    def _divide(self) -> None:
        if {_RAX, _RDX} & self.reserved:
            return
        self._make(self.rng.choice((Code.CDQ, Code.CWD)))
        ins = self._instance(self.rng.choice([f for f in self.groups["integer"] if f.name.startswith(("DIV", "IDIV"))]))
        if ins is not None:
            self._emit(ins)

    def _frame(self) -> None:
        if _RBP in self.reserved:
            return
        enter, leave = Code.ENTERD_IMM16_IMM8, Code.LEAVED
        if self.bits == 16:
            enter, leave = Code.ENTERW_IMM16_IMM8, Code.LEAVEW
        self._make(enter, Imm(4 * self.rng.randrange(16)), Imm(self.rng.choice((0, 0, 0, 1, 2, 5))))
        with self._reserve(_RBP):
            self._body(2)
        self._make(leave)

    def _trap(self) -> None:
        self._make(self.rng.choice((Code.INT3, Code.UD2, Code.HLT, Code.CLI)))

    def _save(self) -> None:
        where = Mem(disp=self.base + SAVE)
        pairs = (
            (Code.FXSAVE_M512BYTE, Code.FXRSTOR_M512BYTE), (Code.FNSAVE_M108BYTE, Code.FRSTOR_M108BYTE),
            (Code.FNSTENV_M28BYTE, Code.FLDENV_M28BYTE),
        )  # fmt: skip
        save, restore = self.rng.choice(pairs)
        self._make(save, where)
        self._body(2)
        if self.rng.random() < 0.7:
            self._make(restore, where)

    def _instance(self, form: Form) -> Instruction | None:
        if self.bits == 16 and form.name.startswith("XLAT"):  # the tables' BX is EBX here
            return None
        return super()._instance(form)
