"""The examples run as their readers run them: as scripts, outside of the package."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
MOST_ADDED_LINES = {"language_model": 9, "nnx_loop": 7, "one_shot": 3, "optax_loop": 10, "train_state": 10}
LEAST_ACCURACY = {"language_model": 30}  # %, of the dense model; else 80
MOST_LOST = {"language_model": 10}  # points; else 3


@pytest.mark.parametrize("name", MOST_ADDED_LINES)
def test_pruning_adds_few_lines(name):
  code = (EXAMPLES / f"{name}.py").read_text().split('"""', 2)[2]
  assert 3 <= len(re.findall(r"# .*\+( \(.*\))?$", code, re.MULTILINE)) <= MOST_ADDED_LINES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST_ADDED_LINES)
def test_the_pruned_network_is_about_as_good(name, optimized, tmp_path):
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = [re.search(r"([\d,]+) MACs +([\d.]+)%", line).groups() for line in done.stdout.splitlines()[-2:]]
  (dense_macs, dense), (small_macs, small) = [(int(macs.replace(",", "")), float(share)) for macs, share in rows]
  assert 0.45 * dense_macs < small_macs < 0.55 * dense_macs
  assert dense > LEAST_ACCURACY.get(name, 80) and small > dense - MOST_LOST.get(name, 3)
