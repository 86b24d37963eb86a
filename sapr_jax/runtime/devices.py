"""Running a per-device step on all devices: one mesh axis, `jax.shard_map` under `jax.jit`."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sapr_jax.errors import InputError, one_line
from sapr_jax.runtime.garbage import without_collection

AXIS = "data"
"""Name of the mesh axis, for `jax.lax.pmean` and the like inside a step."""

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(state, shared, batch of this device) -> (state, metrics), both equal on all devices."""


def start_jax() -> None:
  """Lets JAX find its devices.

  Raises:
    InputError: If it cannot use those that it is told to.
  """
  try:
    jax.devices()
  except RuntimeError as error:
    raise InputError(
      f"JAX cannot start: {one_line(error, 200)}; set JAX_PLATFORMS to what this machine has, or leave it unset."
    ) from error


def data_mesh() -> Mesh:
  """Returns the mesh of all devices along the axis `AXIS`, those of a process side by side.

  Raises `InputError` if the processes have different numbers of them: each provides an equal part of every batch.
  """
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  counts = collections.Counter(device.process_index for device in devices)
  if len(set(counts.values())) > 1:
    shown = ", ".join(f"{count} on process {process}" for process, count in sorted(counts.items()))
    raise InputError(f"All processes must have the same number of devices, got {shown}; give each of them as many.")
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
  """Returns whether the devices are CPUs."""
  return mesh.devices.flat[0].platform == "cpu"


def loops_are_slow(mesh: Mesh) -> bool:
  """Returns whether to unroll loops: XLA for CPUs runs convolutions in a loop some thirty times slower."""
  return is_cpu(mesh)


def default_steps_per_call(mesh: Mesh) -> int:
  """Returns how many steps to run in one call: many, so that the host does nothing, but one where loops are slow."""
  return 1 if loops_are_slow(mesh) else 50


def is_main_process() -> bool:
  """Returns whether this process is the one that writes files and talks to the user."""
  return jax.process_index() == 0


def process_slice(batch_size: int) -> slice:
  """Returns which rows of a global batch this process provides."""
  rows = batch_size // jax.process_count()
  return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


class MappedStep:
  """A per-device step, mapped over the mesh and compiled to run many times in one call.

  Example:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> step = MappedStep(lambda total, scale, batch: (total + scale * batch.sum(), {"sum": batch.sum()}), data_mesh())
    >>> total, metrics = step(jnp.zeros(()), jnp.ones(()), step.place(np.ones((3, 8))))
    >>> float(total), metrics["sum"].tolist()
    (24.0, [8.0, 8.0, 8.0])
  """

  def __init__(self, step: Step, mesh: Mesh, compiler_options: Mapping[str, str] | None = None):
    self._sharding = NamedSharding(mesh, PartitionSpec(None, AXIS))
    # A CPU is busy with one step, and computing ahead would only delay a request to stop.
    self._fetch_every = 1 if is_cpu(mesh) else 8

    @without_collection()  # it runs when the step is traced, not when it is taken
    def many(state: Any, shared: Any, batches: Any) -> tuple[Any, Any]:
      if jax.tree.leaves(batches)[0].shape[0] == 1:  # no loop around a single step
        state, metrics = step(state, shared, jax.tree.map(lambda x: x[0], batches))
        return state, jax.tree.map(lambda x: x[None], metrics)
      return jax.lax.scan(lambda s, batch: step(s, shared, batch), state, batches)

    everywhere, cut = PartitionSpec(), PartitionSpec(None, AXIS)
    mapped = jax.shard_map(
      many, mesh=mesh, in_specs=(everywhere, everywhere, cut), out_specs=(everywhere, everywhere), check_vma=False
    )
    self._many = jax.jit(mapped, donate_argnums=0, compiler_options=dict(compiler_options or {}) or None)

  def place(self, batches: Any) -> Any:
    """Sends the batches of a call, host arrays `[n, batch, ...]`, to the devices, over which a batch is cut evenly.

    Each process provides its `process_slice` of the batches.
    """
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._sharding, x), batches)

  def __call__(self, state: Any, shared: Any, batches: Any) -> tuple[Any, Any]:
    """Starts the step on n batches that `place` has sent; every n is a program to compile.

    State and `shared` are on all devices, and `state` is donated.

    Returns:
      (state, metrics stacked `[n, ...]`). The host does not wait for them.
    """
    return self._many(state, shared, batches)

  def run(self, state: Any, shared: Any, calls: Iterable[Any]) -> tuple[Any, dict[str, np.ndarray]]:
    """Runs all calls; returns the last state and the metrics of all steps, on the host."""
    queue, fetched = self.metrics_queue(), []
    for batches in map(self.place, calls):
      state, metrics = self(state, shared, batches)
      fetched += queue.add(metrics)
    fetched += queue.fetch()
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *fetched)

  def metrics_queue(self) -> MetricsQueue:
    """Returns a queue for the metrics of this step."""
    return MetricsQueue(self._fetch_every)


class MetricsQueue:
  """Metrics that still lie on the devices, fetched `every` calls at a time, so that the host seldom waits.

  It bounds how far the host runs ahead: at most `2 * every` calls are under way.
  """

  def __init__(self, every: int):
    self._every = every
    self._waiting: list[Any] = []

  def add(self, metrics: Any) -> list[Any]:
    """Adds the metrics of a call; returns those of earlier calls that were fetched now, in order."""
    self._waiting.append(metrics)
    return self.fetch(self._every) if len(self._waiting) == 2 * self._every else []

  def fetch(self, count: int | None = None) -> list[Any]:
    """Waits for the oldest `count` calls, or for all; returns their metrics on the host."""
    count = len(self._waiting) if count is None else count
    oldest, self._waiting = self._waiting[:count], self._waiting[count:]
    return jax.device_get(oldest)


def mean_over_devices(tree: Any) -> Any:
  """Averages a pytree over the devices; for use inside a step."""
  return jax.lax.pmean(tree, AXIS)


def sum_over_devices(tree: Any) -> Any:
  """Sums a pytree over the devices; for use inside a step."""
  return jax.lax.psum(tree, AXIS)


def device_key(key: jax.Array) -> jax.Array:
  """Makes a key that differs between devices; for use inside a step."""
  return jax.random.fold_in(key, jax.lax.axis_index(AXIS))
