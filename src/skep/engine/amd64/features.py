"""What the translator needs of the host's CPU and kernel."""

from __future__ import annotations

import ctypes

from skep.engine.amd64 import hostcpuid
from skep.engine.amd64.cpuid import Feature, host_has
from skep.engine.amd64.native import is_amd64
from skep.engine.amd64.registers import Xcr0
from skep.errors import HostError

NEEDED = (Feature.CX16, Feature.SSE4_2, Feature.POPCNT, Feature.BMI1, Feature.BMI2, Feature.LAHF, Feature.XSAVE)
"""The translator's own code uses BMI (jump-cache sets by PDEP) and XSAVE; the baseline CPU model the rest."""

AT_HWCAP2 = 26
HWCAP2_FSGSBASE = 1 << 1


def missing() -> list[str]:
    """Names of what the host lacks; empty where the translator can run."""
    if not is_amd64():
        return ["an x86-64 CPU"]
    names = [feature.name for feature in NEEDED if not host_has(feature)]
    state = Xcr0.X87 | Xcr0.SSE
    if hostcpuid.xcr0() & state != state:
        names.append("XSAVE enabled by the kernel")
    return names


def require() -> None:
    """Raise HostError, one line, where the translator cannot run."""
    lacking = missing()
    if lacking:
        todo = "use a host of the Haswell or Zen generation or later"
        raise HostError(f"this host lacks {', '.join(lacking)}", "engine=translate", todo)


def user_fsgsbase() -> bool:
    """Whether WRGSBASE works in user mode (the kernel set CR4.FSGSBASE); else arch_prctl(ARCH_SET_GS) has to do."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype = ctypes.c_ulong
    return bool(getauxval(ctypes.c_ulong(AT_HWCAP2)) & HWCAP2_FSGSBASE)
