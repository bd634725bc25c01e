"""A CPU port in plain Python over a bytearray: the world around emulation and delivery, without the translator."""

from __future__ import annotations

from iced_x86 import Encoder, Instruction

from skep.contracts.interrupts import Loan
from skep.engine.amd64 import cpuid as cpuid_models
from skep.engine.amd64.registers import Attr, Cr0, Cr4, Efer, PfError, Pte, Vector, canonical
from skep.engine.debug import Debug
from skep.engine.exits import Exits
from skep.engine.translate import segments
from skep.engine.translate.emulate import Emulator
from skep.engine.translate.layout import StateBlock
from skep.engine.translate.modelspecific import ModelSpecific
from skep.engine.translate.port import GuestFault

SIZE = 1 << 20
TSC_HZ = 2_600_000_000

# Where things are in memory
GDT, IDT, TSS, LDT = 0x1000, 0x2000, 0x3000, 0x3800
PML4, PDPT, PD, PT = 0x4000, 0x5000, 0x6000, 0x7000
CODE, DATA, STACK, KERNEL_STACK, IST_STACK = 0x10000, 0x20000, 0x30000, 0x38000, 0x3C000
HANDLER = 0x18000

# Selectors
CODE64, DATA0, CODE32, USER32, USER_DATA, USER64, TSS_SELECTOR = 0x08, 0x10, 0x18, 0x23, 0x2B, 0x33, 0x40
CONFORMING, READ_ONLY, ABSENT, EXECUTE_ONLY, LDT_SELECTOR, DATA16 = 0x50, 0x58, 0x60, 0x68, 0x70, 0x80


def descriptor(
    kind: int, *, dpl: int = 0, flags: int = 0xC, base: int = 0, limit: int = 0xFFFFF, present: int = 1
) -> int:
    """``kind`` is type and S; ``flags`` are G, D, L, AVL."""
    access = kind | dpl << 5 | present << 7
    low = (limit & 0xFFFF) | (base & 0xFF_FFFF) << 16
    return low | access << 40 | (limit >> 16) << 48 | flags << 52 | (base >> 24) << 56


class Ports:
    """Ports that answer with what was written, and remember."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []
        self.next = 0x1122334455667788

    def port_read(self, port: int, size: int) -> int:
        value = self.next & (1 << 8 * size) - 1
        self.log.append(("in", port, size, value))
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        self.log.append(("out", port, size, value))

    def mmio_read(self, gpa: int, size: int) -> int:
        raise NotImplementedError

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        raise NotImplementedError


class Apic:
    """The CPU's side of a local APIC that has nothing pending."""

    def __init__(self) -> None:
        self.tpr = 0
        self.deadline = 0

    def pending(self) -> bool:
        return False

    def acknowledge(self) -> int | None:
        return None

    def take_nmi(self) -> bool:
        return False

    def read_tpr(self) -> int:
        return self.tpr

    def write_tpr(self, value: int) -> None:
        self.tpr = value

    def read_msr(self, index: int) -> int | None:
        return {0x1B: 0xFEE0_0900, 0x6E0: self.deadline}.get(index)

    def write_msr(self, index: int, value: int) -> bool:
        if index == 0x6E0:
            self.deadline = value
        return index in (0x1B, 0x6E0)

    def lend(self, loan: Loan) -> None:
        """Nothing."""

    def settle(self) -> None:
        """Nothing was lent."""


