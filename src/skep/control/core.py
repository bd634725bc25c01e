"""Guest memory and registers as an ELF core, as `virsh dump --memory-only` writes it, for gdb and crash.

Its addresses are what the first processor's page tables map, and behind these all of memory at its guest-physical
addresses. Each processor is a thread: a note NT_PRSTATUS (struct elf_prstatus of x86-64 Linux) for its registers, and
one of QEMU's own kind, which crash needs to find a kernel at a random address.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skep.control.mappings import Run, runs
from skep.errors import UserError
from skep.memory import PAGE, GuestMemory

_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_ET_CORE, _EM_X86_64 = 4, 62
_PT_LOAD, _PT_NOTE = 1, 4
_RWX = 7
_UNALIGNED = 0  # where p_align is anything else, crash takes the file for one of netdump's
_NT_PRSTATUS = 1
_PRSTATUS = 336
_PRSTATUS_PID, _PRSTATUS_REGISTERS = 32, 112
_USER_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
    "orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
"""struct user_regs_struct, 8 bytes each."""
_QEMU_GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
_QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldtr", "tr", "gdtr", "idtr")
_QEMU_VERSION, _QEMU_SIZE = 1, 440
_KERNEL_GS_BASE = 0xC000_0102
_CHUNK = 16 << 20
_MOST_RUNS = 60_000
"""A file has 65,534 program headers at most."""


def write_core(path: Path, memory: GuestMemory, processors: Sequence[dict[str, Any]]) -> int:
    """Write a core of a frozen VM; ``processors`` are states as :class:`skep.engine.contract.Vcpu` gives them.

    The file is for its user alone, and under its name it is complete or not there at all. Returns its length. Pages
    that the guest never touched are holes. Raises UserError for what the file system refuses.
    """
    at = sum(region.size for region in memory.ram)
    # All of one kind, then all of the other: crash counts on it.
    notes = b"".join(_note(b"CORE\0", _NT_PRSTATUS, _prstatus(*one)) for one in enumerate(processors))
    notes += b"".join(_note(b"QEMU\0", 0, _qemu(state)) for state in processors)
    loads = runs(memory, processors[0], _MOST_RUNS) if processors else []
    loads += [Run(region.gpa, region.gpa, region.size) for region in memory.ram]
    count = 1 + len(loads)
    notes_at = _ELF.size + count * _PROGRAM.size
    data_at = -(-(notes_at + len(notes)) // PAGE) * PAGE
    header = _ELF.pack(
        *(b"\x7fELF\2\1\1".ljust(16, b"\0"), _ET_CORE, _EM_X86_64, 1, 0, _ELF.size, 0, 0),
        *(_ELF.size, _PROGRAM.size, count, 0, 0, 0),
    )
    header += _PROGRAM.pack(_PT_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 4)
    for va, gpa, size in loads:
        # In the file, as in its memfd, high RAM follows low RAM at once.
        place = data_at + (gpa if gpa < memory.high_base else gpa - memory.high_base + memory.low_size)
        header += _PROGRAM.pack(_PT_LOAD, _RWX, place, va, gpa, size, size, _UNALIGNED)
    try:
        if path.exists() and not path.is_file():
            raise UserError("exists, and is no file", path)
        _write(path, header + notes, data_at, memory.fd, at)
    except (OSError, ValueError) as error:  # ValueError: no name that a file could have
        raise UserError((getattr(error, "strerror", None) or str(error)).lower(), path) from None
    return data_at + at


def _write(path: Path, header: bytes, data_at: int, source: int, size: int) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.pwrite(fd, header, 0)
            _copy_data(source, fd, data_at, size)
            os.ftruncate(fd, data_at + size)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _copy_data(source: int, sink: int, at: int, size: int) -> None:
    """What there is of a sparse file, ``at`` bytes further on in another. Our own descriptor's offset is another's, so
    the source is never sought in: a descriptor of its own is."""
    own = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = 0
        while end < size:
            try:
                start = os.lseek(own, end, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but holes from here on
                return
            end = min(os.lseek(own, start, os.SEEK_HOLE), size)
            os.lseek(sink, at + start, os.SEEK_SET)
            while start < end:
                start += os.sendfile(sink, own, start, min(end - start, _CHUNK))
    finally:
        os.close(own)


def _prstatus(number: int, state: dict[str, Any]) -> bytes:
    status = bytearray(_PRSTATUS)
    struct.pack_into("<I", status, _PRSTATUS_PID, number + 1)
    values = [_user_register(state, name) for name in _USER_REGISTERS]
    struct.pack_into(f"<{len(values)}Q", status, _PRSTATUS_REGISTERS, *values)
    return bytes(status)


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    return _NOTE.pack(len(name), len(data), kind) + _padded(name) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 4) * 4, b"\0")


def _user_register(state: dict[str, Any], name: str) -> int:
    if name in ("fs_base", "gs_base"):
        return int(state.get(name[:2], {}).get("base", 0))
    value = state.get(name, 0)
    return int(value["selector"] if isinstance(value, dict) else value)


def _qemu(state: dict[str, Any]) -> bytes:
    """struct QEMUCPUState, version 1 (QEMU, target/i386/arch_dump.c)."""
    data = struct.pack("<II", _QEMU_VERSION, _QEMU_SIZE)
    data += struct.pack("<18Q", *(state.get(name, 0) for name in _QEMU_GENERAL))
    for name in _QEMU_SEGMENTS:
        segment = state.get(name, {})
        flags = segment.get("attributes", 0) << 8  # as in a descriptor's second word
        words = (segment.get("selector", 0), segment.get("limit", 0) & 0xFFFF_FFFF, flags, 0, segment.get("base", 0))
        data += struct.pack("<IIIIQ", *words)
    data += struct.pack("<5Q", *(state.get(name, 0) for name in ("cr0", "cr1", "cr2", "cr3", "cr4")))
    data += struct.pack("<Q", state.get("msrs", {}).get(_KERNEL_GS_BASE, 0))
    return data
