"""Runs the notebooks and stores what they print and draw, for readers who do not run them.

    python notebooks/execute.py quickstart your_own_model

Needs the extra `dev`. The notebook for a GPU is stored without outputs, as it takes hours.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from typing import Any

import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parent
_SECONDS = 900  # of one cell
_WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(name: str, workdir: str | pathlib.Path, parameters: str = "", then: str = "") -> nbformat.NotebookNode:
  """Runs a notebook in a new kernel.

  Args:
    name: Its file name, without the suffix.
    workdir: Folder that it runs in, where its files go.
    parameters: Code that runs after the cell tagged `parameters`, to override what it sets.
    then: Code that runs at the end.

  Returns:
    The notebook with outputs, and cells for `parameters` and `then` if they were given.

  Raises:
    nbclient.exceptions.CellExecutionError: If a cell fails.
  """
  notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
  if parameters:
    (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters))
  if then:
    notebook.cells.append(nbformat.v4.new_code_cell(then))
  resources: Any = {"metadata": {"path": str(workdir)}}
  nbclient.NotebookClient(
    notebook, timeout=_SECONDS, kernel_name="python3", coalesce_streams=True, resources=resources
  ).execute()
  return notebook


def tidy(notebook: nbformat.NotebookNode) -> None:
  """Removes what differs from run to run or shows nothing in a file: times of execution and progress bars."""
  notebook.metadata = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
  }
  for cell in notebook.cells:
    cell.metadata.pop("execution", None)
    if cell.cell_type == "code":
      cell.outputs = [output for output in cell.outputs if _WIDGET not in output.get("data", {})]


def main(names: list[str]) -> None:
  for name in names:
    with tempfile.TemporaryDirectory() as workdir:
      notebook = execute(name, workdir)
    tidy(notebook)
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
  if not sys.argv[1:]:
    sys.exit("usage: python notebooks/execute.py NAME ...")
  main(sys.argv[1:])
