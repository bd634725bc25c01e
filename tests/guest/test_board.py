"""What Debian's kernel finds on the board: one guest, asked about one device after the other."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.devices.ps2keyboard import CAPS_LOCK
from skep.guest import debian
from skep.guest.debian import Guest
from tests.linux import ENGINES, Linux, complaints

PORTS = ("com2", "com3", "com4")
ASK = 60.0
UUID = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture(scope="module", params=ENGINES)
def linux(guest: Guest, request: pytest.FixtureRequest) -> Iterator[Linux]:
    config = {f"lpc.{port}.path": "program" for port in PORTS}
    config |= {"max_cpus": "255", "system.product_name": "Straw hive", "uuid": UUID}
    with Linux(guest, engine=request.param, config=config) as linux:
        yield linux
        linux.power_off()


def test_four_serial_ports_are_found_where_acpi_says(linux: Linux) -> None:
    found = re.findall(r"ttyS(\d) at I/O 0x(\w+) \(irq = (\d+),", linux("dmesg | grep ttyS"))
    assert found == [("0", "3f8", "4"), ("1", "2f8", "3"), ("2", "3e8", "4"), ("3", "2e8", "3")]


def test_serial_ports_speak_both_ways_at_once_by_interrupts(linux: Linux) -> None:
    """COM1 shares a line with COM3, COM2 with COM4."""
    for port, name in enumerate(PORTS, 1):
        linux(f"stty -F /dev/ttyS{port} raw -echo")
        linux(f"(while read -r line; do echo {name} $line; done) < /dev/ttyS{port} > /dev/ttyS{port} & true")
    for name in reversed(PORTS):
        linux.vm.serial(name).send(f"hello, {name}\n")
    for name in PORTS:
        linux.vm.serial(name).expect(f"{name} hello, {name}\n", ASK)
    counted = dict(re.findall(r"^ *([34]): +(\d+) .*ttyS", linux("cat /proc/interrupts"), re.MULTILINE))
    assert int(counted["3"]) >= 4 and int(counted["4"]) >= 2


def test_the_hpet_is_taken(linux: Linux) -> None:
    assert "hpet0: 3 comparators, 64-bit 100.000000 MHz counter" in linux("dmesg | grep hpet0")
    available = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
    clocks = linux(f"cat {available}").split()
    assert clocks[-2:] == ["hpet", "acpi_pm"]
    # In a nested machine Linux finds no moment that is quiet enough to refine what it was told of the TSC.
    tsc = {"tsc", "tsc-early"} if linux.vm.engine.name == "kvm" else {"tsc"}
    assert "kvm-clock" in clocks[:2] and tsc & {*clocks[:2]} and len(clocks) == 4


def test_time_goes_on_by_the_hpet(linux: Linux) -> None:
    current = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    try:
        began = time.monotonic()
        before, after = linux(f"echo hpet > {current}; cat /proc/uptime; sleep 2; cat /proc/uptime").splitlines()
        took = time.monotonic() - began
        assert linux(f"cat {current}") == "hpet\n"
    finally:
        linux(f"echo tsc > {current}")
    assert 1.99 <= float(after.split()[0]) - float(before.split()[0]) < took + 0.02, "uptime is told to the hundredth"


def test_255_processors_are_possible(linux: Linux) -> None:
    assert linux("cat /sys/devices/system/cpu/possible /sys/devices/system/cpu/online") == "0-254\n0\n"


def test_smbios_names_the_machine(linux: Linux) -> None:
    said = linux("cd /sys/class/dmi/id && cat sys_vendor product_name product_uuid bios_vendor").split("\n")
    assert said == ["Skep", "Straw hive", UUID, "Skep", ""]
    listed = linux("ls /sys/firmware/dmi/entries").split()
    assert [entry for entry in listed if entry.startswith("4-")] == ["4-0"] and "19-0" in listed


@pytest.mark.slow
def test_one_of_255_processors_runs(guest: Guest) -> None:
    with Linux(guest, "1G", words=("quiet", "maxcpus=1"), cpus=255) as linux:
        assert linux("cat /sys/devices/system/cpu/present /sys/devices/system/cpu/online") == "0-254\n0\n"
        linux.power_off()


@pytest.mark.slow
@pytest.mark.parametrize("acpi", [True, False])
def test_wired_interrupts_are_routed(tmp_path: Path, acpi: bool) -> None:
    """A disk's INTx pin by ACPI's _PRT, and by the MP table, for which only the full kernel has a reader."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"straw".ljust(1 << 20))
    config = {"acpi_tables": str(acpi).lower()}
    with Linux(debian.obtain(full=not acpi), words=("quiet", "pci=nomsi"), disks=[disk], config=config) as linux:
        log = linux("dmesg")
        assert ("MPTABLE: OEM ID: SKEP" in log, "ACPI: RSDP" in log) == (not acpi, acpi)
        assert linux("head -c 5 /dev/vda") == "straw"
        interrupts = linux("cat /proc/interrupts")
        assert re.search(r"^ *18: +[1-9]\d* +IO-APIC +18-fasteoi +virtio0", interrupts, re.MULTILINE)
        assert re.search(r"^ *4: +[1-9]\d* +IO-APIC +4-edge +ttyS0", interrupts, re.MULTILINE)
        assert complaints(log) == []


def test_pci_express_features_are_handed_over(linux: Linux) -> None:
    said = linux("dmesg | grep _OSC").splitlines()
    assert any("OS now controls [PCIeHotplug PME AER PCIeCapability LTR]" in line for line in said), said
    assert not any("fail" in line or "AE_" in line for line in said), said


@pytest.mark.slow
def test_a_new_generation_reseeds_the_guests_random_numbers() -> None:
    """The full kernel; the cloud's has no driver for it."""
    with Linux(debian.obtain(full=True)) as linux:
        linux("head -c 1 /dev/random > /dev/null")  # returns when there is something to reseed
        assert "virtual machine fork" not in linux("dmesg")
        linux.vm.new_generation()
        linux("until dmesg | grep -q 'crng reseeded due to virtual machine fork'; do sleep 0.1; done")
        linux.power_off()


def test_keys_arrive_and_lamps_are_lit(linux: Linux) -> None:
    keyboard = linux.vm.board.keyboard
    assert "AT Translated Set 2 keyboard" in linux("cat /proc/bus/input/devices")
    linux("for module in $(cat /lib/modules/evdev.order); do insmod /lib/modules/$module; done")
    number = re.search(r"Name=\"AT Translated Set 2.*?\bevent(\d+)", linux("cat /proc/bus/input/devices"), re.DOTALL)
    assert number
    # Six events of 24 bytes: scan code, key, end; each with its type, code and value in the last eight.
    linux(f"head -c 144 /dev/input/event{number[1]} > /tmp/events & true")
    linux("until ls -l /proc/[0-9]*/fd 2> /dev/null | grep -q /dev/input/event; do sleep 0.1; done")
    assert keyboard.inject(b"\x1c") and keyboard.inject(b"\xf0\x1c")
    linux("until [ $(wc -c < /tmp/events) = 144 ]; do sleep 0.1; done")
    events = [line.split() for line in linux("od -A n -v -t u2 -w24 /tmp/events").splitlines()]
    assert [event[8:11] for event in events if event[8] == "1"] == [["1", "30", "1"], ["1", "30", "0"]]  # EV_KEY, KEY_A
    linux("echo 1 > $(ls -d /sys/class/leds/*::capslock)/brightness")
    linux("until cat /sys/class/leds/*::capslock/brightness | grep -q 1; do sleep 0.1; done; sleep 1")
    assert keyboard.leds == CAPS_LOCK
