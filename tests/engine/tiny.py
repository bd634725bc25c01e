"""A tiny machine around one vCPU: flat long mode, page tables, GDT, IDT and TSS in place, code from text.

``Tiny`` is what a directed test of an engine needs and no board: ports and MMIO are recorded, interrupts are raised by
the test. A program starts in ring 0 at ``start`` (or at its first byte) with interrupts off; it ends with HLT while
interrupts are off. An exception that the program gave no handler of its own ends it too, with :attr:`Tiny.exception`
saying what it was.

    guest = Tiny(engine, "mov eax, 1\\n mov [rip + out], eax\\n hlt\\n out: dq 0")
    guest.run()
    assert guest.load("out") == 1

Virtual addresses up to :data:`IDENTITY` are the guest-physical ones plus ``base``, which is 0 unless a test needs the
low addresses for itself; the first page is never mapped. More is mapped by :meth:`Tiny.map`.
"""

from __future__ import annotations

import faulthandler
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from skep.contracts.constantports import ConstantPorts
from skep.contracts.interrupts import Loan
from skep.engine.amd64.registers import Cr0, Cr4, Efer, Pte
from skep.engine.contract import Engine, Exit, ExitReason, Vcpu
from skep.irqchip.lapic import LocalApic
from skep.memory import GuestMemory, Overlay
from tests.engine.assemble import Program, assemble
from tests.engine.place import GPRS, PAGE

GDT, IDT, TSS, STUBS = 0x1000, 0x2000, 0x3000, 0x4000
TABLES, TABLES_END = 0x10000, 0x60000
STACK = 0x80000
"""Initial RSP. RSP0 of the TSS and the IST stacks follow, a page each."""
RSP0 = STACK + 0x1000
IST = tuple(STACK + 0x1000 * (1 + n) for n in range(1, 8))
OTHER_STACK = 0x200
"""Bytes of stack of each vCPU but the first."""
USER_STACK = 0xA0000
PROGRAM = 0x100000
IDENTITY = 0x200000
MMIO = 0xD0000000
"""A page of device memory, mapped one to one."""
RAM = 16 << 20

CODE32, CODE64, DATA0, USER32, USER_DATA, USER64, TSS_SELECTOR = 0x08, 0x10, 0x18, 0x23, 0x2B, 0x33, 0x40
"""Selectors. The user's are Linux's, so that code can compare them with the host's."""

_ERROR_CODE = {8, 10, 11, 12, 13, 14, 17, 21}
_STUB = 16
_DEAF = 20.0
"""Seconds after which a vCPU that does not leave when it is told to ends the whole test run."""

SEGMENTS: dict[int, dict[str, int]] = {
    selector: {"selector": selector, "base": 0, "limit": 0xFFFFFFFF, "attributes": attributes}
    for selector, attributes in (
        (CODE32, 0xC09B), (CODE64, 0xA09B), (DATA0, 0xC093), (USER32, 0xC0FB), (USER_DATA, 0xC0F3), (USER64, 0xA0FB),
    )
}  # fmt: skip
NULL_SEGMENT = {"selector": 0, "base": 0, "limit": 0, "attributes": 0}


class TinyError(Exception):
    """The guest did not end as a guest of a test should."""


class RecordingIo:
    """An :class:`~skep.contracts.io.IoSpace` that writes down what it is asked, with one page of device memory."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []
        """(``out`` ``in`` ``write`` or ``read``, port or address, size, value)"""
        self.device = bytearray(PAGE)
        self.inputs: dict[int, int] = {}
        self.on_write: Callable[[int, int, int], None] | None = None
        """Called with (port, size, value) of every OUT, on the vCPU's thread."""
        self.on_read: Callable[[int, int], None] | None = None
        """Called with (port, size) of every IN, before it is answered."""

    def port_read(self, port: int, size: int) -> int:
        if self.on_read is not None:
            self.on_read(port, size)
        value = self.inputs.get(port, (1 << 8 * size) - 1) & ((1 << 8 * size) - 1)
        self.log.append(("in", port, size, value))
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        self.log.append(("out", port, size, value))
        if self.on_write is not None:
            self.on_write(port, size, value)

    def mmio_read(self, gpa: int, size: int) -> int:
        offset = gpa - MMIO
        inside = 0 <= offset <= PAGE - size
        value = int.from_bytes(self.device[offset : offset + size], "little") if inside else (1 << 8 * size) - 1
        self.log.append(("read", gpa, size, value))
        return value

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        self.log.append(("write", gpa, size, value))
        offset = gpa - MMIO
        if 0 <= offset <= PAGE - size:
            self.device[offset : offset + size] = value.to_bytes(size, "little")

    def outs(self, port: int) -> list[int]:
        """Values written to a port."""
        return [value for kind, where, _, value in self.log if kind == "out" and where == port]


