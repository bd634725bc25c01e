"""The programs of examples/, run as a user would, in Debian's kernel."""

from __future__ import annotations

import os
import random
import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from skep.cli import main
from skep.guest.debian import Guest

EXAMPLES = Path(__file__).parents[2] / "examples"


def function(program: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = runpy.run_path(str(EXAMPLES / program))[name]
    return found


def test_every_port_of_a_boot(guest: Guest) -> None:
    lines = function("trace_ports.py", "trace")(str(guest.kernel), str(guest.initrd))
    ports = {int(line.split()[0], 16): line for line in lines}
    assert "com1" in ports[0x3F8] and int(ports[0x3F8].split()[-2]) > 5, "BOOT was printed"
    assert "acpi-pm" in ports[0x604], "and it was switched off"
    assert list(ports) != sorted(ports), "the order is the guest's"
    assert re.fullmatch(r"0x0cf8 +pci +\d+ in +\d+ out", ports[0xCF8])


def test_a_device_of_ones_own(guest: Guest) -> None:
    seen, dice = function("own_device.py", "throw")(str(guest.kernel), str(guest.initrd), 3)
    assert len(seen) == 3 and set(seen) <= set(range(1, 7))
    assert dice.throws == 3
    assert dice.save() == {"version": 1, "sides": 6, "throws": 3}


def test_a_disk_that_goes_bad(guest: Guest, tmp_path: Path) -> None:
    before, after = function("failing_disk.py", "break_a_disk")(
        str(guest.kernel), str(guest.initrd), tmp_path / "disk.img"
    )
    assert before.endswith("STATUS 0\r\n") and "error" not in before.lower()
    assert after.endswith("STATUS 1\r\n") and "I/O error" in after, after


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_a_file_out_of_an_image(tmp_path: Path, kind: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    files = tmp_path / "files"
    (files / "etc").mkdir(parents=True)
    (files / "etc/hostname").write_bytes(b"skep\n")
    large = random.Random(1).randbytes(600_000)
    (files / "large").write_bytes(large)
    raw, image = tmp_path / "raw", tmp_path / "disk.qcow2"
    subprocess.run(["mke2fs", "-q", "-t", kind, "-b", "1024", "-d", files, raw, "8M"], check=True, timeout=60)
    assert main(["image", "convert", "-c", "-O", "qcow2", str(raw), str(image)]) == 0
    capfdbinary.readouterr()
    for name, content in (("/etc/hostname", b"skep\n"), ("large", large)):
        with mock.patch("sys.argv", ["read_qcow2.py", str(image), name]):
            function("read_qcow2.py", "main")()
        assert capfdbinary.readouterr().out == content


def test_a_vmdk_from_a_raw_disk(tmp_path: Path) -> None:
    raw, vmdk = tmp_path / "disk.img", tmp_path / "disk.vmdk"
    raw.write_bytes((b"data" * 50_000 + bytes(1 << 20) + os.urandom(100_000)).ljust(3 << 20, b"\0"))
    function("build_vmdk.py", "build")(str(raw), str(vmdk))
    assert vmdk.stat().st_size < 300_000
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "vmdk", raw, vmdk], check=True, timeout=60)


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text() + (EXAMPLES.parent / "tests/cli/test_debian.py").read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if path.name not in tested] == []
