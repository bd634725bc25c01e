"""Hatchling's hook: puts the compiled modules into a wheel."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from compiled import ROOT, build, wanted
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledModules(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard" or not wanted():
            return
        self._made = tempfile.TemporaryDirectory()
        made = Path(self._made.name)
        build(ROOT / "src", made)
        for library in made.rglob("*.so"):
            build_data["force_include"][str(library)] = str(library.relative_to(made))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
