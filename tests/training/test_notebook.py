"""A run in the kernel of a notebook."""

from __future__ import annotations

import pathlib

import pytest

HERE = pathlib.Path(__file__).parent
SETUP = """
import sys

sys.path[:0] = {path!r}
import os
import signal

from small_run import small_config

import sapr_jax as sapr
"""
INTERRUPTED = """
def interrupt(record):
  if record["step"] == 1:
    os.kill(os.getpid(), signal.SIGINT)


config = small_config(train__epochs=2, train__decay_epochs=(), finetune__epochs=0, finetune__decay_epochs=())
sapr.run(config, {workdir!r}, callbacks=[interrupt])
"""
AGAIN = INTERRUPTED.replace('record["step"] == 1', "False")


@pytest.mark.slow
def test_an_interrupted_cell_goes_on_when_it_is_run_again(tmp_path):
  for package in ("nbclient", "ipykernel", "sklearn"):
    pytest.importorskip(package)
  import nbclient
  import nbformat

  setup = SETUP.format(path=[str(HERE.parent.parent), str(HERE.parent), str(HERE)])
  cells = [setup, *(code.format(workdir=str(tmp_path / "run")) for code in (INTERRUPTED, AGAIN))]
  notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
  nbclient.NotebookClient(notebook, timeout=600, allow_errors=True).execute()
  errors = [[output for output in cell.outputs if output.output_type == "error"] for cell in notebook.cells]
  assert [len(found) for found in errors] == [0, 1, 0], errors
  assert errors[1][0].ename == "InterruptedByUserError"
  assert errors[1][0].evalue == "stopped by an interrupt, all work saved; run the same cell again to go on"
  outputs = notebook.cells[2].outputs
  assert "train: going on after epoch 1/2" in "".join(o.text for o in outputs if o.output_type == "stream")
  assert "<td>pruned</td>" in outputs[-1].data["text/html"]
