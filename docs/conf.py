"""How Sphinx makes the documentation: `make docs`, into docs/_build."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "src"))

import skep  # noqa: E402

project = "Skep"
author = "Skep authors"
project_copyright = author
release = version = skep.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Skep {release}"
html_static_path: list[str] = []
html_show_copyright = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page may begin its parts at any level
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_preserve_defaults = True

REST = "@rest@"
"""Stands in index.md for the pages that it does not name, so that a new page is never lost."""


def _name_the_rest(app: Any, name: str, source: list[str]) -> None:
    if name == "index":
        pages = {path.stem for path in HERE.glob("*.md")} - {"index"}
        named = set(re.findall(r"^([a-z0-9-]+)$", source[0], re.MULTILINE))
        source[0] = source[0].replace(REST, "\n".join(sorted(pages - named)))


def setup(app: Any) -> None:
    app.connect("source-read", _name_the_rest)
