"""Packages of this system's distribution, through its own package client, which checks their signatures.

Nothing here needs root, but to renew package lists.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from skep.errors import UserError
from skep.guest.progress import say

_TOOLS = ("apt-get", "apt-cache", "dpkg-deb")


class AptFailed(Exception):
    """The package client said no; the text is what it said."""


def check_client() -> None:
    """Raises UserError where there is no package client at all."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"{missing[0]} is not installed, so there are no Debian packages to make a guest from",
            None,
            "give `skep run` a kernel and an initramfs of your own: --kernel BZIMAGE --initrd CPIO",
        )


def download(names: Callable[[], list[str]], what: str, into: Path) -> list[Path]:
    """Fetch the packages that ``names`` returns, as ``name:arch``, and return their files in the same order.

    Where the lists are missing or stale they are renewed, if we may. ``what`` is what an error says is not to be had.
    """
    try:
        return _download_once(names(), into)
    except AptFailed as failed:
        if os.geteuid() != 0:
            raise UserError(f"apt-get: {failed}", what, "run `apt-get update` as root first") from None
    say("apt-get update")
    try:
        apt("apt-get", "-q", "update")
        return _download_once(names(), into)
    except AptFailed as failed:
        raise UserError(f"apt-get: {failed}", what, "see what `apt-get update` says") from None


def _download_once(names: list[str], into: Path) -> list[Path]:
    debs = []
    for name in names:
        package = name.partition(":")[0]
        say(f"downloading {package}")
        # The sandbox user could not write into our directory; without root the option does nothing.
        apt("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name, cwd=into)
        found = sorted(into.glob(f"{package}_*.deb"))
        if not found:
            raise AptFailed(f"{package} was not downloaded")
        debs.append(found[-1])
    return debs


def dependency(metapackage: str, pattern: str) -> str:
    """The first package matching ``pattern`` that ``metapackage`` depends on today."""
    text = apt("apt-cache", "depends", "--important", metapackage)
    found = re.findall(rf"^\s*Depends:\s*({pattern})", text, re.MULTILINE)
    if not found:
        raise AptFailed(f"{metapackage} depends on no {pattern}")
    return str(found[0])


def apt(*command: str, cwd: Path | None = None) -> str:
    """Run one command of the package client and return what it said."""
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


def members(deb: Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """The regular files of a package whose path matches, without unpacking the rest onto the disk."""
    return dict(each_member(deb, wanted))


def each_member(deb: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """The same, one after the other: together they may be too large for memory."""
    with subprocess.Popen(("dpkg-deb", "--fsys-tarfile", deb), stdout=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        with tarfile.open(fileobj=unpacker.stdout, mode="r|") as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                if member.isfile() and wanted.fullmatch(path):
                    data = tar.extractfile(member)
                    assert data is not None
                    yield path, data.read()
    if unpacker.returncode:
        raise UserError("dpkg-deb could not unpack the package", deb.name, "try again with --refresh")
