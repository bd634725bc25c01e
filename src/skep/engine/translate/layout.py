"""The state block: everything one vCPU keeps where machine code reaches it through GS.

One block per vCPU thread. Plain fields are 64-bit words at fixed offsets; behind them lie the areas (FPU state,
bounce buffers, TLB, jump cache). Python reads and writes the fields as attributes of :class:`StateBlock`; machine
code uses ``gs:[OFFSET]`` with the offsets of :data:`OFFSETS`.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, Any, Final

GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")

SLOTS = 8
_FIELDS = (
    *GPRS,  # 0x000
    "rip",  # 0x080 where the guest goes on
    "page",  # 0x088 guest virtual address of the page that is executing
    # 0x090 looked at by guest code: byte 0: somebody wants the vCPU (set by kick); byte 1: the guest's own STI does;
    # byte 2: it must stop (set with `stop`); byte 3: its turn is over (turns.py)
    "brk",
    "where",  # 1 while in guest code or in a routine called from it, else 0; a futex
    "stop",  # 1 while the vCPU must not be in guest code; a futex
    # while it waits in machine code, with everything in this block: 1 for `stop` to end, 2 for a turn, 3 after HLT
    "parked",
    "seat", "turns",  # host addresses of what is its own, and of what all share (turns.py); 0: there is room for all
    "inject",  # 0x100 | vector of an interrupt to deliver on the way in, or 0
    "iflag",  # RFLAGS.IF: 0 or 0x200
    "irq",  # 1 while there may be an interrupt for us: STI looks here
    "wanted",  # 1 while Python has something for the vCPU, such as what its local APIC has (set by kick)
    "flags",  # arithmetic flags and DF while outside guest code
    "sysfl",  # RFLAGS.TF, IOPL, NT, RF, AC, VIF, VIP, ID
    "kind",  # why guest code was left: layout.Kind
    "info",  # with kind: the exit's own number
    "va",  # with kind MEM: the guest virtual address
    "desc",  # with kind MEM: the access descriptor
    "site",  # host address of a jump to be patched, or 0
    "host_rsp",
    "host_mxcsr",
    "t0", "t1", "t2", "t6", "t7",  # temporaries of one instruction
    "swap0", "swap1", "swap2",  # registers that make room in a loop (renaming.py)
    *(f"slot{i}" for i in range(SLOTS)),  # host addresses of a block's checked ranges (sharing_runtime.py)
    *(f"{s}_sel" for s in SEGMENTS),
    *(f"{s}_base" for s in SEGMENTS),
    *(f"{s}_limit" for s in SEGMENTS),  # in bytes, granularity applied
    # descriptor bits 40-47 and 52-55 as in VMX/SVM: type, S, DPL, P, -, AVL, L, D, G (bits 0-7, 12-15)
    *(f"{s}_attr" for s in SEGMENTS),
    # for 16- and 32-bit code: offsets from start up to the end that a read, a write may not go beyond (segments.window)
    *(f"{s}_start" for s in SEGMENTS),
    *(f"{s}_rend" for s in SEGMENTS),
    *(f"{s}_wend" for s in SEGMENTS),
    "code_end",  # what lies below it in CS lies in pages that are wholly inside the limit
    "ldtr_sel", "ldtr_base", "ldtr_limit", "ldtr_attr",
    "tr_sel", "tr_base", "tr_limit", "tr_attr",
    "gdt_base", "gdt_limit", "idt_base", "idt_limit",
    "cr0", "cr2", "cr3", "cr4", "efer", "xcr0",
    "cpl",
    "mode",  # layout.Mode bits, and the legality class above them
    "kernel_gs_base",
    "star", "lstar", "cstar", "sfmask", "sysenter_cs", "sysenter_esp", "sysenter_eip",
    "tsc_offset", "tsc_adjust", "tsc_aux", "pat",
    # what is done for the local APIC (loan.py): whether anything is; the vectors in service, a byte each, the most
    # urgent lowest; the timer's vector, or 0; when that comes and when the host's timer goes off at the latest, in
    # ticks of the guest's counter, 0: not at all; the task priority register; the interrupt command register
    "apic", "apic_service", "apic_vector", "apic_deadline", "apic_armed", "apic_task", "apic_command",
    # interrupts from other vCPUs: a bit for each vector; 1 while who sends need not tell Python; 1 when this vCPU has
    # sent to one where that is not so
    "posted0", "posted1", "posted2", "posted3", "listening", "ring",
    "vcpus", "vcpus_count",  # host address of a u64 per APIC ID: its state block, or 0; and how many
    "asleep",  # 1 while it sleeps after HLT, in machine code; a futex
    "wakes",  # how many addresses stand at WAKES
    "slept",  # ticks of the host's counter that it slept so
    "tick",  # the host's timer, a file descriptor (ticks.py)
    "tick_scale",  # nanoseconds a tick of the counter, times 2**32
    "tick_most",  # ticks that the timer is set for at most
    "tick_set",  # 1 for the stub to set it
    "tick_spec", "tick_spec1", "tick_spec2", "tick_ns",  # struct itimerspec
    "dr0", "dr1", "dr2", "dr3", "dr6", "dr7",
    # the breakpoints that count: those of dr0 to dr3 and dr7, or a debugger's (breakpoints.py)
    "armed0", "armed1", "armed2", "armed3", "armed7",
    "watch", "watch_code",  # 1 while breakpoints are armed for data, for instructions (breakpoints.py)
    "pdpte0", "pdpte1", "pdpte2", "pdpte3",  # PAE paging: loaded with CR3, not looked at in memory later
    "self_",  # host address of this block
    "ram",  # host address of guest-physical 0
    "low_end",  # end of low RAM
    "high_base", "high_size",
    "overlays", "frames",  # host address of a byte per guest page frame (overlays.py), or 0; and how many
    "codemask",  # host address of a u64 per guest page frame: bit i is set where its 64-byte line i was translated
    "codebytes",  # host address of a u64 per 64-byte line of guest memory: bit i is set where its byte i was translated
    "wmapped",  # host address of a byte per guest page frame (codemap.py): which some vCPU may store to without asking
    "hash",  # host address of the block table
    "rw_delta",  # writable alias of the code buffer less its executable address
    "constants",  # host address of what reading ports gives (contracts/constantports.py), or 0
    "pairs",  # host address of the window where two pages lie side by side
    "pair_tags",  # host address of a u64 per slot of it: frame of the first page << 32 | frame of the second
    "ng_count",  # entries in the list of non-global TLB entries
    "jl_count",  # entries in the list of non-global jump-cache sets
    "kept",  # which of the slots at KEPT are good: bit i for slot i
    "nmi_blocked",  # 1 between the delivery of an NMI and the next IRET
    "single",  # 1 while one instruction runs alone: faults go to Python instead of into the guest
    "w_pa", "w_flags", "w_error",  # what walk found: physical address; bit 0 global, 1 large; #PF error code
    "tag", "set",  # for a jump: host r10 and r11 at a checked entry (tag and set offset)
    "target",  # host address to enter at
    "room",  # elements of a string instruction that can be done together (narrow_runtime.py)
    "failed",  # return address of a range's check that failed
    "spins",  # PAUSE instructions until the host's CPU is offered to others
    # by TLB array: a page that was last pushed to or popped from, writable, and host less guest address
    *(f"stack{i}_{n}" for i in range(3) for n in ("page", "delta")),
    "stack_offset",  # a temporary of the check that looks there
    "pdep_mask",  # jump-cache set number to byte offset
    # host addresses of the stubs that templates reach through GS (stubs.py)
    "slow", "range", "link", "miss", "brk_exit", "emu_exit", "done_exit", "port_exit", "segment_exit", "halt_exit",
    "iret", "syscall", "sysret", "cr3_load", "invlpg", "invpcid", "rep_stos", "rep_movs", "rep_cmps", "yield_",
    "narrow_string", "span", "load_segment", "cpuid", "rdmsr", "wrmsr",
    # counters
    "n_fill", "n_pf", "n_irq", "n_iret", "n_syscall", "n_cr3", "n_miss", "n_link", "n_span", "n_tick", "n_port",
    "n_ipi", "n_halt",
)

OFFSETS: dict[str, int] = {name: 8 * i for i, name in enumerate(_FIELDS)}
assert 8 * len(_FIELDS) <= 0x800

XSAVE_AREA = 0x1000  # 1 KiB, the guest's FPU state while outside guest code (standard format)
BOUNCE = 0x2000  # four slots of 1 KiB for operands that are not plain RAM within a page
BOUNCE_SIZE = 0x400
VECTORS = 0x3000  # XMM8 to XMM15 while an instruction must leave them alone
TLB = 0x10000  # three arrays by mode & 3: supervisor, user, supervisor with AC
TLB_ENTRIES = 2048
TLB_ENTRY = 32  # read tag, write tag, execute tag, host address of the page
TLB_ARRAY = TLB_ENTRIES * TLB_ENTRY
TLB_READ, TLB_WRITE, TLB_EXEC, TLB_HOST = 0, 8, 16, 24
NG_LIST = 0x40000  # u32 offsets in TLB: entries of pages that are not global
NG_LISTED = 0x46000  # a byte for each entry of TLB: whether it is there (tlb_runtime.py)
JC_PAGES = 0x60000  # a byte per hashed page number: a page that is not global may have jump-cache entries
JC_PAGES_SIZE = 0x2000
JC_GLOBAL = 0x62000  # the same of global pages, those of the upper half of all addresses apart
JC_GLOBAL_SIZE = 0x2000
LARGE_PAGES = 0x64000  # a byte per hashed 2 MiB region: some TLB entry may come from a large page there
GIANT_PAGES = 0x64800  # the same of 1 GiB; both have the upper half of all addresses apart
LARGE_PAGES_SIZE = 0x800  # of either
IDENTITY = 0x65000  # CPUID's leaves (identity.py)
IDENTITY_SIZE = 0x1000
TWINS = 0x66000  # by return address: {where a range's check failed, the plain twin's entry there} (sharing_runtime.py)
TWINS_MASK = 0x3FF0
WAKES = 0x6A000  # host addresses of state blocks whose vCPUs the stub is to wake; as many as there can be vCPUs
TAKEN = 0x6A800  # what take_posted found (apic_runtime.py), four words
EDGES = 0x6A820  # a bit for each vector that was taken since the local APIC lent, four words
PAIR_SLOTS = 4096
HASH_ENTRY = 32  # key + TABLE_KEY, checked entry, plain entry, the block's number (tables.py)
TABLE_KEY = 2  # below: 0 where an entry is free, 1 where a block is no more
HASH_BITS = 18
JC = 0x80000  # three arrays of sets: {-tag0, entry0, -tag1, entry1}
JC_SETS = 8192
JC_SET = 32
JC_ARRAY = JC_SETS * JC_SET
JC_LIST = 0x140000  # u32 offsets in JC: sets with a target on a page that is not global
JC_LISTED = 0x158000  # a byte for each set of JC: 1 if it is there
KEPT = 0x160000  # by PCID modulo KEPT_SLOTS: what TLB and jump cache held of it when another was loaded
KEPT_SLOTS = 8
KEPT_SLOT = 0x5000  # the PCID; numbers of TLB entries and jump-cache ways; those
KEPT_MOST = 256  # of either
KEPT_PAGES, KEPT_PAGE = 0x40, 40  # offset in TLB, the entry
KEPT_JUMPS, KEPT_JUMP = 0x3000, 24  # offset in JC, the target's tag, its entry
SIZE = 0x200000

PDPTE = OFFSETS["pdpte0"]
ARMED = OFFSETS["armed0"]
ES = OFFSETS["es_sel"], OFFSETS["es_base"], OFFSETS["es_limit"], OFFSETS["es_attr"]
"""What ES holds; the other segments follow in the order of SEGMENTS."""
POSTED = OFFSETS["posted0"]
BRK, BRK_STI, BRK_STOP, BRK_TURN = (OFFSETS["brk"] + i for i in range(4))

HALTED = 3
"""In ``parked``: asleep after HLT."""
NO_STACK = 0xD15E_A5ED_0000_0000
"""In place of a stack's page: no canonical address is there, and what takes it for one faults."""
EMPTY_JC = -0x7F00_0000_0000_4000 & (1 << 64) - 1
"""Less the number of its set: what an empty way of the jump cache holds. It is the negative of an address that belongs
in the next set, so nothing that is looked for here can match, wherever a guest jumps."""


