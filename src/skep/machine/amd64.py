"""The amd64 board: a PC without a BIOS, as Linux and others know it from ACPI.

:mod:`skep.machine.amd64map` says where everything is, :mod:`skep.machine.amd64tables` what the guest is told of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from skep.boot.image import BootImage, open_image, open_multiboot
from skep.bus import Bus
from skep.bus.pci import FUNCTIONS, SLOTS, HostBridge, PciBus
from skep.clock import GuestClock
from skep.config import Node, Settings, Tree, View, option, values, view
from skep.contracts.device import Device
from skep.contracts.interrupts import LocalInterrupts
from skep.contracts.io import IoSpace, IrqLine
from skep.devices import pm
from skep.devices.i8042 import I8042
from skep.devices.ps2keyboard import Ps2Keyboard
from skep.devices.rtc import Rtc
from skep.devices.uart import Uart
from skep.devices.vmgenid import VmGenId
from skep.engine.amd64 import msrs
from skep.engine.amd64.cpuid import PHYSICAL_BITS
from skep.engine.amd64.registers import Attr, CpuState, Cr0, Rflags, Segment
from skep.engine.amd64.tsc import guest_counter, tsc_hz
from skep.engine.contract import Engine, EngineVm
from skep.errors import HostError, UserError
from skep.firmware import acpi
from skep.irqchip import hpet, ioapic, lapic
from skep.irqchip.apicbus import ApicBus
from skep.irqchip.hosted import HostedApic, HostedApics
from skep.irqchip.hostedchips import HostedIoApic, HostedPic, HostedPit, LinkedApic
from skep.irqchip.lines import GsiLines
from skep.irqchip.pic import Pic
from skep.irqchip.pit import Pit
from skep.locks import Lock, Order
from skep.machine import Events, PlugSerial
from skep.machine.amd64map import (
    COM_PORTS,
    ECAM_BASE,
    ECAM_SIZE,
    IOAPIC_ID,
    KEYBOARD_IRQ,
    PCI_MEMORY,
    PCI_PORTS,
    RTC_IRQ,
    VMGENID_BASE,
    VMGENID_GPE,
)
from skep.machine.amd64tables import make_tables, memory_map
from skep.machine.pcidevices import Surroundings, check_boot_indexes, make_pci_device
from skep.memory import GuestMemory


class LpcOptions(View):
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
    pc_testdev: bool = option(
        values.boolean, False, key="pc-testdev", doc="the test device of KVM-unit-tests, whose port 0xf4 ends the VM"
    )


class Amd64Board:
    """Implements :class:`skep.machine.Board`."""

    def __init__(
        self,
        tree: Tree,
        settings: Settings,
        memory: GuestMemory,
        events: Events,
        plug: PlugSerial,
        *,
        hosts_apics: bool = False,
        hosts_chips: bool = False,
        scales_tsc: bool = False,
    ) -> None:
        """``hosts_apics``: the engine has the local APICs; ``hosts_chips``: and the other interrupt controllers;
        ``scales_tsc``: it can give the guest a TSC of any frequency."""
        options = view(tree.node("lpc"), LpcOptions)
        counter, hz = _guest_counter(settings.cpu_tsc_khz, scales_tsc)
        self._image = _open_image(settings)
        self.cpus = settings.cpus
        self.memory = memory
        self.lock = Lock("board", Order.BOARD)
        self._paused = False
        self._pressed: list[Callable[[], None]] = []
        self.devices: list[Device] = []
        """Everything with a life, in the order in which it pauses; closed the other way round."""
        with ExitStack() as undo:
            undo.callback(self.close)
            self.clock = GuestClock(counter, hz, self.lock, events.failed)
            self.bus = Bus(self.lock)
            self._hosted_chips: list[HostedIoApic | HostedPic | HostedPit] = []
            self._interrupt_controllers(events, hosts_apics, hosts_chips)
            self._legacy_devices(settings, events)
            self._pci(tree, events, plug)
            if options.pc_testdev:
                self._test_device(events)
            self._serial = self._serial_ports((options.com1, options.com2, options.com3, options.com4), plug)
            self._tables = make_tables(tree, settings, memory, self._serial, hz)
            undo.pop_all()

    def _interrupt_controllers(self, events: Events, hosts_apics: bool, hosts_chips: bool) -> None:
        self._hosted = HostedApics(self.lock) if hosts_apics else None
        self.apics = self._hosted or ApicBus(self.lock)
        local_apic: type[lapic.LocalApic] = HostedApic if hosts_apics else lapic.LocalApic
        if hosts_chips:
            local_apic = LinkedApic
            pic, io_apic = HostedPic(self.lock), HostedIoApic(self.apics, IOAPIC_ID, self.lock)
            self._hosted_chips += [pic, io_apic]
            self.pic: Pic = pic
            self.ioapic: ioapic.IoApic = io_apic
        else:
            self.pic = Pic()
            self.ioapic = ioapic.IoApic(self.apics, IOAPIC_ID)
        self.ioapic.attach(self.bus)
        self.pic.attach(self.bus)
        self.lines = GsiLines(self.pic, self.ioapic, self.lock)
        self.lapics = [
            local_apic(i, self.apics, self.clock, self.pic.acknowledge, bsp=i == 0, physical_bits=PHYSICAL_BITS)
            for i in range(self.cpus)
        ]
        for i, apic in enumerate(self.lapics[1:], 1):
            apic.on_init = lambda i=i: events.stop_cpu(i)  # type: ignore[misc]
            apic.on_sipi = lambda vector, i=i: events.start_cpu(i, startup_state(vector))  # type: ignore[misc]
        self.pic.output = lambda level: self.lapics[0].set_lint(0, level)
        views: list[IoSpace] = [lapic.ApicView(self.bus, apic) for apic in self.lapics]
        self._seats = _Seats(self.bus, views)
        self.io: IoSpace = views[0] if self.cpus == 1 else self._seats
        # Where the engine has them: what the I/O APIC sends while they pause must be in its state or in a local APIC's,
        # and nothing may be sent to a local APIC that is not yet what it was.
        self.wiring: list[Device] = [self.lines, self.ioapic, self.pic, *self.lapics]
        self.devices += self.wiring

    def _legacy_devices(self, settings: Settings, events: Events) -> None:
        timer = hpet.Hpet(self.clock, self.lines.source)
        timer.attach(self.bus)
        irq0 = timer.replaceable(self.lines.source(0))
        if self._hosted_chips:
            pit: Pit = self._host_pit(irq0, timer)
        else:
            pit = Pit(self.clock, irq0)
        pit.attach(self.bus)
        self.pm = pm.AcpiPm(
            self.clock,
            self.lines.source(pm.SCI_GSI),
            events.power_off,
            events.reset,
            sleep=events.sleep,
            wake=events.wake,
        )
        self.pm.attach(self.bus)
        rtc = Rtc(
            self.clock,
            timer.replaceable(self.lines.source(RTC_IRQ)),
            low_memory=self.memory.low_size,
            high_memory=self.memory.high_size,
            local_time=settings.rtc_use_localtime,
            alarm=self.pm.note_alarm,
        )
        rtc.attach(self.bus)
        self.time_of_day = rtc.now_ns
        self.keyboard = Ps2Keyboard(self.lock)
        controller = I8042(self.lines.source(KEYBOARD_IRQ), self.keyboard, events.reset)
        controller.attach(self.bus)
        self.generation = VmGenId(self.memory, VMGENID_BASE, lambda: self.pm.raise_event(VMGENID_GPE))
        self.devices.insert(0, pit)  # an engine's ticks by itself, and a tick that is lost would be the last
        self.devices += [rtc, timer, controller, self.pm, self.generation]
        self._awake = (rtc, self.pm)
        """What has power in S3."""

    def _host_pit(self, irq0: IrqLine, timer: hpet.Hpet) -> Pit:
        pit = HostedPit(self.clock, irq0, self.lock)
        timer.on_replacement = pit.replace
        self._hosted_chips.append(pit)
        return pit

    def _test_device(self, events: Events) -> None:
        from skep.devices.pctestdev import PcTestDev

        device = PcTestDev([self.lines.source(gsi) for gsi in range(ioapic.PINS)], events.leave)
        device.attach(self.bus)
        self.devices.append(device)

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

    # The life of the board.

    def reset(self) -> CpuState:
        for device in self.devices:
            device.reset()
        with self.lock:
            self._pressed.clear()
            self.pci.assign(PCI_PORTS, PCI_MEMORY)
        self.memory.clear()
        for address, data in self._tables.places.items():
            self.memory.write(address, data)
        self.generation.place()
        state = self._image.load(self.memory, memory_map(self.memory), self._tables.rsdp)
        for port, value in self._image.ports:
            self.bus.port_write(port, 1, value)
        return {**power_on_state(), **state}

    def sleep(self) -> None:
        for device in self.devices:
            if device not in self._awake:
                device.reset()
        with self.lock:
            self.pci.assign(PCI_PORTS, PCI_MEMORY)

    def wake(self) -> CpuState | None:
        """ACPI 6.4, 5.2.10: real mode at the FACS's waking vector."""
        vector = self.memory.load_u32(self._tables.facs + acpi.WAKING_VECTOR) if self._tables.facs else 0
        return real_mode_state(vector >> 4 & 0xFFFF, vector & 0xF) if vector else None

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
        if hasattr(self, "bus"):
            self.bus.close()
        self._image.close()

    # Processors.

    def adopt(self, vm: EngineVm | None) -> None:
        if self._hosted is not None:
            self._hosted.adopt(vm.local_apics if vm is not None else None)
        for chip in self._hosted_chips:
            chip.adopt(vm.chips if vm is not None else None)
        self.bus.adopt_doorbells(vm.doorbells if vm is not None else None)
        self.bus.adopt_posted(vm.posted if vm is not None else None)

    def interrupts(self, index: int) -> LocalInterrupts:
        return self.lapics[index]

    def enter_cpu(self, index: int) -> None:
        self._seats.take(index)

    def on_kick(self, index: int, kick: Callable[[], None]) -> None:
        self.lapics[index].kick = kick

    def wakes(self, index: int, interrupts_on: bool) -> bool:
        apic = self.lapics[index]
        return apic.nmi_latched > 0 or (interrupts_on and apic.pending())

    def hears_interrupts(self, state: CpuState) -> bool:
        return bool(state.get("rflags", 0) & Rflags.IF)

    # Buttons. Nothing changes while the board is paused: what is pressed then acts when it goes on.

    def complaints(self) -> list[str]:
        functions = self.pci.functions.values()
        return [f"{one.name}: {complaint}" for one in functions for complaint in one.complaints()]

    def power_button(self) -> None:
        self._press(self.pm.press_power_button)

    def nmi(self) -> None:
        self._press(self._pulse_lint1)

    def new_generation(self) -> None:
        self._press(self.generation.renew)

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


