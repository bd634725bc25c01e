"""As much of a PC's BIOS as a Multiboot kernel may rely on before it takes the machine over (Multiboot 3.2).

The 8259 pair has the BIOS's vectors, only the timer's input is open, and the timer ticks at its slowest, 18.2 Hz. In
real mode every vector leads to an IRET, the timer's to one that ends the interrupt, where they stand since the PC/AT.
There are no services.
"""

from __future__ import annotations

from skep.memory import GuestMemory

BIOS_SEGMENT, TIMER_ENTRY, IRET_ENTRY = 0xF000, 0xFEA5, 0xFF53
TIMER_VECTOR, SLAVE_VECTORS = 0x08, 0x70
_TIMER = bytes.fromhex("50 b020 e620 58 cf")  # push ax; mov al, 0x20; out 0x20, al; pop ax; iret
_IRET = b"\xcf"

PORTS: tuple[tuple[int, int], ...] = (
    (0x20, 0x11), (0x21, TIMER_VECTOR), (0x21, 1 << 2), (0x21, 0x01), (0x21, 0xFA),  # ICW1 to ICW4, IMR: 0 and 2 open
    (0xA0, 0x11), (0xA1, SLAVE_VECTORS), (0xA1, 2), (0xA1, 0x01), (0xA1, 0xFF),
    (0x43, 0x36), (0x40, 0), (0x40, 0),  # counter 0, mode 3, 65,536
)  # fmt: skip
"""What it writes to ports, a byte each."""


def write(memory: GuestMemory) -> None:
    """Its handlers, and the table of real mode's interrupts."""
    memory.write((BIOS_SEGMENT << 4) + TIMER_ENTRY, _TIMER)
    memory.write((BIOS_SEGMENT << 4) + IRET_ENTRY, _IRET)
    for vector in range(256):
        entry = TIMER_ENTRY if vector == TIMER_VECTOR else IRET_ENTRY
        memory.write(4 * vector, (BIOS_SEGMENT << 16 | entry).to_bytes(4, "little"))
