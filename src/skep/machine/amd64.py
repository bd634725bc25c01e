"""The amd64 board: a PC without a BIOS, as Linux and others know it from ACPI.

Guest-physical addresses:

=====================  ==========================================================================
0-0x9fbff              RAM; the boot loader's parts (:mod:`skep.boot`) lie here
0x9fc00-0xdffff        RAM, told to nobody: where a PC has its EBDA, VGA and option ROMs
0xe0000-0xeffff        ACPI tables
0xf0000-0xfffff        where a PC's BIOS is: MP table, SMBIOS tables
0x100000-3 GiB         RAM
0xc0000000-0xdfffffff  windows of PCI devices (32-bit BARs)
0xe0000000-0xe00fffff  PCI configuration space (ECAM), bus 0
0xfec00000             I/O APIC
0xfed00000             HPET
0xfee00000             local APICs; MSIs are writes to 0xfee00000-0xfeefffff
4 GiB-                 RAM beyond 3 GiB
=====================  ==========================================================================

Ports: 0x20, 0xa0, 0x4d0 8259 pair; 0x40, 0x61 8254; 0x60, 0x64, 0x92 reset and A20; 0x70 RTC; 0x3f8, 0x2f8, 0x3e8,
0x2e8 COM1 to COM4; 0x600 ACPI PM1a and timer; 0xcf8-0xcff PCI, 0xcf9 reset; 0xc000-0xffff windows of PCI devices (I/O
BARs).

Interrupts (GSIs): 0 8254 (pin 2 of the I/O APIC), 3 COM2 and COM4, 4 COM1 and COM3, 8 RTC, 9 SCI; 16-23 the INTx pins
of PCI slots.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import UUID

from skep.boot.e820 import E820, RangeType
from skep.boot.image import open_image
from skep.bus import Bus
from skep.bus.pci import FUNCTIONS, SLOTS, HostBridge, PciBus, intx_gsi
from skep.clock import GuestClock
from skep.config import Node, Settings, Tree, option, values, view
from skep.contracts.device import Device
from skep.contracts.interrupts import LocalInterrupts
from skep.contracts.io import IoSpace
from skep.devices import pm
from skep.devices.i8042 import I8042
from skep.devices.rtc import Rtc
from skep.devices.uart import Uart
from skep.devices.virtio.pci import VirtioPci
from skep.engine.amd64 import cpuid
from skep.engine.amd64.registers import Attr, CpuState, Cr0, Rflags, Segment
from skep.engine.amd64.tsc import read_tsc, tsc_hz
from skep.engine.contract import Engine
from skep.errors import HostError, UserError
from skep.firmware import acpi, mptable, smbios
from skep.irqchip import hpet, ioapic, lapic
from skep.irqchip.apicbus import ApicBus
from skep.irqchip.lines import PIT_PIN, GsiLines
from skep.irqchip.pic import Pic
from skep.irqchip.pit import Pit
from skep.locks import Lock, Order
from skep.machine import Events, PlugSerial
from skep.machine.pcidevices import Surroundings, check_boot_indexes, make_pci_device
from skep.memory import GuestMemory

LOW_RAM_END = 0x9FC00
ACPI_BASE, ACPI_SIZE = 0xE0000, 0x10000
BIOS_BASE, BIOS_SIZE = 0xF0000, 0x10000
MPTABLE_BASE, SMBIOS_BASE = 0xF0000, 0xF8000
HIGH_MEMORY = 1 << 20
PCI_MEMORY = range(0xC000_0000, 0xE000_0000)
PCI_PORTS = range(0xC000, 0x1_0000)
ECAM_BASE, ECAM_SIZE = 0xE000_0000, 1 << 20
COM_PORTS = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
"""First port and IRQ of COM1 to COM4."""
RTC_IRQ, RTC_CENTURY = 8, 0x32
IOAPIC_ID = 0
PCI_ROUTING = tuple((slot, pin, intx_gsi(slot, pin)) for slot in range(1, SLOTS) for pin in range(4))
"""(slot, pin from 0 for INTA, GSI) of every interrupt pin."""


@dataclass(frozen=True, slots=True)
class LpcOptions:
    """What hangs on the board itself."""

    com1: str | None = option(
        values.text,
        None,
        key="com1.path",
        doc="the first serial port: stdio, none, pty, unix:PATH, tcp:HOST:PORT or file:PATH",
    )
    com2: str | None = option(values.text, None, key="com2.path", doc="the second, likewise")
    com3: str | None = option(values.text, None, key="com3.path", doc="the third")
    com4: str | None = option(values.text, None, key="com4.path", doc="the fourth")


@dataclass(frozen=True, slots=True)
class X86Options:
    """What is x86's own."""

    mptable: bool = option(values.boolean, True, doc="describe processors and interrupts by an MP table too")


