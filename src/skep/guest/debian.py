"""``skep guest debian``: Debian's kernel and busybox, as a kernel and an initramfs.

Everything comes through the system's own package client, which also checks the signatures, and needs no root.
The result is kept under the user's cache directory and made again only on request or when this recipe changes.

The initramfs is not compressed: unpacking is the guest's time, and on a translated CPU that is dear.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from skep.boot.payload import vmlinux_of
from skep.errors import UserError
from skep.guest import cache, packages
from skep.guest.cpio import Archive
from skep.guest.progress import say

METAPACKAGE = {"amd64": "linux-image-cloud-amd64"}
"""The package that depends on the current kernel, by architecture."""
FULL_METAPACKAGE = {"amd64": "linux-image-amd64"}
"""The same for the kernel with drivers for real machines."""
BUSYBOX = "busybox-static"
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "ext4", "button", "evdev")
"""What the guest's init loads; the modules that these depend on come along."""

_RECIPE = 3
"""To be raised when what is built changes, other than by init.sh."""

FILES = ("vmlinuz", "initrd.img")


@dataclass(frozen=True, slots=True)
class Guest:
    """What to boot."""

    kernel: Path
    initrd: Path


def obtain(arch: str = "amd64", refresh: bool = False, full: bool = False) -> Guest:
    """The guest from the cache, or made now. ``refresh`` makes it again from today's packages.

    ``full`` takes the kernel with drivers for real machines.
    """
    check_architecture(arch)
    home = cache.home_of(f"debian-{'full-' if full else ''}{arch}-{recipe()}")
    if refresh or not cache.complete(home, FILES):
        packages.check_client()
        cache.make(home, FILES, lambda scratch, made: build(arch, scratch, made, full), refresh)
    return Guest(*(home / name for name in FILES))


def vmlinux(kernel: Path) -> Path:
    """The ELF file inside a guest's kernel, kept beside it; unpacked now unless it was before."""
    path = kernel.with_name("vmlinux")
    if not path.is_file():
        say("unpacking the kernel")
        unpacked = vmlinux_of(kernel.read_bytes(), kernel)
        with tempfile.NamedTemporaryFile(dir=kernel.parent, prefix=".vmlinux-", delete=False) as file:
            try:
                file.write(unpacked)
                os.fchmod(file.fileno(), 0o644)
                os.rename(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    return path


def check_architecture(arch: str) -> None:
    if arch not in METAPACKAGE:
        raise UserError(f"no Debian guest for {arch!r}", "--arch", f"one of: {', '.join(METAPACKAGE)}")


def _init() -> bytes:
    return (files("skep.guest") / "init.sh").read_bytes()


def recipe() -> str:
    """Changes when what is built does."""
    return hashlib.sha256(b"%d" % _RECIPE + _init()).hexdigest()[:12]


def build(arch: str, scratch: Path, made: Path, full: bool = False) -> None:
    """Make kernel and initramfs in the directory ``made``, with the help of another."""
    metapackage = (FULL_METAPACKAGE if full else METAPACKAGE)[arch]

    def names() -> list[str]:
        kernel = packages.dependency(f"{metapackage}:{arch}", r"linux-image-[^\s:]+")
        return [f"{kernel}:{arch}", f"{BUSYBOX}:{arch}"]

    kernel_deb, busybox_deb = packages.download(names, metapackage, scratch)
    say("unpacking")
    kernel, modules = _kernel_parts(kernel_deb)
    busybox = _busybox_binary(busybox_deb)
    applets = _applets(busybox, scratch)
    (made / "vmlinuz").write_bytes(kernel)
    (made / "initrd.img").write_bytes(initramfs(_init(), busybox, applets, modules))
    (made / "packages").write_text(f"{kernel_deb.name}\n{busybox_deb.name}\n")


# What is taken out of the packages


def _kernel_parts(deb: Path) -> tuple[bytes, dict[str, bytes]]:
    """The kernel image, and the modules that :data:`DRIVERS` need, by name.

    The full kernel's modules are hundreds of megabytes, so a first pass only looks at what each says of itself.
    """
    images = []
    said: dict[str, bytes] = {}
    for path, data in packages.each_member(deb, re.compile(rf"boot/vmlinuz-.*|{_MODULES}/.*\.ko")):
        if path.startswith("boot/"):
            images.append(data)
        else:
            said[_module_name(path)] = b"".join(re.findall(rb"\0(?:depends|softdep|alias)=[^\0]*(?=\0)", data)) + b"\0"
    if len(images) != 1:
        raise UserError(f"{len(images)} kernel images in the package", deb.name)
    needed = {name for driver in DRIVERS for name in module_order(driver, said)}
    files = "|".join(re.escape(name).replace("_", "[-_]") for name in sorted(needed))
    found = packages.members(deb, re.compile(rf"{_MODULES}/(.*/)?({files})\.ko"))
    return images[0], {_module_name(path): data for path, data in found.items()}


_MODULES = "(usr/)?lib/modules"


def _module_name(path: str) -> str:
    return Path(path).stem.replace("-", "_")


def _busybox_binary(deb: Path) -> bytes:
    found = packages.members(deb, re.compile(r"(usr/)?bin/busybox"))
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

    A module says what it depends on in its .modinfo section, as ``depends=a,b``, and what it asks for by a name that
    several may answer to as ``softdep=pre: c``. One that is not in the package is built into the kernel.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name not in modules:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", modules[name])
        for needed in (depends[1].decode() if depends else "").split(","):
            visit(needed.replace("-", "_"))
        for soft in re.findall(rb"(?<=\0)softdep=pre: ([^\0]*)(?=\0)", modules[name]):
            for needed in soft.decode().split():
                visit(answering(needed))
        order.append(name)

    def answering(name: str) -> str:
        """The first module of that name or alias."""
        if name in modules:
            return name
        alias = b"\0alias=%b\0" % name.encode()
        return next((other for other in sorted(modules) if alias in modules[other]), name)

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
