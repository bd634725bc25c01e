"""A device of one's own on the guest's board: dice, which show another number each time they are read.

    python examples/own_device.py KERNEL INITRD
"""

from __future__ import annotations

import random
import sys
from typing import ClassVar

import skep
from skep.contracts.device import Passive
from skep.state import Fields

PLACE = 0xFE00_0000
"""A guest-physical address where there is nothing else."""


class Dice(Passive, Fields):
    """A read throws them; what is written decides how many sides they have (6)."""

    name = "dice"
    state_fields: ClassVar[tuple[str, ...]] = ("sides", "throws")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sides, self.throws = 6, 0

    def read(self, offset: int, size: int) -> int:
        self.throws += 1
        return random.randint(1, self.sides)

    def write(self, offset: int, size: int, value: int) -> None:
        self.sides = max(value & 0xFF, 1)  # a guest may write anything, and 0 sides do not fall


def throw(kernel: str, initrd: str, times: int) -> tuple[list[int], Dice]:
    """What the guest saw, and the device."""
    with skep.Vm(kernel=kernel, initrd=initrd, memory="512M", cmdline="console=ttyS0 quiet") as vm:
        dice = Dice()
        vm.board.devices.append(dice)  # reset, paused, saved and closed with the others
        vm.board.bus.add_mmio(PLACE, 1, dice)
        vm.start()
        vm.console.expect("skep# ", timeout=300)
        seen = []
        for _ in range(times):
            vm.console.send(f"devmem {PLACE} 8\n")
            seen.append(int(vm.console.expect(r"\n0x(\w+)\r\n", timeout=60)[1], 16))
        return seen, dice


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} KERNEL INITRD; `skep guest debian` makes both")
    print(*throw(sys.argv[1], sys.argv[2], 5)[0])
