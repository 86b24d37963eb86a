"""Masks in the optimizer state: where the regularization finds them, so that any training loop and checkpoint has them.

`regularize_by_penalty` and `regularize_by_prox` keep a `RegularizationState`. `set_masks` puts masks into it, however
deep other transforms of optax have nested it, and `get_masks` reads them.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels import ChannelGraph, Masks, is_nnx
from sapr_jax.checks import check_array, check_tree, shown
from sapr_jax.errors import InputError

Tree = TypeVar("Tree")

_LIKE_MASKS = 0.7
"""Similarity to "masks" from which on the name of an argument is taken for a slip: "mask", "Masks", "msks"."""


class RegularizationState(NamedTuple):
  """State of `regularize_by_penalty` and `regularize_by_prox`.

  Attributes:
    masks: Group name -> 0/1 float32 array `[group.size]`; all 1 until `set_masks` puts others there.
    step: Number of steps taken, int32 scalar.
  """

  masks: Masks
  step: jax.Array


def first_state(graph: ChannelGraph) -> RegularizationState:
  """Returns the state in which every channel is kept; no two arrays of it share memory, as a step may donate it."""
  masks = {group.name: jnp.ones(group.size, jnp.float32) for group in graph.groups}
  return RegularizationState(masks, jnp.zeros((), jnp.int32))


def set_masks(opt_state: Tree, masks: Masks) -> Tree:
  """Puts masks into the optimizer state: what is regularized from now on.

  A step compiled by `jax.jit` is not compiled again, as shapes, dtypes and placement on the devices stay. Works on
  concrete arrays and under `jax.jit`.

  Args:
    opt_state: State of an optimizer with `regularize_by_penalty` or `regularize_by_prox` in it, or any tree that holds
      one, such as a `TrainState` of Flax. Arrays in it may have leading axes, as those that `jax.pmap` takes.
    masks: Group name -> 0/1 array `[group.size]`; 1 keeps the channel.

  Returns:
    A new tree with `masks` in every such state.

  Raises:
    InputError: If there is no such state in `opt_state`; or if `masks` misses a group, names an unknown one, or has an
      entry that is not `[group.size]` or (unless it is traced) holds other values than 0 and 1.

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
  if not isinstance(masks, Mapping):
    raise InputError(f"masks must map the names of the groups to arrays, got {shown(masks)}.")

  def put(state: RegularizationState) -> RegularizationState:
    _check_fit(state.masks, masks)
    return state._replace(masks={name: placed_like(old, masks[name]) for name, old in state.masks.items()})

  return replace_states(opt_state, RegularizationState, put, _CURE)


def get_masks(opt_state: Any) -> dict[str, Any]:
  """Returns the masks in force, those of the first regularization in an optimizer state; arguments as in `set_masks`.

  Raises:
    InputError: If there is no regularization in `opt_state`.
  """
  masks = find_states(opt_state, RegularizationState, _CURE)[0].masks
  return {name: array_in(mask) for name, mask in masks.items()}


_CURE = "put sapr_jax.regularize_by_penalty or regularize_by_prox into the optimizer, and give what its init returned"


def find_states(tree: Any, kind: type[Any], cure: str) -> list[Any]:
  """Returns all nodes of a tree that are a `kind`; raises `InputError` with the cure if there is none."""
  check_tree("opt_state", tree)
  nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
  found = [node for node in nodes if isinstance(node, kind)]
  if not found:
    raise InputError(f"opt_state must hold a {kind.__name__}, got none in {shown(type(tree))}; {cure}.")
  return found


def replace_states(tree: Tree, kind: type[Any], change: Callable[[Any], Any], cure: str) -> Tree:
  """Returns a tree in which `change` replaced each node that is a `kind`; raises `InputError` if there is none.

  An object of NNX, as `nnx.Optimizer` is, is changed in place, and returned.
  """
  find_states(tree, kind, cure)

  def visit(node: Any) -> Any:
    return change(node) if isinstance(node, kind) else node

  changed = jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, kind))
  if not is_nnx(tree):
    return changed
  from flax import nnx  # takes a while to import

  nnx.update(tree, nnx.state(changed))
  return tree


