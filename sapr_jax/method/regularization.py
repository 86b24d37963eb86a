"""Partial regularization: a group lasso on the channels that the masks drop, and on no others.

References:
  Gao et al., ICCV 2023, supplement B, Eq. 2.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from sapr_jax.channels import ChannelGraph, Masks, Member, check_masks, map_members
from sapr_jax.errors import InputError

Params = TypeVar("Params")
Weighting = Literal["share", "relative", "uniform"]


def group_weights(graph: ChannelGraph, masks: Masks, weighting: Weighting = "relative") -> dict[str, jax.Array]:
  """Returns the factor of each group in Eq. 2.

  Args:
    graph: The channel graph.
    masks: Group name -> 0/1 array `[group.size]`.
    weighting: With N_k the number of channels that group k drops and K the number of groups: "relative" is N_k / N with
      N the mean of the N_k; "share" is N_k / N with N their sum, K times less; "uniform" is 1 / K. The paper leaves N
      open; docs/method.md says why the mean is the default.

  Returns:
    Group name -> scalar.

  Raises:
    InputError: If `weighting` is unknown or `masks` does not fit `graph`.
  """
  if weighting not in ("share", "relative", "uniform"):
    raise InputError(f"weighting={weighting!r} is unknown; expected share, relative or uniform.")
  check_masks(graph, masks)
  num_groups = len(graph.groups)
  if weighting == "uniform":
    return {group.name: jnp.full((), 1.0 / num_groups) for group in graph.groups}
  dropped = {group.name: group.size - jnp.sum(jnp.asarray(masks[group.name])) for group in graph.groups}
  total = sum(dropped.values())
  scale = num_groups if weighting == "relative" else 1.0
  # Nothing dropped: all weights are zero, not 0 / 0.
  return {name: scale * count / jnp.maximum(total, 1.0) for name, count in dropped.items()}


def partial_group_lasso(
  params: Any, graph: ChannelGraph, masks: Masks, *, weighting: Weighting = "relative"
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
    weighting: The factor of each group, see `group_weights`.

  Returns:
    Scalar, not yet multiplied by gamma.

  Raises:
    InputError: If `masks` misses a group, names an unknown one, or has an entry that is not `[group.size]`; the message
      names the group and both shapes.

  References:
    Gao et al., ICCV 2023, supplement B, Eq. 2.
  """
  weights = group_weights(graph, masks, weighting)
  norms = channel_norms(params, graph)
  return sum(
    (weights[group.name] * jnp.sum((1.0 - jnp.asarray(masks[group.name])) * norm)
     for group in graph.groups for norm in norms[group.name]),
    jnp.zeros(()),
  )  # fmt: skip


