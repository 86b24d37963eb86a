"""A step of a run as a call to time: on CPUs in its fast form or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.training_pieces import Pieces
from sapr_jax.training import cpu
from sapr_jax.training.devices import Step, replicate


def mapped_call(
  made: Pieces, step: Step, carry: Any, batch: int, *, steps_per_call: int = 1, fast_cpu: bool = True
) -> Callable[[], Any]:
  """Returns a call that runs a step on random batches, in one compiled program, and waits for it.

  Args:
    made: The network, and the images on the devices.
    step: See `training.steps`; reads `made.shared`.
    carry: State before the first step. Each call goes on from the last.
    batch: Images of a step, on all devices together.
    steps_per_call: Steps of a call.
    fast_cpu: As in the config; nothing to accelerators.
  """
  mapped = cpu.map_step(step, made.mesh, made.variables["params"], fast=fast_cpu)
  rows = len(made.shared.labels)  # type: ignore[arg-type]
  order = np.random.default_rng(1).integers(0, rows, (steps_per_call, batch), dtype=np.int32)
  running = mapped.run(replicate(carry, made.mesh), made.shared, itertools.repeat(order))
  return lambda: next(running)
