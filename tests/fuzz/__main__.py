"""A coverage-guided fuzzer of each image format, and of ``nbd``, what a server may say to our client of that protocol:
``python -m tests.fuzz FORMAT SECONDS [DIRECTORY]``.

It starts from sound images of Skep's and of QEMU's making (from what QEMU's server says), and from the corpus that
``DIRECTORY/FORMAT`` has from earlier runs, and stops at the first find: an exception that is no typed error, memory or
time without bound, a file left open. The input is left in ``DIRECTORY/FORMAT/finds``; ``python -m tests.fuzz FORMAT
again INPUT`` repeats it.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.targets import inputs, target

ENDLESS = 600
"""Seconds after which an input is given up; tests.block.hostile bounds CPU time."""
MEMORY = 400
"""MiB of the process, libFuzzer's tables and the corpus with it."""
LARGEST = 200_000
"""Bytes of an input."""


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
    command = [sys.executable, "-m", "tests.fuzz.guided", format, scratch, corpus]
    command += [f"-artifact_prefix={finds}/", f"-max_total_time={seconds}", f"-timeout={ENDLESS}"]
    command += [f"-rss_limit_mb={MEMORY}", f"-max_len={LARGEST}", f"-report_slow_units={ENDLESS}"]
    begun = time.monotonic()
    with (home / "log").open("wb") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    took = (time.monotonic() - begun) / 60
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = re.findall(r"#(\d+)\s.*cov: (\d+) ft: (\d+) corp: (\d+)", (home / "log").read_text(errors="replace"))
    executions, branches, features, size = lines[-1] if lines else "????"
    print(
        f"{format}: {executions} executions, {branches} branches, {features} features, corpus {size}, "
        f"{(used.ru_utime + used.ru_stime) / 60:.1f} minutes of CPU in {took:.1f}"
    )
    if status:
        print(f"a find: see {home}/log and {finds}")
    return bool(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
