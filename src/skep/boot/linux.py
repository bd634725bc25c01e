"""Linux by the 64-bit boot protocol (Documentation/arch/x86/boot.rst in the kernel's sources).

The kernel is entered in long mode, as "64-bit boot protocol" says: identity page tables, flat segments, interrupts off,
RSI pointing at the zero page. Its decompressor does the rest, KASLR included. Field names are those of boot.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from skep.boot.e820 import E820
from skep.boot.files import BootFiles
from skep.engine.amd64.registers import Attr, CpuState, Cr0, Cr4, Efer, Pte, Rflags, Segment
from skep.errors import UserError
from skep.memory import GuestMemory

# Where our parts lie in the first 640 KiB.
GDT = 0x1000
ZERO_PAGE = 0x7000
PAGE_TABLES = 0x9000  # PML4, PDPT and four page directories
STACK = 0x20000  # grows down; the kernel brings its own at once
CMDLINE = 0x20000
CMDLINE_MAX = 0x10000

BOOT_CS, BOOT_DS = 0x10, 0x18  # __BOOT_CS, __BOOT_DS
_MAPPED = 4 << 30  # identity-mapped

_HEADER = 0x1F1  # of the file and of the zero page alike
_HEADER_MAX = 0x290  # there the zero page goes on
_OLDEST = 0x20C  # protocol 2.12: xloadflags
_XLF_KERNEL_64 = 1 << 0
_LOADER_UNDEFINED = 0xFF
_ENTRY_64 = 0x200


class Header(NamedTuple):
    """The fields of the setup header that we read."""

    setup_sects: int
    syssize: int
    initrd_addr_max: int
    cmdline_size: int
    pref_address: int
    init_size: int
    raw: bytes
    """The header from 0x1f1 to its end, for the zero page."""


class LinuxImage:
    """Implements :class:`skep.boot.image.BootImage`."""

    ports: Sequence[tuple[int, int]] = ()

    def __init__(self, files: BootFiles) -> None:
        """``files`` are closed with the image. Raises UserError where the kernel is none, or takes no such command
        line."""
        self._files = files
        self.header = parse_header(files.kernel.read(_HEADER_MAX), files.kernel.size, files.kernel.path)
        files.check_cmdline(min(self.header.cmdline_size or 255, CMDLINE_MAX - 1))

    def load(self, memory: GuestMemory, e820: Sequence[E820], rsdp: int) -> CpuState:
        header, files = self.header, self._files
        load = header.pref_address
        end = load + header.init_size
        if end > memory.low_size:
            raise files.no_room(memory, end)
        files.kernel.load(memory, load, (header.setup_sects + 1) * 512, header.syssize * 16)
        initrd = files.load_initrd(memory, end, header.initrd_addr_max + 1)
        memory.write(CMDLINE, files.cmdline + b"\0")
        memory.write(ZERO_PAGE, self._zero_page(initrd, e820, rsdp))
        memory.write(GDT, _gdt())
        memory.write(PAGE_TABLES, _identity_map())
        return _entry_state(load + _ENTRY_64)

    def _zero_page(self, initrd: int, e820: Sequence[E820], rsdp: int) -> bytes:
        page = bytearray(4096)
        page[_HEADER : _HEADER + len(self.header.raw)] = self.header.raw
        struct.pack_into("<Q", page, 0x070, rsdp)  # acpi_rsdp_addr
        page[0x210] = _LOADER_UNDEFINED  # type_of_loader
        struct.pack_into("<II", page, 0x218, initrd, self._files.initrd_size)  # ramdisk_image, ramdisk_size
        struct.pack_into("<I", page, 0x228, CMDLINE)  # cmd_line_ptr
        page[0x1E8] = len(e820)  # e820_entries
        for i, entry in enumerate(e820):
            struct.pack_into("<QQI", page, 0x2D0 + 20 * i, *entry)  # e820_table
        return bytes(page)

    def close(self) -> None:
        self._files.close()


def parse_header(image: bytes, size: int, where: object) -> Header:
    """Check that a file of ``size`` bytes, which begins with ``image``, is a bzImage with a 64-bit entry, and whole."""
    if len(image) < 0x268 or image[0x202:0x206] != b"HdrS" or image[0x1FE:0x200] != b"\x55\xaa":
        raise UserError("not a Linux kernel (bzImage)", where, "pass a vmlinuz file")
    setup_sects, _, syssize = struct.unpack_from("<BHI", image, _HEADER)
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < _OLDEST:
        raise UserError(f"boot protocol {version >> 8}.{version & 0xFF:02} is too old", where, "2.12 (2012) is needed")
    (initrd_addr_max, _, _, _, xloadflags, cmdline_size) = struct.unpack_from("<IIBBHI", image, 0x22C)
    pref_address, init_size = struct.unpack_from("<QI", image, 0x258)
    if not xloadflags & _XLF_KERNEL_64:
        raise UserError("the kernel has no 64-bit entry", where, "use an x86-64 kernel")
    setup_sects = setup_sects or 4  # "for backwards compatibility, if the setup_sects field contains 0, the value is 4"
    whole = (setup_sects + 1) * 512 + syssize * 16
    if size + 15 < whole:  # syssize counts in 16 bytes
        raise UserError(f"the kernel is truncated: {size} bytes of {whole}", where)
    if pref_address < 1 << 20 or pref_address + init_size > _MAPPED:
        raise UserError(f"the kernel wants to be loaded at {pref_address:#x}", where, "it cannot be")
    return Header(
        setup_sects=setup_sects,
        syssize=syssize,
        initrd_addr_max=initrd_addr_max,
        cmdline_size=cmdline_size,
        pref_address=pref_address,
        init_size=init_size,
        raw=image[_HEADER : min(0x202 + image[0x201], _HEADER_MAX)],  # its own end
    )


def _gdt() -> bytes:
    """Null, unused, __BOOT_CS (64-bit code), __BOOT_DS."""
    return struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)


def _identity_map() -> bytes:
    """4 GiB in pages of 2 MiB, which every 64-bit CPU has."""
    table = Pte.P | Pte.RW
    pml4 = struct.pack("<Q", (PAGE_TABLES + 0x1000) | table).ljust(4096, b"\0")
    pdpt = struct.pack("<4Q", *((PAGE_TABLES + 0x2000 + 0x1000 * i) | table for i in range(4))).ljust(4096, b"\0")
    directories = struct.pack("<2048Q", *(i << 21 | table | Pte.PS for i in range(2048)))
    return pml4 + pdpt + directories


def _entry_state(entry: int) -> CpuState:
    present = Attr.P | Attr.S | Attr.G | Attr.ACCESSED
    data: Segment = {
        "selector": BOOT_DS,
        "base": 0,
        "limit": 0xFFFFFFFF,
        "attributes": present | Attr.D | Attr.WRITABLE,
    }
    code: Segment = {
        "selector": BOOT_CS,
        "base": 0,
        "limit": 0xFFFFFFFF,
        "attributes": present | Attr.L | Attr.CODE | Attr.READABLE,
    }
    return {
        "rip": entry,
        "rsi": ZERO_PAGE,
        "rsp": STACK,
        "rflags": Rflags.ONE,
        "cs": code,
        "ds": data,
        "es": data,
        "ss": data,
        "gdtr": {"base": GDT, "limit": 4 * 8 - 1},
        "cr0": Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.PG,
        "cr3": PAGE_TABLES,
        "cr4": Cr4.PAE,
        "efer": Efer.LME | Efer.LMA,
    }
