"""Where everything is on the amd64 board.

Guest-physical addresses:

=====================  ==========================================================================
0-0x9fbff              RAM; the boot loader's parts (:mod:`skep.boot`) lie here
0x9fc00-0xdffff        RAM, told to nobody: where a PC has its EBDA, VGA and option ROMs
0xe0000-0xeffff        ACPI tables
0xf0000-0xfffff        where a PC's BIOS is: MP table, SMBIOS tables, VM generation identifier
0x100000-3 GiB         RAM
0xc0000000-0xdfffffff  windows of PCI devices (32-bit BARs)
0xe0000000-0xe00fffff  PCI configuration space (ECAM), bus 0
0xfec00000             I/O APIC
0xfed00000             HPET
0xfee00000             local APICs; MSIs are writes to 0xfee00000-0xfeefffff
4 GiB-                 RAM beyond 3 GiB
=====================  ==========================================================================

Ports: 0x20, 0xa0, 0x4d0 8259 pair; 0x40, 0x61 8254; 0x60, 0x64, 0x92 keyboard, reset and A20; 0x70 RTC; 0x3f8, 0x2f8,
0x3e8, 0x2e8 COM1 to COM4; 0x600 ACPI PM1a, timer and GPE0; 0xcf8-0xcff PCI, 0xcf9 reset; 0xc000-0xffff windows of PCI
devices (I/O BARs).

Interrupts (GSIs): 0 8254 (pin 2 of the I/O APIC), 1 keyboard, 3 COM2 and COM4, 4 COM1 and COM3, 8 RTC, 9 SCI; 16-23 the
INTx pins of PCI slots.
"""

from __future__ import annotations

from skep.bus.pci import SLOTS, intx_gsi

LOW_RAM_END = 0x9FC00
ACPI_BASE, ACPI_SIZE = 0xE0000, 0x10000
BIOS_BASE, BIOS_SIZE = 0xF0000, 0x10000
MPTABLE_BASE, SMBIOS_BASE, VMGENID_BASE = 0xF0000, 0xF8000, 0xFF000
HIGH_MEMORY = 1 << 20
PCI_MEMORY = range(0xC000_0000, 0xE000_0000)
PCI_PORTS = range(0xC000, 0x1_0000)
ECAM_BASE, ECAM_SIZE = 0xE000_0000, 1 << 20
COM_PORTS = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
"""First port and IRQ of COM1 to COM4."""
VMGENID_GPE = 0
KEYBOARD_IRQ = 1
RTC_IRQ, RTC_CENTURY = 8, 0x32
IOAPIC_ID = 0
PCI_ROUTING = tuple((slot, pin, intx_gsi(slot, pin)) for slot in range(1, SLOTS) for pin in range(4))
"""(slot, pin from 0 for INTA, GSI) of every interrupt pin."""
