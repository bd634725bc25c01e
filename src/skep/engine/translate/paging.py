"""CR3 and what is loaded with it."""

from __future__ import annotations

import struct

from skep.engine.amd64.cpuid import PHYSICAL_BITS
from skep.engine.amd64.registers import Cr0, Cr4, Efer, Pte, Vector
from skep.engine.translate.port import CpuPort, GuestFault

_RESERVED = 0x1E6  # in an entry of the page-directory-pointer table


def load_pdptes(cpu: CpuPort, cr0: int, cr3: int, cr4: int) -> None:
    """The four entries that PAE paging keeps (SDM 3, 4.4.1), where these registers mean that outside long mode. Raises
    #GP before it commits anything."""
    st = cpu.st
    if not (cr0 & Cr0.PG and cr4 & Cr4.PAE) or st.efer & Efer.LME:
        return
    entries = struct.unpack("<4Q", cpu.read_physical(cr3 & 0xFFFF_FFE0, 32))
    for entry in entries:
        if entry & Pte.P and (entry & _RESERVED or entry >> PHYSICAL_BITS):
            raise GuestFault(Vector.GP, 0)
    st.pdpte0, st.pdpte1, st.pdpte2, st.pdpte3 = entries


def load_cr3(cpu: CpuPort, value: int) -> None:
    load_pdptes(cpu, cpu.st.cr0, value, cpu.st.cr4)
    cpu.st.cr3 = value
    cpu.flush_tlb(False)