def array_in(box: Any) -> Any:
  """Returns an array, which may be boxed as in the optimizer state of NNX."""
  return jax.tree.leaves(box)[0]


def placed_like(old: Any, new: Any) -> Any:
  """Returns `new` with the dtype, leading axes, place and box of `old`, so that no program is compiled again."""
  return jax.tree.map(lambda array: _placed_like(array, new), old)


def _placed_like(old: Any, new: Any) -> Any:
  if any(isinstance(array, jax.core.Tracer) for array in (old, new)):
    return jnp.broadcast_to(jnp.asarray(new).astype(old.dtype), old.shape)
  value = np.broadcast_to(np.asarray(new, old.dtype), old.shape)
  if not isinstance(old, jax.Array):
    return value.copy()
  if not old.committed:  # to put it on a device by name would commit it, which is another program
    return jnp.array(value)
  return jax.make_array_from_callback(old.shape, old.sharding, lambda index: value[index])


def _check_fit(old: Masks, new: Masks) -> None:
  """Raises `InputError` unless the new masks have the names and the sizes of those in the state, and are 0 or 1."""
  if missing := sorted(set(old) - set(new)):
    raise InputError(f"masks misses the group {missing[0]!r}; it must name all {len(old)} of graph.groups.")
  if extra := sorted(map(str, set(new) - set(old))):
    raise InputError(f"masks names an unknown group {extra[0]!r}; it must name those of graph.groups.")
  for name, mask in new.items():
    size = np.shape(old[name])[-1]
    check_array(f"The mask of group {name!r}", mask, (size,))
    if not isinstance(mask, jax.core.Tracer) and not np.isin(np.asarray(mask), (0, 1)).all():
      raise InputError(f"The mask of group {name!r} must hold only 0 (drop) and 1 (keep).")


def check_extra_arguments(names: Any) -> None:
  """Raises `InputError` if an extra argument of `update`, which may be another transform's, is a misspelt `masks`."""
  for name in names:
    if difflib.get_close_matches(name.lower(), ["masks"], cutoff=_LIKE_MASKS):
      raise InputError(f"update must be given masks by the name masks=, got {name}=; rename it.")


def warn_if_idle(state: RegularizationState, expected_from: int | None, transform: str) -> None:
  """Warns if the state keeps all channels at the step from which on masks are expected."""
  if expected_from is None:
    return
  # optax.inject_hyperparams makes an array of the number.
  is_time = state.step == jnp.asarray(expected_from).astype(state.step.dtype)
  if not isinstance(is_time, jax.core.Tracer) and not is_time:
    return
  keeps_all = jnp.all(jnp.stack([jnp.all(jnp.asarray(mask) > 0) for mask in state.masks.values()]))
  warn_if(
    is_time & keeps_all,
    f"{transform} keeps all channels at the step from which on it should not ({shown(expected_from)}), so it"
    " regularizes nothing: call opt_state = sapr_jax.set_masks(opt_state, masks), or give the step at which masks come"
    " as expected_from=STEP (None: no warning).",
  )


def warn_if(condition: jax.Array, message: str) -> None:
  """Logs a warning if a condition holds; under `jax.jit` by a call of the host from the compiled program."""
  # Not by `warnings`: raised in a callback, as a filter may ask for, it would end the program.
  warn = functools.partial(_warn, message=message)
  if not isinstance(condition, jax.core.Tracer):
    warn(condition)
    return
  # The condition goes along, as jax.vmap would take both branches.
  jax.lax.cond(condition, lambda: jax.debug.callback(warn, condition), lambda: None)


def _warn(condition: Any, *, message: str) -> None:
  if np.any(condition):
    logging.getLogger("sapr_jax").warning(message)