class Amd64Board:
    """Implements :class:`skep.machine.Board`."""

    def __init__(
        self, tree: Tree, settings: Settings, memory: GuestMemory, events: Events, plug: PlugSerial
    ) -> None:
        options = view(tree.node("lpc"), LpcOptions)
        if settings.boot_kernel is None:
            raise UserError("there is nothing to boot", "boot.kernel", "name a Linux kernel, with --kernel")
        self._image = open_image(settings.boot_kernel, settings.boot_initrd, settings.boot_cmdline)
        self.cpus = settings.cpus
        self._possible_cpus = settings.max_cpus or settings.cpus
        self.memory = memory
        self.lock = Lock("board", Order.BOARD)
        self._paused = False
        self._pressed: list[Callable[[], None]] = []
        self.devices: list[Device] = []
        """Everything with a life, in the order in which it pauses; closed the other way round."""
        with ExitStack() as undo:
            undo.callback(self.close)
            self.clock = GuestClock(read_tsc, tsc_hz(), self.lock, events.failed)
            self.bus = Bus(self.lock)
            self._interrupt_controllers(events)
            self._legacy_devices(settings, events)
            self._pci(tree, events, plug)
            self._serial = self._serial_ports((options.com1, options.com2, options.com3, options.com4), plug)
            self._acpi = self._acpi_tables() if settings.acpi_tables else None
            self._firmware = self._other_tables(tree, settings)
            undo.pop_all()

    def _interrupt_controllers(self, events: Events) -> None:
        self.apics = ApicBus(self.lock)
        self.pic = Pic()
        self.ioapic = ioapic.IoApic(self.apics, IOAPIC_ID)
        self.ioapic.attach(self.bus)
        self.pic.attach(self.bus)
        self.lines = GsiLines(self.pic, self.ioapic, self.lock)
        self.lapics = [
            lapic.LocalApic(i, self.apics, self.clock, self.pic.acknowledge, bsp=i == 0) for i in range(self.cpus)
        ]
        for i, apic in enumerate(self.lapics[1:], 1):
            apic.on_init = lambda i=i: events.stop_cpu(i)  # type: ignore[misc]
            apic.on_sipi = lambda vector, i=i: events.start_cpu(i, startup_state(vector))  # type: ignore[misc]
        self.pic.output = lambda level: self.lapics[0].set_lint(0, level)
        views: list[IoSpace] = [lapic.ApicView(self.bus, apic) for apic in self.lapics]
        self._seats = _Seats(self.bus, views)
        self.io: IoSpace = views[0] if self.cpus == 1 else self._seats
        self.devices += [*self.lapics, self.ioapic, self.pic]

    def _legacy_devices(self, settings: Settings, events: Events) -> None:
        timer = hpet.Hpet(self.clock, self.lines.source)
        timer.attach(self.bus)
        pit = Pit(self.clock, timer.replaceable(self.lines.source(0)))
        pit.attach(self.bus)
        rtc = Rtc(
            self.clock,
            timer.replaceable(self.lines.source(RTC_IRQ)),
            low_memory=self.memory.low_size,
            high_memory=self.memory.high_size,
            local_time=settings.rtc_use_localtime,
        )
        rtc.attach(self.bus)
        keyboard = I8042(events.reset)
        keyboard.attach(self.bus)
        self.pm = pm.AcpiPm(self.clock, self.lines.source(pm.SCI_GSI), events.power_off, events.reset)
        self.pm.attach(self.bus)
        self.devices += [pit, rtc, timer, keyboard, self.pm]

    def _serial_ports(self, paths: Iterable[str | None], plug: PlugSerial) -> tuple[acpi.Serial, ...]:
        """Those that the tree connects to something; the others are not there."""
        found = []
        for number, (path, (port, irq)) in enumerate(zip(paths, COM_PORTS, strict=True), 1):
            if path is not None:
                name = f"com{number}"
                uart = Uart(name, self.lines.source(irq), plug(name, path, f"lpc.{name}.path"), self.lock)
                uart.attach(self.bus, port)
                self.devices.insert(0, uart)
                found.append(acpi.Serial(number, port, irq))
        return tuple(found)

    def _pci(self, tree: Tree, events: Events, plug: PlugSerial) -> None:
        self.pci = PciBus(self.bus, self.apics, self.lines.source, self.pm.reset_control)
        self.pci.attach(ECAM_BASE, ECAM_SIZE)
        self.devices.append(self.pci)
        around = Surroundings(self.memory, self.lock, self.cpus, plug, events.say)
        places = _places(tree)
        check_boot_indexes(node for _, _, node in places)
        for slot, number, node in places:
            device = make_pci_device(node, around)
            self.devices.insert(0, device)
            self.pci.add(device, slot, number)
        if (0, 0) not in self.pci.functions:
            bridge = HostBridge()
            self.devices.append(bridge)
            self.pci.add(bridge, 0)

    def _other_tables(self, tree: Tree, settings: Settings) -> dict[int, bytes]:
        """What firmware leaves in memory besides ACPI, by address."""
        model = cpuid.make(settings.cpu_model, tsc_hz(), cpus=self.cpus)
        tables = {SMBIOS_BASE: self._smbios(tree, settings, model)}
        if view(tree.node("x86"), X86Options).mptable:
            tables[MPTABLE_BASE] = self._mptable(model)
        return tables

    def _acpi_tables(self) -> acpi.Tables:
        platform = acpi.Platform(
            cpus=self.cpus,
            possible_cpus=self._possible_cpus,
            lapic=lapic.DEFAULT_BASE,
            ioapic=ioapic.BASE,
            ioapic_id=IOAPIC_ID,
            sci=pm.SCI_GSI,
            overrides=((0, PIT_PIN),),
            pm1a_event=pm.BASE,
            pm1a_control=pm.BASE + 4,
            pm_timer=pm.BASE + 8,
            pm_timer_32bit=True,
            reset_port=pm.RESET_PORT,
            reset_value=pm.RESET_VALUE,
            s5_sleep_type=pm.SLEEP_TYPE_S5,
            century=RTC_CENTURY,
            serial=self._serial,
            hpet=acpi.Hpet(hpet.BASE, hpet.SIZE, hpet.CAPABILITIES & 0xFFFF_FFFF, hpet.MIN_PERIOD_TICKS),
            pci=acpi.Pci(
                ecam=ECAM_BASE,
                last_bus=(ECAM_SIZE >> 20) - 1,
                memory=(PCI_MEMORY[0], PCI_MEMORY[-1]),
                ports=((0, 0xCF7), (0xD00, 0xFFFF)),
                routing=PCI_ROUTING,
            ),
        )
        return acpi.build(platform, ACPI_BASE, ACPI_SIZE)

    def _mptable(self, model: cpuid.Cpuid) -> bytes:
        signature, _, _, features = model.table[1, 0]
        machine = mptable.Machine(
            cpus=self.cpus,
            signature=signature,
            features=features,
            lapic=lapic.DEFAULT_BASE,
            ioapic=ioapic.BASE,
            ioapic_id=IOAPIC_ID,
            overrides=((0, PIT_PIN),),
            sci=pm.SCI_GSI,
            routing=PCI_ROUTING,
        )
        return mptable.build(machine, MPTABLE_BASE)

    def _smbios(self, tree: Tree, settings: Settings, model: cpuid.Cpuid) -> bytes:
        signature, _, _, features = model.table[1, 0]
        machine = smbios.Machine(
            bios=view(tree.node("bios"), smbios.BiosStrings),
            system=view(tree.node("system"), smbios.SystemStrings),
            board=view(tree.node("board"), smbios.BoardStrings),
            chassis=view(tree.node("chassis"), smbios.ChassisStrings),
            uuid=UUID(settings.uuid) if settings.uuid is not None else smbios.default_uuid(settings.name),
            processor=smbios.Processor(
                manufacturer=model.vendor.decode("ascii"),
                brand=cpuid.BRAND.decode("ascii"),
                identifier=features << 32 | signature,
                mhz=tsc_hz() // 1_000_000,
                cores=self._possible_cpus,
                enabled_cores=self.cpus,
            ),
            memory=tuple((region.gpa, region.size) for region in self.memory.regions),
            rom=(BIOS_BASE, BIOS_SIZE),
        )
        return smbios.build(machine, SMBIOS_BASE)

    def memory_map(self) -> list[E820]:
        """What the guest is told of its memory."""
        memory = self.memory
        ranges = [
            E820(0, LOW_RAM_END, RangeType.RAM),
            E820(ACPI_BASE, ACPI_SIZE, RangeType.ACPI),
            E820(BIOS_BASE, BIOS_SIZE, RangeType.RESERVED),
            E820(HIGH_MEMORY, memory.low_size - HIGH_MEMORY, RangeType.RAM),
            E820(ECAM_BASE, ECAM_SIZE, RangeType.RESERVED),
        ]
        if memory.high_size:
            ranges.append(E820(memory.high_base, memory.high_size, RangeType.RAM))
        return ranges

    # The life of the board.

    def reset(self) -> CpuState:
        for device in self.devices:
            device.reset()
        with self.lock:
            self._pressed.clear()
            self.pci.assign(PCI_PORTS, PCI_MEMORY)
        self.memory.clear()
        rsdp = 0
        if self._acpi is not None:
            self.memory.write(ACPI_BASE, self._acpi.data)
            rsdp = self._acpi.rsdp
        for address, data in self._firmware.items():
            self.memory.write(address, data)
        return {**power_on_state(), **self._image.load(self.memory, self.memory_map(), rsdp)}

    def pause(self) -> None:
        with self.lock:
            self._paused = True
        self.clock.freeze()
        for device in self.devices:
            device.pause()

    def resume(self) -> None:
        for device in reversed(self.devices):
            device.resume()
        self.clock.thaw()
        with self.lock:
            self._paused = False
            pressed, self._pressed = self._pressed, []
            for act in pressed:
                act()

    def close(self) -> None:
        clock = getattr(self, "clock", None)
        if clock is not None:
            clock.close()
        for device in self.devices:
            device.close()
        self.devices.clear()
        self._image.close()

    # Processors.

    def interrupts(self, index: int) -> LocalInterrupts:
        return self.lapics[index]

    def enter_cpu(self, index: int) -> None:
        self._seats.take(index)

    def on_kick(self, index: int, kick: Callable[[], None]) -> None:
        self.lapics[index].kick = kick

    def wakes(self, index: int, interrupts_on: bool) -> bool:
        apic = self.lapics[index]
        return apic.nmi_latched or (interrupts_on and apic.pending())

    # Buttons. Nothing changes while the board is paused: what is pressed then acts when it goes on.

    def complaints(self) -> list[str]:
        functions = [one for one in self.pci.functions.values() if isinstance(one, VirtioPci)]
        return [f"{one.name}: {complaint}" for one in functions for complaint in list(one.device.complaints)]

    def power_button(self) -> None:
        self._press(self.pm.press_power_button)

    def nmi(self) -> None:
        self._press(self._pulse_lint1)

    def _press(self, act: Callable[[], None]) -> None:
        with self.lock:
            if not self._paused:
                act()
            elif act not in self._pressed:
                self._pressed.append(act)

    def _pulse_lint1(self) -> None:
        """The wire of a PC's NMI button is LINT1 of every processor (MADT); the guest chooses which of them listens."""
        for apic in self.lapics:
            apic.set_lint(1, True)
            apic.set_lint(1, False)


