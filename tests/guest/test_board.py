"""What Debian's kernel finds on the board: one guest, asked about one device after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from skep.guest.debian import Guest
from tests.linux import Linux

PORTS = ("com2", "com3", "com4")
ASK = 60.0


@pytest.fixture(scope="module")
def linux(guest: Guest) -> Iterator[Linux]:
    config = {f"lpc.{port}.path": "program" for port in PORTS}
    with Linux(guest, config=config) as linux:
        yield linux
        linux.power_off()


def test_four_serial_ports_are_found_where_acpi_says(linux: Linux) -> None:
    found = re.findall(r"ttyS(\d) at I/O 0x(\w+) \(irq = (\d+),", linux("dmesg"))
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
