"""A Linux guest with a virtio console and the host's random numbers."""

from __future__ import annotations

from skep.guest.debian import Guest
from tests.linux import BOOT, Linux

DEVICES = {
    "pci.0.5.0.device": "virtio-rnd",
    "pci.0.6.0.device": "virtio-console",
    "pci.0.6.0.port.0.path": "program",
    "pci.0.6.0.port.0.name": "terminal",
    "pci.0.6.0.port.0.console": "true",
    "pci.0.6.0.port.3.path": "program",
    "pci.0.6.0.port.3.name": "org.skep.test",
}


def test_random_numbers_a_terminal_and_a_named_port(guest: Guest) -> None:
    with Linux(guest, config=DEVICES) as linux:
        assert linux("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
        sums = linux("for i in 1 2; do dd if=/dev/hwrng bs=512 count=4 2> /dev/null | sha256sum; done").splitlines()
        assert len(set(sums)) == 2 and linux("dd if=/dev/hwrng bs=512 count=4 2> /dev/null | wc -c") == "2048\n"

        # The terminal: a login shell would run there.
        terminal = linux.vm.serial("terminal")
        linux.begin("setsid sh -c 'exec sh < /dev/hvc0 > /dev/hvc0 2>&1'")
        terminal.send("echo $((6 * 7)); tty\n")
        terminal.expect(r"42\r\n/dev/hvc0\r\n", timeout=BOOT)
        terminal.send("seq 1 2000\n")
        assert terminal.expect(r"\n1998\r\n1999\r\n2000\r\n", timeout=BOOT).string.count("\n") > 1995
        terminal.send("exit\n")
        linux.end()

        # The named port, which is a pipe: bytes as they are.
        port = linux.vm.serial("org.skep.test")
        assert linux("cat /sys/class/virtio-ports/*/name").split() == ["terminal", "org.skep.test"]
        node = "/dev/" + linux("cd /sys/class/virtio-ports && grep -l org.skep.test */name").split("/")[0]
        linux.begin(f"read -r line < {node}; echo got $line; seq 1 3000 > {node}")
        port.send("a line\n")
        assert port.expect(r"\n2999\n3000\n", timeout=BOOT).string.startswith("1\n2\n")
        assert linux.end() == "got a line\n"
        linux.power_off()
