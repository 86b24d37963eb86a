"""Latency as a cost: a network's time from a table of the times that its layers take, measured in many widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels import ChannelGraph, check_graph
from sapr_jax.checks import check_dtype, check_integer, check_number, check_type, is_integer, shown
from sapr_jax.errors import InputError

FORMAT = 1
_ABOUT = ("device", "batch_size", "dtype", "inputs", "macs")
"""What a table must say of itself."""
_LANES = 8
"""Numbers that hardware computes with at once are multiples of it."""

_REACH = 8
"""Channels on each side over which the slope of a table is taken: times rise in steps of so many lanes."""


@dataclasses.dataclass(frozen=True, eq=False)
class TimedLayer:
  """Times of a layer, with what follows it, by the widths of the channel groups that it has.

  Attributes:
    layer: The layer in words.
    uses: The groups, once for each place of the network that has such a layer.
    widths: Widths of each group that were measured, ascending.
    milliseconds: `[len(widths[0]), ...]`: the times. Between two widths they are linear; where there is one group,
      multiples of 8 are told from the widths between them.
  """

  layer: str
  uses: tuple[tuple[str, ...], ...]
  widths: tuple[np.ndarray, ...]
  milliseconds: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class LatencyTable:
  """Times of the layers of a network, as `measure_latency` finds them.

      time of the network = offset + scale * sum of the times of its layers

  Attributes:
    about: What was measured and where: "device", "platform", "cores", "versions", "batch_size", "dtype", "inputs"
      (for one image), "macs" (of the dense network, for one image).
    groups: Name of a channel group -> its width in the dense network.
    layers: Times of the layers; those that do the same are one.
    offset: Milliseconds that the network takes besides.
    scale: How much longer layers take within the network than alone.
    networks: Whole networks that were measured: "widths" in the order of `groups`, "milliseconds", "predicted".

  Raises:
    InputError: If the times are not positive, or do not reach from one channel to all of a group.
  """

  about: Mapping[str, Any]
  groups: Mapping[str, int]
  layers: tuple[TimedLayer, ...]
  offset: float
  scale: float
  networks: tuple[Mapping[str, Any], ...]

  def __post_init__(self) -> None:
    if missing := [name for name in _ABOUT if name not in self.about]:
      raise InputError(f"about must have {', '.join(_ABOUT)}, got none of {', '.join(missing)}.")
    for name in ("device", "inputs"):
      if not isinstance(self.about[name], str) or not self.about[name]:
        raise InputError(f"{name} must be text, got {shown(self.about[name])}.")
    check_dtype("dtype", self.about["dtype"])
    for name in ("batch_size", "macs"):
      check_number(name, self.about[name], "an integer of at least 1", lambda x: x >= 1 and x == int(x))
    for name, size in self.groups.items():
      check_integer(f"The width of group {name!r}", size, 1)
    check_number("offset", self.offset, "a number of at least 0", lambda x: x >= 0)
    check_number("scale", self.scale, "a number above 0", lambda x: x > 0)
    if not self.layers:
      raise InputError("layers must be those of a network, got none.")
    for layer in self.layers:
      _check_layer(layer, self.groups)
    for network in self.networks:
      widths = list(network["widths"])
      if len(widths) != len(self.groups) or not all(
        is_integer(width) and 1 <= width <= size for width, size in zip(widths, self.groups.values(), strict=True)
      ):
        raise InputError(f"The widths of a network must be from 1 to those of its groups, got {shown(widths)}.")
      for name in ("milliseconds", "predicted"):
        check_number(f"The {name} of a network", network[name], "a number above 0", lambda x: x > 0)

  def to_json(self) -> dict[str, Any]:
    """Returns the table in JSON types, for `json.dump`."""
    layers = [
      {
        "layer": layer.layer,
        "uses": [list(groups) for groups in layer.uses],
        "widths": [row.tolist() for row in layer.widths],
        "milliseconds": layer.milliseconds.tolist(),
      }
      for layer in self.layers
    ]
    known = {"offset": self.offset, "scale": self.scale, "networks": [dict(network) for network in self.networks]}
    return {"format": FORMAT, "about": dict(self.about), "groups": dict(self.groups), **known, "layers": layers}

  @classmethod
  def from_json(cls, document: Any) -> LatencyTable:
    """Returns the table that `to_json` wrote.

    Raises:
      InputError: If `document` is not such a table, or cannot be one of a network.
    """
    try:
      if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']!r}, not {FORMAT}")
      return cls(
        dict(document["about"]),
        dict(document["groups"]),
        tuple(map(_layer_from_json, document["layers"])),
        document["offset"],
        document["scale"],
        tuple(map(dict, document["networks"])),
      )
    except InputError:
      raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
      reason = f"{type(error).__name__}: {str(error)[:200]}"
      raise InputError(f"document must be what LatencyTable.to_json returned; reading it gave {reason}.") from error


def _layer_from_json(document: Mapping[str, Any]) -> TimedLayer:
  return TimedLayer(
    str(document["layer"]),
    tuple(map(tuple, document["uses"])),
    tuple(map(np.array, document["widths"])),
    np.array(document["milliseconds"], np.float64),
  )


def _check_layer(layer: TimedLayer, groups: Mapping[str, int]) -> None:
  """Raises `InputError` unless the times are positive, and reach from one channel to all of a group."""
  name, times = f"of layer {layer.layer!r}", layer.milliseconds
  for row in layer.widths:
    if row.ndim != 1 or row.dtype.kind != "i" or row[0] != 1 or (np.diff(row) <= 0).any():
      raise InputError(f"The widths {name} must be integers that rise from 1, got {shown(row.tolist())}.")
  if times.shape != (shape := tuple(row.size for row in layer.widths)):
    raise InputError(f"The times {name} must be {shape}, one for each width, got {times.shape}.")
  if (wrong := times[~(np.isfinite(times) & (times > 0))]).size:
    raise InputError(f"The times {name} must be numbers above 0, got {wrong[0]}.")
  ends = [int(row[-1]) for row in layer.widths]
  for use in layer.uses:
    if (sizes := [groups.get(group) for group in use]) != ends:
      raise InputError(f"The widths {name} must end at those of groups {shown(use)}, {shown(sizes)}, got {ends}.")


def latency_cost(graph: ChannelGraph, table: LatencyTable) -> LatencyCost:
  """Returns the milliseconds that a sub-network takes on the device of a table, as a cost for `make_budget`.

  Times do not always rise with the width. The cost is that of the fastest network which is at least as wide, so that
  it never falls: where more channels take no longer, `project_to_budget` keeps them. The widths that it chooses are
  those where the cost is the time itself. Between masks that are not whole the cost is linear; its slope is that of
  the table over some channels on both sides, as a step has none.

  Args:
    graph: The channel graph of the network that the table is of. It may leave out groups, which keep all channels.
    table: The times, from `measure_latency` or `read_latency_table`.

  Raises:
    InputError: If the table is of another network or other inputs.

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)])
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3)))
    >>> graph = sapr.trace_channels(model, variables, (1, 3), select="unjoined")
    >>> table = sapr.measure_latency(model, variables, graph, batch_size=8)
    >>> budget = sapr.make_budget(graph, sapr.latency_cost(graph, table), share=1.0)
    >>> sapr.project_to_budget(graph, {"layers_0": [0.1, 0.4, 0.3, 0.2]}, budget)
    {'layers_0': array([1., 1., 1., 1.], dtype=float32)}
  """
  check_graph(graph)
  check_type("table", table, LatencyTable, "measure_latency(model, variables, graph) or read_latency_table returns one")
  for name, now in (("inputs", graph.call.arrays_in_words()), ("macs", graph.macs())):
    if (then := table.about[name]) != now:
      raise InputError(f"table must be of a network of {name} {now}, got one of {name} {then}; measure it again.")
  for group in graph.groups:
    if table.groups.get(group.name) != group.size:
      raise InputError(
        f"table must have the channel group {group.name!r} of {group.size} channels, got"
        f" {table.groups.get(group.name, 'none')}; measure it again, with the same select and include."
      )
  return LatencyCost(graph, table)


class LatencyCost:
  """A network's time, from a table; see `latency_cost`.

  Attributes:
    name: "latency_ms".
    table: The table.
  """

  name = "latency_ms"

  def __init__(self, graph: ChannelGraph, table: LatencyTable):
    self.table = table
    order = {group.name: k for k, group in enumerate(graph.groups)}
    sizes = [group.size for group in graph.groups]
    self._constant, alone, self._pairs = table.offset, [np.zeros(size + 1) for size in sizes], []
    for layer in table.layers:
      for groups in layer.uses:
        times: Any = table.scale * layer.milliseconds
        known: list[tuple[int, np.ndarray]] = []
        for axis in reversed(range(len(groups))):
          if groups[axis] in order:
            known.insert(0, (order[groups[axis]], layer.widths[axis]))
          else:  # it keeps all its channels
            times = times.take(-1, axis)
        match known:
          case []:
            self._constant += float(times)
          case [(k, widths)]:
            alone[k] += _every_width(sizes[k], widths, times)
          case [(k, rows), (j, columns)]:
            self._pairs.append((k, j, rows, columns, _from_above(times)))
          case _:
            raise InputError(f"table must have at most two groups in a layer, got {len(known)} in {layer.layer!r}.")
    self._times = alone
    width = max(sizes) + 1
    self._alone = np.stack([np.pad(_from_above(row), (0, width - row.size), mode="edge") for row in alone])
    self._slopes = np.stack([_slope(row, size) for row, size in zip(self._alone, sizes, strict=True)])

  def __call__(self, kept: Any) -> Any:
    """Returns milliseconds: an exact float for an int64 NumPy array `[K]`, else a differentiable JAX scalar."""
    if isinstance(kept, np.ndarray) and kept.dtype == np.int64:
      total = self._constant + self._alone[np.arange(kept.size), kept].sum()
      return float(total + sum(_bilinear(np, kept[k], kept[j], *grid) for k, j, *grid in self._pairs))
    kept = jnp.asarray(kept)
    kept = kept if jnp.issubdtype(kept.dtype, jnp.floating) else kept.astype(jnp.float32)
    dtype, fixed, rows = kept.dtype, jax.lax.stop_gradient(kept), np.arange(kept.size)
    low = jnp.clip(jnp.floor(fixed).astype(jnp.int32), 0, self._alone.shape[1] - 2)
    part = fixed - low.astype(dtype)

    def between(table: np.ndarray) -> jax.Array:
      values = jnp.asarray(table, dtype)
      return values[rows, low] * (1 - part) + values[rows, low + 1] * part

    total = self._constant + jnp.sum(between(self._alone) + between(self._slopes) * (kept - fixed))
    for k, j, *grid in self._pairs:
      total += _bilinear(jnp, kept[k], kept[j], *(jnp.asarray(part, dtype) for part in grid))
    return total

  def time(self, kept: Sequence[int] | np.ndarray) -> float:
    """Returns the predicted milliseconds of one network, `[K]` channels, even if a wider one is faster."""
    widths = np.asarray(kept, np.int64)
    total = self._constant + sum(row[width] for row, width in zip(self._times, widths, strict=True))
    return float(total + sum(_bilinear(np, widths[k], widths[j], *grid) for k, j, *grid in self._pairs))


def _every_width(size: int, widths: np.ndarray, times: np.ndarray) -> np.ndarray:
  """Returns the times of 0 to `size` channels.

  Between measured widths they are linear, but for what full lanes save: where multiples of 8 were measured and the
  widths one above them, the other multiples lie on the line of the first, and what is between them on the second's.
  """
  every = np.arange(size + 1)
  found = np.interp(every, widths, times)
  full = widths % _LANES == 0
  above = (widths % _LANES == 1) & np.isin(widths - 1, widths[full])
  if full.sum() > 1 and above.any() and widths.size < size:
    line = np.interp(every, widths[full], times[full])
    excess = np.interp(every, widths[above], times[above] / line[widths[above]])
    between = (every > widths[full][0]) & ~np.isin(every, widths)
    found[between] = (line * np.where(every % _LANES == 0, 1.0, excess))[between]
  return found


def _from_above(times: np.ndarray) -> np.ndarray:
  """Returns the least time of all widths that are at least so large, in each direction."""
  for axis in range(times.ndim):
    times = np.flip(np.minimum.accumulate(np.flip(times, axis), axis), axis)
  return times


def _slope(row: np.ndarray, size: int) -> np.ndarray:
  """Returns how fast times rise around each width up to `size`; none of them is 0 unless all are."""
  widths = np.arange(row.size)
  reach = max(1, min(_REACH, size // 2))
  low, high = np.clip(widths - reach, 0, size), np.clip(widths + reach, 0, size)
  return (row[high] - row[low]) / np.maximum(high - low, 1)


def _bilinear(xp: Any, x: Any, y: Any, rows: Any, columns: Any, times: Any) -> Any:
  (i, u), (j, v) = (_cell(xp, value, grid) for value, grid in ((x, rows), (y, columns)))
  upper = times[i, j] * (1 - v) + times[i, j + 1] * v
  lower = times[i + 1, j] * (1 - v) + times[i + 1, j + 1] * v
  return upper * (1 - u) + lower * u


def _cell(xp: Any, value: Any, grid: Any) -> tuple[Any, Any]:
  """Returns the place in a grid before a value, and the part of the way to the next."""
  value = xp.clip(value, grid[0], grid[-1])
  i = xp.clip(xp.searchsorted(grid, value, side="right") - 1, 0, grid.shape[0] - 2)
  return i, (value - grid[i]) / (grid[i + 1] - grid[i])
