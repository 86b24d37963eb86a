"""Offers channel groups and cuts them, with any front end. Each cut is proved on the traced program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sapr_jax.channels.analysis import Analysis, analyze, costs, reasons_left_out, shapes_after_cut
from sapr_jax.channels.atoms import Axis, atoms
from sapr_jax.channels.call import Call
from sapr_jax.channels.graph import SELECTIONS, ChannelGraph, ChannelGroup, Masks, Selection, check_graph
from sapr_jax.channels.narrow_program import Cut
from sapr_jax.channels.program import FrontEnd, Program, ProgramError, difference
from sapr_jax.channels.selection import Patterns, choice, selected
from sapr_jax.channels.trees import abstract, check_variables, path_of, prune_tree
from sapr_jax.checks import check_concrete
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


def find_graph(dense: Dense, select: Selection, include: Patterns = (), exclude: Patterns = ()) -> ChannelGraph:
  """Returns the graph of the groups that `selected` chooses."""
  possible = [group for atom, group in dense.analysis.groups if not atom.fixed]
  offered = selected(possible, select, include, exclude)
  if not offered:
    raise InputError(_no_group_message(dense.analysis, select, include, exclude, possible))
  chosen_atoms = [dense.groups[group.name][0] for group in offered]
  left_out = f"it can be cut exactly, but {choice(select, include, exclude)} leaves it out"
  return ChannelGraph(
    groups=tuple(offered),
    fixed=reasons_left_out(dense.analysis, chosen_atoms, left_out),
    layers=dense.analysis.layers,
    shapes={key: tuple(axis.size for axis in variable) for key, variable in dense.analysis.axes.items()},
    costs=costs(dense.analysis, chosen_atoms),
    call=dense.call,
  )


def _no_group_message(
  analysis: Analysis, select: Selection, include: Patterns, exclude: Patterns, possible: Sequence[ChannelGroup]
) -> str:
  offers = {name: len(selected(possible, test, include, exclude)) for name, test in SELECTIONS.items()}
  would = [f"{name!r} would offer {n}" for name, n in offers.items() if n]
  names_by_reason: dict[str, list[str]] = {}
  for key, _, reason in reasons_left_out(analysis, (), ""):
    if reason:
      names = names_by_reason.setdefault(reason, [])
      names.extend({"/".join(key[1:-1])} - set(names))
  why = "; ".join(
    f"{', '.join(n[:3])}{' ...' if len(n) > 3 else ''}: {reason}" for reason, n in names_by_reason.items()
  )
  advice = f"select={', '.join(would)}" if would else "no other choice would find one either"
  made = choice(select, include, exclude)
  return f"{made} finds no channel group to prune; {advice}." + (f" Fixed: {why}." if why else "")


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
  check_fit(variables, graph)
  small_variables = prune_tree(dict(variables), graph, masks)
  dense = Dense(front_end, model, variables, graph.call)
  _check_same_groups(dense, graph)
  small = _narrowed(dense, graph, masks)
  if small is None:
    small = front_end.program(model, _cuts(dense, graph, masks))
  return small, small_variables


def check_fit(variables: Mapping[str, Any], graph: ChannelGraph) -> None:
  """Raises `InputError` unless the variables have the shapes that the graph was traced with."""
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


def _narrowed(dense: Dense, graph: ChannelGraph, masks: Masks) -> Any:
  """Returns the model with narrower layers; None unless it certainly computes what the masked network does."""
  small = dense.front_end.narrow(dense.model, graph, masks)
  if small is None:
    return None
  try:
    program = dense.front_end.trace(small, prune_tree(abstract(dict(dense.variables)), graph, masks), dense.call)
  except Exception:  # the model's own code may fail in any way
    return None
  shapes = shapes_after_cut(dense.analysis, _kept(dense, graph, masks))
  try:
    is_same = difference(dense.program.closed, program.closed, shapes) is None
  except ProgramError:
    return None
  return small if is_same else None


def _kept(dense: Dense, graph: ChannelGraph, masks: Masks) -> list[tuple[Axis, int]]:
  return [(dense.groups[group.name][0], int(n)) for group, n in zip(graph.groups, graph.kept(masks), strict=True)]


def _cuts(dense: Dense, graph: ChannelGraph, masks: Masks) -> tuple[Cut, ...]:
  """Returns which axes of which variables are cut, and what they are made of."""
  kept = {id(atom): n for atom, n in _kept(dense, graph, masks)}
  cuts = []
  for key, variable in dense.analysis.axes.items():
    for i, axis in enumerate(variable):
      parts = tuple((atom.size, kept.get(id(atom), atom.size)) for atom in atoms(axis))
      if any(n < size for size, n in parts):
        cuts.append(("/".join(key), i, axis.size, parts))
  return tuple(cuts)