class TestInterrupts:
    """A :class:`~skep.contracts.interrupts.LocalInterrupts` whose interrupts the test raises, from any thread."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    def __init__(self) -> None:
        self.kick: Callable[[], None] = lambda: None
        self._vectors: list[int] = []
        self._nmis = 0
        self._lock = threading.Lock()
        self.tpr = 0
        self.msrs: dict[int, int] = {0x1B: 0xFEE00900}

    def raise_vector(self, vector: int) -> None:
        with self._lock:
            self._vectors.append(vector)
        self.kick()

    def raise_nmi(self) -> None:
        with self._lock:
            self._nmis += 1
        self.kick()

    def pending(self) -> bool:
        with self._lock:
            return any(v >> 4 > self.tpr for v in self._vectors)

    def nmi_pending(self) -> bool:
        with self._lock:
            return self._nmis > 0

    def acknowledge(self) -> int | None:
        with self._lock:
            for i, vector in enumerate(self._vectors):
                if vector >> 4 > self.tpr:
                    return self._vectors.pop(i)
        return None

    def clear(self) -> None:
        """What was raised goes away again."""
        with self._lock:
            self._vectors.clear()

    def take_nmi(self) -> bool:
        with self._lock:
            taken = self._nmis > 0
            self._nmis -= taken
        return taken

    def read_tpr(self) -> int:
        return self.tpr

    def write_tpr(self, value: int) -> None:
        self.tpr = value & 0xF
        self.kick()  # what was masked may be pending now

    def read_msr(self, index: int) -> int | None:
        return self.msrs.get(index)

    def write_msr(self, index: int, value: int) -> bool:
        if index not in self.msrs:
            return False
        self.msrs[index] = value
        return True

    def lend(self, loan: Loan) -> None:
        """Nothing: the tests see every write."""

    def settle(self) -> None:
        """Nothing was lent."""

    def collect(self) -> None:
        """Nobody posts to what lends nothing."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What the CPU pushed for an exception that ended a program, with CR2."""

    vector: int
    error: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    cr2: int


