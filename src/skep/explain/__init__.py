"""Why a guest does not do what it should: what it did last, what it said, what it missed.

:func:`explain` looks at a VM that stands still, a :class:`Subject`, and gives an :class:`Explanation`; ``str`` of one
is the report that ``skep run`` prints. Nothing is recorded for it while a guest runs but what exits to Python note of
themselves (:mod:`skep.engine.exits`, ``Bus.unknown``) and the end of the consoles' output.

A guest's memory may hold anything: whatever is read there is bounded, and what makes no sense is left out.

Every VM's start pays for imports, and most guests never fail: what explains is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skep.explain.subject import Activity, Cause, Seen, Subject

if TYPE_CHECKING:
    from skep.explain.explanation import Explanation, Frame, Processor
    from skep.explain.findings import Finding
    from skep.explain.looking import explain

__all__ = ["Activity", "Cause", "Explanation", "Finding", "Frame", "Processor", "Seen", "Subject", "explain"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from skep.explain import explanation, looking

        return getattr(looking if name == "explain" else explanation, name)
    raise AttributeError(f"module 'skep.explain' has no attribute {name!r}")