def _open_image(settings: Settings) -> BootImage:
    if settings.boot_multiboot is not None:
        if settings.boot_kernel is not None:
            raise UserError("there are two kernels", "boot.multiboot", "leave out boot.kernel, or this one")
        return open_multiboot(settings.boot_multiboot, settings.boot_initrd, settings.boot_cmdline)
    if settings.boot_kernel is None:
        raise UserError("there is nothing to boot", "boot.kernel", "name a Linux kernel, with --kernel")
    return open_image(settings.boot_kernel, settings.boot_initrd, settings.boot_cmdline)


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
    """After INIT and a start-up message: real mode at page ``vector``."""
    return real_mode_state(vector << 8, 0)


def real_mode_state(segment: int, offset: int) -> CpuState:
    """After INIT, but for where it goes on (SDM 3, 9.1.4 and table 9-1)."""
    present = Attr.P | Attr.S | Attr.ACCESSED | Attr.WRITABLE
    data: Segment = {"selector": 0, "base": 0, "limit": 0xFFFF, "attributes": present}
    code: Segment = {
        "selector": segment,
        "base": segment << 4,
        "limit": 0xFFFF,
        "attributes": present | Attr.CODE,
    }
    return {
        **power_on_state(),
        "rip": offset, "cs": code, "ds": data, "es": data, "ss": data, "fs": data, "gs": data,
        "cr0": Cr0.ET | Cr0.NW | Cr0.CD, "cr3": 0,
        "msrs": {msrs.KVM_SYSTEM_TIME_NEW: 0},  # as KVM's INIT has it: what lay there may be another kernel's now
    }  # fmt: skip


