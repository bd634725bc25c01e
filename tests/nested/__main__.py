"""``python -m tests.nested COMMAND``: run a piece of shell in the laboratory, in the working tree; its output is shown.

``/mnt/guest/*/vmlinuz`` and ``initrd.img`` are there, Skep as ``python3 -m skep.cli``. The status is the command's.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.nested.laboratory import Machine, Payload, Silent

PATIENCE = 600.0
"""Seconds for a command that says nothing."""
ROOM = 2 << 30
"""Bytes that can be taken out."""

_COMMAND = """
mkdir /tmp/taken
bash -c {command} < /dev/null > /dev/ttyS1 2>&1
status=$?
[ -b /dev/nvme0n3 ] && tar -C /tmp/taken -cf /dev/nvme0n3 .
echo "STATUS $status" > /dev/ttyS1
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.nested", description=__doc__)
    parser.add_argument(
        "--put", type=Path, action="append", default=[], metavar="PATH", help="have it at /mnt/put/NAME"
    )
    parser.add_argument("--qemu", action="store_true", help="have this host's QEMU as /mnt/qemu/qemu-system-x86_64")
    parser.add_argument("--take", type=Path, metavar="DIRECTORY", help="what is in /tmp/taken at the end comes there")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="skep-nested-") as scratch:
        payload = Payload(Path(scratch))
        for path in options.put:
            payload.put(path)
        if options.qemu:
            payload.put_qemu()
        image = payload.build(_COMMAND.format(command=shlex.quote(" ".join(options.command))))
        taken = None
        if options.take is not None:
            taken = Path(scratch) / "taken"
            with taken.open("wb") as file:
                file.truncate(ROOM)
        with Machine(image, Path(scratch) / "console", taken) as machine:
            try:
                while not (line := machine.line(PATIENCE)).startswith("STATUS "):
                    sys.stdout.write(line)
                    sys.stdout.flush()
            except Silent as silent:
                print(machine.console(), silent, sep="\n", file=sys.stderr)
                return 4
        if taken is not None:
            subprocess.run(("tar", "-C", options.take, "-xf", taken), check=True)
    return int(line.split()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
