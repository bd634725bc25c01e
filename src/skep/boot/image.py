"""What a board wants of a boot protocol, and which one a kernel's file asks for: a VM imports one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from skep.boot.e820 import E820
from skep.boot.files import BootFiles, FileName
from skep.engine.amd64.registers import CpuState
from skep.memory import GuestMemory

_ELF = b"\x7fELF"


class BootImage(Protocol):
    """The files of one boot, read once and checked."""

    ports: Sequence[tuple[int, int]]
    """What the boot protocol wants written to ports, a byte each, when everything else is in its place."""

    def load(self, memory: GuestMemory, e820: Sequence[E820], rsdp: int) -> CpuState:
        """Put everything into cleared RAM and say how the first CPU starts; for each reset anew.

        ``rsdp`` is where the ACPI tables begin, 0 without them. Raises UserError where memory is too small.
        """

    def close(self) -> None: ...


def open_multiboot(kernel: FileName, module: FileName | None = None, cmdline: str = "") -> BootImage:
    """A kernel by the Multiboot Specification. Raises UserError."""
    from skep.boot.multiboot import MultibootImage

    files = BootFiles(kernel, module, cmdline)
    try:
        return MultibootImage(files)
    except BaseException:
        files.close()
        raise


def open_image(kernel: FileName, initrd: FileName | None = None, cmdline: str = "") -> BootImage:
    """By its content: an ELF file has a PVH entry, anything else has to be a Linux bzImage. Raises UserError."""
    files = BootFiles(kernel, initrd, cmdline)
    try:
        if files.kernel.read(len(_ELF)) == _ELF:
            from skep.boot.pvh import PvhImage

            return PvhImage(files)
        from skep.boot.linux import LinuxImage

        return LinuxImage(files)
    except BaseException:
        files.close()
        raise