class PlainCpu:
    """Linear addresses are physical ones, unless ``paged``. ``holes`` are linear pages that fault always."""

    def __init__(self, model: str = "host", vendor: bytes | None = None) -> None:
        self.st = StateBlock()
        self.io = Ports()
        self.interrupts = Apic()
        self.memory = bytearray(SIZE)
        self.paged = False
        self.devices: range = range(0)
        """Where no RAM is; accesses are remembered, and reach memory all the same."""
        self.accesses: list[tuple[str, int, int]] = []
        self.holes: set[int] = set()
        self.read_only: set[int] = set()
        self.flushes: list[bool | int] = []
        self.changes = 0
        self.hits = 0
        self.debug = Debug()
        self.cpuid = cpuid_models.make(model, TSC_HZ, vendor=vendor)
        self.msrs = ModelSpecific(self.st, self.interrupts, self.cpuid, Exits())
        self.emulator = Emulator(self, self.cpuid, self.msrs)

    def close(self) -> None:
        self.st.close()

    # CpuPort

    def read(self, va: int, size: int, supervisor: bool = False) -> bytes:
        parts = self._parts(va, size, 0, supervisor)
        self._remember("read", parts)
        return b"".join(bytes(self.memory[pa : pa + n]) for pa, n in parts)

    def fetch(self, va: int, size: int) -> bytes:
        self.physical(va, execute=True)
        return self.read(va, size)

    def write(self, va: int, data: bytes, supervisor: bool = False) -> None:
        at = 0
        parts = self._parts(va, len(data), PfError.W, supervisor)
        self._remember("write", parts)
        for pa, n in parts:
            self.memory[pa : pa + n] = data[at : at + n]
            at += n

    def change(self, va: int, *, to_set: int = 0, to_clear: int = 0) -> None:
        self.write(va, bytes((self.read(va, 1, True)[0] & ~to_clear | to_set,)), True)

    def check_write(self, va: int, size: int, supervisor: bool = False) -> None:
        self._parts(va, size, PfError.W, supervisor)

    def physical(self, va: int, *, write: bool = False, execute: bool = False) -> int:
        return self._walk(va, (PfError.W if write else 0) | (PfError.FETCH if execute else 0), self.st.cpl < 3)

    def read_physical(self, gpa: int, size: int) -> bytes:
        return bytes(self.memory[gpa : gpa + size])

    def ram(self, va: int, size: int, *, write: bool = False) -> int | None:
        gpa = self.physical(va, write=write)
        return None if gpa in self.devices else gpa

    def flush_tlb(self, global_too: bool) -> None:
        self.flushes.append(global_too)

    def invalidate_page(self, va: int) -> None:
        self.flushes.append(va)

    def breakpoints_changed(self) -> None:
        pass

    def state_changed(self) -> None:
        self.changes += 1

    # Memory

    def _remember(self, kind: str, parts: list[tuple[int, int]]) -> None:
        self.accesses.extend((kind, pa, n) for pa, n in parts if pa in self.devices)

    def _parts(self, va: int, size: int, access: int, supervisor: bool) -> list[tuple[int, int]]:
        parts = []
        while size:
            n = min(size, 4096 - (va & 4095))
            parts.append((self._walk(va, access, supervisor or self.st.cpl < 3), n))
            va, size = va + n & 0xFFFF_FFFF_FFFF_FFFF, size - n
        return parts

    def _walk(self, va: int, access: int, supervisor: bool) -> int:
        st = self.st
        user = 0 if supervisor else PfError.U
        if not canonical(va):
            raise GuestFault(Vector.GP, 0)
        page = va & ~4095
        if page in self.holes:
            raise GuestFault(Vector.PF, access | user, va)
        if page in self.read_only and access & PfError.W:
            raise GuestFault(Vector.PF, access | user | PfError.P, va)
        if not self.paged:
            if va >= SIZE:
                raise GuestFault(Vector.PF, access | user, va)
            return va
        table, rights = st.cr3 & Pte.ADDRESS, Pte.RW | Pte.US
        for level in (39, 30, 21, 12):
            entry = int.from_bytes(self.memory[(at := table + (va >> level & 511) * 8) : at + 8], "little")
            if not entry & Pte.P:
                raise GuestFault(Vector.PF, access | user, va)
            rights &= entry
            table = entry & Pte.ADDRESS
        if (user and not rights & Pte.US) or (access & PfError.W and not rights & Pte.RW):
            raise GuestFault(Vector.PF, access | user | PfError.P, va)
        return table | va & 4095

    def map(self, va: int, pa: int, rights: int) -> None:
        """One page of the first two megabytes."""
        for at, entry in ((PML4, PDPT | 7), (PDPT, PD | 7), (PD, PT | 7)):
            self.put64(at, entry)
        self.put64(PT + (va >> 12) * 8, pa | rights)

    def put64(self, at: int, *values: int) -> None:
        for n, value in enumerate(values):
            self.memory[at + 8 * n : at + 8 * n + 8] = value.to_bytes(8, "little")

    def get64(self, at: int, count: int = 1) -> list[int]:
        return [int.from_bytes(self.memory[at + 8 * n : at + 8 * n + 8], "little") for n in range(count)]

    def get32(self, at: int, count: int) -> list[int]:
        return [int.from_bytes(self.memory[at + 4 * n : at + 4 * n + 4], "little") for n in range(count)]

    # Setting up

    def set_up(self, bits: int = 64, cpl: int = 0) -> None:
        """Tables, segments and a stack for code of 64, 32 (flat protected mode) or, as -32, compatibility mode."""
        st = self.st
        long = bits != 32
        st.cr0 = Cr0.PE | Cr0.ET | Cr0.NE | Cr0.WP | (Cr0.PG if long else 0)
        st.cr4 = Cr4.PAE | Cr4.OSFXSR
        st.efer = (Efer.LME | Efer.LMA | Efer.SCE) if long else 0
        data, code = 0x13, 0x1B
        self.put64(
            GDT,
            0,
            descriptor(code, flags=0xA),  # 08 64-bit code
            descriptor(data),  # 10
            descriptor(code),  # 18 32-bit code
            descriptor(code, dpl=3),  # 20 32-bit user code
            descriptor(data, dpl=3),  # 28
            descriptor(code, dpl=3, flags=0xA),  # 30 64-bit user code
            0,
            descriptor(0xB, base=TSS, limit=0x7FF, flags=0),  # 40 busy TSS
            0,
            descriptor(0x1F, flags=0xA if long else 0xC),  # 50 conforming code
            descriptor(0x11),  # 58 read-only data
            descriptor(data, present=0),  # 60
            descriptor(0x19, flags=0xA if long else 0xC),  # 68 execute only
            descriptor(0x2, base=LDT, limit=0x17, flags=0),  # 70 LDT
            0,
            descriptor(data, flags=0),  # 80 16-bit data, 1 MiB
        )
        st.gdt_base, st.gdt_limit = GDT, 0x8F
        st.idt_base, st.idt_limit = IDT, 0xFFF if long else 0x7FF
        st.tr_sel, st.tr_base, st.tr_limit, st.tr_attr = TSS_SELECTOR, TSS, 0x7FF, 0x8B
        selector = (USER64 if cpl else CODE64) if bits == 64 else USER32 if cpl else CODE32
        self.load("cs", selector)
        for name in ("ss", "ds", "es", "fs", "gs"):
            self.load(name, USER_DATA if cpl else DATA0)
        st.cpl = cpl
        st.rip, st.rsp = CODE, STACK
        st.rflags = 2
        if long:
            self.put64(TSS + 4, KERNEL_STACK)
            self.put64(TSS + 36, IST_STACK)
        else:
            self.memory[TSS + 4 : TSS + 10] = KERNEL_STACK.to_bytes(4, "little") + DATA0.to_bytes(2, "little")

    def load(self, name: str, selector: int) -> None:
        address = GDT + (selector & ~7)
        segments.put(self.st, name, segments.unpack(selector, self.get64(address)[0]))

    def gate(
        self,
        vector: int,
        handler: int = HANDLER,
        *,
        selector: int | None = None,
        kind: int = 14,
        dpl: int = 0,
        ist: int = 0,
        present: int = 1,
    ) -> None:
        """An IDT entry of the form that the mode wants."""
        long = bool(self.st.efer & Efer.LMA)
        selector = selector if selector is not None else CODE64 if long else CODE32
        low = (handler & 0xFFFF) | selector << 16 | (handler >> 16 & 0xFFFF) << 48
        low |= ist << 32 | kind << 40 | dpl << 45 | present << 47
        if long:
            self.put64(IDT + 16 * vector, low, handler >> 32)
        else:
            self.put64(IDT + 8 * vector, low)

    def step(self, code: bytes | Instruction) -> bool:
        """Emulate one instruction, put at rip."""
        st = self.st
        at = st.cs_base + st.rip if not st.cs_attr & Attr.L else st.rip
        if isinstance(code, Instruction):
            encoder = Encoder(64)
            encoder.encode(code, st.rip)
            code = encoder.take_buffer()
        self.memory[at : at + len(code)] = code
        return self.emulator.step()
