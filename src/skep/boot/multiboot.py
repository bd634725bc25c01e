"""A kernel by the Multiboot Specification, version 0.6.96: what GRUB loads, and test programs that need no more.

The first processor starts in 32-bit protected mode with flat segments, without paging, interrupts off, EAX the magic
number and EBX the address of the Multiboot information. An initrd is the one module. As GRUB does, the command line and
the module's string begin with the file's name. bios.py has what the specification wants left as a BIOS leaves it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from skep.boot import bios, elf
from skep.boot.e820 import E820
from skep.boot.files import BootFile, BootFiles
from skep.boot.protected import flat_segments
from skep.engine.amd64.registers import CpuState, Cr0, Rflags
from skep.errors import UserError
from skep.memory import GuestMemory

HEADER_MAGIC, LOADER_MAGIC = 0x1BADB002, 0x2BADB002
SEARCH = 8192
"""The header is in the first bytes of the file, at a multiple of 4."""
PAGE_ALIGN, MEMORY_INFO, VIDEO_MODE, ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16
"""Flags of the header: modules on page boundaries, tell of memory, of graphics, and load as the header says."""
_REQUIRED = 0xFFFF
_KNOWN = PAGE_ALIGN | MEMORY_INFO

INFO_MEMORY, INFO_CMDLINE, INFO_MODULES, INFO_MEMORY_MAP, INFO_LOADER_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9

# Where our parts lie in the first 640 KiB.
OURS = INFO = 0x90000
INFO_SIZE = 88
MODULE, NAME = 0x90080, 0x900A0
MEMORY_MAP, MEMORY_MAP_MAX = 0x91000, 0x1000
CMDLINE, MODULE_STRING = 0x92000, 0x96000
CMDLINE_MAX = 0x4000

BOOT_CS, BOOT_DS = 0x08, 0x10
"""There is no table that they name: GDTR is the kernel's to load."""
_LOADER = b"Skep\0"
_MIB = 1 << 20
_PAGE = 4096


class MultibootImage:
    """Implements :class:`skep.boot.image.BootImage`."""

    ports: Sequence[tuple[int, int]] = bios.PORTS

    def __init__(self, files: BootFiles) -> None:
        """``files`` are closed with the image. Raises UserError for what is no Multiboot kernel."""
        self._files = files
        self._program = _program(files.kernel)
        self._cmdline = _named(files.kernel, files.cmdline)
        if len(self._cmdline) > CMDLINE_MAX:
            raise UserError(f"the command line has {len(self._cmdline)} bytes, {CMDLINE_MAX} fit", "boot.cmdline")

    def load(self, memory: GuestMemory, e820: Sequence[E820], rsdp: int) -> CpuState:
        end = self._program.end
        if end > memory.low_size:
            raise self._files.no_room(memory, end)
        bios.write(memory)
        self._program.load(memory)
        memory.write(INFO, self._info(memory, e820, end))
        code, data = flat_segments(BOOT_CS, BOOT_DS)
        return {
            "rip": self._program.entry,
            "rax": LOADER_MAGIC,
            "rbx": INFO,
            "rflags": Rflags.ONE,
            "cs": code,
            "ds": data, "es": data, "fs": data, "gs": data, "ss": data,
            "cr0": Cr0.PE | Cr0.ET,
            "cr3": 0,
        }  # fmt: skip

    def _info(self, memory: GuestMemory, e820: Sequence[E820], end: int) -> bytes:
        """Writes what the Multiboot information points at, and gives that itself (3.3)."""
        memory.write(CMDLINE, self._cmdline)
        memory.write(NAME, _LOADER)
        # each entry is preceded by its size, which does not count itself
        table = b"".join(struct.pack("<I", 20) + struct.pack("<QQI", *entry) for entry in e820)[:MEMORY_MAP_MAX]
        memory.write(MEMORY_MAP, table)
        flags = INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP | INFO_LOADER_NAME | INFO_MODULES
        modules = 0
        initrd = self._files.initrd
        if initrd is not None:
            start = end + _PAGE - 1 & -_PAGE
            if start + initrd.size > memory.low_size:
                raise self._files.no_room(memory, start + initrd.size)
            initrd.load(memory, start, 0, initrd.size)
            memory.write(MODULE_STRING, _named(initrd, b"")[:CMDLINE_MAX])
            memory.write(MODULE, struct.pack("<4I", start, start + initrd.size, MODULE_STRING, 0))
            modules = 1
        lower, upper = 640, (memory.low_size - _MIB) >> 10
        head = struct.pack("<7I", flags, lower, upper, 0, CMDLINE, modules, MODULE)
        symbols = bytes(16)
        rest = struct.pack("<6I", len(table), MEMORY_MAP, 0, 0, 0, NAME)
        return (head + symbols + rest).ljust(INFO_SIZE, b"\0")

    def close(self) -> None:
        self._files.close()


class _Elf:
    """What most kernels are."""

    def __init__(self, file: BootFile) -> None:
        self._elf = elf.ElfFile(file)
        first, self.end = self._elf.extent()
        _check_place(file, first, self.end)
        self.entry = self._elf.entry

    def load(self, memory: GuestMemory) -> None:
        self._elf.load(memory)


class _Flat:
    """One piece of the file, placed as the header says (3.1.3)."""

    def __init__(self, file: BootFile, at: int, fields: tuple[int, ...]) -> None:
        self._file = file
        header_addr, self._load_addr, load_end, bss_end, self.entry = fields
        self._start = at - (header_addr - self._load_addr)
        self._size = (load_end - self._load_addr) if load_end else file.size - self._start
        self.end = max(bss_end, self._load_addr + self._size)
        if self._start < 0 or self._size < 0 or self._start + self._size > file.size:
            raise UserError("its Multiboot header names addresses outside the file", file.path, "that is no kernel")
        _check_place(file, self._load_addr, self.end)

    def load(self, memory: GuestMemory) -> None:
        self._file.load(memory, self._load_addr, self._start, self._size)


def _program(file: BootFile) -> _Elf | _Flat:
    at, flags = _header(file)
    if flags & ADDRESSES:
        fields = file.read(20, at + 12)
        if len(fields) == 20:
            return _Flat(file, at, struct.unpack("<5I", fields))
    elif file.read(len(elf.MAGIC)) == elf.MAGIC:
        return _Elf(file)
    raise UserError("its Multiboot header does not say where it is loaded, and it is no ELF file", file.path)


def _header(file: BootFile) -> tuple[int, int]:
    """Where the header is, and its flags. Magic, flags and checksum are 0 together."""
    data = file.read(SEARCH)
    for at in range(0, len(data) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<3I", data, at)
        if magic == HEADER_MAGIC and not magic + flags + checksum & 0xFFFFFFFF:
            unknown = flags & _REQUIRED & ~_KNOWN
            if unknown:
                raise UserError(f"it wants of a Multiboot loader what there is not (flags {unknown:#x})", file.path)
            return at, flags
    raise UserError("not a Multiboot kernel", file.path, "pass a Linux kernel with --kernel")


def _check_place(file: BootFile, first: int, end: int) -> None:
    """It has to leave room for what we tell it, and for what a PC has between 640 KiB and 1 MiB."""
    if not (first < end <= OURS or _MIB <= first < end <= 1 << 32):
        raise UserError(f"the kernel wants to be loaded at {first:#x}-{end:#x}", file.path, "it cannot be")


def _named(file: BootFile, rest: bytes) -> bytes:
    name = os.fsencode(file.path)
    return (name + b" " + rest if rest else name) + b"\0"
