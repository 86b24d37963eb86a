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

from sapr_jax.models import with_fast_layers


def compare_programs(
  networks: Mapping[str, tuple[nn.Module, Any]], input_shape: Sequence[int], batch_size: int, *, repeats: int
) -> dict[str, dict[str, Any]]:
  """Times the compiled evaluation-mode forward pass, and asks the compiler how much memory it takes.

  On a CPU it has the forms of layers that are fast there, as an exported program has. The networks take turns, so that
  other load on the machine affects them alike. Compilation and first calls do not count.

  Args:
    networks: Name -> (model, variables).
    input_shape: `[batch, ...]`; the batch does not count.
    batch_size: Images of a call.
    repeats: Calls of each.

  Returns:
    Name -> "latency_ms", the median; "quartiles_ms", between which half of the calls lie; "memory_bytes", of weights,
    images, outputs and all that is held between them, None where the compiler does not say.
  """
  x = jnp.zeros((batch_size, *input_shape[1:]))
  compiled = {name: _compiled(*network, x) for name, network in networks.items()}
  times = _milliseconds({name: _call(*parts) for name, parts in compiled.items()}, repeats)
  result = {}
  for name, (program, _) in compiled.items():
    low, median, high = (round(float(value), 4) for value in np.percentile(times[name], (25, 50, 75)))
    result[name] = {"latency_ms": median, "quartiles_ms": [low, high], "memory_bytes": _memory(program)}
  return result


def _compiled(model: nn.Module, variables: Any, x: jax.Array) -> tuple[jax.stages.Compiled, tuple[Any, jax.Array]]:
  """Returns the compiled forward pass and its arguments."""

  def forward(variables: Any, inputs: jax.Array) -> Any:
    return model.apply(variables, inputs, train=False)

  variables = jax.device_put(variables)
  program = jax.jit(with_fast_layers(forward) if jax.default_backend() == "cpu" else forward)
  return program.lower(variables, x).compile(), (variables, x)


def _call(program: jax.stages.Compiled, arguments: tuple[Any, jax.Array]) -> Callable[[], jax.Array]:
  call = functools.partial(program, *arguments)
  for _ in range(2):
    jax.block_until_ready(call())
  return call


def _milliseconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
  """Returns how long each call takes, which take turns."""
  times: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(repeats):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      times[name].append((time.perf_counter() - start) * 1e3)
  return times


def _memory(program: jax.stages.Compiled) -> int | None:
  found: Any = program.memory_analysis()
  names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
  return sum(getattr(found, name) for name in names) if all(hasattr(found, name) for name in names) else None
