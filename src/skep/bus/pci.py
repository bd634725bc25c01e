"""PCI: configuration space through ports 0xcf8/0xcfc and ECAM, BARs, capabilities, INTx (PCI 3.0; PCIe 3.0, 7.2).

One root bus, number 0. There is no firmware, so :meth:`PciBus.assign` gives every BAR an address before the guest
starts, as firmware would; the guest may move them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from skep.bus import Bus
from skep.bus.msix import MsiX
from skep.contracts.io import IoRegion, IrqLine, MsiSink
from skep.errors import UserError
from skep.state import Fields

# Offsets in configuration space.
VENDOR_ID, DEVICE_ID, COMMAND, STATUS, REVISION, CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
CACHE_LINE, HEADER_TYPE, BAR0, SUBSYSTEM_VENDOR, SUBSYSTEM = 0x0C, 0x0E, 0x10, 0x2C, 0x2E
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D

COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_OFF = 1 << 0, 1 << 1, 1 << 2, 1 << 10
STATUS_INTERRUPT, STATUS_CAPABILITIES = 1 << 3, 1 << 4
CAP_VENDOR, CAP_MSIX = 0x09, 0x11

ECAM_BYTES_PER_BUS = 1 << 20
SLOTS, FUNCTIONS = 32, 8
INTX_FIRST_GSI, INTX_GSIS = 16, 8


def intx_gsi(slot: int, pin: int) -> int:
    """The GSI of a slot's interrupt pin, 0 to 3 for INTA to INTD; ACPI's _PRT says the same.

    The usual swizzle, over the I/O APIC's eight pins that no ISA interrupt has: level-triggered, shared.
    """
    return INTX_FIRST_GSI + (slot + pin) % INTX_GSIS


class PciIds(NamedTuple):
    """What a driver is found by. ``class_code`` is class, subclass and programming interface: 0x060000."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


class Bar:
    """A base address register, and where its window is now."""

    __slots__ = ("at", "doorbells", "index", "io", "prefetchable", "region", "size", "wide")

    def __init__(
        self,
        index: int,
        size: int,
        region: IoRegion,
        io: bool,
        wide: bool,
        prefetchable: bool,
        doorbells: Mapping[int, int],
    ) -> None:
        """``doorbells``: offsets at which a write only wakes somebody, and the eventfd that does."""
        self.index = index
        self.size = size
        self.region = region
        self.io = io
        self.wide = wide
        self.prefetchable = prefetchable
        self.doorbells = doorbells
        self.at: int | None = None
        """The address on the board's bus; None while it is not decoded, or hidden behind what was there before."""


