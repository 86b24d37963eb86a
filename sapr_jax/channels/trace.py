"""From a Flax module to its `ChannelGraph`: traces the evaluation-mode `apply` and walks the jaxpr."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Imported for the rules they register.
from sapr_jax.channels import layers, primitives  # noqa: F401
from sapr_jax.channels.atoms import Axis, find, fix
from sapr_jax.channels.graph import SELECTIONS, ChannelGraph, ChannelPolynomial, Selection, polynomial
from sapr_jax.channels.groups import (
  Axes,
  judge,
  macs_terms,
  no_group_message,
  product_terms,
  reasons_left_out,
  size_terms,
)
from sapr_jax.channels.program import ProgramError, abstract, compare_programs, trace_program
from sapr_jax.channels.rules import ParamKey, Place, Value, Walk, fixed_axes
from sapr_jax.channels.surgery import narrow, path_of, prune_tree
from sapr_jax.errors import InputError


def trace_channels(
  model: nn.Module,
  variables: Mapping[str, Any],
  input_shape: Sequence[int],
  *,
  select: Selection = "blocks",
  apply_kwargs: Mapping[str, Any] | None = None,
  input_dtype: Any = jnp.float32,
) -> ChannelGraph:
  """Finds the channels of `model` that can be cut together without changing what is computed from the others.

  `model.apply(variables, x, **apply_kwargs)` is traced abstractly (nothing is computed, and `variables` may be
  `jax.ShapeDtypeStruct`s). What the walk over the jaxpr does not understand it fixes: the graph is never wrong, at
  worst less prunable, and `ChannelGraph.explain` says why. What the model's own code does not follow when it is cut
  (a reshape to a number of channels that is written there) is fixed too; that is found by tracing a narrower model.

  Args:
    model: A Flax linen module that maps images to any pytree of arrays, in evaluation mode.
    variables: Its variables: `{"params": ..., "batch_stats": ...}`.
    input_shape: Shape of its input, `[batch, height, width, channels]`; the batch is traced as 1.
    select: Which of the groups that can be cut exactly are offered. "blocks" is the paper's choice: groups inside one
      sub-module and not joined by an addition of two different activations, so neither residual streams nor stem nor
      head. "unjoined" drops the first condition (a flat VGG needs that), "exact" both. Or a predicate over
      `ChannelGroup`.
    apply_kwargs: Further arguments of `apply` that choose the evaluation mode, such as `{"train": False}`.
    input_dtype: Dtype of the input.

  Returns:
    The graph of the groups offered.

  Raises:
    InputError: If `variables` or `input_shape` does not fit `model`, `select` is unknown, or it offers no group; the
      message says which choice would.

  References:
    Gao et al., ICCV 2023, supplement B: one mask a block, on the output of the upper and the input of the lower layer.
  """
  if isinstance(select, str) and select not in SELECTIONS:
    raise InputError(f"select={select!r} is unknown; expected one of {', '.join(SELECTIONS)}, or a predicate.")
  if not isinstance(select, str) and not callable(select):
    raise InputError(f"select={select!r} is unknown; expected one of {', '.join(SELECTIONS)}, or a predicate.")
  kwargs = dict(apply_kwargs or {})
  inputs, closed, features = _trace(model, variables, input_shape, kwargs, input_dtype)
  axes, walk = _walk(closed, variables, inputs)
  judgement = judge(walk.contractions, axes, features)

  def offer() -> ChannelGraph:
    chosen = SELECTIONS[select] if isinstance(select, str) else select
    offered = [(atom, group) for atom, group in judgement.groups if not atom.fixed and chosen(group)]
    order = {id(atom): k for k, (atom, _) in enumerate(offered)}
    if not offered:
      possible = [group for atom, group in judgement.groups if not atom.fixed]
      raise InputError(no_group_message(select, possible, axes, judgement.roles))
    return ChannelGraph(
      groups=tuple(group for _, group in offered),
      fixed=reasons_left_out(axes, judgement.roles, order, select),
      layers=judgement.layers,
      shapes={key: tuple(axis.size for axis in variable) for key, variable in axes.items()},
      costs=_costs(walk, axes, order),
      results=_results(walk, order),
      jaxpr=closed,
      inputs=inputs,
      apply_kwargs=kwargs,
    )

  graph = offer()
  atom_of = {group.name: atom for atom, group in judgement.groups}
  if refused := _refused(model, variables, graph):
    for name, reason in refused.items():
      fix(atom_of[name], f"the model's code does not follow when it is cut ({reason})")
    graph = offer()
  return graph


def count_macs(
  model: nn.Module,
  variables: Mapping[str, Any],
  input_shape: Sequence[int],
  *,
  apply_kwargs: Mapping[str, Any] | None = None,
  input_dtype: Any = jnp.float32,
) -> int:
  """Counts the multiply-accumulates of all convolutions and matrix products of `model` for one image.

  Unlike `trace_channels(...).macs()` it also works where nothing can be pruned. Arguments as there.
  """
  inputs, closed, _ = _trace(model, variables, input_shape, dict(apply_kwargs or {}), input_dtype)
  _, walk = _walk(closed, variables, inputs)
  return sum(coefficient for contraction in walk.contractions for coefficient, _ in macs_terms(contraction, {}))


def _trace(
  model: nn.Module,
  variables: Mapping[str, Any],
  input_shape: Sequence[int],
  apply_kwargs: Mapping[str, Any],
  input_dtype: Any,
) -> tuple[jax.ShapeDtypeStruct, Any, dict[tuple[str, ...], int]]:
  """Traces `model.apply`; returns the abstract input, the program and the fields `features` of the modules."""
  shape = tuple(input_shape)
  if len(shape) < 2 or not all(isinstance(size, int | np.integer) and size > 0 for size in shape):
    raise InputError(f"input_shape={input_shape!r} is no shape; expected positive sizes, such as (1, 32, 32, 3).")
  inputs = jax.ShapeDtypeStruct((1, *shape[1:]), input_dtype)
  try:
    return inputs, *trace_program(model, variables, inputs, apply_kwargs)
  except flax.errors.FlaxError as error:
    reason = " ".join(str(error).partition(" (https://")[0].split())
    raise InputError(
      f"The variables, the model and input_shape={shape} do not fit together: {reason} Expected the variables of this"
      " model, all collections, made for such inputs."
    ) from error


def _walk(closed: Any, variables: Mapping[str, Any], inputs: jax.ShapeDtypeStruct) -> tuple[Axes, Walk]:
  """Walks the program; returns the axes of all variables and what was found."""
  axes: dict[ParamKey, tuple[Axis, ...]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
    axes[path_of(path)] = tuple(map(Axis, jnp.shape(leaf)))
  operands = [Value(variable, zeroed_by=frozenset({key})) for key, variable in axes.items()]
  operands.append(Value(fixed_axes(inputs.shape, "it is the network's input"), producers=frozenset({0})))
  walk = Walk()
  for value in walk.walk_jaxpr(closed.jaxpr, operands):
    for axis in value.axes:
      fix(axis, "it is the network's output")
  return axes, walk


def _costs(walk: Walk, axes: Axes, order: Mapping[int, int]) -> dict[str, ChannelPolynomial]:
  """Returns the costs of `ChannelGraph.costs`."""
  macs = [macs_terms(contraction, order) for contraction in walk.contractions]
  touching = [terms for terms in macs if any(factors for _, factors in terms)]
  params = [product_terms(variable, order) for key, variable in axes.items() if key[0] == "params"]
  found = {"macs": macs, "prunable_macs": touching, "params": params}
  return {name: polynomial(list(itertools.chain(*terms)), len(order)) for name, terms in found.items()}


def _results(walk: Walk, order: Mapping[int, int]) -> dict[Place, list[list[int | ChannelPolynomial]]]:
  """Returns the shapes of results that depend on the masks (see `ChannelGraph.results`)."""
  sizes: dict[int, int | ChannelPolynomial] = {}

  def size(axis: Axis) -> int | ChannelPolynomial:
    axis = find(axis)
    if id(axis) not in sizes:
      terms = size_terms(axis, order)
      sizes[id(axis)] = polynomial(terms, len(order)) if any(factors for _, factors in terms) else axis.size
    return sizes[id(axis)]

  shapes = {place: [[size(axis) for axis in axes] for axes in results] for place, results in walk.results.items()}
  return {
    place: results
    for place, results in shapes.items()
    if any(isinstance(entry, ChannelPolynomial) for result in results for entry in result)
  }


def _refused(model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph) -> dict[str, str]:
  """Cuts one channel of each group, abstractly. Returns the groups that the model's code does not follow, and why."""
  shapes = abstract(variables)

  def failure(names: Sequence[str]) -> str | None:
    masks = graph.full_masks()
    for name in names:
      masks[name][-1] = 0
    try:
      compare_programs(narrow(model, graph, masks), prune_tree(shapes, graph, masks), graph, masks)
    except ProgramError as error:
      return str(error)
    return None

  names = [group.name for group in graph.groups]
  if failure(names) is None:
    return {}
  return {name: reason for name in names if (reason := failure([name]))}


__all__ = ["count_macs", "trace_channels"]
