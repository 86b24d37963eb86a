"""Measures how long the layers of a network take in many widths, on the device at hand, and keeps that in a file."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax import report
from sapr_jax.artifacts.files import read_bytes, sha256_of_entries, write_json
from sapr_jax.channels import ChannelGraph, Piece, is_nnx, network_pieces
from sapr_jax.checks import check_function, check_integer, check_path, check_type, shown
from sapr_jax.errors import InputError, one_line, os_errors_in_one_line
from sapr_jax.method import LatencyCost, LatencyTable, TimedLayer
from sapr_jax.runtime import say

if TYPE_CHECKING:
  from flax import nnx

_SECONDS = 3e-3
"""A timing is of so many evaluations that it takes about this long: calling a program costs some microseconds."""
_ROUNDS = 5
_RANDOM_NETWORKS = 3
_EVERY_WIDTH = 64
"""Up to so many channels, each width of a group is measured."""


_Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


@overload
def measure_latency(
  model: nnx.Module, graph: ChannelGraph, /, *, batch_size: int = 1, transform: _Transform | None = None
) -> LatencyTable: ...


@overload
def measure_latency(
  model: nn.Module | nnx.Module,
  variables: Any,
  graph: ChannelGraph,
  *,
  batch_size: int = 1,
  transform: _Transform | None = None,
) -> LatencyTable: ...


def measure_latency(
  model: Any, variables: Any = None, graph: Any = None, *, batch_size: int = 1, transform: _Transform | None = None
) -> LatencyTable:
  """Times the layers of a network, compiled and in evaluation mode, in many widths.

  A layer is a convolution or matrix product of the network's program with all that is computed from its result
  (normalization, activation, additions), so that any network can be measured. Those that do the same are timed once.
  Every width of a group is measured up to 64, and of larger ones multiples of 8 or more, and one channel above them.
  Where two groups meet in a layer, it is a grid of eight by eight; where more do, each alone, and savings are added.

  All layers take turns, and the least time counts, as other programs only add to it. A process that may use only one
  core of a CPU counts its processor time. Then whole networks of some widths are timed: they give the offset and the
  scale of the table, and its error.

  Args:
    model: The dense network.
    variables: Its variables, or their shapes; left out for a module of NNX: `measure_latency(module, graph)`.
    graph: Its channel graph, of one image.
    batch_size: Images in a call.
    transform: What the function that is served goes through, such as `sapr_jax.models.with_fast_layers`.

  Returns:
    The table. It takes about half a second for each width that is measured: some minutes for a ResNet.

  Raises:
    InputError: If `graph` is of another network.
  """
  if is_nnx(model):
    if isinstance(variables, ChannelGraph):
      variables, graph = None, variables if graph is None else graph
    if variables is not None:
      raise InputError(f"graph must be a ChannelGraph in measure_latency(module, graph), got {shown(variables)}.")
  check_type("graph", graph, ChannelGraph, "trace_channels(model, variables, input_shape) returns it")
  check_integer("batch_size", batch_size, 1)
  if transform is not None:
    check_function("transform", transform, "such as sapr_jax.models.with_fast_layers")
  divide = network_pieces if transform is None else transform(network_pieces)
  pieces, whole = divide(model, variables, graph, batch_size)
  alike: dict[str, list[Piece]] = {}
  for piece in pieces:
    alike.setdefault(piece.key, []).append(piece)
  points = [(same[0], widths) for same in alike.values() for widths in _grid(same[0].sizes)]
  chosen = list(_networks(graph))
  order = [group.name for group in graph.groups]
  timers: list[Any] = [_LayerTimer(piece, widths) for piece, widths in points]
  timers += [_NetworkTimer(whole, [widths[order.index(name)] for name in whole.groups]) for widths in chosen]
  for _ in range(_ROUNDS):
    for timer in timers:
      timer.run()
  best = [1e3 * timer.best for timer in timers]
  found = {(id(piece), widths): ms for (piece, widths), ms in zip(points, best, strict=False)}
  layers = tuple(itertools.chain(*(_timed_layers(same, found) for same in alike.values())))
  about = {
    **_device(),
    "batch_size": batch_size,
    "dtype": _dtype(pieces),
    "inputs": graph.call.arrays_in_words(),
    "macs": graph.macs(),
  }
  sizes = {group.name: group.size for group in graph.groups}
  return _calibrated(LatencyTable(about, sizes, layers, 0.0, 1.0, ()), graph, chosen, best[len(points) :])


def write_latency_table(path: str | os.PathLike[str], table: LatencyTable) -> None:
  """Writes a table as JSON, with its SHA-256.

  Raises:
    InputError: If the path cannot be written.
  """
  check_type("table", table, LatencyTable, "measure_latency(model, variables, graph) returns one")
  path = check_path(path)
  with os_errors_in_one_line(path):
    write_json(path, (document := table.to_json()) | {"sha256": sha256_of_entries(document)})


def read_latency_table(path: str | os.PathLike[str]) -> LatencyTable:
  """Reads a table, of this or another device.

  Raises:
    InputError: If the file cannot be read, is damaged, was edited, or is something else.
  """
  path = check_path(path)
  if not path.exists():
    raise InputError(f"{path} is missing; `sapr latency MODEL {path.name}` measures one.")
  with os_errors_in_one_line(path):
    data = read_bytes(path)
  try:
    table = LatencyTable.from_json(document := json.loads(data))
    if document.get("sha256", checksum := sha256_of_entries(document)) != checksum:  # a file by hand may have none
      raise InputError("its SHA-256 must be that of its entries, got another, so it was edited.")
  except (InputError, RecursionError, ValueError) as error:
    reason = one_line(error).rstrip(".")
    raise InputError(
      f"{path} is damaged or is no latency table: {reason}; measure it again, with sapr latency."
    ) from error
  return table


def table_for(
  model: nn.Module,
  variables: Any,
  graph: ChannelGraph,
  *,
  path: str | os.PathLike[str] | None = None,
  batch_size: int | None = None,
  dtype: str | None = None,
) -> LatencyTable:
  """Returns the table in a file, if `path` names one, or measures it here.

  Raises:
    InputError: If the file cannot be read, or is of another batch or dtype, unless that is None.
  """
  if path is None:
    say("Measuring how long the layers take in many widths; this takes some minutes.")
    return measure_latency(model, variables, graph, batch_size=batch_size or 1)
  table = read_latency_table(path)
  for name, asked in (("batch_size", batch_size), ("dtype", dtype)):
    if asked is not None and table.about[name] != asked:
      raise InputError(f"{path} must be of {name} {asked}, got {table.about[name]}; measure it again, or ask for that.")
  return table


# What is measured.


def _grid(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
  """Yields the widths of the groups of a layer that are measured."""
  if len(sizes) <= 2:
    yield from itertools.product(*_axes(sizes))
    return
  yield tuple(sizes)
  for k, row in enumerate(_axes(sizes)):
    for width in row[:-1]:
      yield (*sizes[:k], width, *sizes[k + 1 :])


def _axes(sizes: Sequence[int]) -> list[list[int]]:
  """Returns the widths of each group that are measured."""

  def row(size: int) -> list[int]:
    if len(sizes) == 2:
      step = max(1, size // 8 if size < 64 else -(-size // 64) * 8)
      return sorted({1, *range(step, size, step), size})
    if size <= _EVERY_WIDTH:
      return list(range(1, size + 1))
    step = -(-size // 128) * 8
    multiples = range(step, size, step)
    return sorted({1, *multiples, *(width + 1 for width in multiples), size})

  return list(map(row, sizes))


def _networks(graph: ChannelGraph) -> Iterator[list[int]]:
  """Yields widths of whole networks: the dense one, the narrowest, and some between."""
  yield [group.size for group in graph.groups]
  yield [1 for group in graph.groups]
  rng = np.random.default_rng(0)
  for _ in range(_RANDOM_NETWORKS):
    yield [int(rng.integers(1, group.size, endpoint=True)) for group in graph.groups]


# Timing.


def clock() -> float:
  """Returns seconds: on a single core those of this process, to which other programs add nothing."""
  alone = jax.default_backend() == "cpu" and hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1
  return time.process_time() if alone else time.perf_counter()


class _LayerTimer:
  """Times a layer in a loop on the device, each iteration of which has to wait for the one before."""

  def __init__(self, piece: Piece, widths: Sequence[int]):
    self.inputs = piece.shapes(widths)
    self.results = jax.eval_shape(lambda *arrays: piece.function(widths, arrays), *self.inputs)
    real = [jnp.issubdtype(array.dtype, jnp.floating) for array in self.inputs]
    candidates = [i for i, feeds in enumerate(piece.feeds_layer) if feeds and real[i]]
    tied = min(candidates, key=lambda i: self.inputs[i].size, default=None)

    def program(results: list[Any], count: jax.Array, *arrays: Any) -> list[Any]:
      def body(_: Any, results: list[Any]) -> list[Any]:
        given = list(arrays)
        if tied is not None:
          given[tied] += (0 * results[0].reshape(-1)[0]).astype(given[tied].dtype)
        return piece.function(widths, given)

      return jax.lax.fori_loop(0, count, body, results)

    number = jax.ShapeDtypeStruct((), jnp.int32)
    self.program = jax.jit(program, donate_argnums=0).lower(self.results, number, *self.inputs).compile()
    self.count, self.best = 0, np.inf

  def run(self) -> None:
    results, inputs = list(map(_filled, self.results)), list(map(_filled, self.inputs))

    def seconds(count: int) -> float:
      nonlocal results
      number, start = jnp.int32(count), clock()
      results = jax.block_until_ready(self.program(results, number, *inputs))
      return (clock() - start) / count

    seconds(1)
    self.count = self.count or int(np.clip(_SECONDS / max(seconds(1), 1e-9), 1, 1000))
    self.best = min(self.best, *(seconds(self.count) for _ in range(3)))


class _NetworkTimer:
  """Times calls of a whole network, as it is served."""

  def __init__(self, whole: Piece, widths: Sequence[int]):
    self.inputs = whole.shapes(widths)
    self.program = jax.jit(lambda *arrays: whole.function(widths, arrays)).lower(*self.inputs).compile()
    self.best = np.inf

  def run(self) -> None:
    inputs = list(map(_filled, self.inputs))
    jax.block_until_ready(self.program(*inputs))
    for _ in range(10):
      start = clock()
      jax.block_until_ready(self.program(*inputs))
      self.best = min(self.best, clock() - start)


def _filled(array: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns an array of values that are ordinary in all that a network does with them."""
  return jnp.full(array.shape, 0.5 if jnp.issubdtype(array.dtype, jnp.inexact) else 0, array.dtype)


