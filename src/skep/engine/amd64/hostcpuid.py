"""What the host's own CPUID and XGETBV say."""

from __future__ import annotations

import ctypes

from skep.engine.amd64.native import function

_cpuid = function(
    # mov r8, rdx; push rbx; mov eax, edi; mov ecx, esi; cpuid;
    bytes.fromhex("4989d0 53 89f8 89f1 0fa2")
    # mov [r8], eax; mov [r8+4], ebx; mov [r8+8], ecx; mov [r8+12], edx; pop rbx; xor eax, eax; ret
    + bytes.fromhex("418900 41895804 41894808 4189500c 5b 31c0 c3"),
    ctypes.c_int, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p,
)
_xgetbv = function(
    bytes.fromhex("89f9 0f01d0 48c1e220 4809d0 c3"),  # mov ecx, edi; xgetbv; shl rdx, 32; or rax, rdx; ret
    ctypes.c_uint64, ctypes.c_uint32,
)


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of the CPU this runs on."""
    out = (ctypes.c_uint32 * 4)()
    _cpuid(leaf, subleaf, ctypes.addressof(out))
    return out[0], out[1], out[2], out[3]


def xcr0() -> int:
    """The host kernel's XCR0; 0 where it has not enabled XSAVE."""
    osxsave = cpuid(1)[2] >> 27 & 1
    return _xgetbv(0) if osxsave else 0
