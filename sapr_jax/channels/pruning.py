"""Offers channel groups and cuts them, with any front end. Each cut is proved on the traced program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels.analysis import Analysis, analyze, costs, reasons_left_out, shapes_after_cut
from sapr_jax.channels.atoms import Axis, fix
from sapr_jax.channels.call import Call
from sapr_jax.channels.graph import SELECTIONS, ChannelGraph, ChannelGroup, Masks, Selection, check_graph
from sapr_jax.channels.program import FrontEnd, Program, ProgramError, difference
from sapr_jax.channels.trees import abstract, check_variables, mask_params, path_of, prune_tree
from sapr_jax.checks import check_concrete, shown
from sapr_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Dense:
  """A dense network. Every cut is proved against its program, which is traced once."""

  front_end: FrontEnd
  model: Any
  variables: Mapping[str, Any]
  call: Call

  @functools.cached_property
  def program(self) -> Program:
    return self.front_end.trace(self.model, self.variables, self.call)

  @functools.cached_property
  def analysis(self) -> Analysis:
    return analyze(self.program, self.variables, self.call)

  @functools.cached_property
  def groups(self) -> dict[str, tuple[Axis, ChannelGroup]]:
    """Name of a group -> its atom and the group, for all that can be cut exactly."""
    return {group.name: (atom, group) for atom, group in self.analysis.groups}


def find_graph(dense: Dense, select: Selection) -> ChannelGraph:
  """Returns the graph of the groups that `select` chooses, without those that the model's code cannot lose."""
  graph = _offer(dense, select)
  refused = _refused(dense, graph)
  for name, reason in refused.items():
    fix(dense.groups[name][0], f"the model's code does not follow when it is cut ({reason})")
  return _offer(dense, select) if refused else graph


def _offer(dense: Dense, select: Selection) -> ChannelGraph:
  """Returns the graph of the groups that `select` chooses and that are not fixed by now."""
  chosen = SELECTIONS.get(select) if isinstance(select, str) else select
  if not callable(chosen):
    raise InputError(f"select must be one of {', '.join(SELECTIONS)}, or a predicate, got {shown(select)}.")
  possible = [(atom, group) for atom, group in dense.analysis.groups if not atom.fixed]
  offered = [(atom, group) for atom, group in possible if chosen(group)]
  if not offered:
    raise InputError(_no_group_message(dense.analysis, select, [group for _, group in possible]))
  atoms = [atom for atom, _ in offered]
  left_out = f"it can be cut exactly, but select={select!r} leaves it out"
  return ChannelGraph(
    groups=tuple(group for _, group in offered),
    fixed=reasons_left_out(dense.analysis, atoms, left_out),
    layers=dense.analysis.layers,
    shapes={key: tuple(axis.size for axis in variable) for key, variable in dense.analysis.axes.items()},
    costs=costs(dense.analysis, atoms),
    call=dense.call,
  )


def _no_group_message(analysis: Analysis, select: Selection, possible: Sequence[ChannelGroup]) -> str:
  would = [f"{name!r} would offer {n}" for name, test in SELECTIONS.items() if (n := sum(map(test, possible)))]
  names_by_reason: dict[str, list[str]] = {}
  for key, _, reason in reasons_left_out(analysis, (), ""):
    if reason:
      names = names_by_reason.setdefault(reason, [])
      names.extend({"/".join(key[1:-1])} - set(names))
  why = "; ".join(
    f"{', '.join(n[:3])}{' ...' if len(n) > 3 else ''}: {reason}" for reason, n in names_by_reason.items()
  )
  advice = f"select={', '.join(would)}" if would else "no other choice would find one either"
  return f"select={select!r} finds no channel group to prune; {advice}." + (f" Fixed: {why}." if why else "")


def _refused(dense: Dense, graph: ChannelGraph) -> dict[str, str]:
  """Cuts one channel of each group, abstractly. Returns the groups where the model's code fails, and why.

  Of K groups few fail, if any: they are found by halves, as each trace takes a while.
  """

  def failure(names: Sequence[str]) -> str | None:
    masks = graph.full_masks()
    for name in names:
      masks[name][-1] = 0
    try:
      _difference_after_cut(dense, graph, masks)
    except ProgramError as error:
      return str(error)
    return None

  def failing(names: Sequence[str]) -> dict[str, str]:
    reason = failure(names)
    if reason is None:
      return {}
    if len(names) == 1:
      return {names[0]: reason}
    half = len(names) // 2
    return failing(names[:half]) | failing(names[half:])

  return failing([group.name for group in graph.groups])


