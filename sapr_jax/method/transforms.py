"""The partial group lasso as an optax transform, in two forms of one thing: by its penalty and by its prox.

`regularize_by_penalty` stands before the optimizer and adds a gradient; `regularize_by_prox` stands after it and
shrinks weights. gamma means the same in both. docs/method.md compares them. Both keep the masks in their state, see
`masks_in_state`.

Within `optax.masked` and `optax.multi_transform` they see a part of the parameters, and regularize the kernels that are
there; at least one of a channel group must be.

References:
  Gao et al., ICCV 2023, supplement B, Eq. 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sapr_jax.channels import ChannelGraph, Masks, check_graph, check_params
from sapr_jax.channels.trees import path_of
from sapr_jax.checks import check_number, check_tree, check_type
from sapr_jax.errors import InputError, one_line
from sapr_jax.method.channel_norms import is_kernel
from sapr_jax.method.masks_in_state import RegularizationState, check_extra_arguments, first_state, warn_if_idle
from sapr_jax.method.regularization import (
  Weighting,
  check_weighting,
  partial_group_lasso,
  prox_partial_group_lasso,
  relative_weights,
)


def regularize_by_penalty(
  graph: ChannelGraph,
  gamma: float | jax.Array,
  *,
  weighting: Weighting = relative_weights,
  expected_from: int | None = 0,
) -> optax.GradientTransformationExtraArgs:
  """Regularizes by the penalty: adds the gradient of `gamma * partial_group_lasso` to the gradients.

  As if the penalty were a term of the loss: put it first in a chain, as `optax.add_decayed_weights`, and the masks into
  the state by `set_masks`; until then all channels are kept, and it does nothing. The weights of dropped channels end
  oscillating about zero, with an amplitude of about learning_rate / (1 - momentum) * gamma. An optimizer that rescales
  gradients, such as Adam, rescales this one too. `regularize_by_prox` is the other form: it keeps the meaning of gamma
  with such an optimizer and makes weights exactly zero, but a channel that later masks keep then has almost no gradient
  to come back with.

  Args:
    graph: The channel graph of the network.
    gamma: Strength of the regularization.
    weighting: The weight of each group, see `partial_group_lasso`.
    expected_from: The step from which on something is to be regularized. If the masks in the state keep all channels
      at that step, a line in the log "sapr_jax" warns. None leaves the check out, and with it the call of the host from
      a compiled step, for which JAX keeps no compiled program on disk.

  Returns:
    A transform whose `update(grads, state, params)` returns the gradients of loss and penalty; `params` is the whole
    tree that the graph was traced with. An argument `masks=` of `update` goes before the masks in the state.

  Raises:
    InputError: If gamma is negative or not a number.

  Example:
    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(2, use_bias=False), nn.relu, nn.Dense(1, use_bias=False)])
    >>> params = {"layers_0": {"kernel": jnp.ones((1, 2))}, "layers_2": {"kernel": jnp.ones((2, 1))}}
    >>> graph = sapr.trace_channels(model, {"params": params}, (1, 1), select="unjoined")
    >>> tx = optax.chain(sapr.regularize_by_penalty(graph, gamma=0.25), optax.sgd(1.0))
    >>> opt_state = sapr.set_masks(tx.init(params), {"layers_0": jnp.array([1.0, 0.0])})
    >>> updates, opt_state = tx.update(optax.tree.zeros_like(params), opt_state, params)
    >>> optax.apply_updates(params, updates)["layers_0"]["kernel"]
    Array([[1.  , 0.75]], dtype=float32)
  """
  _check_arguments(graph, gamma, weighting, expected_from)

  def init(params: Any) -> RegularizationState:
    del params
    return first_state(graph)

  def update(
    updates: Any, state: RegularizationState, params: Any = None, *, masks: Masks | None = None, **extra: Any
  ) -> tuple[Any, RegularizationState]:
    masks, new_state = _begin(state, masks, extra, expected_from, "regularize_by_penalty")
    if params is None:
      raise InputError("regularize_by_penalty needs the parameters: tx.update(grads, state, params).")
    present = _present(graph, params)

    def penalty(params: Any) -> jax.Array:
      return gamma * partial_group_lasso(params, present, masks, weighting=weighting)

    def add(update: Any, slope: Any) -> Any:
      # As in optax: a parameter may have no gradient, and one of integers has none of its own.
      return update if update is None or slope.dtype == jax.dtypes.float0 else update + slope

    check_params(params, present)
    gradient = jax.grad(penalty, allow_int=True)(params)
    with _one_tree():
      return jax.tree.map(add, updates, gradient, is_leaf=lambda update: update is None), new_state

  return optax.GradientTransformationExtraArgs(init, update)


def regularize_by_prox(
  graph: ChannelGraph,
  learning_rate: float | Callable[[Any], Any],
  gamma: float | jax.Array,
  *,
  momentum: float = 0.0,
  weighting: Weighting = relative_weights,
  expected_from: int | None = 0,
) -> optax.GradientTransformationExtraArgs:
  """Regularizes by the proximal operator: applies `prox_partial_group_lasso` after the optimizer's own step.

  Put it last in a chain, and the masks into the state by `set_masks`; until then all channels are kept, and it does
  nothing. The threshold follows the effective learning rate, `learning_rate / (1 - momentum)`: in
  `regularize_by_penalty`, the other form, the gradient goes through the momentum buffer, and gamma shall mean the same
  in both. After an optimizer whose momentum is a mean of gradients, such as Adam, leave `momentum` at 0.

  Args:
    graph: The channel graph of the network.
    learning_rate: The optimizer's learning rate: a number or a schedule of the step.
    gamma: Strength of the regularization.
    momentum: The optimizer's momentum.
    weighting: The weight of each group, see `partial_group_lasso`.
    expected_from: As in `regularize_by_penalty`.

  Returns:
    A transform whose `update(updates, state, params)` returns the updates that lead to the shrunk weights. An argument
    `masks=` of `update` goes before the masks in the state.

  Raises:
    InputError: If gamma is negative or not a number, or momentum is not in [0, 1).

  Example:
    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(2, use_bias=False), nn.relu, nn.Dense(1, use_bias=False)])
    >>> params = {"layers_0": {"kernel": jnp.ones((1, 2))}, "layers_2": {"kernel": jnp.ones((2, 1))}}
    >>> graph = sapr.trace_channels(model, {"params": params}, (1, 1), select="unjoined")
    >>> tx = optax.chain(optax.sgd(1.0), sapr.regularize_by_prox(graph, 1.0, gamma=0.25))
    >>> opt_state = sapr.set_masks(tx.init(params), {"layers_0": jnp.array([1.0, 0.0])})
    >>> updates, opt_state = tx.update(optax.tree.zeros_like(params), opt_state, params)
    >>> optax.apply_updates(params, updates)["layers_0"]["kernel"]
    Array([[1.  , 0.75]], dtype=float32)
  """
  _check_arguments(graph, gamma, weighting, expected_from)
  must, cure = "in [0, 1)", "give the momentum of the optimizer before it"
  check_number("momentum", momentum, must, lambda x: 0 <= x < 1, cure=cure, may_be_traced=True)
  if not callable(learning_rate):
    must = "a number of at least 0, or a schedule"
    check_number("learning_rate", learning_rate, must, lambda x: x >= 0, may_be_traced=True)

  def init(params: Any) -> RegularizationState:
    del params
    return first_state(graph)

  def update(
    updates: Any, state: RegularizationState, params: Any = None, *, masks: Masks | None = None, **extra: Any
  ) -> tuple[Any, RegularizationState]:
    masks, new_state = _begin(state, masks, extra, expected_from, "regularize_by_prox")
    if params is None:
      raise InputError("regularize_by_prox needs the parameters: tx.update(updates, state, params).")
    present = _present(graph, params)
    rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
    with _one_tree():
      given = jax.tree.map(
        lambda u, p: jnp.zeros_like(p) if _is_missing(u) else u, updates, params, is_leaf=_is_missing
      )
      moved = optax.apply_updates(params, given)
    step_size = rate / (1.0 - momentum) * gamma
    shrunk = prox_partial_group_lasso(moved, present, masks, step_size, weighting=weighting)

    # Whatever the operator left alone keeps its update bit for bit.
    def update_of(u: Any, p: jax.Array, m: jax.Array, s: jax.Array) -> Any:
      return u if _is_missing(u) else jnp.where(s == m, u, s - p)

    return jax.tree.map(update_of, updates, params, moved, shrunk, is_leaf=_is_missing), new_state

  return optax.GradientTransformationExtraArgs(init, update)


def _begin(
  state: RegularizationState, masks: Masks | None, extra: Any, expected_from: int | None, transform: str
) -> tuple[Masks, RegularizationState]:
  """Returns the masks of an update, and the state after it."""
  check_type("state", state, RegularizationState, "tx.init(params) makes it")
  check_extra_arguments(extra)
  if masks is None:
    masks = state.masks
    warn_if_idle(state, expected_from, transform)
  return masks, state._replace(step=optax.safe_increment(state.step))


def _present(graph: ChannelGraph, params: Any) -> ChannelGraph:
  """Returns the graph of those members whose parameters `optax.masked` left in `params`; all groups stay."""
  check_tree("params", params)
  places = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked)
  away = [path_of(place) for place, leaf in places if _is_masked(leaf)]
  if not away:
    return graph

  def here(path: tuple[str, ...]) -> bool:
    return not any(path[: len(start)] == start for start in away)

  groups = [
    dataclasses.replace(group, members=tuple(member for member in group.members if here(member.path)))
    for group in graph.groups
  ]
  if not any(is_kernel(member) for group in groups for member in group.members):
    raise InputError(
      "params must have a kernel of at least one channel group, got none: optax.masked or multi_transform keeps all of"
      " them from the regularization; let it have the kernels."
    )
  return dataclasses.replace(graph, groups=tuple(groups))


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def _is_missing(update: Any) -> bool:
  """Returns whether a parameter has no update: it is frozen, or holds integers."""
  return update is None or getattr(update, "dtype", None) == jax.dtypes.float0


@contextlib.contextmanager
def _one_tree() -> Iterator[None]:
  """Turns what two trees that do not fit raise within the block into an `InputError`."""
  try:
    yield
  except (AttributeError, TypeError, ValueError) as error:
    raise InputError(f"updates must be a tree like params, got another ({one_line(error, 200)}).") from error


def _check_arguments(
  graph: ChannelGraph, gamma: float | jax.Array, weighting: Weighting, expected_from: int | None
) -> None:
  check_graph(graph)
  check_number("gamma", gamma, "at least 0", lambda x: x >= 0, may_be_traced=True)
  check_weighting(weighting)
  if expected_from is not None:
    must = "an integer of at least 0, or None"
    check_number("expected_from", expected_from, must, lambda x: x >= 0 and x == int(x), may_be_traced=True)
