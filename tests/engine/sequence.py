"""A random instruction sequence as data: laying it out, and knowing which flags may be compared where."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from iced_x86 import Decoder, FastFormatter, FlowControl, Instruction, Mnemonic, RflagsBits

from tests.engine.assemble import CODE_NAMES, encode
from tests.engine.place import ARITHMETIC, DF, GPRS, Case


class Label:
    """A place in a sequence."""

    __slots__ = ()


@dataclass(slots=True)
class Item:
    """One instruction, or the address of a label as eight bytes of data."""

    instruction: Instruction | None = None
    target: Label | None = None
    """Where a branch goes, what a RIP-relative LEA addresses, or the address that is the data."""
    prefix: bytes = b""
    """Redundant prefixes, to be put in front."""
    keep: bool = False
    """Without it the sequence might not end."""

    @property
    def is_branch(self) -> bool:
        return self.instruction is not None and self.instruction.flow_control in _BRANCHING

    def encode(self, ip: int, target: int | None, bits: int = 64) -> bytes:
        if self.instruction is None:
            return (target or 0).to_bytes(8, "little")
        if self.target is not None:
            if self.is_branch:
                self.instruction.near_branch64 = ip if target is None else target
            else:
                self.instruction.memory_displacement = ip if target is None else target
        return self.prefix + encode(self.instruction, ip + len(self.prefix), bits)


_BRANCHING = (FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CALL)
_FLAG_BITS = {
    RflagsBits.CF: 0x1, RflagsBits.PF: 0x4, RflagsBits.AF: 0x10, RflagsBits.ZF: 0x40, RflagsBits.SF: 0x80,
    RflagsBits.DF: 0x400, RflagsBits.OF: 0x800,
}  # fmt: skip
ALL_FLAGS = ARITHMETIC | DF
UD2 = b"\x0f\x0b"


@functools.cache
def rflags(bits: int) -> int:
    """iced's flag bits as RFLAGS has them."""
    return sum(flag for bit, flag in _FLAG_BITS.items() if bits & bit)


@dataclass(frozen=True, slots=True)
class FlagUse:
    read: int
    written: int
    """Always given a defined value."""
    undefined: int
    """Perhaps left undefined."""


def flag_use(instruction: Instruction) -> FlagUse:
    """What an instruction does with the flags; stricter than iced where the manual is.

    A shift or rotate by CL, and a repeated compare, keep all flags when the count is zero: what they write they
    perhaps do not. CF is undefined after SHL and SHR of 8 or 16 bits by as much or more; everything is after SHLD and
    SHRD of 16 bits (SDM 2, SAL/SAR/SHL/SHR and SHLD).
    """
    read, undefined = rflags(instruction.rflags_read), rflags(instruction.rflags_undefined)
    written = rflags(instruction.rflags_written | instruction.rflags_cleared | instruction.rflags_set) & ~undefined
    name = CODE_NAMES[instruction.code]
    operation = name.split("_")[0]
    if operation in ("SHL", "SHR", "SAL") and ("RM8" in name or "RM16" in name) and not name.endswith("_1"):
        undefined |= 0x1 if instruction.rflags_modified else 0
    elif operation in ("SHLD", "SHRD") and "RM16" in name:
        undefined |= ARITHMETIC if instruction.rflags_modified else 0
    if name.endswith("_CL") or (
        instruction.mnemonic in _COMPARES and (instruction.has_rep_prefix or instruction.has_repne_prefix)
    ):
        written = 0
    return FlagUse(read, written & ~undefined, undefined)


_COMPARES = {
    getattr(Mnemonic, name) for name in ("CMPSB", "CMPSW", "CMPSD", "CMPSQ", "SCASB", "SCASW", "SCASD", "SCASQ")
}