# The table.


def _timed_layers(same: Sequence[Piece], found: Mapping[Any, float]) -> list[TimedLayer]:
  """Returns the times of pieces that do the same."""
  first, sizes = same[0], same[0].sizes
  rows = [np.array(row, np.int64) for row in _axes(sizes)]
  uses = tuple(piece.groups for piece in same)
  if len(sizes) <= 2:
    times = np.array([found[id(first), widths] for widths in _grid(sizes)]).reshape([row.size for row in rows])
    return [TimedLayer(first.layer, uses, tuple(rows), times)]
  layers, dense = [], found[id(first), tuple(sizes)]
  for k, row in enumerate(rows):
    alone = np.array([found[id(first), (*sizes[:k], int(width), *sizes[k + 1 :])] for width in row])
    part = np.maximum(alone - dense * (len(rows) - 1) / len(rows), dense * 1e-3)
    layers.append(TimedLayer(first.layer, tuple((groups[k],) for groups in uses), (row,), part))
  return layers


def _calibrated(
  table: LatencyTable, graph: ChannelGraph, networks: Sequence[Sequence[int]], times: Sequence[float]
) -> LatencyTable:
  """Returns the table with the offset and scale that fit whole networks best, each predicted from the others."""
  cost = LatencyCost(graph, table)
  sums, measured = np.array([cost.time(widths) for widths in networks]), np.array(times)

  def fit(rows: np.ndarray) -> tuple[float, float]:
    design = np.stack([1 / measured[rows], sums[rows] / measured[rows]], 1)  # of relative errors
    offset, scale = np.linalg.lstsq(design, np.ones(len(rows)), rcond=None)[0]
    if offset < 0 or scale <= 0:
      offset, scale = 0.0, 1 / np.mean(design[:, 1])
    return float(offset), float(scale)

  everything, known = np.arange(len(sums)), []
  for i, widths in enumerate(networks):
    offset, scale = fit(np.delete(everything, i))
    known.append(
      {"widths": list(widths), "milliseconds": float(measured[i]), "predicted": float(offset + scale * sums[i])}
    )
  offset, scale = fit(everything)
  return LatencyTable(table.about, table.groups, table.layers, offset, scale, tuple(known))


def _device() -> dict[str, Any]:
  device = jax.devices()[0]
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "cores": cores if device.platform == "cpu" else None,
    "versions": report.versions(),
  }


def _dtype(pieces: Sequence[Piece]) -> str:
  """Returns the dtype that most layers compute in."""
  dtypes = [piece.dtype for piece in pieces]
  return max(dict.fromkeys(dtypes), key=dtypes.count)
