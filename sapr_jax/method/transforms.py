"""The partial group lasso as an optax transform, in two forms of one thing: by its penalty and by its prox.

`regularize_by_penalty` stands before the optimizer and adds a gradient; `regularize_by_prox` stands after it and
shrinks weights. gamma means the same in both. docs/method.md compares them.

References:
  Gao et al., ICCV 2023, supplement B, Eq. 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sapr_jax.channels import ChannelGraph, Masks, check_graph, check_params
from sapr_jax.checks import check_number, check_type
from sapr_jax.errors import InputError, one_line
from sapr_jax.method.regularization import (
  Weighting,
  check_weighting,
  partial_group_lasso,
  prox_partial_group_lasso,
  relative_weights,
)


def regularize_by_penalty(
  graph: ChannelGraph, gamma: float | jax.Array, *, weighting: Weighting = relative_weights
) -> optax.GradientTransformationExtraArgs:
  """Regularizes by the penalty: adds the gradient of `gamma * partial_group_lasso` to the gradients.

  As if the penalty were a term of the loss: put it first in a chain, as `optax.add_decayed_weights`, and pass the masks
  to `update`; without masks it does nothing. The weights of dropped channels end oscillating about zero, with an
  amplitude of about learning_rate / (1 - momentum) * gamma. An optimizer that rescales gradients, such as Adam,
  rescales this one too. `regularize_by_prox` is the other form: it keeps the meaning of gamma with such an optimizer
  and makes weights exactly zero, but a channel that later masks keep then has almost no gradient to come back with.

  Args:
    graph: The channel graph of the network.
    gamma: Strength of the regularization.
    weighting: The weight of each group, see `partial_group_lasso`.

  Returns:
    A transform whose `update(grads, state, params, masks=masks)` returns the gradients of loss and penalty; `params` is
    the whole tree that the graph was traced with.

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
    >>> grads, masks = optax.tree.zeros_like(params), {"layers_0": jnp.array([1.0, 0.0])}
    >>> updates, opt_state = tx.update(grads, tx.init(params), params, masks=masks)
    >>> optax.apply_updates(params, updates)["layers_0"]["kernel"]
    Array([[1.  , 0.75]], dtype=float32)
  """
  _check_arguments(graph, gamma, weighting)

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
      raise InputError("regularize_by_penalty needs the parameters: tx.update(grads, state, params, masks=masks).")

    def penalty(params: Any) -> jax.Array:
      return gamma * partial_group_lasso(params, graph, masks, weighting=weighting)

    def add(update: Any, slope: Any) -> Any:
      # As in optax: a parameter may have no gradient, and one of integers has none of its own.
      return update if update is None or slope.dtype == jax.dtypes.float0 else update + slope

    check_params(params, graph)
    gradient = jax.grad(penalty, allow_int=True)(params)
    with _one_tree():
      return jax.tree.map(add, updates, gradient, is_leaf=lambda update: update is None), state

  return optax.GradientTransformationExtraArgs(init, update)


class RegularizeByProxState(NamedTuple):
  """State of `regularize_by_prox`.

  Attributes:
    step: Number of steps taken, int32 scalar.
  """

  step: jax.Array


def regularize_by_prox(
  graph: ChannelGraph,
  learning_rate: float | Callable[[Any], Any],
  gamma: float | jax.Array,
  *,
  momentum: float = 0.0,
  weighting: Weighting = relative_weights,
) -> optax.GradientTransformationExtraArgs:
  """Regularizes by the proximal operator: applies `prox_partial_group_lasso` after the optimizer's own step.

  Put it last in a chain and pass the masks to `update`; without masks it does nothing. The threshold follows the
  effective learning rate, `learning_rate / (1 - momentum)`: in `regularize_by_penalty`, the other form, the gradient
  goes through the momentum buffer, and gamma shall mean the same in both. After an optimizer whose momentum is a mean
  of gradients, such as Adam, leave `momentum` at 0.

  Args:
    graph: The channel graph of the network.
    learning_rate: The optimizer's learning rate: a number or a schedule of the step.
    gamma: Strength of the regularization.
    momentum: The optimizer's momentum.
    weighting: The weight of each group, see `partial_group_lasso`.

  Returns:
    A transform whose `update(updates, state, params, masks=masks)` returns the updates that lead to the shrunk weights.

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
    >>> grads, masks = optax.tree.zeros_like(params), {"layers_0": jnp.array([1.0, 0.0])}
    >>> updates, opt_state = tx.update(grads, tx.init(params), params, masks=masks)
    >>> optax.apply_updates(params, updates)["layers_0"]["kernel"]
    Array([[1.  , 0.75]], dtype=float32)
  """
  _check_arguments(graph, gamma, weighting)
  must, cure = "in [0, 1)", "give the momentum of the optimizer before it"
  check_number("momentum", momentum, must, lambda x: 0 <= x < 1, cure=cure, may_be_traced=True)
  if not callable(learning_rate):
    must = "a number of at least 0, or a schedule"
    check_number("learning_rate", learning_rate, must, lambda x: x >= 0, may_be_traced=True)

  def init(params: Any) -> RegularizeByProxState:
    del params
    return RegularizeByProxState(jnp.zeros((), jnp.int32))

  def update(
    updates: Any, state: RegularizeByProxState, params: Any = None, *, masks: Masks | None = None, **extra: Any
  ) -> tuple[Any, RegularizeByProxState]:
    del extra
    check_type("state", state, RegularizeByProxState, "tx.init(params) makes it")
    new_state = RegularizeByProxState(optax.safe_increment(state.step))
    if masks is None:
      return updates, new_state
    if params is None:
      raise InputError("regularize_by_prox needs the parameters: tx.update(updates, state, params, masks=masks).")
    rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
    with _one_tree():
      given = jax.tree.map(
        lambda u, p: jnp.zeros_like(p) if _is_missing(u) else u, updates, params, is_leaf=_is_missing
      )
      moved = optax.apply_updates(params, given)
    step_size = rate / (1.0 - momentum) * gamma
    shrunk = prox_partial_group_lasso(moved, graph, masks, step_size, weighting=weighting)

    # Whatever the operator left alone keeps its update bit for bit.
    def update_of(u: Any, p: jax.Array, m: jax.Array, s: jax.Array) -> Any:
      return u if _is_missing(u) else jnp.where(s == m, u, s - p)

    return jax.tree.map(update_of, updates, params, moved, shrunk, is_leaf=_is_missing), new_state

  return optax.GradientTransformationExtraArgs(init, update)


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


def _check_arguments(graph: ChannelGraph, gamma: float | jax.Array, weighting: Weighting) -> None:
  check_graph(graph)
  check_number("gamma", gamma, "at least 0", lambda x: x >= 0, may_be_traced=True)
  check_weighting(weighting)
