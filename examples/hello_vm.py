"""Boot a guest, run a command in it, print what it said.

    skep guest debian
    python examples/hello_vm.py KERNEL INITRD [COMMAND]
"""

from __future__ import annotations

import sys

import skep

PROMPT = "skep# "


def hello(kernel: str, initrd: str, command: str) -> str:
    """What ``command`` prints in the guest."""
    with skep.Vm(kernel=kernel, initrd=initrd, memory="512M", cmdline="console=ttyS0 quiet") as vm:
        vm.start()
        vm.console.expect(PROMPT, timeout=300)
        vm.console.send(f"{command}\n")
        vm.console.expect(r"\n", timeout=60)  # the terminal's echo of the command
        output = vm.console.expect(PROMPT, timeout=60)
        vm.console.send("exit\n")
        vm.wait(timeout=60)
        return output.string[: output.start()].replace("\r\n", "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} KERNEL INITRD [COMMAND]; `skep guest debian` makes the first two")
    print(hello(sys.argv[1], sys.argv[2], " ".join(sys.argv[3:]) or "uname -a"), end="")