@dataclass
class RandomSequence:
    """A sequence with the state it starts from."""

    seed: str
    items: list[Item | Label]
    registers: tuple[int, ...]
    rflags: int
    fs_base: int
    gs_base: int
    xsave: bytes
    bits: int = 64
    writable: bool = False
    """Code may be stored to."""
    labels: dict[Label, int] = field(default_factory=dict, repr=False)
    _laid_out: tuple[int, list[tuple[int, bytes, Item]]] = field(default=(-1, []), repr=False)

    def layout(self, address: int) -> list[tuple[int, bytes, Item]]:
        """Address and bytes of every item, which stay what they are once this was asked. Raises ValueError where a
        short branch does not reach."""
        if self._laid_out[0] == address:
            return self._laid_out[1]
        labels: dict[Label, int] = {}
        placed: list[tuple[int, bytes, Item]] = []
        for _ in range(2):  # lengths do not depend on targets
            placed.clear()
            ip = address
            for item in self.items:
                if isinstance(item, Label):
                    labels[item] = ip
                    continue
                machine = item.encode(ip, labels.get(item.target) if item.target else None, self.bits)
                placed.append((ip, machine, item))
                ip += len(machine)
        self.labels = labels
        self._laid_out = address, placed
        return placed

    def case(self, address: int) -> Case:
        code = b"".join(machine for _, machine, _ in self.layout(address)) + UD2
        state = self.registers, self.rflags, self.fs_base, self.gs_base, self.xsave
        return Case(address, code, *state, self.bits, self.writable)

    def comparable_flags(self, address: int) -> dict[int, int]:
        """For an exception at each address of the sequence: the flags that are defined, and not dead, there.

        A flag that every path overwrites before anything reads it is dead: the translator need not keep it.
        """
        flow = _Flow(self.items)
        tainted, live = flow.tainted(), flow.live()
        masks = {}
        index = 0
        end = address
        for ip, machine, _ in self.layout(address):
            while not isinstance(flow.items[index], Item):
                index += 1
            masks[ip] = ALL_FLAGS & live[index] & ~tainted[index]
            end = ip + len(machine)
            index += 1
        masks[end] = ALL_FLAGS & ~tainted[-1]
        return masks

    def at(self, address: int, rip: int) -> Instruction | None:
        """The instruction at ``rip``."""
        return next((item.instruction for ip, _, item in self.layout(address) if ip == rip), None)

    def tainted_reader(self) -> int | None:
        """The index of an item that reads a flag which is undefined there."""
        tainted = _Flow(self.items).tainted()
        for i, item in enumerate(self.items):
            instruction = item.instruction if isinstance(item, Item) else None
            if instruction is not None and flag_use(instruction).read & tainted[i]:
                return i
        return None

    def without(self, index: int) -> RandomSequence | None:
        """The same sequence less one item; None where others need it."""
        item = self.items[index]
        if isinstance(item, Label) or item.keep:
            return None
        return replace(self, items=self.items[:index] + self.items[index + 1 :], labels={}, _laid_out=(-1, []))

    def listing(self, address: int) -> str:
        """Disassembly, and the registers at the start."""
        formatter = FastFormatter()
        lines = [f"seed {self.seed}"]
        for i in range(0, 16, 4):
            lines.append(
                "  " + "  ".join(f"{n:>3}={self.registers[j]:016x}" for j, n in enumerate(GPRS) if i <= j < i + 4)
            )
        lines.append(f"  rflags={self.rflags:x} fs={self.fs_base:x} gs={self.gs_base:x}")
        for ip, machine, item in self.layout(address):
            text = f"dq {self.labels.get(item.target, 0):#x}" if item.target else "dq 0"
            if item.instruction is not None:
                text = formatter.format(next(iter(Decoder(self.bits, machine, ip=ip))))
            lines.append(f"  {ip:x}: {machine.hex():<30} {text}")
        return "\n".join(lines)


class _Flow:
    """Flag dataflow over a sequence. An indirect jump or a RET may come out at any label."""

    def __init__(self, items: Sequence[Item | Label]) -> None:
        self.items = items
        self.uses = [
            flag_use(i.instruction) if isinstance(i, Item) and i.instruction is not None else None for i in items
        ]
        places = {item: i for i, item in enumerate(items) if isinstance(item, Label)}
        anywhere = [*places.values(), *(i + 1 for i, item in enumerate(items) if _is_call(item)), len(items)]
        self.successors = [list(self._next(i, item, places, anywhere)) for i, item in enumerate(items)]

    @staticmethod
    def _next(i: int, item: Item | Label, places: dict[Label, int], anywhere: list[int]) -> Iterator[int]:
        if isinstance(item, Label) or item.instruction is None:
            yield i + 1
            return
        flow = item.instruction.flow_control
        if flow in (FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL, FlowControl.RETURN):
            yield from anywhere
            return
        if item.is_branch and item.target is not None:
            yield places[item.target]
        if flow not in (FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CALL):
            yield i + 1

    def tainted(self) -> list[int]:
        """Flags that may be undefined before each item, and at the end."""
        before = [0] * (len(self.items) + 1)
        changed = True
        while changed:
            changed = False
            for i, use in enumerate(self.uses):
                after = before[i] if use is None else before[i] & ~use.written | use.undefined
                for s in self.successors[i]:
                    if after & ~before[s]:
                        before[s] |= after
                        changed = True
        return before

    def live(self) -> list[int]:
        """Flags that something may still read before each item; at the end all are read."""
        before = [0] * len(self.items) + [ALL_FLAGS]
        changed = True
        while changed:
            changed = False
            for i in reversed(range(len(self.items))):
                after = 0
                for s in self.successors[i]:
                    after |= before[s]
                use = self.uses[i]
                value = after if use is None else after & ~(use.written | use.undefined) | use.read
                if value != before[i]:
                    before[i] = value
                    changed = True
        return before


def _is_call(item: Item | Label) -> bool:
    return (
        isinstance(item, Item)
        and item.instruction is not None
        and item.instruction.flow_control in (FlowControl.CALL, FlowControl.INDIRECT_CALL)
    )
