"""A coverage-guided fuzzer of each image format, and of ``nbd``, what a server may say to our client of that protocol:
``python -m tests.fuzz FORMAT SECONDS [DIRECTORY]``.

It starts from sound images of Skep's and of QEMU's making (from what QEMU's server says), and from the corpus that
``DIRECTORY/FORMAT`` has from earlier runs, and stops after so many seconds of CPU, or at the first find: an exception
that is no typed error, memory or time without bound, a file left open. The input is left in ``DIRECTORY/FORMAT/finds``;
``python -m tests.fuzz FORMAT again INPUT`` repeats it. It may be killed at any time; ``DIRECTORY/FORMAT/tally.json``
has what all runs come to.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.tally import Tally
from tests.fuzz.targets import inputs, target

MEMORY = 400
"""MiB of the process, libFuzzer's tables and the corpus with it."""
LARGEST = 200_000
"""Bytes of an input."""
NEVER = 1 << 20
"""Seconds."""
OPTIONS = (
    f"-rss_limit_mb={MEMORY}",
    f"-max_len={LARGEST}",
    "-entropic_scale_per_exec_time=1",  # what is quick comes more often
    "-reload=0",  # nobody else adds to the corpus
    f"-timeout={NEVER}",  # by the clock, which goes on while others have the CPU: tests.fuzz.guided bounds CPU time
    f"-report_slow_units={NEVER}",
)


def main(format: str, seconds: str, *rest: str) -> int:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        if seconds == "again":
            target(format, Path(name))(Path(rest[0]).read_bytes())
            return 0
        return fuzz(format, seconds, Path(rest[0] if rest else ".fuzz", format).absolute(), Path(name))


def fuzz(format: str, seconds: str, home: Path, scratch: Path) -> int:
    corpus, finds = home / "corpus", home / "finds"
    for directory in (corpus, finds):
        directory.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(inputs(format, scratch)):
        (corpus / f"sound.{number}").write_bytes(one)
    command = [sys.executable, "-m", "tests.fuzz.guided", format, scratch, home, seconds]
    command += [*OPTIONS, f"-artifact_prefix={finds}/", corpus]
    with (home / "log").open("wb") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if -status == signal.SIGVTALRM:
        (home / "current").rename(finds / f"hang-{os.getpid()}")
    lines = re.findall(r"#\d+\s.*cov: (\d+) ft: (\d+) corp: (\d+)", (home / "log").read_text(errors="replace"))
    branches, features, size = lines[-1] if lines else "???"
    print(f"{format}: {Tally(home)}, {branches} branches, {features} features, corpus {size}")
    if status:
        print(f"a find: see {home}/log and {finds}")
    return bool(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
