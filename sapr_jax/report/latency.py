"""Measured latency of networks, side by side."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def measure_latency(
  networks: Mapping[str, tuple[nn.Module, Any]],
  input_shape: Sequence[int],
  batch_sizes: Sequence[int],
  *,
  repeats: int = 15,
) -> dict[str, dict[str, float]]:
  """Times the compiled evaluation-mode forward pass.

  The networks, (model, variables), take turns, so that other load on the machine affects them alike. Compilation and
  first calls do not count.

  Returns:
    Name -> batch size, as a string for JSON -> median milliseconds of `repeats` calls.
  """
  result: dict[str, dict[str, float]] = {name: {} for name in networks}
  for batch_size in batch_sizes:
    x = jnp.zeros((batch_size, *input_shape[1:]))
    calls = {name: _compiled(model, variables, x) for name, (model, variables) in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(repeats):
      for name, call in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
      result[name][str(batch_size)] = round(float(np.median(seconds)) * 1e3, 4)
  return result


def _compiled(model: nn.Module, variables: Any, x: jax.Array) -> Callable[[], jax.Array]:
  variables = jax.device_put(variables)
  forward = jax.jit(lambda v, inputs: model.apply(v, inputs, train=False)).lower(variables, x).compile()
  call = functools.partial(forward, variables, x)
  for _ in range(2):
    jax.block_until_ready(call())
  return call
