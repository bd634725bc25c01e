"""Every port that a kernel touches while it boots: who answered, how often, and what came first.

    python examples/trace_ports.py KERNEL INITRD
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import skep
from skep.contracts.io import IoSpace


@dataclass
class Seen:
    first: int
    """The number of the access with which the guest first came here."""
    reads: int = 0
    writes: int = 0


class Tracer:
    """Stands between the engine and the board, and writes down what passes."""

    def __init__(self, io: IoSpace) -> None:
        self._io = io
        self.mmio_read = io.mmio_read
        self.mmio_write = io.mmio_write
        self.ports: dict[int, Seen] = {}
        self.accesses = 0

    def _seen(self, port: int) -> Seen:
        self.accesses += 1
        return self.ports.setdefault(port, Seen(self.accesses))

    def port_read(self, port: int, size: int) -> int:
        self._seen(port).reads += 1
        return self._io.port_read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        self._seen(port).writes += 1
        self._io.port_write(port, size, value)


def trace(kernel: str, initrd: str) -> list[str]:
    """A line for each port, in the order in which the guest came to them."""
    with skep.Vm(kernel=kernel, initrd=initrd, memory="512M", cmdline="console=ttyS0 quiet skep.poweroff") as vm:
        tracer = vm.board.io = Tracer(vm.board.io)  # the engine is made at the start, and takes what is here
        vm.start()
        vm.wait(timeout=600)
        seen = sorted(tracer.ports.items(), key=lambda item: item[1].first)
        return [
            f"{port:#06x}  {vm.board.bus.owner('port', port) or '-':20}  {one.reads:8} in  {one.writes:8} out"
            for port, one in seen
        ]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} KERNEL INITRD; `skep guest debian` makes both")
    print(*trace(*sys.argv[1:]), sep="\n")
