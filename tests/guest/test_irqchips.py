"""A Linux with each share of the interrupt controllers that KVM may have, by messages and by wires, also frozen.

All of them and messages are what it has where nothing is said, in every other test. A kernel that knows the TSC
deadline takes no 8254, however little else it has: one without all others must not know it."""

from __future__ import annotations

from pathlib import Path

import pytest

from skep.guest.debian import Guest
from tests.linux import Linux

pytestmark = [pytest.mark.hardware, pytest.mark.slow]


@pytest.mark.parametrize(
    ("irqchip", "words"),
    [
        ("whole", "quiet pci=nomsi"),
        ("whole", "quiet nohpet nolapic_timer lapic=notscdeadline"),
        ("split", "quiet pci=nomsi"),
        ("off", "quiet"),
    ],
)
def test_interrupts_come(guest: Guest, tmp_path: Path, irqchip: str, words: str) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    config = {"kvm.irqchip": irqchip}
    with Linux(guest, engine="kvm", disks=[disk], config=config, words=tuple(words.split())) as linux:
        read = "dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct 2> /dev/null; sleep 0.1; echo done"
        for _ in range(3):
            assert linux(read) == "done\n"
            linux.vm.freeze()
            linux.vm.thaw()
        assert linux("cat /proc/interrupts | grep -c virtio").strip() > "0"
        linux.power_off()
