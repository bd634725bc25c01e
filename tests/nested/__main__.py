"""``python -m tests.nested COMMAND``: run a piece of shell in the laboratory, in the working tree; its output is shown.

``/mnt/guest/*/vmlinuz`` and ``initrd.img`` are there, Skep as ``python3 -m skep.cli``. The status is the command's.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

from tests.nested.laboratory import Machine, Payload, Silent

_COMMAND = """
bash -c {command} < /dev/null > /dev/ttyS1 2>&1
echo "STATUS $?" > /dev/ttyS1
"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="skep-nested-") as scratch:
        image = Payload(Path(scratch)).build(_COMMAND.format(command=shlex.quote(" ".join(sys.argv[1:]))))
        with Machine(image, Path(scratch) / "console") as machine:
            try:
                while not (line := machine.line(600)).startswith("STATUS "):
                    sys.stdout.write(line)
                    sys.stdout.flush()
            except Silent as silent:
                print(machine.console(), silent, sep="\n", file=sys.stderr)
                return 4
    return int(line.split()[1])


if __name__ == "__main__":
    sys.exit(main())
