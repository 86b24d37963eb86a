"""`sapr_jax.main` with one network more, called "tiny", that compiles fast, for `small_run.py` and `test_processes.py`.

With STOP="SIGNAL PROCESS EPOCH STEP" in the environment that process sends itself the signal as it makes that
checkpoint.
"""

import os
import signal
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app

from sapr_jax import artifacts, main, models


class Tiny(nn.Module):
  """Two convolutions with batch normalization."""

  num_classes: int = 10
  width_multiplier: float = 1.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    for number, features in enumerate((8, 6)):
      x = nn.Conv(features, (3, 3), name=f"conv{number}")(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{number}")(x))
    return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


models.MODELS["tiny"] = Tiny
models.CLASSES["Tiny"] = Tiny


def stop_where_told() -> None:
  name, process, epoch, step = os.environ["STOP"].split()
  save = artifacts.Checkpointer.save

  def saving(checkpointer, number, state, position):
    save(checkpointer, number, state, position)
    if (str(jax.process_index()), str(position["epoch"]), str(position["step"])) == (process, epoch, step):
      os.kill(os.getpid(), signal.Signals[name])

  artifacts.Checkpointer.save = saving


if __name__ == "__main__":
  if "STOP" in os.environ:
    stop_where_told()
  app.run(main.main, flags_parser=main._parse_flags)
