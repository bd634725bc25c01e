"""``skep guest debian --root``: a Debian with systemd as a disk image, with the kernel and the initramfs that boot it.

debootstrap makes the root from the archive that this system's own package client uses, in the release that this system
is; ``root.sh`` is the whole of what is done. The kernel's modules go in, so the three files belong together and are
kept in one directory. The image there is to be copied, not to be written to.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from skep.config.values import MIB
from skep.config.values import size as bytes_of
from skep.errors import UserError
from skep.guest import cache, debian, packages
from skep.guest.progress import Ticker, say

SIZE = "1G"
"""Of the image unless something else is asked for; it can only be more."""
CMDLINE = "console=ttyS0 root=/dev/vda"
"""The kernel's command line, where the image is the first disk."""
FILES = (*debian.FILES, "root.img")

_LARGEST = 16 << 40
"""What ext4 holds with blocks of 4 KiB and 32-bit block numbers."""
_TOOLS = {"debootstrap": "debootstrap", "mke2fs": "e2fsprogs", "resize2fs": "e2fsprogs", "unshare": "util-linux"}
"""What is run here and in root.sh, and the packages that have it."""
_APART = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""In namespaces of its own, which end with the program or with us."""
_AS_ROOT = ("--map-root-user", "--map-auto")
"""Where we are not root: as the root of a user namespace, with our subordinate users and groups as the others."""


@dataclass(frozen=True, slots=True)
class Root:
    """What to boot, and the disk image that is its root."""

    kernel: Path
    initrd: Path
    image: Path


def obtain(arch: str = "amd64", size: str = SIZE, refresh: bool = False) -> Root:
    """The guest from the cache, or made now, which takes a minute or two. ``refresh`` makes it again.

    ``size`` is the image's; it is sparse. Raises UserError where it cannot be made on this system, or by this user.
    """
    debian.check_architecture(arch)
    length = _length(size)
    home = cache.home_of(f"debian-root-{arch}-{_recipe()}")
    if refresh or not cache.complete(home, FILES):
        packages.check_client()
        _check_tools()
        cache.make(home, FILES, lambda scratch, made: _build(arch, scratch, made), refresh)
    kernel, initrd, image = (home / name for name in FILES)
    return Root(kernel, initrd, image if length == bytes_of(SIZE) else _of_length(image, length))


def how_to_run(root: Root) -> str:
    """For somebody who has just made it."""
    return (
        "To run a copy of it, which may be written to:\n"
        f"  cp --sparse=always {root.image} debian.img && chmod u+w debian.img\n"
        f"  skep run --kernel {root.kernel} --initrd {root.initrd} --memory 512M --disk debian.img"
        f' --cmdline "{CMDLINE}"'
    )


def _length(size: str) -> int:
    try:
        length = bytes_of(size)
    except ValueError as error:
        raise UserError(str(error), "--size") from None
    if not bytes_of(SIZE) <= length <= _LARGEST or length % MIB:
        raise UserError(f"{size} is no size for this root", "--size", f"ask for {SIZE} to 16T, in whole MiB")
    return length


def _script() -> bytes:
    return (files("skep.guest") / "root.sh").read_bytes()


def _recipe() -> str:
    return hashlib.sha256(debian.recipe().encode() + _script()).hexdigest()[:12]


def _environment() -> dict[str, str]:
    """System programs are in the path for users too."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def _check_tools() -> None:
    """Raises UserError where a program is missing, or this user may not set owners of files."""
    for tool, package in _TOOLS.items():
        if shutil.which(tool, path=_environment()["PATH"]) is None:
            raise UserError(f"{tool} is not installed", None, f"apt-get install {package}")
    if os.geteuid() == 0:
        return
    tried = subprocess.run((*_APART, *_AS_ROOT, "true"), check=False, capture_output=True, env=_environment())
    if tried.returncode:
        raise UserError(
            "files of a root have several owners, which this user may not set",
            "--root",
            "run it as root, or install uidmap and have a range of your own in /etc/subuid and /etc/subgid",
        )


def archive(arch: str) -> tuple[str, str]:
    """This system's release, and where its package client finds it."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    wanted = ("Created-By: Packages", f"Codename: {release}", "Component: main", f"Architecture: {arch}")
    try:
        known = packages.apt("apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted).split()
    except packages.AptFailed as failed:
        raise UserError(f"apt-get: {failed}", "--root") from None
    if platform.freedesktop_os_release().get("ID") != "debian" or not known:
        raise UserError(f"apt knows no Debian archive with {release or 'this release'}/main for {arch}", "--root")
    return release, known[0]


def _build(arch: str, scratch: Path, made: Path) -> None:
    release, mirror = archive(arch)
    debian.build(arch, scratch, made)
    (kernel,) = scratch.glob("linux-image-*.deb")
    with as_file(files("skep.guest") / "root.sh") as script, Ticker() as ticker:
        apart = _APART if os.geteuid() == 0 else (*_APART, *_AS_ROOT)
        tree, image = scratch / "tree", made / "root.img"
        tree.mkdir()
        command = (*apart, "sh", script, release, mirror, arch, kernel, tree, image, str(bytes_of(SIZE)))
        last = _follow(command, ticker)
    if last:
        todo = "making it takes the archive that this system's apt uses, half a GiB of memory, and as much of disk"
        raise UserError(last, "the root could not be made", todo)
    image.chmod(0o444)


def _follow(command: tuple[str | Path, ...], ticker: Ticker) -> str:
    """Run root.sh; the complaint with which it failed, if it did."""
    lines: deque[str] = deque(maxlen=40)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(),
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.strip())
                if line.startswith("I: "):
                    ticker.tell(line[3:].strip())
        except BaseException:
            process.kill()  # and with it the namespaces
            raise
    if process.returncode == 0:
        return ""
    errors = [line for line in lines if line.startswith(("E: ", "W: "))] or [line for line in lines if line]
    return errors[-1][:300].removeprefix("E: ") if errors else f"root.sh ended with status {process.returncode}"


def _of_length(image: Path, length: int) -> Path:
    """A larger copy of the image, beside it."""
    larger = image.with_name(f"root-{length // MIB}M.img")
    if larger.exists():
        return larger
    say("growing the image")
    with tempfile.TemporaryDirectory(prefix=".growing-", dir=image.parent) as scratch:
        copy = Path(scratch) / "root.img"
        for command in (
            ("cp", "--sparse=always", image, copy),
            ("chmod", "u+w", copy),
            ("truncate", f"--size={length}", copy),
            ("resize2fs", copy),
            ("chmod", "u-w", copy),
        ):
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=_environment())
            if done.returncode:
                raise UserError(done.stderr.strip() or f"{command[0]} ended with status {done.returncode}", larger)
        copy.rename(larger)
    return larger
