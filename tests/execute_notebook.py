"""Executes the notebook from top to bottom and stores it with what came out.

    python tests/execute_notebook.py             # in place: make notebook
    python tests/execute_notebook.py copy.ipynb  # as another file

It runs in the current folder, in a kernel of its own. With the outputs it stores the SHA-256 of the
code that was executed, so that code which was changed afterwards can be told from it.
"""

import hashlib
import json
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "digitclassification-model.ipynb"
DIGEST = "executed_sha256"  # in the notebook's metadata


def execute(target: Path) -> None:
    """Executes the notebook and writes it; an error in a cell ends it, and nothing is written."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # When a cell ran would make each run's file another one.
    NotebookClient(notebook, timeout=None, record_timing=False).execute()
    notebook.metadata[DIGEST] = code_sha256(notebook)
    nbformat.write(notebook, target)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Returns the cells that are executed, in their order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_sha256(notebook: nbformat.NotebookNode) -> str:
    """Returns the SHA-256 of the sources of those cells."""
    sources = [cell.source for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


if __name__ == "__main__":
    execute(Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK)
