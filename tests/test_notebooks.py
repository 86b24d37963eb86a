"""The notebooks: what is stored in them, and that they run."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import sys

import pytest

import sapr_jax as sapr

nbformat = pytest.importorskip("nbformat", reason="notebooks are read by nbformat: pip install 'sapr_jax[dev]'")

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
EXECUTED = ("quickstart", "your_own_model")
NAMES = (*EXECUTED, "cifar10_gpu")
ABSOLUTE = re.compile(r"(?<![\w:/.])/(?!content/drive)\w+/|[A-Z]:\\")
"""A path from the root, but for the one that Colab gives to Google Drive."""

REDUCED = """
WORKDIR = "runs/reduced"
CHANGES = {
  "model.name": "resnet8", "data.source": "digits", "data.crop_padding": 1, "data.flip": False,
  "train.epochs": 6, "train.batch_size": 64, "train.decay_epochs": (5,),
  "finetune.epochs": 2, "finetune.batch_size": 64, "finetune.learning_rate": 0.02, "finetune.decay_epochs": (),
  "prune.start_epoch": 2, "prune.gamma": 5e-2, "prune.statistics_batches": 18, "eval_batch_size": 304,
  "generator.data_share": 0.2, "generator.batch_size": 64, "generator.learning_rate": 2e-2,
  "report.latency_batch_sizes": (1,), "report.latency_repeats": 1, "report.page": False,
}
"""


def read(name):
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_of(notebook):
  """Returns the code of each cell, as Python: the line of pip is the notebook's own."""
  return [re.sub(r"^( *)%pip .*$", r"\1pass", cell.source, flags=re.M) for cell in cells(notebook, "code")]


def cells(notebook, kind):
  return [cell for cell in notebook.cells if cell.cell_type == kind]


def test_these_are_all_notebooks():
  assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_small_and_holds_no_paths_of_a_machine(name):
  notebook, text = read(name), (FOLDER / f"{name}.ipynb").read_text()
  nbformat.validate(notebook)
  assert len(text) < 500_000
  assert all(cell.source.strip() for cell in notebook.cells)
  assert "widgets" not in notebook.metadata and "widget-view" not in text
  written = [cell.source for cell in notebook.cells]
  written += [json.dumps({**output, "data": without_images(output)}) for output in outputs(notebook)]
  assert [found for part in written for found in ABSOLUTE.findall(part)] == []


def without_images(output):
  return {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}


def outputs(notebook):
  return [output for cell in cells(notebook, "code") for output in cell.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_compiles_and_uses_what_the_package_has(name):
  for code in code_of(read(name)):
    for node in ast.walk(ast.parse(code)):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sapr":
        assert hasattr(sapr, node.attr), code
      if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sapr_jax"):
        module = __import__(node.module, fromlist=[alias.name for alias in node.names])
        assert all(hasattr(module, alias.name) for alias in node.names), code


@pytest.mark.parametrize("name", EXECUTED)
def test_outputs_are_stored_without_errors(name):
  found = outputs(read(name))
  assert len(found) > 5 and any("image/png" in output.get("data", {}) for output in found)
  assert not [output for output in found if output.output_type == "error" or output.get("name") == "stderr"]
  assert [cell.execution_count for cell in cells(read(name), "code")] == [
    number + 1 for number in range(len(cells(read(name), "code")))
  ]


def test_the_notebook_for_a_gpu_claims_no_results():
  assert outputs(read("cifar10_gpu")) == []
  (tagged,) = (cell for cell in cells(read("cifar10_gpu"), "code") if cell.metadata.get("tags") == ["parameters"])
  assert "CHANGES = {}" in tagged.source


def run(name, workdir, variables, parameters=""):
  """Runs a notebook in a new kernel; returns the values of some of its variables."""
  for package in ("nbclient", "ipykernel", "sklearn", "matplotlib", "pandas"):
    pytest.importorskip(package)
  sys.path.insert(0, str(FOLDER))
  try:
    import execute
  finally:
    sys.path.remove(str(FOLDER))
  ask = f"import json\nprint(json.dumps([float(value) for value in ({', '.join(variables)},)]))"
  notebook = execute.execute(name, workdir, parameters, then=ask)
  assert not [output for output in outputs(notebook) if output.output_type == "error"]
  execute.tidy(notebook)
  assert "widget-view" not in nbformat.writes(notebook)
  return json.loads(notebook.cells[-1].outputs[0].text)


@pytest.mark.slow
def test_the_quickstart_runs(optimized, tmp_path):
  shares = ("info.macs / result.summary['dense']['macs']", "result.summary['pruned']['accuracy']", "accuracy", "same")
  share, measured, accuracy, same = run("quickstart", tmp_path, shares)
  assert 0.4 < share <= 0.5
  assert accuracy > 0.95 and accuracy == pytest.approx(measured, abs=1e-3)
  assert same == 1


@pytest.mark.slow
def test_a_model_of_ones_own_is_pruned(optimized, tmp_path):
  names = ("small_macs / dense_macs", "dense_accuracy", "cut_accuracy", "small_accuracy", "difference")
  norms = ("kept_norms[-1]", "dropped_norms[-1]")
  share, dense, cut, small, difference, kept, dropped = run("your_own_model", tmp_path, names + norms)
  assert 0.4 < share <= 0.5
  assert dense > 0.88 and cut > dense - 0.05 and small > dense - 0.03
  assert difference < 1e-4
  assert dropped < 0.1 * kept


@pytest.mark.slow
def test_the_notebook_for_a_gpu_runs_at_a_reduced_size(optimized, tmp_path):
  names = ("macs_share", "measured['accuracy']", "result.summary['pruned']['accuracy']", "exported.stat().st_size")
  share, accuracy, recorded, size = run("cifar10_gpu", tmp_path, names, REDUCED)
  assert 0.35 < share <= 0.5
  assert accuracy > 0.6 and accuracy == pytest.approx(recorded, abs=2e-3)
  assert size > 10_000
