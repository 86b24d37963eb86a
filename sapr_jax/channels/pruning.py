"""Pruning a network, and checking that the small network computes what the masked one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels.graph import ChannelGraph, Masks
from sapr_jax.channels.masking import mask_params
from sapr_jax.channels.program import ProgramError, abstract, compare_programs
from sapr_jax.channels.surgery import narrow, path_of, prune_tree
from sapr_jax.errors import InputError


def prune(
  model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks
) -> tuple[nn.Module, dict[str, Any]]:
  """Cuts the dropped channels out of a network.

  The result computes what the masked network computes. This is checked: the small model must be the same program as the
  dense one but for its shapes, and these must be the ones that the graph predicts. Where it is another program (the
  model's code may compute a number from a width, as in `y * y.shape[-1] ** -0.5`), both are run on random inputs and
  must agree.

  Args:
    model: The dense network.
    variables: Its variables, all collections.
    graph: Its channel graph.
    masks: Group name -> 0/1 array `[group.size]`, concrete; 1 keeps.

  Returns:
    (`NarrowModule`, its variables). Nothing in the arguments is changed.

  Raises:
    InputError: If `variables` or `masks` does not fit `graph`, a mask drops a whole group, or the cut model would
      compute something else; the message names the variable or the group.
  """
  _check_variables(variables, graph)
  small_variables = prune_tree(dict(variables), graph, masks)
  small = narrow(model, graph, masks)
  if (reason := _wrong(model, variables, small, graph, masks)) is not None:
    culprit = _culprit(model, variables, graph, masks)
    raise InputError(
      f"Cutting group {culprit!r} changes what the model computes ({reason}): its code derives a number from that"
      f" width. Leave the group out by trace_channels(select=lambda group: group.name != {culprit!r} and ...)."
    )
  return small, small_variables


def _check_variables(variables: Mapping[str, Any], graph: ChannelGraph) -> None:
  found = {path_of(place): jnp.shape(leaf) for place, leaf in jax.tree_util.tree_leaves_with_path(dict(variables))}
  for key, shape in graph.shapes.items():
    if key not in found:
      raise InputError(f"variables lacks {'/'.join(key)}; expected all collections of the network that was traced.")
    if found[key] != shape:
      raise InputError(f"variables has {'/'.join(key)} of shape {found[key]}; the graph was traced with {shape}.")


def _wrong(
  model: nn.Module, variables: Mapping[str, Any], small: nn.Module, graph: ChannelGraph, masks: Masks
) -> str | None:
  """Says why the small network does not compute what the masked one does; None if it does."""
  try:
    difference = compare_programs(small, prune_tree(abstract(variables), graph, masks), graph, masks)
  except ProgramError as error:
    return str(error)
  if difference is None:
    return None
  # The variables as they are may hide a difference: a scale that is zero at first, units that are dead.
  for drawn in (variables, _draw_variables(variables)):
    inputs = _draw_inputs(graph)
    masked = {**drawn, "params": mask_params(drawn["params"], graph, masks)}
    want = model.apply(masked, inputs, **graph.apply_kwargs)
    got = small.apply(prune_tree(dict(drawn), graph, masks), inputs, **graph.apply_kwargs)
    if not all(map(_close, jax.tree.leaves(got), jax.tree.leaves(want))):
      return difference
  return None


def _draw_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Draws positive variables, kernels such that a layer keeps the size of its input: no unit is dead."""
  rng = np.random.default_rng(0)

  def draw(leaf: Any) -> Any:
    fan_in = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 1
    return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) / fan_in, leaf.dtype)

  return jax.tree.map(draw, dict(variables))


def _draw_inputs(graph: ChannelGraph) -> jax.Array:
  draws = np.random.default_rng(1).normal(size=(2, *graph.inputs.shape[1:]))
  return jnp.asarray(draws, graph.inputs.dtype)


def _close(a: Any, b: Any) -> bool:
  tolerance = 1e-3 * float(jnp.max(jnp.abs(b), initial=0))
  return np.shape(a) == np.shape(b) and bool(jnp.allclose(a, b, rtol=1e-3, atol=tolerance))


def _culprit(model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks) -> str:
  """Finds the first group whose cut alone changes the result."""
  pruned = [group.name for group in graph.groups if not np.asarray(masks[group.name]).all()]
  for name in pruned:
    alone = {**graph.full_masks(), name: masks[name]}
    if _wrong(model, variables, narrow(model, graph, alone), graph, alone) is not None:
      return name
  return pruned[0]


__all__ = ["prune"]
