"""Whether a write is durable when it completes, as strace sees it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = """
import os, sys
from pathlib import Path
from tests.devices.virtio.disk import disk
with disk(Path(sys.argv[1]), **eval(sys.argv[2])) as made:
    made.start()
    out = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT)
    if sys.argv[4]:
        made.driver.set_config(32, 1, int(sys.argv[4]))
    for number in range(8):
        made.write(8 * number, bytes([number + 1]) * 4096)
        os.write(out, b"written")
    made.flush()
    os.write(out, b"flushed")
"""


def calls(tmp_path: Path, options: str, cache: str) -> str:
    """What was asked of the host, a letter each: o the image was opened, O so that each write is durable at once; w a
    write, but for those by an io_uring, which strace does not see; f fdatasync; D the driver knows that a write
    completed, F that a flush did."""
    if shutil.which("strace") is None:
        pytest.skip("the package strace")
    root = Path(__file__).parents[3]
    image, trace, out = tmp_path / "disk", tmp_path / "trace", tmp_path / "out"
    image.write_bytes(bytes(1 << 20))
    command = ["strace", "-f", "-y", "-o", str(trace), "-e", "trace=openat,write,pwrite64,pwritev,pwritev2,fdatasync"]
    command += [sys.executable, "-c", SESSION, str(image), options, str(out), cache]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    found = []
    for line in trace.read_text().splitlines():
        if re.search(r'openat\(.*/disk", O_RDWR', line):
            found.append("O" if "O_DSYNC" in line else "o")
        elif re.search(r"pwrite\w*\(\d+<[^>]*/disk>", line):
            found.append("w")
        # One that another thread's line cuts in two has its result in the second half.
        elif re.search(r"fdatasync\(\d+<[^>]*/disk>\)\s*= 0|fdatasync resumed>\)\s*= 0", line):
            found.append("f")
        elif '"written"' in line:
            found.append("D")
        elif '"flushed"' in line:
            found.append("F")
    return "".join(found)


@pytest.mark.parametrize(
    ("options", "cache", "expected"),
    [
        ("{}", "", r"o(w?D){8}fF"),
        ("{}", "0", r"o(w?fD){8}f?F"),
        ("{'write_cache': False}", "", r"o(w?fD){8}f?F"),
        ("{'write_cache': False}", "1", r"o(w?D){8}fF"),
        ("{'synchronous': True}", "", r"O(w?D){8}f?F"),
        ("{'synchronous': True}", "1", r"O(w?D){8}f?F"),
    ],
)
def test_when_the_host_is_asked_for_durability(tmp_path: Path, options: str, cache: str, expected: str) -> None:
    found = calls(tmp_path, options, cache)
    assert re.fullmatch(expected, found), found