class _Seats:
    """The I/O space of several processors: each sees its own local APIC, and is known by its thread."""

    def __init__(self, bus: Bus, views: list[IoSpace]) -> None:
        self._views = views
        self._of_thread: dict[int, IoSpace] = {}
        self.port_read = bus.port_read
        self.port_write = bus.port_write

    def take(self, index: int) -> None:
        """The calling thread is processor ``index``. Identifiers of ended threads come back for new ones."""
        self._of_thread[threading.get_ident()] = self._views[index]

    def mmio_read(self, gpa: int, size: int) -> int:
        return self._of_thread[threading.get_ident()].mmio_read(gpa, size)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        self._of_thread[threading.get_ident()].mmio_write(gpa, size, value)


def _places(tree: Tree) -> list[tuple[int, int, Node]]:
    """The PCI functions of the tree, as (slot, function, node), in the order of their places."""
    node = tree.node("pci")
    found = set()
    for key in node.leaves():
        bus, slot, number, *rest = [*key.split("."), "", ""]
        place = [int(part) if part.isdecimal() and len(part) < 4 else -1 for part in (bus, slot, number)]
        if place[0] != 0 or not 0 <= place[1] < SLOTS or not 0 <= place[2] < FUNCTIONS or not rest[0]:
            raise UserError("no such PCI place", node.full(key), "it is pci.0.SLOT.FUNCTION, up to pci.0.31.7")
        found.add((place[1], place[2], f"{bus}.{slot}.{number}"))
    return [(slot, number, node.node(path)) for slot, number, path in sorted(found)]


