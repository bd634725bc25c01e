"""Skep, a hypervisor in Python: unmodified guests, with or without hardware virtualization.

``skep.Vm`` is the programming interface. It is imported when it is first asked for: ``import skep`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skep.vm import Outcome, Vm

__version__ = "0.1.0"
__all__ = ["Outcome", "Vm", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Outcome", "Vm"):
        from skep import vm

        return getattr(vm, name)
    raise AttributeError(f"module 'skep' has no attribute {name!r}")
