"""An uncompressed kernel by Xen's PVH boot ABI (docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h in Xen's
sources), which Linux, FreeBSD, Xen and others take.

The kernel's ELF note says where it is entered: in 32-bit protected mode with flat segments, without paging, interrupts
off, EBX pointing at ``hvm_start_info``, version 1, which leads to the rest. Structures and fields are named as there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from skep.boot.e820 import E820
from skep.boot.elf import PT_LOAD, ElfFile
from skep.boot.files import BootFiles
from skep.boot.protected import flat_segments
from skep.engine.amd64.registers import Attr, CpuState, Cr0, Rflags, SystemType
from skep.errors import UserError
from skep.memory import GuestMemory

XEN_ELFNOTE_PHYS32_ENTRY = 18
XEN_HVM_START_MAGIC_VALUE = 0x336EC578

# Where our parts lie in the first 640 KiB.
GDT = 0x1000
TSS, TSS_SIZE = 0x2000, 0x68
START_INFO = 0x6000
MODLIST = 0x6040
MEMMAP, MEMMAP_MAX = 0x7000, 0x1000
CMDLINE = 0x20000
CMDLINE_MAX = 0x10000

BOOT_CS, BOOT_DS, BOOT_TR = 0x08, 0x10, 0x18
_FIRST = 1 << 20
"""Below it are our parts, and a PC's history."""


class PvhImage:
    """Implements :class:`skep.boot.image.BootImage`."""

    ports: Sequence[tuple[int, int]] = ()

    def __init__(self, files: BootFiles) -> None:
        """``files`` are closed with the image. Raises UserError for what is no kernel with a PVH entry."""
        self._files = files
        self._elf = ElfFile(files.kernel)
        self.entry = _phys32_entry(self._elf)
        first, end = self._elf.extent()
        if first < _FIRST or end > 1 << 32:
            where = f"{first:#x}-{end:#x}"
            raise UserError(f"the kernel wants to be loaded at {where}", files.kernel.path, "it cannot be")
        files.check_cmdline(CMDLINE_MAX - 1)

    def load(self, memory: GuestMemory, e820: Sequence[E820], rsdp: int) -> CpuState:
        files = self._files
        _, end = self._elf.extent()
        if end > memory.low_size:
            raise files.no_room(memory, end)
        self._elf.load(memory)
        initrd = files.load_initrd(memory, end, memory.low_size)
        memory.write(CMDLINE, files.cmdline + b"\0")
        if files.initrd is not None:
            memory.write(MODLIST, struct.pack("<4Q", initrd, files.initrd_size, 0, 0))
        memmap = b"".join(struct.pack("<QQII", *entry, 0) for entry in e820)
        memory.write(MEMMAP, memmap[:MEMMAP_MAX])
        memory.write(START_INFO, self._start_info(len(e820), rsdp))
        memory.write(GDT, _gdt())
        return _entry_state(self.entry)

    def _start_info(self, memmap_entries: int, rsdp: int) -> bytes:
        modules = 0 if self._files.initrd is None else 1
        return struct.pack(
            "<IIIIQQQQII",
            XEN_HVM_START_MAGIC_VALUE,
            1,  # version
            0,  # flags: neither privileged nor the initial domain
            modules,
            MODLIST if modules else 0,
            CMDLINE,
            rsdp,
            MEMMAP,
            memmap_entries,
            0,
        )

    def close(self) -> None:
        self._files.close()


def _phys32_entry(elf: ElfFile) -> int:
    for name, kind, desc in elf.notes():
        if name == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(desc) in (4, 8):
            entry = int.from_bytes(desc, "little")
            if any(one.paddr <= entry < one.paddr + one.filesz for one in elf.segments if one.type == PT_LOAD):
                return entry
            raise UserError(f"the PVH entry, {entry:#x}, is outside the kernel", elf.file.path)
    raise UserError("an ELF file without a PVH entry", elf.file.path, "pass a vmlinux with CONFIG_PVH, or a vmlinuz")


def _gdt() -> bytes:
    """Null, 32-bit code, data, and the task state that the ABI asks for."""
    tss = TSS_SIZE - 1 | TSS << 16 | (Attr.P | SystemType.TSS_BUSY) << 40
    return struct.pack("<4Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, tss)


def _entry_state(entry: int) -> CpuState:
    code, data = flat_segments(BOOT_CS, BOOT_DS)
    return {
        "rip": entry,
        "rbx": START_INFO,
        "rflags": Rflags.ONE,
        "cs": code,
        "ds": data,
        "es": data,
        "ss": data,
        "tr": {"selector": BOOT_TR, "base": TSS, "limit": TSS_SIZE - 1, "attributes": Attr.P | SystemType.TSS_BUSY},
        "gdtr": {"base": GDT, "limit": 4 * 8 - 1},
        "cr0": Cr0.PE | Cr0.ET,
        "cr3": 0,
    }
