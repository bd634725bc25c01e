"""``skep guest debian``: Debian's cloud kernel and busybox, as a kernel and an initramfs.

Everything comes through the system's own package client, which also checks the signatures, and needs no root.
The result is kept under the user's cache directory and made again only on request or when this recipe changes.

The initramfs is not compressed: unpacking is the guest's time, and on a translated CPU that is dear.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from skep.errors import UserError
from skep.guest.cpio import Archive

METAPACKAGE = {"amd64": "linux-image-cloud-amd64"}
"""The package that depends on the current kernel, by architecture."""
BUSYBOX = "busybox-static"
DRIVERS = ("virtio_pci", "virtio_blk", "button", "evdev")
"""What the guest's init loads; the modules that these depend on come along."""

_APT = ("apt-get", "apt-cache", "dpkg-deb")
_RECIPE = 2
"""To be raised when what is built changes, other than by init.sh."""


@dataclass(frozen=True, slots=True)
class Guest:
    """What to boot."""

    kernel: Path
    initrd: Path


class AptFailed(Exception):
    """The package client said no; the text is what it said."""


def obtain(arch: str = "amd64", refresh: bool = False) -> Guest:
    """The guest from the cache, or made now. ``refresh`` makes it again from today's packages."""
    if arch not in METAPACKAGE:
        raise UserError(f"no Debian guest for {arch!r}", "--arch", f"one of: {', '.join(METAPACKAGE)}")
    home = _cache_home() / "guest" / f"debian-{arch}-{_recipe()}"
    if refresh or not _complete(home):
        _make(arch, home)
    return Guest(home / "vmlinuz", home / "initrd.img")


def _cache_home() -> Path:
    """XDG Base Directory Specification: a relative XDG_CACHE_HOME is to be ignored."""
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (told if told.is_absolute() else Path.home() / ".cache") / "skep"


def _init() -> bytes:
    return (files("skep.guest") / "init.sh").read_bytes()


def _recipe() -> str:
    return hashlib.sha256(b"%d" % _RECIPE + _init()).hexdigest()[:12]


def _complete(home: Path) -> bool:
    return (home / "vmlinuz").is_file() and (home / "initrd.img").is_file()


def _make(arch: str, home: Path) -> None:
    missing = [tool for tool in _APT if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"{missing[0]} is not installed, so there are no Debian packages to make a guest from",
            None,
            "give `skep run` a kernel and an initramfs of your own: --kernel BZIMAGE --initrd CPIO",
        )
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="making-", dir=home.parent) as scratch:
            _build(arch, Path(scratch), Path(scratch) / "guest")
            _swap_in(Path(scratch) / "guest", home, Path(scratch) / "old")
    except OSError as error:
        raise UserError(error.strerror or str(error), error.filename or home.parent) from None


def _swap_in(made: Path, home: Path, old: Path) -> None:
    """Put the finished directory in its place: whoever looks finds a complete guest or none."""
    if home.exists():
        home.rename(old)
    try:
        made.rename(home)
    except OSError:
        # Another process was quicker; what it made from the same recipe is as good.
        if not _complete(home):
            raise


def _build(arch: str, scratch: Path, made: Path) -> None:
    kernel_deb, busybox_deb = _download(arch, scratch)
    _say("unpacking")
    kernel, modules = _kernel_parts(kernel_deb)
    busybox = _busybox_binary(busybox_deb)
    applets = _applets(busybox, scratch)
    made.mkdir()
    (made / "vmlinuz").write_bytes(kernel)
    (made / "initrd.img").write_bytes(initramfs(_init(), busybox, applets, modules))
    (made / "packages").write_text(f"{kernel_deb.name}\n{busybox_deb.name}\n")


# The package client


def _download(arch: str, scratch: Path) -> tuple[Path, Path]:
    """Fetch the two packages; where the lists are missing or stale, renew them if we may."""
    try:
        return _download_once(arch, scratch)
    except AptFailed as failed:
        if os.geteuid() != 0:
            raise UserError(f"apt-get: {failed}", METAPACKAGE[arch], "run `apt-get update` as root first") from None
    _say("apt-get update")
    try:
        _apt("apt-get", "-q", "update")
        return _download_once(arch, scratch)
    except AptFailed as failed:
        raise UserError(f"apt-get: {failed}", METAPACKAGE[arch], "see what `apt-get update` says") from None