# Processors' states.


def power_on_state() -> CpuState:
    """What a boot protocol leaves open: general registers 0, no segments, no tables (SDM 3, table 9-1)."""
    none: Segment = {"selector": 0, "base": 0, "limit": 0xFFFF, "attributes": 0}
    ldtr: Segment = {"selector": 0, "base": 0, "limit": 0xFFFF, "attributes": Attr.P | 2}
    tr: Segment = {"selector": 0, "base": 0, "limit": 0xFFFF, "attributes": Attr.P | 11}
    return {
        "rax": 0, "rcx": 0, "rdx": 0, "rbx": 0, "rsp": 0, "rbp": 0, "rsi": 0, "rdi": 0,
        "r8": 0, "r9": 0, "r10": 0, "r11": 0, "r12": 0, "r13": 0, "r14": 0, "r15": 0,
        "rflags": Rflags.ONE,
        "fs": none, "gs": none, "ldtr": ldtr, "tr": tr,
        "gdtr": {"base": 0, "limit": 0xFFFF}, "idtr": {"base": 0, "limit": 0xFFFF},
        "cr2": 0, "cr4": 0, "efer": 0,
        "dr0": 0, "dr1": 0, "dr2": 0, "dr3": 0, "dr6": 0xFFFF0FF0, "dr7": 0x400,
    }  # fmt: skip