def cut(
  front_end: FrontEnd, model: Any, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks
) -> tuple[Any, dict[str, Any]]:
  """Returns the small model and its variables, and proves that they compute what the masked network does.

  Raises:
    InputError: If something does not fit `graph`, a mask drops a whole group, or the proof fails.
  """
  check_graph(graph)
  check_variables(variables)
  check_concrete("variables", dict(variables), "prune")
  _check_fit(variables, graph)
  small_variables = prune_tree(dict(variables), graph, masks)
  dense = Dense(front_end, model, variables, graph.call)
  _check_same_groups(dense, graph)
  if (reason := _wrong(dense, graph, masks)) is not None:
    culprit = _culprit(dense, graph, masks)
    raise InputError(
      f"Cutting group {culprit!r} changes what the model computes ({reason}): its code derives a number from that"
      f" width. Leave the group out by trace_channels(select=lambda group: group.name != {culprit!r} and ...)."
    )
  return front_end.narrow(model, graph, masks), small_variables


def _check_fit(variables: Mapping[str, Any], graph: ChannelGraph) -> None:
  found = {path_of(place): leaf.shape for place, leaf in jax.tree_util.tree_leaves_with_path(dict(variables))}
  for key, shape in graph.shapes.items():
    if key not in found:
      raise InputError(f"variables lacks {'/'.join(key)}; it must hold all collections of the traced network.")
    if found[key] != shape:
      raise InputError(f"variables: {'/'.join(key)} must have shape {shape} as it was traced, got {found[key]}.")


def _check_same_groups(dense: Dense, graph: ChannelGraph) -> None:
  """Checks that the model has each group of the graph."""
  for group in graph.groups:
    if group.name not in dense.groups or dense.groups[group.name][1].to_json() != group.to_json():
      raise InputError(
        f"graph must be of this model, which has no such group {group.name!r}; call trace_channels again."
      )


def _difference_after_cut(dense: Dense, graph: ChannelGraph, masks: Masks) -> str | None:
  """Traces the small model and compares it with the dense one (see `difference`)."""
  small = dense.front_end.narrow(dense.model, graph, masks)
  try:
    program = dense.front_end.trace(small, prune_tree(abstract(dict(dense.variables)), graph, masks), dense.call)
  except Exception as error:  # the model's own code may fail in any way
    cause = error.__cause__ or error
    reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    raise ProgramError(f"the small model does not run: {reason}") from error
  kept = [(dense.groups[group.name][0], int(n)) for group, n in zip(graph.groups, graph.kept(masks), strict=True)]
  return difference(dense.program.closed, program.closed, shapes_after_cut(dense.analysis, kept))


def _wrong(dense: Dense, graph: ChannelGraph, masks: Masks) -> str | None:
  """Returns why the small network does not compute what the masked one does; None if it does."""
  try:
    found = _difference_after_cut(dense, graph, masks)
  except ProgramError as error:
    return str(error)
  if found is None:
    return None
  small = dense.front_end.narrow(dense.model, graph, masks)
  # The variables as they are may hide a difference: a scale that is zero at first, units that are dead.
  for drawn in (dense.variables, _draw_variables(dense.variables)):
    args, kwargs = graph.call.filled(_draw_inputs(graph.call))
    masked = {**drawn, "params": mask_params(drawn["params"], graph, masks)}
    want = dense.front_end.apply(dense.model, masked, args, kwargs)
    got = dense.front_end.apply(small, prune_tree(dict(drawn), graph, masks), args, kwargs)
    if not all(map(_close, jax.tree.leaves(got), jax.tree.leaves(want))):
      return found
  return None


def _draw_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Draws positive variables, scaled so that a layer keeps the size of its input: no unit is dead."""
  rng = np.random.default_rng(0)

  def draw(leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    fan_in = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 1
    return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) / fan_in, leaf.dtype)

  return jax.tree.map(draw, dict(variables))


def _draw_inputs(call: Call) -> list[jax.Array]:
  """Draws the inputs; integers are 0 or 1, as they may be tokens of any vocabulary."""
  rng = np.random.default_rng(1)

  def draw(array: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
      return jnp.broadcast_to(jax.random.key(1), array.shape)
    is_real = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.asarray(rng.normal(size=array.shape) if is_real else rng.integers(2, size=array.shape), array.dtype)

  return list(map(draw, call.arrays))


def _close(a: Any, b: Any) -> bool:
  tolerance = 1e-3 * float(jnp.max(jnp.abs(b), initial=0))
  return np.shape(a) == np.shape(b) and bool(jnp.allclose(a, b, rtol=1e-3, atol=tolerance))


def _culprit(dense: Dense, graph: ChannelGraph, masks: Masks) -> str:
  """Returns the first group whose cut alone changes the result."""
  pruned = [group.name for group in graph.groups if not np.asarray(masks[group.name]).all()]
  for name in pruned:
    if _wrong(dense, graph, {**graph.full_masks(), name: masks[name]}) is not None:
      return name
  return pruned[0]
