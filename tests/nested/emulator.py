"""QEMU in one directory, with its libraries and firmware: to be run where it is not installed.

The laboratory's machine is emulated by Debian 13's QEMU, 10.0: Debian 12's, 7.2, loses an L1 now and then. It is taken
from the archive that this host's package client uses, by that client, with lists of its own. Inside L1 there is this
host's, for ``-accel kvm``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from skep.errors import UserError
from skep.guest import cache, packages
from skep.guest import root as debian_root
from tests import apt

NAME = "qemu-system-x86_64"
ENOUGH = 10
"""The version from which on this host's own will do."""
RELEASE = "trixie"
FIRMWARE = ("bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "multiboot_dma.bin", "pvh.bin")
"""What ``-M q35 -nodefaults -kernel`` asks for."""

_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_LOADER = "ld-linux-x86-64.so.2"
_SCRIPT = f"""#!/bin/sh
exec %(home)s/lib/{_LOADER} --library-path %(home)s/lib %(home)s/program -L %(home)s/firmware "$@"
"""
_RECIPE = 1
"""Of what is in the cache."""


def for_laboratory() -> Path:
    """The program that emulates L1. Where the archive cannot be had it is this host's: an older one is better than no
    laboratory at all."""
    here = shutil.which(NAME)
    if here is not None and _version(here) >= ENOUGH:
        return Path(here)
    home = cache.home_of(f"qemu-{RELEASE}-{_RECIPE}")
    files = (NAME, "program", f"lib/{_LOADER}", *(f"firmware/{name}" for name in FIRMWARE))
    try:
        cache.make(home, files, lambda scratch, made: _fetch(scratch, made, home))
    except UserError as error:
        if here is None:
            raise
        print(f"tests.nested: L1 runs on this host's QEMU: {error}", file=sys.stderr)
        return Path(here)
    return home / NAME


def put_host(made: Path, home: str) -> None:
    """This host's into the directory ``made``, which will be ``home``."""
    program = Path(shutil.which(NAME) or "")
    places = subprocess.run((program, "-L", "help"), check=True, capture_output=True, text=True).stdout.split()
    _bundle(program.resolve(), ("ldd",), [Path(place) for place in places], made, home)


def _version(program: str) -> int:
    said = subprocess.run((program, "--version"), check=True, capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)\.", said)
    return int(found[1]) if found else 0


def _fetch(scratch: Path, made: Path, home: Path) -> None:
    packages.check_client()
    _, mirror = debian_root.archive("amd64")
    tree = scratch / "tree"
    client = apt.client(scratch / "apt", "amd64", f"deb [signed-by={_KEYS}] {mirror} {RELEASE} main")
    try:
        packages.apt(*client, "update")
        packages.apt(*client, "install", "--download-only", "--no-install-recommends", "qemu-system-x86")
    except packages.AptFailed as failed:
        raise UserError(f"apt-get: {failed}", f"Debian {RELEASE}'s QEMU") from None
    for deb in (scratch / "apt/archives").glob("*.deb"):
        subprocess.run(("dpkg-deb", "-x", deb, tree), check=True)
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    lister = (libraries / _LOADER, "--library-path", libraries, "--list")
    _bundle(tree / "usr/bin" / NAME, lister, [tree / "usr/share/qemu", tree / "usr/share/seabios"], made, str(home))


def _bundle(program: Path, lister: Sequence[str | Path], places: Iterable[Path], made: Path, home: str) -> None:
    """``lister`` says, as ldd does, what ``program`` is linked with."""
    for name in ("lib", "firmware"):
        (made / name).mkdir(parents=True)
    shutil.copy(program, made / "program")
    listed = subprocess.run((*lister, program), check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listed):
        shutil.copy(library, made / "lib" / Path(library).name)
    for name in FIRMWARE:
        shutil.copy(next(place / name for place in places if (place / name).exists()), made / "firmware" / name)
    script = made / NAME
    script.write_text(_SCRIPT % {"home": home})
    script.chmod(0o755)