class PciFunction(Fields):
    """Base of every PCI device: configuration space, windows and interrupts. Implements Device.

    A subclass adds its BARs and capabilities in its constructor, after this one's; :meth:`PciBus.add` puts it on
    the bus. It extends ``reset``, ``config_read`` and ``config_write`` as it needs.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("config", "intx_level", "msix")

    def __init__(self, name: str, ids: PciIds, pin: int | None = None) -> None:
        """``pin`` is 0 to 3 for INTA to INTD, None for a function without."""
        self.name = name
        self.slot = self.number = 0
        self.config = bytearray(0x100)
        self.bars: dict[int, Bar] = {}
        self.msix: MsiX | None = None
        self.intx_level = False
        self._power_on = bytearray(0x100)
        self._writable = bytearray(0x100)
        self._next_capability = 0x40
        self._last_link = CAPABILITIES
        self._msix_control = 0
        self._pin = pin
        self._bus: Bus | None = None
        self._line: IrqLine | None = None
        self._put(VENDOR_ID, 2, ids.vendor)
        self._put(DEVICE_ID, 2, ids.device)
        self._put(REVISION, 1, ids.revision)
        self._put(CLASS, 3, ids.class_code)
        self._put(SUBSYSTEM_VENDOR, 2, ids.subsystem_vendor)
        self._put(SUBSYSTEM, 2, ids.subsystem)
        self._put(COMMAND, 2, 0, writable=0x0547)  # decoding, bus master, parity and SERR# (which never happen), INTx
        self._put(CACHE_LINE, 1, 0, writable=0xFF)
        if pin is not None:
            self._put(INTERRUPT_PIN, 1, pin + 1)
            self._put(INTERRUPT_LINE, 1, 0xFF, writable=0xFF)  # "unknown": the 8259 pair has none of these lines

    # For the constructors of subclasses.

    def add_bar(
        self,
        index: int,
        size: int,
        region: IoRegion,
        *,
        io: bool = False,
        wide: bool = False,
        prefetchable: bool = False,
        doorbells: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """A window of ``size`` bytes, a power of two; ``wide`` is a 64-bit one, which takes the next index too.
        ``doorbells`` are eventfds by offset, open as long as the function is on its bus."""
        least = 4 if io else 16
        if size & (size - 1) or size < least or index + wide > 5 or (io and (wide or size > 256)):
            raise ValueError(f"{self.name}: no such BAR {index} of {size:#x} bytes")
        if any(index <= bar.index + bar.wide and bar.index <= index + wide for bar in self.bars.values()):
            raise ValueError(f"{self.name}: BAR {index} is taken")
        self.bars[index] = Bar(index, size, region, io, wide, prefetchable, doorbells)
        kind = 1 if io else wide << 2 | prefetchable << 3
        width = 8 if wide else 4
        self._put(BAR0 + 4 * index, width, kind, writable=(1 << 8 * width) - size)

    def add_capability(self, capability: int, body: bytes, writable: bytes = b"") -> int:
        """``body`` follows the capability's ID and link; returns the offset of the ID. ``writable`` masks ``body``."""
        offset = self._next_capability
        if offset + 2 + len(body) > 0x100:
            raise ValueError(f"{self.name}: no room for capability {capability:#x}")
        self._put(offset, 1, capability)
        for i, byte in enumerate(body):
            self._put(offset + 2 + i, 1, byte, writable=writable[i] if i < len(writable) else 0)
        self._put(self._last_link, 1, offset)
        self._put(STATUS, 2, STATUS_CAPABILITIES)
        self._last_link = offset + 1
        self._next_capability = (offset + 2 + len(body) + 3) & ~3
        return offset

    def add_msix(self, vectors: int, bar: int) -> MsiX:
        """MSI-X with the table and pending bits in a 32-bit BAR of their own."""
        self.msix = MsiX(vectors)
        self.add_bar(bar, self.msix.bar_size, self.msix)
        body = (vectors - 1).to_bytes(2, "little") + bar.to_bytes(4, "little")
        body += (self.msix.pba_offset | bar).to_bytes(4, "little")
        self._msix_control = 2 + self.add_capability(CAP_MSIX, body, b"\x00\xc0")
        return self.msix

    def _put(self, offset: int, size: int, value: int, writable: int = 0) -> None:
        """Power-on value and mask of a register."""
        for array, bits in ((self._power_on, value), (self._writable, writable), (self.config, value)):
            array[offset : offset + size] = bits.to_bytes(size, "little")

    # Interrupts.

    def set_intx(self, level: bool) -> None:
        """The function wants, or no longer wants, an interrupt by its pin. Under the board lock."""
        self.intx_level = level
        self._drive_intx()

    def _drive_intx(self) -> None:
        self.config[STATUS] = self.config[STATUS] & ~STATUS_INTERRUPT | (STATUS_INTERRUPT if self.intx_level else 0)
        if self._line is not None:
            off = self.command & COMMAND_INTX_OFF or (self.msix is not None and self.msix.enabled)
            self._line.set(self.intx_level and not off)

    # Configuration space. Offsets are below 4096; there are no extended capabilities.

    @property
    def command(self) -> int:
        return self.config[COMMAND] | self.config[COMMAND + 1] << 8

    def config_read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        end = min(offset + size, len(self.config))
        for at in range(offset, end):
            writable = self._writable[at]
            self.config[at] = self.config[at] & ~writable | value & writable
            value >>= 8
        if offset < COMMAND + 2 and end > COMMAND:
            self._drive_intx()
            self._map()
        elif offset < BAR0 + 24 and end > BAR0:
            self._map()
        elif self.msix is not None and offset < self._msix_control + 2 and end > self._msix_control:
            self.msix.set_control(self.config_read(self._msix_control, 2))
            self._drive_intx()

    # BARs.

    def bar_address(self, index: int) -> int:
        """What the guest wrote there, flags removed."""
        bar = self.bars[index]
        value = self.config_read(BAR0 + 4 * index, 8 if bar.wide else 4)
        return value & ~(3 if bar.io else 15)

    def _map(self) -> None:
        """Put each window where its BAR says. One that would overlap another device's stays hidden."""
        if self._bus is None:
            return
        moved = []
        for bar in self.bars.values():
            decoded = self.command & (COMMAND_IO if bar.io else COMMAND_MEMORY)
            # 0 is no address: firmware and guests use it for "unset".
            wanted = (self.bar_address(bar.index) or None) if decoded else None
            if wanted != bar.at:
                self._unmap(bar)
                if wanted is not None:
                    moved.append((bar, wanted))
        for bar, wanted in moved:
            try:
                if bar.io:
                    self._bus.add_ports(wanted, bar.size, bar.region, self.name)
                else:
                    self._bus.add_mmio(wanted, bar.size, bar.region, self.name)
            except ValueError:
                continue
            bar.at = wanted
            for offset, fd in bar.doorbells.items():
                self._bus.add_doorbell(wanted + offset, fd)

    def _unmap(self, bar: Bar) -> None:
        if bar.at is not None and self._bus is not None:
            for offset in bar.doorbells:
                self._bus.remove_doorbell(bar.at + offset)
            (self._bus.remove_ports if bar.io else self._bus.remove_mmio)(bar.at)
            bar.at = None

    # The life of a device.

    def connect(self, pci: PciBus, slot: int, number: int) -> None:
        """Called by :meth:`PciBus.add`."""
        self.slot, self.number = slot, number
        self._bus = pci.bus
        if self.msix is not None:
            self.msix.connect(pci.msi, pci.bus.lock)
        if self._pin is not None:
            self._line = pci.intx(intx_gsi(slot, self._pin))

    def set_multifunction(self) -> None:
        self._put(HEADER_TYPE, 1, 0x80)

    def reset(self) -> None:
        """Power-on; BARs are unset until :meth:`PciBus.assign`."""
        self.config[:] = self._power_on
        if self.msix is not None:
            self.msix.reset()
        self.set_intx(False)
        self._map()

    def pause(self) -> None:
        """Configuration space changes only by the guest's accesses."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def loaded(self) -> None:
        self._drive_intx()
        self._map()

    def complaints(self) -> list[str]:
        """What its driver did wrong, and the host to it: the last few times."""
        return []

    def close(self) -> None:
        """The bus no longer knows its windows."""
        for bar in self.bars.values():
            self._unmap(bar)
        self._bus = None
        if self.msix is not None:
            self.msix.close()


class HostBridge(PciFunction):
    """Function 0:0.0, which a root bus must have; it has nothing to configure.

    8086:0d57 is Intel's ID for a virtual host bridge, which Firecracker and Cloud Hypervisor show too: guests
    have no chipset quirks for it, and Linux's probe of ports 0xcf8/0xcfc finds its class.
    """

    def __init__(self) -> None:
        super().__init__("hostbridge", PciIds(0x8086, 0x0D57, 0x06_0000))


class PciBus(Fields):
    """The root bus: who is there, and the two ways to their configuration spaces.

    ``reset_control`` answers port 0xcf9, a byte in the middle of CONFIG_ADDRESS's dword.
    """

    name = "pci"
    state_fields: ClassVar[tuple[str, ...]] = ("address",)

    def __init__(
        self, bus: Bus, msi: MsiSink, intx: Callable[[int], IrqLine], reset_control: IoRegion | None = None
    ) -> None:
        """``intx`` gives a new wire to a GSI."""
        self.bus = bus
        self.msi = msi
        self.intx = intx
        self.functions: dict[tuple[int, int], PciFunction] = {}
        self.ecam = _Ecam(self)
        self._reset_control = reset_control
        self.address = 0

    def add(self, function: PciFunction, slot: int, number: int = 0) -> None:
        """Before the guest starts. Raises ValueError where there is no such place, or it is taken."""
        if not (0 <= slot < SLOTS and 0 <= number < FUNCTIONS) or (slot, number) in self.functions:
            raise ValueError(f"no free PCI place {slot}.{number} for {function.name}")
        self.functions[slot, number] = function
        function.connect(self, slot, number)
        same = [other for (at, _), other in self.functions.items() if at == slot]
        if len(same) > 1:
            for other in same:
                other.set_multifunction()

    def assign(self, io: range, mmio: range) -> None:
        """Give every BAR its place in these windows, the largest first, and turn decoding on: what firmware does.

        After every reset of the functions. Raises UserError where the windows are too small.
        """
        free = {True: io.start, False: mmio.start}
        bars = [(function, bar) for function in self.functions.values() for bar in function.bars.values()]
        for function, bar in sorted(bars, key=lambda one: -one[1].size):
            at = (free[bar.io] + bar.size - 1) & -bar.size
            free[bar.io] = at + bar.size
            if free[bar.io] > (io if bar.io else mmio).stop:
                raise UserError("no room for its PCI windows", function.name, "use fewer devices")
            offset = BAR0 + 4 * bar.index
            function.config_write(offset, 4, at & 0xFFFF_FFFF)
            if bar.wide:
                function.config_write(offset + 4, 4, at >> 32)
        for function in self.functions.values():
            kinds = {bar.io for bar in function.bars.values()}
            decode = COMMAND_IO * (True in kinds) | COMMAND_MEMORY * (False in kinds)
            function.config_write(COMMAND, 2, function.command | decode)

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(self, 8), (self.ecam, ECAM_BYTES_PER_BUS)]

    def attach(self, ecam_base: int, ecam_size: int = ECAM_BYTES_PER_BUS) -> None:
        self.bus.add_ports(0xCF8, 8, self)
        self.bus.add_mmio(ecam_base, ecam_size, self.ecam, self.name)

    def reset(self) -> None:
        self.address = 0

    def pause(self) -> None:
        """Nothing happens to it but by the guest's accesses."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def close(self) -> None:
        """The functions are closed by who made them."""

    # Ports 0xcf8-0xcff: CONFIG_ADDRESS, which only a dword reaches, and CONFIG_DATA.

    def read(self, offset: int, size: int) -> int:
        if offset >= 4:
            function = self._selected()
            if function is not None:
                return function.config_read(self.address & 0xFC | offset & 3, size)
        elif offset == 0 and size == 4:
            return self.address
        elif offset == 1 and size == 1 and self._reset_control is not None:
            return self._reset_control.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= 4:
            function = self._selected()
            if function is not None:
                function.config_write(self.address & 0xFC | offset & 3, size, value)
        elif offset == 0 and size == 4:
            self.address = value & 0x80FF_FFFC
        elif offset == 1 and size == 1 and self._reset_control is not None:
            self._reset_control.write(0, 1, value)

    def _selected(self) -> PciFunction | None:
        address = self.address
        if address >> 31 and not address >> 16 & 0xFF:
            return self.functions.get((address >> 11 & 31, address >> 8 & 7))
        return None


class _Ecam:
    """Configuration space in memory: bus << 20 | slot << 15 | function << 12 | offset."""

    def __init__(self, pci: PciBus) -> None:
        self._functions = pci.functions

    def read(self, offset: int, size: int) -> int:
        function = self._functions.get((offset >> 15, offset >> 12 & 7))  # beyond slot 31: other buses, nobody
        return (1 << 8 * size) - 1 if function is None else function.config_read(offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        function = self._functions.get((offset >> 15, offset >> 12 & 7))
        if function is not None:
            function.config_write(offset & 0xFFF, size, value)
