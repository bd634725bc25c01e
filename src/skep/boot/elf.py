"""ELF files of 32 and 64 bits as far as a loader reads them: segments, and the notes beside them (System V ABI, 5)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from skep.boot.files import BootFile
from skep.errors import UserError
from skep.memory import GuestMemory

MAGIC = b"\x7fELF"
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4

_LITTLE_ENDIAN = 1
_MOST_HEADERS = 256
_LONGEST_NOTES = 1 << 16


class Segment(NamedTuple):
    """A program header, without its flags."""

    type: int
    offset: int
    """In the file."""
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    """What is beyond ``filesz`` is zero."""


class ElfFile:
    """Reads the headers of an executable for x86; what it names is inside the file. Raises UserError for all others."""

    def __init__(self, file: BootFile) -> None:
        self.file = file
        ident = file.read(16)
        if ident[:4] != MAGIC or len(ident) < 16 or ident[4] not in (1, 2) or ident[5] != _LITTLE_ENDIAN:
            raise UserError("not an ELF file for x86", file.path)
        self.wide = ident[4] == 2
        form = "<HHIQQQIHHH" if self.wide else "<HHIIIIIHHH"
        header = file.read(struct.calcsize(form), 16)
        if len(header) < struct.calcsize(form):
            raise self._truncated(16 + struct.calcsize(form))
        _, self.machine, _, self.entry, phoff, _, _, _, phentsize, phnum = struct.unpack(form, header)
        if self.machine != (EM_X86_64 if self.wide else EM_386):
            raise UserError(f"an ELF file for another machine ({self.machine})", file.path, "use one for x86")
        self.segments = tuple(self._segments(phoff, phentsize, phnum))

    def _segments(self, phoff: int, phentsize: int, phnum: int) -> Iterator[Segment]:
        form = "<II6Q" if self.wide else "<8I"
        if phentsize != struct.calcsize(form) or phnum > _MOST_HEADERS:
            raise UserError(f"{phnum} program headers of {phentsize} bytes", self.file.path, "that is no kernel")
        table = self.file.read(phnum * phentsize, phoff)
        if len(table) < phnum * phentsize:
            raise self._truncated(phoff + phnum * phentsize)
        for fields in struct.iter_unpack(form, table):
            if self.wide:
                kind, _, offset, vaddr, paddr, filesz, memsz, _ = fields
            else:
                kind, offset, vaddr, paddr, filesz, memsz, _, _ = fields
            if kind in (PT_LOAD, PT_NOTE) and offset + filesz > self.file.size:
                raise self._truncated(offset + filesz)
            if kind == PT_LOAD and filesz > memsz:
                raise UserError("a segment is larger in the file than in memory", self.file.path, "that is no kernel")
            yield Segment(kind, offset, vaddr, paddr, filesz, memsz)

    def _truncated(self, whole: int) -> UserError:
        return UserError(f"the kernel is truncated: {self.file.size} bytes of {whole}", self.file.path)

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Name without its NUL, type, and description of every note."""
        for segment in self.segments:
            if segment.type == PT_NOTE:
                yield from _notes(self.file.read(min(segment.filesz, _LONGEST_NOTES), segment.offset))

    def extent(self) -> tuple[int, int]:
        """The first physical address that is loaded, and the one behind the last; (0, 0) for nothing."""
        loads = [segment for segment in self.segments if segment.type == PT_LOAD and segment.memsz]
        if not loads:
            return 0, 0
        return min(one.paddr for one in loads), max(one.paddr + one.memsz for one in loads)

    def load(self, memory: GuestMemory) -> None:
        """Put every segment at its physical address, all of which is RAM and was zero."""
        for segment in self.segments:
            if segment.type == PT_LOAD and segment.filesz:
                self.file.load(memory, segment.paddr, segment.offset, segment.filesz)


def _notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Until the first that does not fit. Name and description are padded to 4 bytes, in files of 64 bits too."""
    at = 0
    while at + 12 <= len(data):
        namesz, descsz, kind = struct.unpack_from("<III", data, at)
        name = at + 12
        desc = name + (namesz + 3 & ~3)
        at = desc + (descsz + 3 & ~3)
        if desc + descsz > len(data):
            return
        yield data[name : name + namesz].rstrip(b"\0"), kind, data[desc : desc + descsz]
