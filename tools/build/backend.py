"""The build backend: Hatchling, which is told what else it takes to compile the translator (PEP 517).

``compiled.py`` does that when a wheel is built, where there is a C compiler; ``SKEP_PURE=1`` leaves it out. An editable
installation is always pure.
"""

from __future__ import annotations

from typing import Any

from compiled import requirements
from hatchling import build as hatchling
from hatchling.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*hatchling.get_requires_for_build_wheel(config_settings), *requirements()]
