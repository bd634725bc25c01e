"""``python -m tests.guest.counting begin|go_on ENGINE STATE MADE``: half of a move from one engine to another.

``begin`` boots a Linux that counts, and writes what it was into the file MADE; ``go_on`` lets it go on from the file
STATE, and writes that it powered off.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import skep
from skep.guest import debian
from tests.linux import LISTEN, Linux, Session, command_line, engine_words

COUNT = "(i=0; while :; do i=$((i + 1)); echo $i > /tmp/next; mv /tmp/next /tmp/count; sleep 0.05; done) > /dev/null &"
BOOTED = "cat /proc/sys/kernel/random/boot_id"
UP = "cat /proc/uptime"
WORDS = ("quiet", "nopcid", *engine_words("kvm"))
"""What a boot under KVM needs, the guest has under both; and it does without what QEMU's processor has not."""


def options(engine: str) -> dict[str, Any]:
    """Of the VM: a processor that both engines have."""
    return {"memory": "256M", "engine": engine, "config": {"cpu.model": "baseline"}}


def begin(engine: str, made: Path) -> None:
    with Linux(debian.obtain(), words=WORDS, **options(engine)) as linux:
        linux(f"{COUNT} until [ -e /tmp/count ]; do sleep 0.1; done")
        seen = int(linux("cat /tmp/count")), linux(BOOTED), float(linux(UP).split()[0])
        linux.vm.freeze()
        made.write_bytes(pickle.dumps((linux.vm.save(), seen)))


class Moved(Session):
    """The session goes on with another VM."""

    def __init__(self, state: skep.vm.VmState, engine: str) -> None:
        guest = debian.obtain()
        cmdline = command_line(LISTEN, *WORDS)
        self.vm = skep.Vm(kernel=guest.kernel, initrd=guest.initrd, cmdline=cmdline, **options(engine))
        try:
            self.vm.load(state)
            self.vm.thaw()
        except BaseException:
            self.vm.close()
            raise


def go_on(engine: str, begun: Path, made: Path) -> None:
    state, (count, booted, up) = pickle.loads(begun.read_bytes())
    with Moved(state, engine) as moved:
        assert moved(BOOTED) == booted
        later = int(moved("cat /tmp/count"))
        assert later >= count
        moved(f"until [ $(cat /tmp/count) -gt {later} ]; do sleep 0.1; done")
        assert float(moved(UP).split()[0]) > up
        moved.power_off()
    made.write_text("powered off")


def main(arguments: list[str]) -> None:
    what, engine, state, made = arguments
    if what == "begin":
        begin(engine, Path(made))
    else:
        go_on(engine, Path(state), Path(made))


if __name__ == "__main__":
    main(sys.argv[1:])
