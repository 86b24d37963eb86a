"""Changes kept weights so that they make up for dropped channels: least squares on what the readers of a group see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels import (
  ChannelGraph,
  Masks,
  Moments,
  check_masks,
  check_variables,
  is_nnx,
  kept_features,
  kept_weights,
  network_of,
  reader_moments,
)
from sapr_jax.channels.trees import path_of
from sapr_jax.checks import check_concrete, check_values, shown
from sapr_jax.errors import InputError
from sapr_jax.method.statistics import some

if TYPE_CHECKING:
  from flax import nnx  # takes a while to import

_RIDGE = 1e-4
"""As a share of the variance of the kept channels, as some are zero or copies of others."""
_ROUNDING = 1e-6
"""What sums in float32 leave of a variance of zero, as a share of the mean square."""


@overload
def compensate(model: nnx.Module, graph: ChannelGraph, masks: Masks, batches: Iterable[Any], /) -> nnx.Module: ...


@overload
def compensate(
  model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks, batches: Iterable[Any]
) -> dict[str, Any]: ...


def compensate(model: Any, variables: Any = None, graph: Any = None, masks: Any = None, batches: Any = None) -> Any:
  """Changes the weights that read kept channels so that they make up for the dropped ones, before the cut.

  Each kernel that reads a group loses a part z of what it gives at each position. What it still sees there, y: the kept
  channels, in all places of a convolution's window, says some of that. The least squares over all positions of all
  batches are added to the weights W of what stays:

      z ~ D^T y + b,   D = (C_yy + ridge)^-1 C_yz,   W_kept + D

  where C are covariances. b goes into the bias. A kernel without one in a network with running statistics leaves it to
  these, so `renew_statistics` belongs after the cut; without statistics b is 0, and C are means of products. That is
  the least error of what the kernel gives, layer by layer: what layers before it have lost is not made up for.

  There is nothing to train. It needs several positions for each weight of an output channel that is kept: a convolution
  has many in an image, a layer behind a mean or a flattening only one. Convolutions and matrix products are changed; a
  kernel that reads its input in another way (grouped, reshaped, in a loop, with more than 8192 such weights) stays.

  Args:
    model: The dense network.
    variables: Its variables; left out for a module of NNX: `compensate(module, graph, masks, batches)`.
    graph: Its channel graph.
    masks: Group name -> 0/1 array `[group.size]`; 1 keeps.
    batches: Inputs of the network, as it was traced: an array each, or a tuple of those of the call in the order of
      `graph.call`, which sorts keyword arguments by name. Of any batch size.

  Returns:
    The variables of the dense network with other kernels, for `prune` with the same masks; with NNX a module.

  Raises:
    InputError: If something does not fit `graph`, there is no batch, or what a kernel reads is not finite.

  Example:
    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(2, use_bias=False), nn.Dense(1, use_bias=False)])
    >>> params = {"layers_0": {"kernel": jnp.array([[1.0, 2.0]])}, "layers_1": {"kernel": jnp.array([[5.0], [3.0]])}}
    >>> graph = sapr.trace_channels(model, {"params": params}, (1, 1), select="unjoined")
    >>> masks = {"layers_0": jnp.array([0.0, 1.0])}  # the channel that is dropped is half of the other
    >>> found = sapr.compensate(model, {"params": params}, graph, masks, [jnp.ones((8, 1))])
    >>> found["params"]["layers_1"]["kernel"][1].round(2)
    Array([5.5], dtype=float32)

  References:
    Luo et al., ThiNet, 2017, section 3.2.3, and He et al., Channel pruning for accelerating very deep neural networks,
    2017, section 3.1, solve for the kernel of one layer after the other.
  """
  if is_nnx(model):
    given = [part for part in (variables, graph, masks, batches) if part is not None]
    if len(given) != 3 or not isinstance(given[0], ChannelGraph):
      found = ", ".join(["the module", *(type(part).__name__ for part in given)])
      raise InputError(f"compensate must be called as compensate(module, graph, masks, batches) with NNX, got {found}.")
    from sapr_jax.channels import nnx

    graph, masks, batches = given
    variables = network_of(model, None, ())[1]
    return nnx.with_variables(model, _compensated(model, variables, graph, masks, batches))
  network_of(model, variables, ())
  check_variables(variables)
  return _compensated(model, variables, graph, masks, batches)


def _compensated(model: Any, variables: Any, graph: ChannelGraph, masks: Masks, batches: Any) -> dict[str, Any]:
  check_masks(graph, masks, allow_empty=False)
  check_values("variables", dict(variables), "compensate")
  moments_of = jax.jit(lambda variables, batch: reader_moments(model, variables, graph, masks, batch))
  total: Any = None
  for batch in some(batches):
    check_concrete("batches", batch, "compensate")
    arrays = graph.call.arrays_of(batch)
    if not all(map(np.size, arrays)):
      raise InputError(f"batches must hold arrays with entries, got {shown(batch)}; leave out a batch without inputs.")
    found = jax.device_get(moments_of(dict(variables), arrays))
    found = jax.tree.map(lambda sums: np.asarray(sums, np.float64), found)
    total = found if total is None else jax.tree.map(np.add, total, found)
  return with_moments(variables, graph, masks, total)


def with_moments(
  variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks, moments: Mapping[Any, Moments]
) -> dict[str, Any]:
  """Does what `compensate` does, from the sums of `reader_moments` over all batches."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(variables["params"])
  params = {path_of(place): leaf for place, leaf in leaves}
  kept = kept_weights(graph, masks)
  for key, found in moments.items():
    path = key[1:]
    if not all(np.isfinite(sums).all() for sums in (found.seen, found.missing)):
      raise InputError(
        f"what {'/'.join(path)} reads must be finite, got NaN or infinity; look for it in the batches and weights."
      )
    kernel, first = params[path], range(len(found.axes))
    bias: Any = params.get(bias_path := (*path[:-1], "bias"))
    moved = np.moveaxis(np.array(kernel, np.float64), found.axes, first)
    outputs = moved.shape[len(first) :]
    has_bias = bias is not None and bias.shape == outputs
    change, constant = _least_squares(found, centered=has_bias or "batch_stats" in variables)
    if has_bias:
      params[bias_path] = jnp.asarray(bias + constant.reshape(outputs), bias.dtype)
    rows = moved.reshape(-1, len(constant))
    rows[kept_features(kept[key], kernel.shape, found.axes)] += change
    params[path] = jnp.asarray(np.moveaxis(rows.reshape(moved.shape), first, found.axes), kernel.dtype)
  return {**variables, "params": jax.tree.unflatten(structure, params.values())}


def _least_squares(moments: Moments, *, centered: bool) -> tuple[np.ndarray, np.ndarray]:
  """Returns D and b of `compensate`, `[f, c]` and `[c]`, from the moments of one kernel."""
  seen, missing = (np.asarray(sums, np.float64) / moments.seen[-1, -1] for sums in (moments.seen, moments.missing))
  squares = seen[:-1, :-1].trace()
  mean, mean_missing = seen[-1, :-1] * centered, missing[-1] * centered
  among_seen = seen[:-1, :-1] - np.outer(mean, mean)
  with_missing = missing[:-1] - np.outer(mean, mean_missing)
  ridge = _RIDGE * max(among_seen.trace(), _ROUNDING * squares, np.finfo(np.float32).tiny) / len(mean)
  change = np.linalg.solve(among_seen + ridge * np.eye(len(mean)), with_missing)
  return change, mean_missing - mean @ change