class Mode:
    """Bits of the ``mode`` field: how code is read and what surrounds it. Code of different modes is translated apart.

    The number above them, from CLASS_SHIFT on, names a set of CR0/CR4/XCR0 bits that change legality.
    """

    USER: Final = 1
    AC: Final = 2  # supervisor with RFLAGS.AC, which is all that SMAP looks at
    CODE32: Final = 4
    CODE16: Final = 8
    NARROW: Final = CODE32 | CODE16
    SEGMENTED: Final = 16  # CS, DS, ES or SS is not flat: bases are added, limits checked. All 16-bit code is taken so
    STACK16: Final = 32  # SS.B is clear
    REAL: Final = 64  # real or virtual-8086 mode: a selector is a paragraph's number
    PLAIN: Final = 128  # only in a block's key: no checks are shared (sharing_runtime.py)
    SHAPE: Final = 0xFF
    CLASS_SHIFT: Final = 8
    BITS: Final = 16  # a block's key is its physical address above its mode
    ALL: Final = (1 << BITS) - 1
    TAGGED: Final = 0xFC  # what jump-cache tags tell apart; USER and AC have arrays of their own
    TAG_SHIFT: Final = 56


class Kind:
    """Why machine code came back to Python."""

    JUMP = 0  # no translation known for rip; `site` may be patched
    MEM = 1  # an access that machine code cannot finish: va, desc; rip is the instruction
    EMULATE = 2  # the instruction at rip is Python's
    BREAK = 3  # brk was set
    FAULT = 4  # the host CPU faulted in guest code
    EXCEPTION = 5  # deliver #PF with error code w_error, address va, at rip, in Python
    SPAN = 7  # a block on two pages whose second is not in the TLB, or is another now
    PORT = 8  # IN or OUT: info is lower.port_info; rip is behind it
    STOPPED = 9  # the vCPU was to enter guest code for one instruction while it must not
    SEGMENT = 11  # an access outside its segment, or (at `va`) not aligned: exception `info` with error code 0
    DELIVER = 10  # the interrupt in `inject` is for Python to deliver
    PLAIN = 12  # the plain twin of the block at rip is wanted
    MSR = 13  # RDMSR or (info 1) WRMSR, at CPL 0, that is Python's
    HALT = 14  # HLT at CPL 0; rip is behind it
    PAIR = 6  # map the frames of tag `info` side by side, then run the instruction at rip again


