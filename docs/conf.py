"""Sphinx configuration: ``make docs`` builds these pages into ``build/docs``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from trainer import __version__  # noqa: E402

project = "digits-trainer"
author = "The digits-trainer authors"
release = version = __version__

extensions = [
    "commands",  # docs/_ext
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

# Markdown. Headings down to the third level can be linked to as page.md#the-heading.
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
exclude_patterns = ["_ext"]

# Signatures are long; the types are in them, and the docstrings add shapes and units.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"digits-trainer {version}"
html_copy_source = False


def _mark_examples(app, what, name, obj, options, lines: list[str]) -> None:
    """Makes literal blocks of the indented examples in docstrings, as pydoc shows them.

    An example follows an unindented paragraph and a blank line; what belongs to a Google-style
    section follows its heading directly.
    """
    marked, paragraph = [], ""
    for number, line in enumerate(lines):
        starts = line.startswith("    ") and number and not lines[number - 1].strip()
        if starts and paragraph and not paragraph.startswith(" ") and not paragraph.endswith("::"):
            marked += ["::", ""]
        marked.append(line)
        paragraph = line or paragraph
    lines[:] = marked


def setup(app) -> None:
    """Has examples marked before Napoleon reads the sections."""
    app.connect("autodoc-process-docstring", _mark_examples, priority=100)
