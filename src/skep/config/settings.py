"""The keys that belong to the VM as a whole, bhyve's names where bhyve has them."""

from __future__ import annotations

import os

from skep.config import values
from skep.config.tree import Tree
from skep.config.views import View, option, view
from skep.errors import HostError, UserError

MAX_CPUS = 255
"""What 8-bit APIC identifiers can name, less the broadcast."""
HUGE_PAGES = {"auto": None, "off": 0, "transparent": 1, "2M": 2 * values.MIB, "1G": 1024 * values.MIB}
"""The choices of memory.hugepages, for :class:`skep.memory.GuestMemory`."""
_PAGE = 4096
_LEAST_MEMORY = 2 * values.MIB
"""The first MiB is spoken for by a PC's history; a guest needs some of its own."""

BRANCHES = ("pci", "lpc", "bios", "system", "board", "chassis", "x86")
"""Branches of the tree whose keys the devices declare."""


class Settings(View):
    """The VM's own keys, as values."""

    name: str = option(
        values.vm_name, "guest", doc="what the VM is called; `skep run` takes guest-2, guest-3... if it is not given"
    )
    cpus: int = option(values.integer(1, MAX_CPUS), 1, doc="number of virtual CPUs")
    max_cpus: int | None = option(
        values.integer(1, MAX_CPUS), None, doc="how many there could be, as the guest's tables tell; at least cpus"
    )
    memory_size: int = option(
        values.memory_size, 256 * values.MIB, key="memory.size", doc="guest memory: 512M, 4G; a bare number is MiB"
    )
    memory_hugepages: str = option(
        values.choice(*HUGE_PAGES),
        "auto",
        key="memory.hugepages",
        doc="what pages of the host guest memory is made of: small ones; also huge ones, as far as the host finds any"
        " (transparent; auto: under KVM, where the host makes any); or huge ones of its pool (2M, 1G), under KVM",
    )
    memory_wired: bool = option(
        values.boolean, False, key="memory.wired", doc="all guest memory is in the host's RAM from the start, and stays"
    )
    acpi_tables: bool = option(values.boolean, True, doc="describe the board to the guest by ACPI tables")
    rtc_use_localtime: bool = option(
        values.boolean, False, key="rtc.use_localtime", doc="the clock chip keeps local time, otherwise UTC"
    )
    uuid: str | None = option(values.uuid, None, doc="the VM's UUID")
    engine: str = option(
        values.choice("auto", "kvm", "translate"), "auto", doc="what executes guest code: auto, kvm or translate"
    )
    kvm_irqchip: str = option(
        values.choice("auto", "whole", "split", "off"),
        "auto",
        key="kvm.irqchip",
        doc="under KVM, who has the interrupt controllers: the host's kernel (whole), it the local APICs and Skep the"
        " others (split), Skep (off); auto is the first of these that the kernel can do",
    )
    kvm_dirty_ring: int = option(
        values.integer(0, 65536),
        0,
        key="kvm.dirty_ring",
        doc="under KVM, entries of the ring by which each CPU tells what pages it wrote, a power of two from 1024 on;"
        " 0: a bitmap tells",
    )
    cpu_model: str = option(
        values.choice("baseline", "host"),
        "baseline",
        key="cpu.model",
        doc="baseline (x86-64-v2, the same on every host) or host (all that this host has)",
    )
    cpu_tsc_khz: int | None = option(
        values.integer(100_000, 100_000_000),
        None,
        key="cpu.tsc_khz",
        doc="the frequency of the guest's TSC; the host's if not given, and any other only under a KVM that can scale",
    )
    cpu_kvmclock: bool = option(
        values.boolean,
        True,
        key="cpu.kvmclock",
        doc="guests have kvm-clock, which tells them the frequency of their TSC and the time of day; without it they"
        " measure the one by a timer and ask the clock chip for the other",
    )
    boot_kernel: str | None = option(
        values.text, None, key="boot.kernel", doc="the kernel to boot: a Linux bzImage, or an ELF vmlinux (PVH)"
    )
    boot_multiboot: str | None = option(
        values.text, None, key="boot.multiboot", doc="instead of a kernel: one by the Multiboot Specification"
    )
    boot_initrd: str | None = option(
        values.text, None, key="boot.initrd", doc="the initramfs that goes with it, or the Multiboot module"
    )
    boot_cmdline: str = option(values.any_text, "", key="boot.cmdline", doc="the kernel's command line")
    boot_system_map: str | None = option(
        values.text, None, key="boot.system_map", doc="the kernel's System.map, to name functions when a boot failed"
    )
    explain_silence: int = option(
        values.integer(0, 86400),
        0,
        key="explain.silence",
        doc="after so many seconds without output, say what the guest does; 0: never",
    )
    no_reboot: bool = option(values.boolean, False, doc="a reboot of the guest ends the VM")
    code_cache: str = option(
        values.text, "on", doc="where the translator keeps its work for the next time: on, off, or a directory"
    )
    code_size: int = option(
        values.code_size, 64 * values.MIB, doc="bytes of code that the translator has at a time, 8M to 1G"
    )
    stats: bool = option(values.boolean, False, doc="tell at the VM's end what the engine did")
    perf_map: bool = option(values.boolean, False, doc="name the guest's code for Linux perf, in /tmp/perf-PID.map")
    control: bool = option(values.boolean, True, doc="`skep run` opens a control socket, for skep ctl and skep list")
    config_dump: bool = option(values.boolean, False, key="config.dump", doc="print the tree and exit")


def check_settings(tree: Tree) -> Settings:
    """The VM's own keys of a tree, checked against each other and against this host."""
    settings = view(tree.node(), Settings, others=BRANCHES)
    memory = settings.memory_size
    if memory < _LEAST_MEMORY:
        raise UserError(f"{memory} bytes of memory are too few", "memory.size", "give 512M or more to boot a Linux")
    if memory % _PAGE:
        raise UserError(f"{memory} bytes are not whole pages of {_PAGE}", "memory.size")
    huge = HUGE_PAGES[settings.memory_hugepages] or 1
    if memory % huge:
        raise UserError(f"{memory >> 20} MiB are not whole pages of {huge >> 20} MiB", "memory.size")
    ring = settings.kvm_dirty_ring
    if ring and (ring < 1024 or ring & ring - 1):
        raise UserError(f"{ring} is no power of two from 1024 on", "kvm.dirty_ring", "use 4096, or 0")
    if settings.max_cpus is not None and settings.max_cpus < settings.cpus:
        raise UserError(f"{settings.max_cpus} is less than cpus, {settings.cpus}", "max_cpus")
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory > host:
        raise HostError(f"{memory >> 20} MiB are more than this host's {host >> 20} MiB", "memory.size", "ask for less")
    return settings