class StateBlock:
    """One vCPU's state block. Every name in :data:`OFFSETS` is an attribute (an int, 0 to 2**64 - 1)."""

    __slots__ = ("_keep", "address", "buffer", "bytes", "q")

    def __init__(self) -> None:
        self.buffer = mmap.mmap(-1, SIZE)
        self._keep = ctypes.c_char.from_buffer(self.buffer)
        self.address = ctypes.addressof(self._keep)
        self.bytes = memoryview(self.buffer)
        self.q = self.bytes.cast("Q")
        self.q[OFFSETS["self_"] >> 3] = self.address

    def close(self) -> None:
        self.q.release()
        self.bytes.release()
        del self._keep  # the memory goes with the last who holds it

    @property
    def rflags(self) -> int:
        """RFLAGS as the guest would see it."""
        return (self.flags & 0xCD5) | 2 | self.iflag | self.sysfl

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.flags = value & 0xCD5
        self.iflag = value & 0x200
        self.sysfl = value & 0x3F7100

    if TYPE_CHECKING:  # the fields' properties are made by _install

        def __getattr__(self, name: str) -> int: ...

        def __setattr__(self, name: str, value: Any) -> None: ...


def _install() -> None:
    for name, offset in OFFSETS.items():
        i = offset >> 3

        def get(self: StateBlock, i: int = i) -> int:
            return self.q[i]

        def put(self: StateBlock, value: int, i: int = i) -> None:
            self.q[i] = value & 0xFFFFFFFFFFFFFFFF

        setattr(StateBlock, name, property(get, put))


_install()
