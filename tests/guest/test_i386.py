"""Programs of 32 bits under the 64-bit kernel: Debian's static busybox for i386 does the same work as on the host.

Its system calls go through the vDSO: by SYSENTER under Intel's name, by SYSCALL under AMD's, and by INT 80.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from skep.errors import UserError
from skep.guest import packages
from skep.guest.debian import Guest
from tests import apt
from tests.linux import Linux

SCRIPT = r"""
exec 2>/dev/null
cd /tmp || exit 1
$B uname -s
$B seq 1 20000 > seq
$B awk 'BEGIN { s = 1; for (i = 0; i < 20000; i++) { s = (s * 1103515245 + 12345) % 2147483648; print s } }' > random
for sum in md5sum sha1sum sha256sum sha512sum; do $B $sum < random; done
$B sort -n random | $B md5sum
$B awk 'BEGIN { x = 1; for (i = -20; i < 20; i++) { x *= -3.7; printf "%.17g %x %.3e\n", x, i * 7919, 1 / (i + x) } }'
$B gzip -c < random | $B gzip -dc | $B cmp - random && echo unpacked
echo '2^1000; scale=40; sqrt(2); 4*a(1)' | $B bc -l
$B factor 600851475143 1000000007
i=0; while [ $i -lt 30 ]; do $B echo $i | $B cat | $B tr 0-9 a-j; i=$((i + 1)); done | $B md5sum
for k in 1 2 3 4; do (j=0; while [ $j -lt 200 ]; do j=$((j + 1)); done; echo done $k > done.$k) & done
wait
$B cat done.1 done.2 done.3 done.4
$B sh -c 'kill -SEGV $$' ; echo status $?
"""


@pytest.fixture(scope="module")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, through the system's package client with lists of its own, for this machine has none for i386."""
    home = tmp_path_factory.mktemp("i386")
    client = apt.client(home / "apt", "i386")
    try:
        packages.check_client()
        subprocess.run([*client, "update"], check=False, capture_output=True, timeout=300)
        packages.apt(*client, "download", "busybox-static", cwd=home)
    except (UserError, packages.AptFailed) as error:
        pytest.skip(f"no i386 busybox: {error}")
    (deb,) = home.glob("busybox-static_*_i386.deb")
    subprocess.run(["dpkg-deb", "-x", deb, home / "x"], check=True, timeout=60)
    return home / "x" / "bin" / "busybox"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["baseline", "host"])
def test_a_static_i386_busybox(guest: Guest, busybox: Path, tmp_path: Path, model: str) -> None:
    native_script = SCRIPT.replace("cd /tmp", f"cd {tmp_path}")
    native = subprocess.run(
        [busybox, "sh", "-c", native_script],
        env={"B": str(busybox)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    disks = []
    for name, data in (("program", busybox.read_bytes()), ("script", SCRIPT.encode())):
        disk = tmp_path / name
        disk.write_bytes(data + b"\n" * (-len(data) % 512))
        disks.append(disk)
    with Linux(guest, disks=disks, config={"cpu.model": model}) as linux:
        linux("mkdir /i386 && cp /dev/vda /i386/busybox && chmod +x /i386/busybox")
        assert linux("B=/i386/busybox /i386/busybox sh /dev/vdb") == native.stdout
        linux.power_off()
