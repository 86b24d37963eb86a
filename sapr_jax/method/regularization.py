"""Partial regularization: a group lasso on the channels that the masks drop, and on no others.

`partial_group_lasso` is the penalty, `prox_partial_group_lasso` its proximal operator; `transforms` makes an optax
transform of either.

References:
  Gao et al., ICCV 2023, supplement B, Eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from sapr_jax.channels import ChannelGraph, Masks, Member, check_masks, map_members
from sapr_jax.checks import check_array, check_function, check_number
from sapr_jax.method.channel_norms import channel_norms, is_kernel, output_first, safe_sqrt, sum_by_channel

Params = TypeVar("Params")
Weighting = Callable[[jax.Array], jax.Array]
"""Number of dropped channels of each group, `[K]` -> weight of each group in Eq. 2, `[K]`."""


def relative_weights(dropped: jax.Array) -> jax.Array:
  """Returns N_k / N with N the mean of the N_k: weights whose mean is 1.

  The paper leaves N open; docs/method.md says why the mean is the default. If nothing is dropped, all weights are 0.

  Example:
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> sapr.relative_weights(jnp.array([2.0, 0.0, 4.0]))
    Array([1., 0., 2.], dtype=float32)
  """
  dropped = _as_counts(dropped)
  return dropped.size * dropped / _sum_of_all(dropped)


def share_weights(dropped: jax.Array) -> jax.Array:
  """Returns N_k / N with N the sum of the N_k: weights whose sum is 1, K times less than `relative_weights`.

  If nothing is dropped, all weights are 0.
  """
  dropped = _as_counts(dropped)
  return dropped / _sum_of_all(dropped)


def _as_counts(dropped: Any) -> jax.Array:
  check_array("dropped", dropped, (None,))
  return jnp.asarray(dropped, None if hasattr(dropped, "dtype") else jnp.float32)


def _sum_of_all(dropped: jax.Array) -> jax.Array:
  """Returns the divisor of each weight, `[K]`: the sum of `dropped`, at least 1."""
  total = jnp.maximum(jnp.sum(dropped), 1.0)
  # Without the barrier XLA would multiply by 1 / total, which rounds twice.
  return jax.lax.optimization_barrier(jnp.broadcast_to(total, dropped.shape))


def partial_group_lasso(
  params: Any, graph: ChannelGraph, masks: Masks, *, weighting: Weighting = relative_weights
) -> jax.Array:
  """Sums the norms of the channels that `masks` drops.

      penalty = sum_k (N_k / N) sum_{c: masks[k][c] = 0} sum_m ||w[m, c]||_2

  where w[m, c] is slice c of kernel m of channel group k: a filter of a layer that produces the group, or the weights
  with which a layer reads channel c. Kept channels add nothing and receive a zero gradient: that is what makes it
  partial. At w = 0 the gradient is defined as zero, so dead channels give no NaN. Biases and normalizations are not
  regularized.

  Args:
    params: Parameters of the dense network.
    graph: Which axis of which parameter belongs to which channel group.
    masks: Group name -> 0/1 array `[group.size]`; 1 keeps the channel.
    weighting: N_k of each group `[K]` -> N_k / N, or any other weights `[K]`.

  Returns:
    Scalar, not yet multiplied by gamma.

  Raises:
    InputError: If `masks` misses a group, names an unknown one, or has an entry that is not `[group.size]`; the message
      names the group and both shapes.

  Example:
    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(2, use_bias=False), nn.relu, nn.Dense(1, use_bias=False)])
    >>> params = {
    ...   "layers_0": {"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])},
    ...   "layers_2": {"kernel": jnp.array([[2.0], [6.0]])},
    ... }
    >>> graph = sapr.trace_channels(model, {"params": params}, (1, 2), select="unjoined")
    >>> sapr.partial_group_lasso(params, graph, {"layers_0": jnp.array([0.0, 1.0])})  # ||(3, 4)|| + ||(2)||
    Array(7., dtype=float32)

  References:
    Gao et al., ICCV 2023, supplement B, Eq. 2.
  """
  weights = _group_weights(graph, masks, weighting)
  norms = channel_norms(params, graph)
  penalty: Any = 0.0
  for group in graph.groups:
    for norm in norms[group.name]:
      weight, mask, norm = _promoted(weights[group.name], jnp.asarray(masks[group.name]), norm)
      penalty += weight * jnp.sum((1.0 - mask) * norm)
  return penalty


def prox_partial_group_lasso(
  params: Params,
  graph: ChannelGraph,
  masks: Masks,
  step_size: float | jax.Array,
  *,
  weighting: Weighting = relative_weights,
) -> Params:
  """Applies the proximal operator of `step_size * partial_group_lasso`: shrinks dropped channels toward zero.

      w[m, c] <- max(0, 1 - step_size (N_k / N) / ||w[m, c]||_2) w[m, c]   where masks[k][c] = 0

  A slice whose norm does not exceed the threshold becomes exactly zero; kept channels are returned bit for bit. A
  kernel that belongs to groups on both its axes (the middle of a bottleneck) gets the two operators one after the
  other, output axis first: the joint minimizer of overlapping groups has no closed form.

  Args:
    params: Parameters of the dense network.
    graph: Which axis of which parameter belongs to which channel group.
    masks: Group name -> 0/1 array `[group.size]`; 1 keeps the channel.
    step_size: The optimizer's effective learning rate times gamma.
    weighting: N_k of each group `[K]` -> N_k / N, or any other weights `[K]`.

  Returns:
    New parameters.

  Raises:
    InputError: If `masks` or `params` does not fit `graph`.

  References:
    Gao et al., ICCV 2023, supplement B, Eq. 2; Yuan and Lin, 2006, for the operator.
  """
  check_number("step_size", step_size, "a number of at least 0", lambda x: x >= 0, may_be_traced=True)
  weights = _group_weights(graph, masks, weighting)

  def shrink(kernel: jax.Array, members: Sequence[tuple[str, Member]]) -> jax.Array:
    for name, member in output_first(members):
      if is_kernel(member):
        scale = _shrinkage(kernel, member, jnp.asarray(masks[name]), step_size * weights[name])
        kernel = jnp.where(scale == 1.0, kernel, kernel * scale)
    return kernel

  return map_members(shrink, params, graph)


def check_weighting(weighting: Any) -> None:
  check_function("weighting", weighting, "pass sapr_jax.relative_weights or sapr_jax.share_weights")


def _group_weights(graph: ChannelGraph, masks: Masks, weighting: Weighting) -> dict[str, jax.Array]:
  """Returns group name -> its weight, scalar."""
  check_weighting(weighting)
  check_masks(graph, masks)
  dropped = jnp.asarray(graph.kept(), jnp.float32) - jnp.asarray(graph.kept(masks), jnp.float32)
  weights = weighting(dropped)
  check_array("What weighting returns, one weight for each group,", weights, dropped.shape)
  weights = jnp.asarray(weights)
  return {group.name: weights[k] for k, group in enumerate(graph.groups)}


def _shrinkage(kernel: jax.Array, member: Member, mask: jax.Array, threshold: jax.Array) -> jax.Array:
  """Returns the factors that the proximal operator multiplies with, shaped to broadcast; exactly 1 where kept."""
  threshold, norms = _promoted(threshold, safe_sqrt(sum_by_channel(jnp.square(kernel), member)))
  factors = jnp.maximum(0.0, 1.0 - threshold / jnp.where(norms > 0, norms, 1.0))
  return member.along_axis(jnp.where(mask > 0, 1.0, factors).astype(kernel.dtype), 1.0)


def _promoted(*arrays: jax.Array) -> list[jax.Array]:
  """Casts arrays to the dtype that they promote to: masks and weights are float32, parameters may be anything."""
  with jax.numpy_dtype_promotion("standard"):
    dtype = jnp.result_type(*arrays)
  return [array.astype(dtype) for array in arrays]
