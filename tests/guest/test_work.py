"""Programs in a guest compute what they compute on the host: the same busybox, the same script."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from skep.engine.translate.blocks import PIECES
from skep.guest.debian import Guest
from tests.linux import Linux

SCRIPT = r"""
exec 2>&1
rm -rf /tmp/work && mkdir /tmp/work && cd /tmp/work || exit 1
$B seq 1 60000 > seq
$B awk 'BEGIN { s = 1; for (i = 0; i < 60000; i++) { s = (s * 1103515245 + 12345) % 2147483648; print s } }' > random
for sum in md5sum sha1sum sha256sum sha512sum sha3sum; do $B $sum seq random; done
$B sort -n random | $B md5sum
$B sort random | $B uniq | $B wc
$B awk 'BEGIN { x = 1; for (i = -20; i < 20; i++) { x *= -3.7; printf "%.17g %x %.3e\n", x, i * 7919, 1 / (i + x) } }'
for pack in gzip bzip2; do
    $B $pack -c < random > packed; $B md5sum packed; $B $pack -dc < packed | $B cmp - random && echo unpacked
done
echo '2^1000; 7^300 % 1000003; scale=40; sqrt(2); 4*a(1); e(1)' | $B bc -l
echo '100k 2 v p 3 7 / p' | $B dc
$B factor 600851475143 1000000007 999999000001
$B od -A x -t f8 -N 4096 random | $B md5sum
$B od -t x8 -N 65536 random | $B md5sum
$B sed -e 's/\([0-9]\)\([0-9]\)/\2\1/g' -e '/7$/d' random | $B md5sum
$B grep -Ec '(12|34|56)+7' random
$B tar cf - seq random | $B tar tf -
i=0; while [ $i -lt 300 ]; do echo $((i * i * i % 977 ^ i << 3)); i=$((i + 1)); done | $B md5sum
i=0; while [ $i -lt 60 ]; do $B echo $i | $B cat | $B tr 0-9 a-j; i=$((i + 1)); done | $B md5sum
$B base64 random | $B md5sum
for k in 1 2 3 4 5 6 7 8; do (j=0; while [ $j -lt 200 ]; do j=$((j + 1)); done; echo done $k > done.$k) & done
wait
$B cat done.1 done.2 done.3 done.4 done.5 done.6 done.7 done.8
$B diff seq random | $B md5sum
"""


@pytest.fixture
def native(guest: Guest, tmp_path: Path) -> str:
    """What the host says."""
    with guest.initrd.open("rb") as archive:
        unpack = ["cpio", "-i", "--quiet", "--make-directories", "bin/busybox"]
        subprocess.run(unpack, stdin=archive, cwd=tmp_path, check=True, timeout=60)
    busybox = tmp_path / "bin" / "busybox"
    script = SCRIPT.replace("/tmp/work", str(tmp_path / "work"))
    return subprocess.run(
        [busybox, "sh", "-c", script], env={"B": str(busybox)}, check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The script, for the guest."""
    disk = tmp_path / "disk"
    text = SCRIPT.encode()
    disk.write_bytes(text + b"\n" * (-len(text) % 512))
    return disk


@pytest.mark.parametrize("model", ["baseline", "host"])
def test_the_same_work_has_the_same_result(guest: Guest, native: str, disk: Path, model: str) -> None:
    with Linux(guest, disks=[disk], config={"cpu.model": model}) as linux:
        assert linux("B=/bin/busybox sh /dev/vda") == native
        linux.power_off()


@pytest.mark.slow
def test_in_a_code_buffer_that_is_filled_again_and_again(guest: Guest, native: str, disk: Path) -> None:
    """Two processors, whose code goes and is made again, some of it while the other one runs it."""
    config = {"code_size": "8M", "code_cache": "off", "stats": "true"}
    with Linux(guest, disks=[disk], cpus=2, config=config) as linux:
        before = 0
        for _ in range(3):
            assert linux("B=/bin/busybox sh /dev/vda") == native
            before = before or _anonymous()
        grown = _anonymous() - before
        linux.power_off()
    told = linux.vm.statistics
    print({name: told[name] for name in told if "buffer" in name or "forgotten" in name or "room" in name}, grown)
    assert told["pieces of the code buffer used again"] >= 5 * PIECES
    assert told["bytes of host code"] <= 8 << 20
    assert grown < 16 << 10  # KiB


def _anonymous() -> int:
    """KiB of memory of this process's own: no guest's, no translations'."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])
