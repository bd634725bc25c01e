"""The host's time stamp counter: reading it, and its frequency."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from collections.abc import Callable
from functools import lru_cache

from skep.engine.amd64.hostcpuid import cpuid
from skep.engine.amd64.native import function

read_tsc: Callable[[], int] = function(
    bytes.fromhex("0f31 48c1e220 4809d0 c3"),  # rdtsc; shl rdx, 32; or rax, rdx; ret
    ctypes.c_uint64,
)
"""The counter now (0.1 us)."""

TOLERANCE = 250e-6
"""So near to the host's frequency a guest gets the host's, as KVM has it (its ``tsc_tolerance_ppm``)."""
CALIBRATION_NS = 30_000_000


@lru_cache(maxsize=1)
def tsc_hz() -> int:
    """The counter's frequency in Hz: as the kernel uses it, else as CPUID tells it, else measured (over 30 ms)."""
    return _from_perf() or _from_cpuid() or _measured()


def guest_counter(khz: int | None) -> tuple[Callable[[], int], int]:
    """What a guest's TSC of that frequency follows, before its offset, and the frequency in Hz; None: the host's.

    Another than the host's is what the processor makes of its own: times a ratio of 32 bits behind the point under SVM
    (APM 2, 15.30.5), of 48 under VMX (SDM 3, 26.6.5), which KVM derives from whole kHz.
    """
    host = tsc_hz()
    if khz is None or abs(khz * 1000 - host) <= host * TOLERANCE:
        return read_tsc, host
    vmx = cpuid(1)[2] >> 5 & 1
    point = 48 if vmx else 32
    ratio = (khz << point) // (host // 1000)
    return lambda: read_tsc() * ratio >> point & (1 << 64) - 1, khz * 1000


def _from_perf() -> int | None:
    """The kernel's own figure: perf's user page tells how it turns cycles into nanoseconds (perf_event_open(2)).

    ns = cycles * time_mult >> time_shift, derived by the kernel from a whole number of kHz, which rounding restores.
    """
    size = 64  # PERF_ATTR_SIZE_VER0
    software, dummy, disabled_exclude_kernel_hv = 1, 9, 1 | 1 << 5 | 1 << 6
    attr = struct.pack("<IIQQQQQIIQ", software, size, dummy, 0, 0, 0, disabled_exclude_kernel_hv, 0, 0, 0)
    perf_event_open, cloexec = 298, 8
    # A host's first event of a task makes Linux wait until every processor has been through its scheduler; one of a
    # processor does not, but is root's to have.
    syscall = ctypes.CDLL(None).syscall
    fd: int = syscall(perf_event_open, attr, -1, 0, -1, cloexec)
    if fd < 0:
        fd = syscall(perf_event_open, attr, 0, -1, -1, cloexec)
    if fd < 0:
        return None
    try:
        with mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ) as page:
            (capabilities,) = struct.unpack_from("<Q", page, 40)
            time_shift, time_mult = struct.unpack_from("<HI", page, 50)
    except OSError:
        return None
    finally:
        os.close(fd)
    cap_user_time = 1 << 3
    if not capabilities & cap_user_time or not time_mult:
        return None
    khz: int = round(((10**6) << time_shift) / time_mult)
    return khz * 1000


def _from_cpuid() -> int | None:
    """Leaf 0x15 (core crystal and its ratio) or the hypervisors' leaf 0x40000010 (kHz)."""
    if cpuid(0)[0] >= 0x15:
        denominator, numerator, crystal, _ = cpuid(0x15)
        if denominator and numerator and crystal:
            return crystal * numerator // denominator
    hypervisor_present = cpuid(1)[2] >> 31
    if hypervisor_present and cpuid(0x40000000)[0] >= 0x40000010:
        return cpuid(0x40000010)[0] * 1000 or None
    return None


def _measured() -> int:
    """Against CLOCK_MONOTONIC_RAW, which nobody slews, since this module was imported: by now that may be long enough.
    Each end is the tightest of a few readings."""
    first, start = _AT_IMPORT
    left = CALIBRATION_NS - (time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - start)
    if left > 0:
        time.sleep(left / 1e9)
    last, end = _paired_reading()
    return (last - first) * 10**9 // (end - start)


def _paired_reading() -> tuple[int, int]:
    """(counter, nanoseconds) of one moment: the pair whose clock reading took the fewest cycles."""
    best = None
    for _ in range(16):
        before = read_tsc()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        width = read_tsc() - before
        if best is None or width < best[0]:
            best = (width, before + width // 2, now)
    assert best is not None
    return best[1], best[2]


_AT_IMPORT = _paired_reading()
