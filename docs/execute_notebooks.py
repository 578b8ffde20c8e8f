"""Executes the notebooks, each in a fresh kernel and an empty folder, and writes their outputs into them.

    python docs/execute_notebooks.py [NAME ...]

An error in a cell ends it, with the cell and its traceback. CI runs this on all of them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent / "notebooks"


def execute(path: Path) -> None:
    """One notebook, in place; what differs from run to run by itself (times, versions, identifiers) is left out."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources, record_timing=False).execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    nbformat.write(notebook, path)


def main(names: list[str]) -> None:
    paths = sorted(FOLDER.glob("*.ipynb"))
    if unknown := set(names) - {path.stem for path in paths}:
        sys.exit(f"no notebook {', '.join(sorted(unknown))} in {FOLDER}; there are {[path.stem for path in paths]}")
    for path in paths:
        if not names or path.stem in names:
            start = time.perf_counter()
            execute(path)
            print(f"{path.stem}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
