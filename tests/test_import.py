"""Importing the package in a program of one's own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import sapr_jax as sapr

PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO)
import sapr_jax
import jax
jax.devices()
for level in (logging.INFO, logging.WARNING):
  logging.getLogger("jax._src.xla_bridge").log(level, "Unable to initialize backend 'tpu': %s", "no answer")
"""


def test_a_missing_library_of_tpus_is_not_reported_and_other_trouble_is():
  environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr
  assert "libtpu.so" not in done.stderr
  reported = [line for line in done.stderr.splitlines() if "no answer" in line]
  assert [line.partition(":")[0] for line in reported] == ["INFO", "WARNING"]


def test_the_line_about_the_library_passes_where_it_is_a_warning(caplog):
  text = "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so: libtpu.so: cannot open"
  logger = logging.getLogger("jax._src.xla_bridge")
  with caplog.at_level(logging.INFO, logger.name):
    logger.info(text)
    logger.warning(text)
  assert [record.levelname for record in caplog.records if record.name == logger.name] == ["WARNING"]


def test_what_is_offered_is_there():
  assert sapr.configs.get("digits").model.name == "resnet8"
  assert all(getattr(sapr, name) is not None for name in dir(sapr))


UNTIL_THE_FIRST_STEP = """
import pathlib, sys
import sapr_jax.main
from sapr_jax import runtime, training
from sapr_jax.artifacts import Checkpointer
checkpointer = Checkpointer(pathlib.Path(sys.argv[1]) / "train")
assert checkpointer.restore(3) == (3, None)
checkpointer.close()
print(*sys.modules)
"""


def test_training_starts_without_what_it_needs_later(tmp_path):
  command = [sys.executable, "-c", UNTIL_THE_FIRST_STEP, tmp_path]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  modules = set(done.stdout.split())
  assert "sapr_jax.training.run" in modules and (tmp_path / "train").is_dir()
  assert not {"orbax", "tensorstore", "matplotlib", "torch", "tensorflow", "pandas", "flax.nnx", "PIL.Image"} & modules