# Engines.


def _guest_counter(khz: int | None, scales_tsc: bool) -> tuple[Callable[[], int], int]:
    """See :func:`skep.engine.amd64.tsc.guest_counter`. Raises HostError where the engine has only the host's."""
    counter, hz = guest_counter(khz)
    if hz != tsc_hz() and not scales_tsc:
        what = f"on this host every guest's TSC runs at {tsc_hz() // 1000} kHz, for nothing here can scale it"
        raise HostError(what, "cpu.tsc_khz", "leave it out, or use KVM on a processor with TSC scaling")
    return counter, hz


def choose_engine(
    wanted: str, code_cache: str, code_size: int, kvm_irqchip: str, kvm_dirty_ring: int
) -> tuple[Engine, str]:
    """See :func:`skep.machine.choose_engine`."""
    if wanted == "kvm":
        why = why_not_kvm()
        return _kvm(kvm_irqchip, kvm_dirty_ring), "as configured" if why is None else f"as configured, though {why}"
    if wanted == "translate":
        return _translate(code_cache, code_size), "as configured"
    why = why_not_kvm()
    if why is None:
        return _kvm(kvm_irqchip, kvm_dirty_ring), "the CPU has hardware virtualization, and /dev/kvm opens"
    return _translate(code_cache, code_size), why