def startup_state(vector: int) -> CpuState:
    """After INIT and a start-up message: real mode at page ``vector`` (SDM 3, 9.1.4 and table 9-1)."""
    present = Attr.P | Attr.S | Attr.ACCESSED | Attr.WRITABLE
    data: Segment = {"selector": 0, "base": 0, "limit": 0xFFFF, "attributes": present}
    code: Segment = {
        "selector": vector << 8,
        "base": vector << 12,
        "limit": 0xFFFF,
        "attributes": present | Attr.CODE,
    }
    return {
        **power_on_state(),
        "rip": 0, "cs": code, "ds": data, "es": data, "ss": data, "fs": data, "gs": data,
        "cr0": Cr0.ET | Cr0.NW | Cr0.CD, "cr3": 0,
    }  # fmt: skip


# Engines.


def choose_engine(wanted: str) -> tuple[Engine, str]:
    """See :func:`skep.machine.choose_engine`."""
    if wanted == "kvm":
        return _kvm(), "as configured"
    if wanted == "translate":
        return _translate(), "as configured"
    why = why_not_kvm()
    if why is None:
        return _kvm(), "the CPU has hardware virtualization, and /dev/kvm opens"
    return _translate(), why


def why_not_kvm() -> str | None:
    """What keeps KVM from running any guest here, in words; None if nothing does.

    /dev/kvm alone says little: without VMX or SVM it may run guests in an instruction emulator, which no stock kernel
    survives.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            flags = next((line for line in info if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    if "vmx" not in flags and "svm" not in flags:
        return "the CPU has neither vmx nor svm"
    try:
        open("/dev/kvm", "r+b", buffering=0).close()
    except OSError as error:
        return f"/dev/kvm does not open: {(error.strerror or str(error)).lower()}"
    return None


def _kvm() -> Engine:
    from skep.engine.kvm import KvmEngine

    return KvmEngine()


def _translate() -> Engine:
    try:
        from skep.engine.translate import TranslateEngine
    except ImportError as error:
        if error.name is None or not error.name.startswith("iced_x86"):
            raise
        raise HostError("the translator needs the Python package iced-x86", None, "install it") from None
    return TranslateEngine()
