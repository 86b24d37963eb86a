"""The command line: one line on standard error and a non-zero status for what a user can mend."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (["--config.model.nam=resnet8"], 'Did you mean "name"'),
    (["--config.model.name=resnet9"], "'resnet9' is unknown; expected one of resnet8"),
    (["--config.prune.p=1.5"], "p=1.5 is not a share"),
    (["--config.train.epochs=many"], "--config.train.epochs=many"),
    (["--config=configs/nothing.py"], "configs/nothing.py"),
    (["--workdir="], "--workdir is missing"),
    (["surplus"], "unexpected argument 'surplus'"),
  ],
)
def test_bad_input_ends_in_one_line(arguments, text, tmp_path):
  command = [sys.executable, "-m", "sapr_jax.main", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
  done = subprocess.run(
    [*command, *arguments], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
  )
  assert done.returncode == 2
  assert text in done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert not (tmp_path / "run").exists()