class Tiny:
    """One VM of one vCPU, from ``engine``, with ``text`` at :data:`PROGRAM`. A context manager.

    ``handlers`` gives vectors to labels of the program (interrupt gates); ``ist`` gives vectors to IST stacks 1 to 7;
    ``user`` starts the program in ring 3, its pages and :data:`USER_STACK` being the user's. ``apic`` is a real one, in
    place of :attr:`interrupts`, and ``other_apics`` are the other vCPUs'; ``constants`` are ports that the engine may
    answer; ``overlays``, there from the beginning, and others may lie below ``reach``; with ``time_of_day`` it has
    kvm-clock.
    """

    def __init__(
        self,
        engine: Engine,
        text: str,
        *,
        handlers: Mapping[int, str] | None = None,
        ist: Mapping[int, int] | None = None,
        user: bool = False,
        symbols: Mapping[str, int] | None = None,
        cpu_model: str = "host",
        bits: int = 64,
        base: int = 0,
        cpus: int = 1,
        apic: LocalApic | None = None,
        other_apics: Sequence[LocalApic] = (),
        constants: ConstantPorts | None = None,
        reach: int = 0,
        overlays: Sequence[Overlay] = (),
        time_of_day: Callable[[], int] | None = None,
    ) -> None:
        self.base = base
        self.memory = GuestMemory(RAM, reach=reach)
        self.memory.change(add=overlays)
        self.io = RecordingIo()
        self.interrupts = TestInterrupts()
        self._timed_out = threading.Event()
        self._next_table = TABLES
        self.cr3 = self.new_table()
        user_bit = Pte.US if user else 0
        for page in range(PAGE, IDENTITY, PAGE):
            self.map(base + page, page, Pte.RW | (user_bit if page >= USER_STACK - PAGE else 0))
        self.map(MMIO, MMIO, Pte.RW | user_bit)
        names = {"MMIO": MMIO, "STACK": STACK, "USER_STACK": USER_STACK, "GDT": GDT, "IDT": IDT, "TSS": TSS}
        names |= {"PML4": self.cr3, **(symbols or {})}
        self.program: Program = assemble(text, base + PROGRAM, names, bits)
        if len(self.program.code) > IDENTITY - PROGRAM:
            raise TinyError("the program is too long")
        self.memory.write(PROGRAM, self.program.code)
        self._tables(handlers or {}, ist or {})
        self.vm = engine.create_vm(self.memory, self.io, cpus, cpu_model, 0, None, time_of_day)
        if constants is not None:
            self.vm.answer_ports(constants)
        self.vcpu = self.vm.create_vcpu(0, self.interrupts if apic is None else apic)
        self.interrupts.kick = self.vcpu.kick
        start = self._start(user, xsave=cpu_model == "host")
        self.set(**start)
        self.others: list[Vcpu] = []
        for index in range(1, cpus):
            vcpu = self.vm.create_vcpu(index, other_apics[index - 1] if other_apics else TestInterrupts())
            vcpu.set_state(start | {"rdi": index, "rsp": start["rsp"] - index * OTHER_STACK})
            self.others.append(vcpu)

    # Building

    def new_table(self) -> int:
        """A zeroed page for a paging structure."""
        page = self._next_table
        self._next_table += PAGE
        if self._next_table > TABLES_END:
            raise TinyError("no room for more page tables")
        self.memory.write(page, bytes(PAGE))
        return page

    def entry(self, va: int, level: int = 1, cr3: int | None = None) -> int:
        """Guest-physical address of the entry for ``va``: level 1 is the page table's, 4 the PML4's.

        Tables above it that are missing are made."""
        table = self.cr3 if cr3 is None else cr3
        for above in range(4, level, -1):
            where = table + 8 * (va >> 12 + 9 * (above - 1) & 0x1FF)
            found = self.memory.load_u64(where)
            if not found & Pte.P:
                found = self.new_table() | Pte.P | Pte.RW | Pte.US
                self.memory.store_u64(where, found)
            table = found & Pte.ADDRESS
        return table + 8 * (va >> 12 + 9 * (level - 1) & 0x1FF)

    def map(self, va: int, gpa: int, flags: int = Pte.RW, *, level: int = 1, cr3: int | None = None) -> int:
        """Map one page, of 2 MiB at level 2. Returns where the entry is. Nothing is flushed."""
        where = self.entry(va, level, cr3)
        self.memory.store_u64(where, gpa | flags | Pte.P | (Pte.PS if level > 1 else 0))
        return where

    def unmap(self, va: int) -> int:
        where = self.entry(va)
        self.memory.store_u64(where, 0)
        return where

    def _tables(self, handlers: Mapping[int, str], ist: Mapping[int, int]) -> None:
        flat = {CODE32: 0x00CF9B000000FFFF, CODE64: 0x00AF9B000000FFFF, DATA0: 0x00CF93000000FFFF}
        flat |= {USER32: 0x00CFFB000000FFFF, USER_DATA: 0x00CFF3000000FFFF, USER64: 0x00AFFB000000FFFF}
        for selector, descriptor in flat.items():
            self.memory.store_u64(GDT + (selector & ~7), descriptor)
        tss = self.base + TSS
        low = 0x67 | (tss & 0xFFFFFF) << 16 | 0x8B << 40 | (tss >> 24 & 0xFF) << 56
        self.memory.store_u64(GDT + TSS_SELECTOR, low)
        self.memory.store_u64(GDT + TSS_SELECTOR + 8, tss >> 32)
        stacks = [self.base + stack for stack in (RSP0, 0, 0, 0, *IST)]
        self.memory.write(TSS, struct.pack("<I11QQHH", 0, *stacks, 0, 0, 0x68))
        code = bytearray()
        for vector in range(256):
            stub = b"" if vector in _ERROR_CODE else b"\x6a\x00"  # push 0
            stub += b"\x68" + vector.to_bytes(4, "little") + b"\xf4\xeb\xfd"  # push vector; hlt; jmp back
            code += stub.ljust(_STUB, b"\xcc")
            stub_address = self.base + STUBS + _STUB * vector
            self.gate(
                vector, self.program[handlers[vector]] if vector in handlers else stub_address, ist.get(vector, 0)
            )
        self.memory.write(STUBS, bytes(code))

    def gate(self, vector: int, handler: int, ist: int = 0) -> None:
        """An interrupt gate; breakpoints are for everybody."""
        dpl = 3 if vector in (3, 4, 0x80) else 0
        low = handler & 0xFFFF | CODE64 << 16 | ist << 32 | (0x8E | dpl << 5) << 40 | (handler >> 16 & 0xFFFF) << 48
        self.memory.store_u64(IDT + 16 * vector, low)
        self.memory.store_u64(IDT + 16 * vector + 8, handler >> 32)

    def _start(self, user: bool, xsave: bool) -> dict[str, Any]:
        """Registers before the first instruction. ``xsave``: the CPU has XSAVE and AVX, and they are on."""
        image = bytearray(832)
        struct.pack_into("<H", image, 0, 0x37F)
        struct.pack_into("<I", image, 24, 0x1F80)
        data = SEGMENTS[USER_DATA if user else DATA0]
        state: dict[str, Any] = dict.fromkeys(GPRS, 0)
        state.update(
            rip=self.program.labels.get("start", self.program.address), rflags=2,
            rsp=self.base + (USER_STACK if user else STACK),
            cs=SEGMENTS[USER64 if user else CODE64], ss=data, ds=data, es=data, fs=data, gs=data,
            ldtr={"selector": 0, "base": 0, "limit": 0, "attributes": 0},
            tr={"selector": TSS_SELECTOR, "base": self.base + TSS, "limit": 0x67, "attributes": 0x8B},
            gdtr={"base": self.base + GDT, "limit": 0x4F}, idtr={"base": self.base + IDT, "limit": 0xFFF},
            cr0=Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.PG, cr2=0, cr3=self.cr3,
            dr6=0xFFFF0FF0, dr7=0x400,
            cr4=Cr4.PAE | Cr4.PGE | Cr4.OSFXSR | Cr4.OSXMMEXCPT | Cr4.FSGSBASE | (Cr4.OSXSAVE if xsave else 0),
            efer=Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE, xcr0=7 if xsave else 1, xsave=bytes(image),
        )  # fmt: skip
        return state

    # Running

    def set(self, **state: Any) -> None:
        """Change registers, by the names of :class:`skep.engine.amd64.registers.CpuState`."""
        self.vcpu.set_state(state)

    @property
    def state(self) -> dict[str, Any]:
        return self.vcpu.get_state()

    def reg(self, name: str) -> int:
        value: int = self.state[name]
        return value

    def load(self, where: str | int, size: int = 8) -> int:
        """A number out of guest memory, at a label or a guest-physical address."""
        return int.from_bytes(self.read(where, size), "little")

    def read(self, where: str | int, size: int) -> bytes:
        return self.memory.read(self.program[where] - self.base if isinstance(where, str) else where, size)

    def run(self, timeout: float = 10.0) -> Exit:
        """Run until the guest halts with interrupts off, or with none to come, or shuts down."""
        with self.watched(timeout):
            return self.until_halt()

    @contextmanager
    def watched(self, timeout: float) -> Iterator[None]:
        """What runs inside, by :meth:`until_halt`, has so many seconds altogether."""

        def expire() -> None:
            self._timed_out.set()
            self.vcpu.request_exit()

        watchdog = threading.Timer(timeout, expire)
        watchdog.start()
        # A vCPU that hears nothing cannot be stopped from here, and would hang the test run for good.
        faulthandler.dump_traceback_later(timeout + _DEAF, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            watchdog.cancel()
            watchdog.join()
            self._timed_out.clear()

    def until_halt(self) -> Exit:
        """Run inside :meth:`watched`."""
        while True:
            left = self.vcpu.run()
            if left.reason is ExitReason.FAILED:
                raise TinyError(f"the engine failed: {left.detail.get('message')}")
            if self._timed_out.is_set():
                raise TinyError(f"still running when its time was over, at rip {self.reg('rip'):#x}")
            if left.reason is ExitReason.SHUTDOWN:
                return left
            if left.reason is ExitReason.HALTED:
                waiting = self.interrupts.pending() and left.detail["interrupts"]
                if not waiting and not self.interrupts.nmi_pending():
                    return left

    def run_together(self, timeout: float = 30.0) -> None:
        """Run all vCPUs, each on a thread, until each has halted; rdi is a vCPU's number, and it has a stack of its
        own."""
        problems: list[str] = []

        def run(vcpu: Vcpu, name: str) -> None:
            left = vcpu.run()
            while left.reason is ExitReason.KICKED and not expired.is_set():
                left = vcpu.run()
            if left.reason is not ExitReason.HALTED:
                problems.append(f"{name}: {left}, at {vcpu.get_state()['rip']:#x}")

        expired = threading.Event()
        everyone = [self.vcpu, *self.others]
        threads = [threading.Thread(target=run, args=(v, f"vCPU {i}")) for i, v in enumerate(everyone)]
        faulthandler.dump_traceback_later(timeout + _DEAF, exit=True)
        try:
            for thread in threads:
                thread.start()
            end = time.monotonic() + timeout
            for thread in threads:
                thread.join(max(end - time.monotonic(), 0))
            expired.set()
            for vcpu in everyone:
                vcpu.request_exit()
            for thread in threads:
                thread.join()
        finally:
            faulthandler.cancel_dump_traceback_later()
        if problems:
            raise TinyError("; ".join(problems))

    @property
    def exception(self) -> Frame | None:
        """The exception that ended the program, if one did."""
        return self.frame(self.state)

    def frame(self, state: dict[str, Any]) -> Frame | None:
        """The same, when :attr:`state` is known already."""
        if not 0 <= state["rip"] - self.base - STUBS < 256 * _STUB:
            return None
        vector, error, rip, cs, rflags, rsp, ss = struct.unpack("<7Q", self.memory.read(state["rsp"] - self.base, 56))
        return Frame(vector, error, rip, cs, rflags, rsp, ss, state["cr2"])

    def close(self) -> None:
        for vcpu in (self.vcpu, *self.others):
            vcpu.close()
        self.vm.close()
        self.memory.close()

    def __enter__(self) -> Tiny:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
