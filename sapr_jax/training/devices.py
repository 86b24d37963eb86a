"""Running a per-device step on all devices: one mesh axis, `jax.shard_map` under `jax.jit`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"
"""Name of the mesh axis, for `jax.lax.pmean` and the like inside a step."""

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(carry, shared, batch of this device) -> (carry, metrics), the carry and the metrics equal on all devices."""


def data_mesh() -> Mesh:
  """Returns the mesh of all devices along the axis `AXIS`."""
  return Mesh(np.asarray(jax.devices()), (AXIS,))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts a copy of each array on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def default_steps_per_call(mesh: Mesh) -> int:
  """Returns how many steps to run in one call: many, so that the host does nothing, but one on a CPU.

  XLA runs the convolutions in the body of a loop on one CPU thread by a slow path, some thirty times slower.
  """
  return 1 if mesh.devices.flat[0].platform == "cpu" else 50


class MappedSteps:
  """A per-device step, mapped over the mesh and compiled to run many times in one call.

  The carry is donated; batches are cut along their second axis. Every number of steps in a call is a program to
  compile, so a call runs fewer than `steps_per_call` where that leaves no remainder.
  """

  def __init__(self, step: Step, mesh: Mesh, steps_per_call: int | None = None):
    self._steps_per_call = steps_per_call or default_steps_per_call(mesh)
    self._sharding = NamedSharding(mesh, PartitionSpec(None, AXIS))

    def many(carry: Any, shared: Any, batches: Any) -> tuple[Any, Any]:
      if jax.tree.leaves(batches)[0].shape[0] == 1:  # no loop around a single step
        carry, metrics = step(carry, shared, jax.tree.map(lambda x: x[0], batches))
        return carry, jax.tree.map(lambda x: x[None], metrics)
      return jax.lax.scan(lambda c, batch: step(c, shared, batch), carry, batches)

    everywhere, cut = PartitionSpec(), PartitionSpec(None, AXIS)
    mapped = jax.shard_map(
      many, mesh=mesh, in_specs=(everywhere, everywhere, cut), out_specs=(everywhere, everywhere), check_vma=False
    )
    self._many = jax.jit(mapped, donate_argnums=0)

  def run(self, carry: Any, shared: Any, batches: Any) -> Iterator[tuple[Any, Any]]:
    """Runs the step on all batches in turn.

    Args:
      carry: State before the first step, on all devices.
      shared: What every step reads, on all devices.
      batches: Pytree of host arrays `[n, batch, ...]`; the batch is cut evenly over the devices.

    Yields:
      After each call (carry, metrics), the metrics stacked `[steps of this call, ...]`; the host has waited for them.
    """
    total = jax.tree.leaves(batches)[0].shape[0]
    most = self._steps_per_call
    size = next((size for size in range(most, most // 2, -1) if total % size == 0), most)
    for start in range(0, total, size):
      part = jax.tree.map(operator.itemgetter(slice(start, start + size)), batches)
      carry, metrics = self._many(carry, shared, jax.device_put(part, self._sharding))
      jax.block_until_ready(metrics)
      yield carry, metrics


def mean_over_devices(tree: Any) -> Any:
  """Averages a pytree over the devices; for use inside a step."""
  return jax.lax.pmean(tree, AXIS)


def sum_over_devices(tree: Any) -> Any:
  """Sums a pytree over the devices; for use inside a step."""
  return jax.lax.psum(tree, AXIS)


def device_key(key: jax.Array) -> jax.Array:
  """Makes a key that differs between devices; for use inside a step."""
  return jax.random.fold_in(key, jax.lax.axis_index(AXIS))


__all__ = [
  "AXIS",
  "MappedSteps",
  "data_mesh",
  "default_steps_per_call",
  "device_key",
  "mean_over_devices",
  "replicate",
  "sum_over_devices",
]