def why_not_kvm() -> str | None:
    """What keeps KVM from running any guest here, in words; None if nothing does.

    /dev/kvm alone says little: without VMX or SVM it may run guests in an instruction emulator, which no stock kernel
    survives.
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            flags = next((line for line in info if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    if "vmx" not in flags and "svm" not in flags:
        return "the CPU has neither vmx nor svm"
    try:
        open("/dev/kvm", "r+b", buffering=0).close()
    except PermissionError:
        from skep.engine.kvm.failures import group_of

        return f"/dev/kvm is for the group {group_of('/dev/kvm')} only"
    except OSError as error:
        return f"/dev/kvm does not open: {(error.strerror or str(error)).lower()}"
    return None


def _kvm(irqchip: str, dirty_ring: int) -> Engine:
    from skep.engine.kvm import KvmEngine, can_host_apics, can_host_chips

    if irqchip == "auto":
        irqchip = "whole" if can_host_chips() else "split" if can_host_apics() else "off"
    return KvmEngine(hosts_apics=irqchip == "split", hosts_chips=irqchip == "whole", dirty_ring=dirty_ring)


def _translate(code_cache: str, code_size: int) -> Engine:
    try:
        from skep.engine.translate import TranslateEngine, store
    except ImportError as error:
        if error.name is None or not error.name.startswith("iced_x86"):
            raise
        raise HostError("the translator needs the Python package iced-x86", None, "install it") from None
    from pathlib import Path

    kept = {"on": store.directory(), "off": None}
    return TranslateEngine(kept[code_cache] if code_cache in kept else Path(code_cache), code_size)
