"""Some of the cases of `faulty_disk.py`, which tries every file operation of a run by hand."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="a C compiler on Linux is needed")
def test_a_run_survives_failures_of_its_disk():
  script = pathlib.Path(__file__).with_name("faulty_disk.py")
  command = [sys.executable, script, "--cases", "16", "--damage", "8"]
  environment = {**os.environ, "PYTHONPATH": str(script.parent.parent.parent), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
  assert "24 passed, 0 failed" in done.stdout
