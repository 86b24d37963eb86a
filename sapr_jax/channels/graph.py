"""The channel graph: which channels must be cut together, and what each costs. Plain data."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels.call import Call
from sapr_jax.channels.describe import describe_groups, describe_reasons
from sapr_jax.channels.rules import ParamKey
from sapr_jax.checks import check_array, check_type
from sapr_jax.errors import InputError

Masks = Mapping[str, Any]
"""Group name -> 0/1 array `[group.size]`; 1 keeps the channel."""


Role = Literal["in", "out", "vector"]


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
  """One axis of one variable that is cut with its group.

  Attributes:
    collection: "params", "batch_stats", ...
    path: Names of modules, then of the variable: ("block1", "conv1", "kernel").
    axis: Which axis.
    role: "out" if a kernel's output channels, "in" if a kernel's input channels, "vector" for what goes along: biases,
      normalization scales and statistics.
    ndim: Rank of the variable.
    channels: int array `[size of the axis]`: the group's channel that each entry belongs to, or -1. It is
      `arange(group.size)` unless the axis was flattened or concatenated.
  """

  collection: str
  path: tuple[str, ...]
  axis: int
  role: Role
  ndim: int
  channels: np.ndarray

  def get(self, tree: Any) -> Any:
    """Returns the variable of this member from a tree of its collection: `member.get(variables[member.collection])`."""
    for name in self.path:
      tree = tree[name]
    return tree

  @functools.cached_property
  def is_whole_axis(self) -> bool:
    """True if the axis consists of the group's channels, each once and in order."""
    return np.array_equal(self.channels, np.arange(self.channels.size))

  def along_axis(self, per_channel: Any, fill: float) -> Any:
    """Spreads `[group.size]` values to the variable's axis, shaped to broadcast with the variable.

    Args:
      per_channel: Array `[group.size]` (NumPy or JAX).
      fill: Value for entries that belong to no channel of the group.
    """
    xp = np if isinstance(per_channel, np.ndarray) else jnp
    if not self.is_whole_axis:
      per_channel = xp.append(per_channel, xp.asarray(fill, per_channel.dtype))[self.channels]
    shape = [1] * self.ndim
    shape[self.axis] = self.channels.size
    return per_channel.reshape(shape)

  def __str__(self) -> str:
    return f"{'/'.join((self.collection, *self.path))} axis {self.axis} ({self.role})"


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
  """Channels that exist or vanish together in all of `members`.

  Attributes:
    name: Path of the first layer that produces the channels.
    size: Number of channels.
    members: The axes that are cut, in the order of the variables.
    scope: Deepest module that holds all members, () for the whole network.
    is_block: Whether `scope` is a sub-module of the network.
    joined: Whether two different activations are added along it, each with its own entry at each position: a residual
      stream.
  """

  name: str
  size: int
  members: tuple[Member, ...]
  scope: tuple[str, ...]
  is_block: bool
  joined: bool

  def to_json(self) -> dict[str, Any]:
    """Returns the fields; the channels of a member are None where they are a whole axis."""
    members = [
      dataclasses.asdict(member) | {"channels": None if member.is_whole_axis else member.channels.tolist()}
      for member in self.members
    ]
    return dataclasses.asdict(self) | {"members": members}

  @classmethod
  def from_json(cls, group: Mapping[str, Any]) -> ChannelGroup:
    """Returns the group that `to_json` wrote."""

    def member(fields: Mapping[str, Any]) -> Member:
      channels = np.arange(group["size"]) if fields["channels"] is None else np.array(fields["channels"], np.int64)
      return Member(**{**fields, "path": tuple(fields["path"]), "channels": channels})

    return cls(**{**group, "members": tuple(map(member, group["members"])), "scope": tuple(group["scope"])})

  def __str__(self) -> str:
    lines = [f"{self.name}: {self.size} channels{', joined by an addition' if self.joined else ''}"]
    return "\n  ".join([*lines, *map(str, self.members)])


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelPolynomial:
  """A cost, such as MACs, as a polynomial in the number of kept channels of each group.

      value = sum_t coefficients[t] * prod_j kept[factors[t, j]]

  where the entry after the last group is the constant 1.
  """

  coefficients: np.ndarray
  factors: np.ndarray

  def __call__(self, kept: Any) -> Any:
    """Evaluates at `kept`, `[K]`: concrete integers give an exact Python int, others a floating JAX scalar."""
    if not isinstance(kept, jax.core.Tracer) and np.issubdtype(np.asarray(kept).dtype, np.integer):
      widths = np.append(np.asarray(kept, np.int64), 1)
      return int((self.coefficients * widths[self.factors].prod(axis=1)).sum())
    kept = jnp.asarray(kept)
    extended = jnp.append(kept, jnp.ones((), kept.dtype))
    return jnp.sum(jnp.asarray(self.coefficients, kept.dtype) * jnp.prod(extended[self.factors], axis=1))


