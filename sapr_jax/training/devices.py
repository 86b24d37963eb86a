"""Running a per-device step on all devices: one mesh axis, `jax.shard_map` under `jax.jit`."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sapr_jax.errors import InputError

AXIS = "data"
"""Name of the mesh axis, for `jax.lax.pmean` and the like inside a step."""

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(carry, shared, batch of this device) -> (carry, metrics), the carry and the metrics equal on all devices."""


def data_mesh() -> Mesh:
  """Returns the mesh of all devices along the axis `AXIS`, those of a process side by side.

  Raises:
    InputError: If the processes have different numbers of devices, as each provides an equal part of every batch.
  """
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  counts = collections.Counter(device.process_index for device in devices)
  if len(set(counts.values())) > 1:
    shown = ", ".join(f"{count} on process {process}" for process, count in sorted(counts.items()))
    raise InputError(f"The processes have different numbers of devices ({shown}); expected equal ones.")
  return Mesh(np.asarray(devices), (AXIS,))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts a copy of each array on every device.

  Each process serves its own devices from its own copy, without asking the others whether theirs is equal.
  """
  everywhere = NamedSharding(mesh, PartitionSpec())
  if jax.process_count() == 1:
    return jax.device_put(tree, everywhere)

  def put(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and leaf.sharding == everywhere:
      return leaf
    copies = [jax.device_put(leaf, device) for device in mesh.local_devices]
    return jax.make_array_from_single_device_arrays(jnp.shape(leaf), everywhere, copies)

  return jax.tree.map(put, tree)


def is_cpu(mesh: Mesh) -> bool:
  """Whether the devices are CPUs."""
  return mesh.devices.flat[0].platform == "cpu"


def loops_are_slow(mesh: Mesh) -> bool:
  """Whether to unroll loops: on a CPU, XLA runs the convolutions in the body of one some thirty times slower."""
  return is_cpu(mesh)


def default_steps_per_call(mesh: Mesh) -> int:
  """Returns how many steps to run in one call: many, so that the host does nothing, but one where loops are slow."""
  return 1 if loops_are_slow(mesh) else 50


def is_main_process() -> bool:
  """Whether this process is the one that writes files and talks to the user."""
  return jax.process_index() == 0


def process_slice(batch_size: int) -> slice:
  """Returns which rows of a global batch this process provides."""
  rows = batch_size // jax.process_count()
  return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


class MappedSteps:
  """A per-device step, mapped over the mesh and compiled to run many times in one call.

  The carry is donated; batches are cut along their second axis.

  Args:
    step: The step.
    mesh: The devices.
    compiler_options: For `jax.jit`.
  """

  def __init__(self, step: Step, mesh: Mesh, compiler_options: Mapping[str, str] | None = None):
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
    self._many = jax.jit(mapped, donate_argnums=0, compiler_options=dict(compiler_options or {}) or None)

  def run(self, carry: Any, shared: Any, calls: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Runs the step on all batches in turn; every number of batches in a call is a program to compile.

    Args:
      carry: State before the first step, on all devices.
      shared: What every step reads, on all devices.
      calls: The batches of each call: a pytree of host arrays `[n, batch, ...]`, of which each process provides its
        `process_slice`. The batch is cut evenly over the devices. The next call's batches are read and sent while the
        devices work.

    Yields:
      After each call (carry, metrics), the metrics stacked `[n, ...]`; the host has waited for them.
    """
    placed = map(self._place, calls)
    batches = next(placed, None)
    while batches is not None:
      carry, metrics = self._many(carry, shared, batches)
      batches = next(placed, None)
      jax.block_until_ready((carry, metrics))
      yield carry, metrics

  def _place(self, batches: Any) -> Any:
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._sharding, x), batches)


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
  "is_cpu",
  "is_main_process",
  "loops_are_slow",
  "mean_over_devices",
  "process_slice",
  "replicate",
  "sum_over_devices",
]