def _download_once(arch: str, scratch: Path) -> tuple[Path, Path]:
    kernel = _dependency(METAPACKAGE[arch], arch)
    debs = []
    for package in (kernel, BUSYBOX):
        _say(f"downloading {package}")
        # The sandbox user could not write into our directory; without root the option does nothing.
        _apt("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", f"{package}:{arch}", cwd=scratch)
        found = sorted(scratch.glob(f"{package}_*.deb"))
        if not found:
            raise AptFailed(f"{package} was not downloaded")
        debs.append(found[-1])
    return debs[0], debs[1]


def _dependency(metapackage: str, arch: str) -> str:
    """The versioned kernel package that the metapackage stands for today."""
    text = _apt("apt-cache", "depends", "--important", f"{metapackage}:{arch}")
    found = re.findall(r"^\s*Depends:\s*(linux-image-[^\s:]+)", text, re.MULTILINE)
    if not found:
        raise AptFailed(f"{metapackage} names no kernel package")
    return str(found[0])


def _apt(*command: str, cwd: Path | None = None) -> str:
    """Run one command of the package client and return what it said; on a terminal, downloads show themselves."""
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise AptFailed(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "N:"))] or [done.stderr.strip()]
        raise AptFailed(lines[0].removeprefix("E: ") or f"{command[0]} ended with status {done.returncode}")
    return done.stdout


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"skep: {text} ...", file=sys.stderr, flush=True)


# What is taken out of the packages


def _members(deb: Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """The regular files of a package whose path matches, without unpacking the rest onto the disk."""
    found: dict[str, bytes] = {}
    with subprocess.Popen(("dpkg-deb", "--fsys-tarfile", deb), stdout=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        with tarfile.open(fileobj=unpacker.stdout, mode="r|") as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                if member.isfile() and wanted.fullmatch(path):
                    data = tar.extractfile(member)
                    assert data is not None
                    found[path] = data.read()
    if unpacker.returncode:
        raise UserError("dpkg-deb could not unpack the package", deb.name, "try again with --refresh")
    return found


def _kernel_parts(deb: Path) -> tuple[bytes, dict[str, bytes]]:
    """The kernel image, and all modules by name."""
    found = _members(deb, re.compile(r"boot/vmlinuz-.*|(usr/)?lib/modules/.*\.ko"))
    images = [data for path, data in found.items() if path.startswith("boot/")]
    if len(images) != 1:
        raise UserError(f"{len(images)} kernel images in the package", deb.name)
    modules = {Path(path).stem.replace("-", "_"): data for path, data in found.items() if path.endswith(".ko")}
    return images[0], modules


def _busybox_binary(deb: Path) -> bytes:
    found = _members(deb, re.compile(r"(usr/)?bin/busybox"))
    if len(found) != 1:
        raise UserError("no busybox in the package", deb.name)
    return next(iter(found.values()))


def _applets(busybox: bytes, scratch: Path) -> list[str]:
    """The names that busybox answers to."""
    program = scratch / "busybox"
    program.write_bytes(busybox)
    program.chmod(0o755)
    listed = subprocess.run((program, "--list"), capture_output=True, text=True, check=True).stdout
    return sorted(set(listed.split()) - {"busybox", "mkfs.ext2"})


def module_order(driver: str, modules: dict[str, bytes]) -> list[str]:
    """The modules to load for one driver, those first that others need.

    A module says what it depends on in its .modinfo section, as ``depends=a,b``. One that is not in the package
    is built into the kernel.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name not in modules:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", modules[name])
        for needed in (depends[1].decode() if depends else "").split(","):
            visit(needed.replace("-", "_"))
        order.append(name)

    visit(driver)
    return order


def initramfs(init: bytes, busybox: bytes, applets: Iterable[str], modules: dict[str, bytes]) -> bytes:
    """The guest's root: busybox under all its names, the drivers, and ``init``."""
    archive = Archive()
    for directory in ("bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "lib", "lib/modules", "mnt", "proc", "root"):
        archive.directory(directory)
    archive.directory("sys")
    archive.directory("tmp", 0o1777)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox, 0o755)
    for applet in applets:
        archive.symlink(f"bin/{applet}", "busybox")
    archive.file("bin/mkfs.ext2", b'#!/bin/sh\nexec busybox mke2fs "$@"\n', 0o755)  # busybox has it under one name only
    archive.file("etc/acpi/PWRF/00000080", b"#!/bin/sh\npoweroff -f\n", 0o755)
    packed: set[str] = set()
    for driver in DRIVERS:
        order = module_order(driver, modules)
        archive.file(f"lib/modules/{driver}.order", "".join(f"{name}.ko\n" for name in order).encode())
        for name in order:
            if name not in packed:
                packed.add(name)
                archive.file(f"lib/modules/{name}.ko", modules[name])
    archive.file("init", init, 0o755)
    return archive.finish()