@dataclasses.dataclass(frozen=True)
class Layer:
  """A module whose number of output channels can be narrowed.

  Attributes:
    kernel: Path of its kernel in "params".
    out_axis: The kernel's output axis.
    multiplier: Output channels per input channel if it is a depthwise convolution, else None.
  """

  kernel: tuple[str, ...]
  out_axis: int
  multiplier: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGraph:
  """The channels of a network that must be cut together, as `trace_channels` finds them.

  Plain data: it can be pickled, and written as JSON (`to_json`, `from_json`). `prune` proves each cut by tracing the
  model again.

  Attributes:
    groups: The groups offered for pruning, in forward order.
    fixed: (variable, axis, reason) for each output axis of a kernel that is not offered.
    layers: Module path -> layer, for all modules that can be narrowed.
    shapes: Variable -> its shape in the dense network.
    costs: Costs of a sub-network by name: "macs" of all convolutions and matrix products for `call`, "prunable_macs"
      of those that touch a group, and the number of "params".
    call: Arguments that the model was applied to.
  """

  groups: tuple[ChannelGroup, ...]
  fixed: tuple[tuple[ParamKey, int, str], ...]
  layers: Mapping[tuple[str, ...], Layer]
  shapes: Mapping[ParamKey, tuple[int, ...]]
  costs: Mapping[str, ChannelPolynomial]
  call: Call

  def to_json(self) -> dict[str, Any]:
    """Returns the graph in JSON types, for `json.dump`.

    Raises:
      InputError: If JSON cannot represent an argument of the model.
    """
    document = {
      "groups": [group.to_json() for group in self.groups],
      "fixed": self.fixed,
      "layers": [(path, dataclasses.asdict(layer)) for path, layer in self.layers.items()],
      "shapes": list(self.shapes.items()),
      "costs": {name: [c.coefficients.tolist(), c.factors.tolist()] for name, c in self.costs.items()},
      "call": self.call.to_json(),
    }
    return json.loads(json.dumps(document))

  @classmethod
  def from_json(cls, document: Mapping[str, Any]) -> ChannelGraph:
    """Returns the graph that `to_json` wrote.

    Raises:
      InputError: If `document` is not such a graph.
    """
    try:
      return cls(
        groups=tuple(ChannelGroup.from_json(group) for group in document["groups"]),
        fixed=tuple((tuple(key), axis, reason) for key, axis, reason in document["fixed"]),
        layers={tuple(p): Layer(**layer | {"kernel": tuple(layer["kernel"])}) for p, layer in document["layers"]},
        shapes={tuple(key): tuple(shape) for key, shape in document["shapes"]},
        costs={
          name: ChannelPolynomial(*(np.array(part, np.int64) for part in parts))
          for name, parts in document["costs"].items()
        },
        call=Call.from_json(document["call"]),
      )
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
      reason = f"{type(error).__name__}: {str(error)[:200]}"
      raise InputError(f"document must be what ChannelGraph.to_json returned; reading it gave {reason}.") from error

  def full_masks(self) -> dict[str, np.ndarray]:
    """Returns the masks that keep every channel, as float32 arrays."""
    return {group.name: np.ones(group.size, np.float32) for group in self.groups}

  def kept(self, masks: Masks | None = None) -> Any:
    """Returns the number of kept channels of each group, `[K]`: int64 for concrete 0/1 masks, else floating."""
    if masks is None:
      return np.array([group.size for group in self.groups], np.int64)
    check_masks(self, masks)
    arrays = [masks[group.name] for group in self.groups]
    if any(isinstance(mask, jax.core.Tracer) for mask in arrays):
      arrays = list(map(jnp.asarray, arrays))
      return jnp.stack([jnp.sum(m, dtype=jnp.float64 if m.dtype == jnp.float64 else jnp.float32) for m in arrays])
    concrete = [np.asarray(mask) for mask in arrays]
    sums = np.array([mask.sum(dtype=np.float64) for mask in concrete])
    return sums.astype(np.int64) if all(np.isin(mask, (0, 1)).all() for mask in concrete) else sums

  def macs(self, masks: Masks | None = None) -> Any:
    """Counts the multiply-accumulates of convolutions and matrix products for one call, or one image by `input_shape`.

    Args:
      masks: Which channels are kept; None for the dense network.

    Returns:
      An exact int for concrete 0/1 masks; under `jax.grad` or `jax.jit` a scalar that is differentiable in the masks.
    """
    return self.costs["macs"](self.kept(masks))

  def prunable_macs(self, masks: Masks | None = None) -> Any:
    """Counts like `macs`, but only the layers that touch a group."""
    return self.costs["prunable_macs"](self.kept(masks))

  def num_params(self, masks: Masks | None = None) -> Any:
    """Counts the parameters likewise; running statistics are not among them."""
    return self.costs["params"](self.kept(masks))

  def members_by_variable(self, collection: str) -> dict[tuple[str, ...], list[tuple[str, Member]]]:
    """Returns for each variable of `collection` that is cut: [(group name, member), ...]."""
    found: dict[tuple[str, ...], list[tuple[str, Member]]] = {}
    for group in self.groups:
      for member in group.members:
        if member.collection == collection:
          found.setdefault(member.path, []).append((group.name, member))
    return found

  def explain(self) -> str:
    """Gives the reasons why output channels of kernels stay, each with the layers; `fixed` has them one by one."""
    return describe_reasons(self)

  def __str__(self) -> str:
    return describe_groups(self)


