"""A Linux guest with a virtio console and the host's random numbers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from skep.guest.debian import Guest
from tests.linux import BOOT, ENGINES, Linux


class Client:
    """Somebody at a port's socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(BOOT)
        self.socket.connect(str(path))

    def expect(self, data: bytes) -> None:
        got = b""
        while len(got) < len(data):
            got += self.socket.recv(1 << 16)
        assert got == data

    def close(self) -> None:
        self.socket.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_random_numbers_a_terminal_and_named_ports(guest: Guest, engine: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    devices = ["virtio-rnd", f"virtio-console,console=program,org.one={one},org.two={two}"]
    with Linux(guest, engine=engine, devices=devices) as linux:
        assert linux("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
        sums = linux("for i in 1 2; do dd if=/dev/hwrng bs=512 count=4 2> /dev/null | sha256sum; done").splitlines()
        assert len(set(sums)) == 2 and linux("dd if=/dev/hwrng bs=512 count=4 2> /dev/null | wc -c") == "2048\n"

        # The terminal: a login shell would run there.
        terminal = linux.vm.serial("console")
        linux.begin("setsid sh -c 'exec sh < /dev/hvc0 > /dev/hvc0 2>&1'")
        terminal.send("echo $((6 * 7)); tty\n")
        terminal.expect(r"42\r\n/dev/hvc0\r\n", timeout=BOOT)
        terminal.send("seq 1 2000\n")
        assert terminal.expect(r"\n1998\r\n1999\r\n2000\r\n", timeout=BOOT).string.count("\n") > 1995
        console = linux.vm.board.pci.functions[3, 0].device  # type: ignore[attr-defined]
        console.ports[0].resized(132, 50)  # as the backend says when it is a terminal
        terminal.send("while [ \"$(stty size)\" != '50 132' ]; do sleep 0.1; done; echo si''zed\n")
        terminal.expect("sized", timeout=BOOT)
        terminal.send("exit\n")
        linux.end()

        # The named ports are pipes: bytes as they are. Until somebody is there Linux reads an end, and writes wait.
        names = linux("cd /sys/class/virtio-ports && grep . */name").split()
        nodes = {name: "/dev/" + line.split("/")[0] for line in names for name in [line.rpartition(":")[2]]}
        assert sorted(nodes) == ["console", "org.one", "org.two"]
        read = f"until read -r line < {nodes['org.one']}; do sleep 0.1; done; echo got $line"
        linux.begin(f"{read}; seq 1 3000 > {nodes['org.two']}")
        first, second = Client(one), Client(two)
        first.socket.sendall(b"a line\n")
        second.expect(b"".join(b"%d\n" % i for i in range(1, 3001)))
        assert linux.end() == "got a line\n"

        # A reader that reads nothing makes the guest wait, and loses nothing.
        linux.begin(f"dd if=/dev/zero of={nodes['org.two']} bs=64k count=48 2> /dev/null; echo done")
        linux.vm.freeze()  # also while it waits
        linux.vm.thaw()
        second.expect(bytes(48 << 16))
        assert linux.end() == "done\n"

        # One leaves, another comes.
        second.close()
        second = Client(two)
        linux(f"echo again > {nodes['org.two']}")
        second.expect(b"again\n")
        first.close()
        second.close()
        linux.power_off()