def prox_partial_group_lasso(
  params: Params, graph: ChannelGraph, masks: Masks, step_size: Any, *, weighting: Weighting = "relative"
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
    weighting: The factor of each group, see `group_weights`.

  Returns:
    New parameters.

  Raises:
    InputError: If `masks` or `params` does not fit `graph`.

  References:
    Gao et al., ICCV 2023, supplement B, Eq. 2; Yuan and Lin, 2006, for the operator.
  """
  weights = group_weights(graph, masks, weighting)

  def shrink(kernel: jax.Array, members: Sequence[tuple[str, Member]]) -> jax.Array:
    for name, member in _kernel_axes(members):
      scale = _shrinkage(kernel, member, jnp.asarray(masks[name]), step_size * weights[name])
      kernel = jnp.where(scale == 1.0, kernel, kernel * scale)
    return kernel

  return map_members(shrink, params, graph)


class PartialRegularizationState(NamedTuple):
  """State of `partial_regularization`.

  Attributes:
    step: Number of steps taken, int32 scalar.
  """

  step: jax.Array


def add_partial_group_lasso(
  graph: ChannelGraph, gamma: float, *, weighting: Weighting = "relative"
) -> optax.GradientTransformationExtraArgs:
  """An optax transform that adds the gradient of `gamma * partial_group_lasso` to the gradients.

  As if the penalty were a term of the loss: put it first in a chain, as `optax.add_decayed_weights`, and pass the masks
  to `update`; without masks it does nothing. The weights of dropped channels end oscillating about zero, with an
  amplitude of about learning_rate / (1 - momentum) * gamma. `partial_regularization` is the proximal form, which makes
  them exactly zero; from there, a channel that later masks keep has almost no gradient to come back with.
  docs/method.md compares the two. An optimizer that rescales gradients, such as Adam, rescales this one too: there the
  proximal form keeps the meaning of gamma.

  Args:
    graph: The channel graph of the network.
    gamma: Strength of the regularization.
    weighting: The factor of each group, see `group_weights`.

  Returns:
    A transform whose `update(grads, state, params, masks=masks)` returns the gradients of loss and penalty; `params` is
    the whole tree that the graph was traced with.

  Raises:
    InputError: If gamma is negative or not a number.

  Example:
    >>> tx = optax.chain(add_partial_group_lasso(graph, gamma=5e-4), optax.sgd(0.1, momentum=0.9))
    >>> updates, opt_state = tx.update(grads, opt_state, params, masks=masks)
  """
  _check_gamma(gamma)

  def init(params: Any) -> optax.EmptyState:
    del params
    return optax.EmptyState()

  def update(
    updates: Any, state: optax.EmptyState, params: Any = None, *, masks: Masks | None = None, **extra: Any
  ) -> tuple[Any, optax.EmptyState]:
    del extra
    if masks is None:
      return updates, state
    if params is None:
      raise InputError("add_partial_group_lasso needs the parameters: tx.update(grads, state, params, masks=masks).")

    def penalty(params: Any) -> jax.Array:
      return gamma * partial_group_lasso(params, graph, masks, weighting=weighting)

    def add(update: Any, slope: Any) -> Any:
      # As in optax: a parameter may have no gradient, and one of integers has none of its own.
      return update if update is None or slope.dtype == jax.dtypes.float0 else update + slope

    gradient = jax.grad(penalty, allow_int=True)(params)
    return jax.tree.map(add, updates, gradient, is_leaf=lambda update: update is None), state

  return optax.GradientTransformationExtraArgs(init, update)


def partial_regularization(
  graph: ChannelGraph,
  learning_rate: float | Callable[[Any], Any],
  gamma: float,
  *,
  momentum: float = 0.0,
  weighting: Weighting = "relative",
) -> optax.GradientTransformationExtraArgs:
  """The proximal form: an optax transform that applies the proximal step after the optimizer's own.

  Put it last in a chain and pass the masks to `update`; without masks it does nothing. The threshold follows the
  effective learning rate, `learning_rate / (1 - momentum)`: a penalty in the loss would go through the momentum buffer,
  and gamma shall mean the same in both forms. After an optimizer whose momentum is a mean of gradients,
  such as Adam, leave `momentum` at 0.

  Args:
    graph: The channel graph of the network.
    learning_rate: The optimizer's learning rate: a number or a schedule of the step.
    gamma: Strength of the regularization.
    momentum: The optimizer's momentum.
    weighting: The factor of each group, see `group_weights`.

  Returns:
    A transform whose `update(updates, state, params, masks=masks)` returns the updates that lead to the shrunk weights.

  Raises:
    InputError: If gamma is negative or not a number, or momentum is not in [0, 1).

  Example:
    >>> tx = optax.chain(
    ...   optax.sgd(0.1, momentum=0.9), partial_regularization(graph, 0.1, gamma=5e-4, momentum=0.9)
    ... )
    >>> updates, opt_state = tx.update(grads, opt_state, params, masks=masks)
  """
  _check_gamma(gamma)
  if not 0 <= momentum < 1:
    raise InputError(f"momentum={momentum} is out of range; expected a number in [0, 1).")

  def init(params: Any) -> PartialRegularizationState:
    del params
    return PartialRegularizationState(jnp.zeros((), jnp.int32))

  def update(
    updates: Any, state: PartialRegularizationState, params: Any = None, *, masks: Masks | None = None, **extra: Any
  ) -> tuple[Any, PartialRegularizationState]:
    del extra
    new_state = PartialRegularizationState(optax.safe_increment(state.step))
    if masks is None:
      return updates, new_state
    if params is None:
      raise InputError("partial_regularization needs the parameters: tx.update(updates, state, params, masks=masks).")
    rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
    moved = optax.apply_updates(params, updates)
    step_size = rate / (1.0 - momentum) * gamma
    shrunk = prox_partial_group_lasso(moved, graph, masks, step_size, weighting=weighting)
    # What the operator left alone keeps its update bit for bit.
    updates = jax.tree.map(lambda u, p, m, s: jnp.where(s == m, u, s - p), updates, params, moved, shrunk)
    return updates, new_state

  return optax.GradientTransformationExtraArgs(init, update)


def _check_gamma(gamma: Any) -> None:
  if isinstance(gamma, numbers.Real) and not float(gamma) >= 0:  # a traced one cannot be checked
    raise InputError(f"gamma={gamma} is out of range; expected at least 0.")


def channel_norms(params: Any, graph: ChannelGraph) -> dict[str, list[jax.Array]]:
  """Returns the Euclidean norm of each channel in each kernel of its group.

  Returns:
    Group name -> one array `[group.size]` for each regularized kernel, producers and readers.
  """
  norms: dict[str, list[jax.Array]] = {group.name: [] for group in graph.groups}

  def note(kernel: jax.Array, members: Sequence[tuple[str, Member]]) -> jax.Array:
    for name, member in _kernel_axes(members):
      norms[name].append(_safe_sqrt(_sum_of_squares(kernel, member)))
    return kernel

  map_members(note, params, graph)
  return norms


def _kernel_axes(members: Sequence[tuple[str, Member]]) -> list[tuple[str, Member]]:
  """Returns the regularized axes of a parameter, output axes first; none if it is not a kernel."""
  kernels = [(name, member) for name, member in members if member.role in ("in", "out")]
  return sorted(kernels, key=lambda entry: entry[1].role != "out")


def _sum_of_squares(kernel: jax.Array, member: Member) -> jax.Array:
  """Returns `[group.size]`: the squared norm of each channel's slice."""
  others = tuple(axis for axis in range(kernel.ndim) if axis != member.axis)
  squares = jnp.sum(jnp.square(kernel), axis=others)
  if member.is_whole_axis:
    return squares
  size = int(member.channels.max()) + 1
  # Entries of no channel (-1) are collected in one segment more, and left out.
  return jax.ops.segment_sum(squares, jnp.where(member.channels < 0, size, member.channels), size + 1)[:size]


def _safe_sqrt(squares: jax.Array) -> jax.Array:
  """Square root with gradient zero at zero."""
  positive = squares > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _shrinkage(kernel: jax.Array, member: Member, mask: jax.Array, threshold: Any) -> jax.Array:
  """Returns the factors that the proximal operator multiplies with, shaped to broadcast; exactly 1 where kept."""
  norms = _safe_sqrt(_sum_of_squares(kernel, member))
  factors = jnp.maximum(0.0, 1.0 - threshold / jnp.where(norms > 0, norms, 1.0))
  return member.along_axis(jnp.where(mask > 0, 1.0, factors).astype(kernel.dtype), 1.0)
