"""The kernel inside a bzImage comes out, however it is packed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable

import pytest

from skep.boot.payload import vmlinux_of
from skep.errors import UserError
from skep.guest.debian import Guest
from tests.boot.bzimage import bzimage

KERNEL = b"\x7fELF" + bytes(range(256)) * 500
SIZE = struct.pack("<I", len(KERNEL))


def packed(*command: str) -> bytes:
    return subprocess.run(command, input=KERNEL, capture_output=True, check=True, timeout=60).stdout


PACKERS: dict[str, Callable[[], bytes]] = {
    "none": lambda: KERNEL,
    "gzip": lambda: gzip.compress(KERNEL),
    "xz": lambda: packed("xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB") + SIZE,
    "lzma": lambda: lzma.compress(KERNEL, lzma.FORMAT_ALONE) + SIZE,
    "bzip2": lambda: bz2.compress(KERNEL) + SIZE,
    "lz4": lambda: packed("lz4", "-lc9") + SIZE,  # the legacy format, as scripts/Makefile.lib has it
    "zstd": lambda: packed("zstd", "-22", "--ultra", "-c") + SIZE,
}


def image(payload: bytes) -> bytes:
    """A bzImage with ``payload`` behind 64 bytes of a decompressor."""
    code = bytes(64) + payload + bytes(-len(payload) % 16 + 512)
    made = bytearray(bzimage(code=code))
    struct.pack_into("<II", made, 0x248, 64, len(payload))
    return bytes(made)


@pytest.mark.parametrize("packer", PACKERS)
def test_each_format_comes_out(packer: str) -> None:
    assert vmlinux_of(image(PACKERS[packer]()), "x") == KERNEL


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (lambda: b"", r"no kernel that we know how to unpack is inside \(\)"),
        (lambda: b"MZ\0\0" + bytes(100), r"inside \(4d5a0000\)"),
        (lambda: gzip.compress(b"no ELF file"), "no kernel that we know"),
        *((lambda name=name: PACKERS[name]()[:-100], "cannot be unpacked") for name in PACKERS if name != "none"),
    ],
)
def test_what_does_not_come_out_is_one_line(payload: Callable[[], bytes], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        vmlinux_of(image(payload()), "vmlinuz")
    assert "\n" not in str(error.value)


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lz4 = image(PACKERS["lz4"]())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="install lz4"):
        vmlinux_of(lz4, "vmlinuz")


def test_debians_kernel_comes_out(guest: Guest) -> None:
    kernel = vmlinux_of(guest.kernel.read_bytes(), guest.kernel)
    assert len(kernel) > 40 << 20 and b"Linux version 6." in kernel
