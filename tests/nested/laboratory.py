"""The nested laboratory: a machine with hardware virtualization where there is none.

QEMU's TCG emulates AMD's SVM with nested paging, so that inside of it Linux's KVM is the real one. L1 is Debian's cloud
kernel and the root that ``skep guest debian --root`` makes, never written to; a second image, made anew for each run,
has what is to be run: the working tree, the packages that the tests import, a guest. Nothing is mounted on this host.

L1 says what happens on its second serial port, a line each, which is QEMU's standard output; on the third it says every
five seconds that it lives.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from skep.errors import UserError
from skep.guest import debian
from skep.guest import root as debian_root
from tests.nested import emulator

ROOT = Path(__file__).parents[2]
TREE = ("src", "tests", "benchmarks", "pyproject.toml")
PACKAGES = (
    *("pytest", "_pytest", "py", "pygments", "pluggy", "iniconfig", "packaging"),
    *("hypothesis", "_hypothesis_globals", "sortedcontainers", "iced_x86"),
)
PROGRAMS = ("tests/engine/kvm/exits.c",)
"""In C: L1 has no compiler."""
CPUS = 3
"""Of L1, whose first keeps house. QEMU 10.0 (and before) forgets on that one that a guest runs, or that it does not,
where another processor loads its x87 state meanwhile: cpu_clear_ignne() reads and writes the first processor's flags
from that other's thread. Guests ended by triple faults nobody ordered, and a processor deaf to interrupts took L1
along. So guests, and all that is tested, are on the others."""
MEMORY = "2048"
"""Of L1, in MiB."""
TOOLS = ("mke2fs", "setpriv")

_KERNEL = (
    "console=ttyS0 root=/dev/nvme0n1 ro rootfstype=ext4 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"
    " watchdog_thresh=30 softlockup_panic=1"
    ' init=/bin/sh -- -c "mount -t proc proc /proc; mount -t devtmpfs dev /dev; mount -t ext4 -o ro /dev/nvme0n2 /mnt;'
    ' exec sh /mnt/run.sh"'
)
_RUN = """
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
ip link set lo up
taskset -p {tested:x} $$ > /dev/null
modprobe kvm_amd
stty -F /dev/ttyS1 -opost 2> /dev/null
(while sleep 5; do echo; done) > /dev/ttyS2 &
mkdir -p /tmp/cache/skep
ln -s /mnt/guest /tmp/cache/skep/guest
export HOME=/root XDG_CACHE_HOME=/tmp/cache XDG_RUNTIME_DIR=/run PYTHONPATH=/mnt/tree/src:/mnt/packages:/mnt/tree
export SKEP_PROGRAMS=/mnt/programs PYTHONDONTWRITEBYTECODE=1 PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
cd /mnt/tree
(. /mnt/command)
echo o > /proc/sysrq-trigger
sleep 100
"""


SILENCE = 90.0
"""Seconds without a sign of life after which L1 is dead: however busy the host is, it gives one every few seconds."""


class Silent(Exception):
    """L1 is dead, said nothing for too long, or ended before its time."""


def missing() -> str | None:
    """What keeps a laboratory from being built here, in words; None: nothing."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    return f"{', '.join(absent)} is not installed" if absent else None


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class Payload:
    """The second image, which L1 has at /mnt."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "payload.img"
        self._staged = directory / "payload"
        self._staged.mkdir()
        tree, packages = self._staged / "tree", self._staged / "packages"
        for name in TREE:
            _copy(ROOT / name, tree / name)
        compiled = (sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", tree)
        subprocess.run(compiled, check=True)  # in L1 it takes seconds for every process
        for name in PACKAGES:
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:
                raise UserError(f"the Python package {name} is not installed", None, "pip install it")
            origin = Path(found.origin)
            whole = origin.parent if origin.name == "__init__.py" else origin
            _copy(whole, packages / whole.name)
        programs = self._staged / "programs"
        programs.mkdir()
        for name in PROGRAMS if shutil.which("gcc") else ():
            source = ROOT / name
            subprocess.run(("gcc", "-O2", "-static", "-o", programs / source.stem, source), check=True)
        guest = debian.obtain()
        _copy(guest.kernel.parent, self._staged / "guest" / guest.kernel.parent.name)
        (self._staged / "run.sh").write_text(_RUN.format(tested=(1 << CPUS) - 2))

    def put(self, path: Path) -> None:
        """A file or a directory, at ``/mnt/put/NAME``."""
        _copy(path, self._staged / "put" / path.name)

    def put_qemu(self) -> None:
        """This host's, for ``-accel kvm`` there: ``/mnt/qemu/qemu-system-x86_64``, with its libraries and firmware."""
        emulator.put_host(self._staged / "qemu", "/mnt/qemu")

    def build(self, command: str, files: Iterable[tuple[str, str]] = ()) -> Path:
        """The image, whose L1 runs ``command``, a piece of shell, in the working tree. ``files`` are put into its root
        besides: names, and what is in them."""
        for name, text in (("command", command), *files):
            (self._staged / name).write_text(text)
        used = int(subprocess.run(("du", "-sm", self._staged), check=True, capture_output=True).stdout.split()[0])
        self.image.unlink(missing_ok=True)
        subprocess.run(
            ("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", self._staged, self.image,
             f"{used + used // 4 + 32}M"),
            check=True, env={**os.environ, "PATH": _path()}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return self.image


def _copy(source: Path, target: Path) -> None:
    """With times of files: compiled modules are taken along, and are those of their sources."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(("cp", "-a", "--no-preserve=ownership", source, target), check=True)


class Machine:
    """L1, running. A context manager: behind it, its process is gone."""

    def __init__(self, payload: Path, console: Path, taken: Path | None = None) -> None:
        """``console`` is a file that gets what L1's kernel and programs say, and QEMU's complaints. ``taken`` is a file
        that L1 has as the disk /dev/nvme0n3."""
        self._console = console
        self._beats = console.with_name(f"{console.name}.beats")
        root = debian_root.obtain()
        images = [(root.image, "on"), (payload, "on"), *([(taken, "off")] if taken is not None else [])]
        drives = [
            part
            for number, (image, snapshot) in enumerate(images, 1)
            for part in (
                "-drive", f"file={image},if=none,id=d{number},format=raw,snapshot={snapshot}",
                "-device", f"nvme-ns,drive=d{number},nsid={number}",
            )
        ]  # fmt: skip
        command: list[str | Path] = [
            "setpriv", "--pdeathsig", "KILL",
            emulator.for_laboratory(), "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512",
            "-cpu", "EPYC,+svm,+npt,+umip", "-smp", str(CPUS), "-m", MEMORY, "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{console}", "-serial", "stdio", "-serial", f"file:{self._beats}",
            "-kernel", root.kernel, "-append", _KERNEL, "-device", "nvme,serial=l1", *drives,
        ]  # fmt: skip
        with (console.parent / "qemu").open("wb") as complaints:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="laboratory", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.decode(errors="replace"))
        self._lines.put(None)

    def line(self, patience: float) -> str:
        """The next one from L1. Raises Silent where none comes for ``patience`` seconds, or L1 is dead or over."""
        end = time.monotonic() + patience
        beats, dead = self._lived(), time.monotonic() + SILENCE
        while True:
            try:
                line = self._lines.get(timeout=1)
                break
            except queue.Empty:
                now = time.monotonic()
                if (lived := self._lived()) != beats:
                    beats, dead = lived, now + SILENCE
                if now > dead:
                    raise Silent(f"L1 gave no sign of life for {SILENCE:g} seconds") from None
                if now > end:
                    raise Silent(f"L1 lives, and said nothing for {patience:g} seconds") from None
        if line is None:
            self._lines.put(None)
            raise Silent("L1 is over")
        return line

    def _lived(self) -> int:
        """How many signs of life there were."""
        return self._beats.stat().st_size if self._beats.exists() else 0

    def console(self) -> str:
        """What L1 said elsewhere so far."""
        try:
            return self._console.read_text(errors="replace")
        except OSError:
            return ""

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
