"""The benchmark's guest: an initramfs with the programs of the rows, for the kernel of ``skep guest debian``.

The programs come from ``programs/`` (compiled here, statically) and from Debian's packages (``apt-get download``, which
needs no root). Unpacked they are a directory, which the native runs use, and packed the initramfs of both guests: the
same bytes run in all three places. Kept under the user's cache directory under a hash of all that it was made of.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.console import BenchmarkError
from skep.guest.cpio import Archive

PROGRAMS = Path(__file__).with_name("programs")
PACKAGES = (
    "busybox-static", "coreutils", "gzip", "libc6", "libexpat1", "libpython3.11-minimal", "libssl3", "openssl",
    "python3.11-minimal", "zlib1g",
)  # fmt: skip
LIBRARIES = "usr/lib/x86_64-linux-gnu"
WANTED = re.compile(
    r"bin/busybox|usr/bin/(sha256sum|gzip|openssl|python3\.11)|usr/lib/python3\.11/.*"
    r"|usr/lib/x86_64-linux-gnu/(ld-linux-x86-64|libc|libm|libcrypto|libssl|libexpat|libz)\.so[^/]*"
)
"""What is taken out of the packages, with /lib and /bin as parts of /usr (``busybox`` has its own place)."""
FLAGS = ("-O2", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-static")
INIT = """\
#!/bin/busybox sh
# The console's other end types "ROW COUNT" or "ROW COUNT COPIES"; until it does, the guest is idle.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
cd /tmp
/bin/busybox stty -echo < /dev/console
echo READY
while read -r row count copies; do
    [ "$row" = off ] && /bin/busybox poweroff -f
    if [ "$copies" ]; then
        for copy in $(/bin/busybox seq "$copies"); do /bench/bench "$row" "$count" < /dev/null & done
        wait
    else
        /bench/bench "$row" "$count"
    fi
    echo "DONE $?"
done
"""


@dataclass(frozen=True, slots=True)
class SuiteGuest:
    """Where the guest lies: the directory for native runs, and the initramfs with the same files."""

    root: Path
    initrd: Path


def obtain() -> SuiteGuest:
    """The guest's files from the cache, or made now. Raises BenchmarkError where a tool or a package is missing."""
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = (told if told.is_absolute() else Path.home() / ".cache") / "skep"
    home = cache / f"benchmark-{_recipe()}"
    if not (home / "initrd.img").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="making-", dir=cache) as scratch:
            _make(Path(scratch))
            try:
                (Path(scratch) / "made").rename(home)
            except OSError:
                if not (home / "initrd.img").exists():  # else another process was quicker
                    raise
    return SuiteGuest(home / "root", home / "initrd.img")


def _recipe() -> str:
    made_of = hashlib.sha256(Path(__file__).read_bytes())
    for source in sorted(PROGRAMS.iterdir()):
        made_of.update(source.name.encode() + source.read_bytes())
    return made_of.hexdigest()[:12]


def _run(*command: str, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command, check=False, cwd=cwd, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        raise BenchmarkError(f"{command[0]} is not installed, which makes the benchmark's guest") from None
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()}")


def _make(scratch: Path) -> None:
    print("making the benchmark's guest ...", file=sys.stderr, flush=True)
    root = scratch / "made" / "root"
    (root / "bench").mkdir(parents=True)
    _compile(scratch, root / "bench" / "bench")
    for script in ("loop.sh", "work.py"):
        shutil.copy(PROGRAMS / script, root / "bench" / script)
    _unpack(scratch, root)
    (scratch / "made" / "initrd.img").write_bytes(_initramfs(root))


def _compile(scratch: Path, program: Path) -> None:
    sources = sorted(str(source) for source in PROGRAMS.glob("*.c") if source.name != "avx2.c")
    _run("gcc", *FLAGS, "-mavx2", "-c", str(PROGRAMS / "avx2.c"), "-o", str(scratch / "avx2.o"))
    _run("gcc", *FLAGS, "-o", str(program), *sources, str(scratch / "avx2.o"))


def _unpack(scratch: Path, root: Path) -> None:
    download = ("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *(f"{name}:amd64" for name in PACKAGES))
    try:
        _run(*download, cwd=scratch)
    except BenchmarkError:
        if os.geteuid() != 0:
            raise
        _run("apt-get", "-q", "update")
        _run(*download, cwd=scratch)
    whole = scratch / "whole"
    for package in sorted(scratch.glob("*.deb")):
        _run("dpkg-deb", "-x", str(package), str(whole))
    for path in sorted(whole.rglob("*")):
        inside = re.sub(r"^lib/", "usr/lib/", str(path.relative_to(whole)))
        inside = re.sub(r"^bin/(?!busybox)", "usr/bin/", inside)
        if WANTED.fullmatch(inside) and path.is_file():
            target = root / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)  # what a link leads to, under the link's name
    loader = root / LIBRARIES / "ld-linux-x86-64.so.2"
    for needed in (loader, root / "bin/busybox", root / "usr/bin/python3.11"):
        if not needed.exists():
            raise BenchmarkError(f"{needed.relative_to(root)} is in none of the packages")


def _initramfs(root: Path) -> bytes:
    archive = Archive()
    for path in sorted(root.rglob("*")):
        inside = str(path.relative_to(root))
        if path.is_dir():
            archive.directory(inside)
        else:
            archive.file(inside, path.read_bytes(), 0o755 if path.stat().st_mode & 0o100 else 0o644)
    for directory in ("dev", "proc"):
        archive.directory(directory)
    archive.directory("tmp", 0o1777)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", INIT.encode(), 0o755)
    return archive.finish()