def check_graph(graph: Any) -> None:
  """Raises `InputError` unless `graph` is one."""
  check_type("graph", graph, ChannelGraph, "trace_channels(model, variables, input_shape) returns it")


def check_masks(graph: ChannelGraph, masks: Masks, *, allow_empty: bool = True) -> None:
  """Checks that `masks` fits `graph`.

  Args:
    graph: The channel graph.
    masks: Group name -> array `[group.size]`.
    allow_empty: Whether a group may drop all its channels. Only then may masks be traced arrays.

  Raises:
    InputError: If a group is missing or unknown, a mask is not `[group.size]` or holds a NaN, or (unless `allow_empty`)
      a mask holds other values than 0 and 1 or drops its whole group.
  """
  check_graph(graph)
  if not isinstance(masks, Mapping):
    raise InputError(f"masks must map the names in graph.groups to arrays, got a {type(masks).__name__}.")
  names = {group.name for group in graph.groups}
  if missing := sorted(names - set(masks)):
    raise InputError(f"masks misses the group {missing[0]!r}; it must name all {len(names)} of graph.groups.")
  if extra := sorted(map(str, set(masks) - names)):
    raise InputError(f"masks names an unknown group {extra[0]!r}; it must name those of graph.groups.")
  for group in graph.groups:
    mask = masks[group.name]
    check_array(f"The mask of group {group.name!r}", mask, (group.size,))
    if isinstance(mask, jax.core.Tracer):
      if allow_empty:
        continue
      raise InputError(
        f"The mask of group {group.name!r} must be concrete to be cut, got a traced array; cut outside of jax.jit."
      )
    mask = np.asarray(mask)
    if allow_empty:
      if not np.isfinite(mask).all():
        raise InputError(f"The mask of group {group.name!r} must be finite: 0 drops a channel, 1 keeps it.")
      continue
    if not np.isin(mask, (0, 1)).all():
      raise InputError(f"The mask of group {group.name!r} must hold only 0 (drop) and 1 (keep).")
    if not mask.any():
      raise InputError(f"The mask of group {group.name!r} drops all {group.size} channels; keep at least one.")


def polynomial(terms: Sequence[tuple[int, tuple[int, ...]]], num_groups: int) -> ChannelPolynomial:
  """Builds a `ChannelPolynomial` from (coefficient, group indices) pairs, merging equal monomials."""
  merged: dict[tuple[int, ...], int] = {}
  for coefficient, factors in terms:
    key = tuple(sorted(factors))
    merged[key] = merged.get(key, 0) + coefficient
  degree = max((len(key) for key in merged), default=0)
  rows = [key + (num_groups,) * (degree - len(key)) for key in merged]
  return ChannelPolynomial(
    np.array(list(merged.values()), np.int64), np.array(rows, np.int64).reshape(len(merged), degree)
  )


Selection = Literal["blocks", "unjoined", "exact"] | Callable[[ChannelGroup], bool]

SELECTIONS: dict[str, Callable[[ChannelGroup], bool]] = {
  "blocks": lambda group: group.is_block and not group.joined,
  "unjoined": lambda group: not group.joined,
  "exact": lambda group: True,
}
