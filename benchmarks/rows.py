"""The fixed rows of the suite. What each does stands beside its function in ``programs/``."""

from __future__ import annotations

CAP = 20.0
"""A row's ratio counts for no more than this, so that no single one carries a mean."""

ROWS = {
    "integer": {
        "alu": "arithmetic in registers",
        "calls": "calls and returns",
        "copy": "memory copy",
        "chase": "pointer chase",
        "sort": "the C library's sort",
        "rmw": "read-modify-write",
        "crc": "CRC-32 by table",
        "matrix": "matrix product",
        "sieve": "Eratosthenes' sieve",
        "sha256sum": "coreutils' sha256sum",
        "gzip": "gzip -6",
        "shell": "busybox's shell, without forks",
        "python3": "Debian's python3",
    },
    "FP and SIMD": {
        "sse2-double": "n-body in double",
        "avx2": "float and 32-bit integer",
        "x87": "long double",
        "sse2-integer": "a codec's pixel work",
        "openssl": "AES-256-CTR, ChaCha20, SHA-512",
    },
    "system": {
        "syscalls": "getppid",
        "faults": "first touch of pages",
        "forks": "fork, exit and wait",
        "pipes": "512 bytes at a time",
        "switches": "a byte to and fro, one CPU",
    },
}
"""Group, row, what it is."""

NAMES = tuple(name for rows in ROWS.values() for name in rows)
