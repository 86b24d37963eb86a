"""Finds the channel groups of a traced network: its layers, what can be cut, what stays and why."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Imported for the rules that they register.
import sapr_jax.channels.contractions
import sapr_jax.channels.primitives  # noqa: F401
from sapr_jax.channels.atoms import Axis, atoms, channel_index, find, fix, fix_repeated_factors, sizes_after_cut
from sapr_jax.channels.call import Call
from sapr_jax.channels.graph import ChannelGroup, ChannelPolynomial, Layer, Member, Role, polynomial
from sapr_jax.channels.program import Program
from sapr_jax.channels.rules import AxisInterpreter, Contraction, ParamKey, Place, Value, fixed_axes
from sapr_jax.channels.trees import path_of
from sapr_jax.errors import InputError

Axes = Mapping[ParamKey, tuple[Axis, ...]]
Roles = Mapping[tuple[ParamKey, int], Role]


@dataclasses.dataclass(frozen=True)
class Analysis:
  """The channels of a network.

  Attributes:
    axes: Variable -> its axes.
    results: Place of an equation -> the axes of each of its results.
    contractions: Convolutions and matrix products, in forward order.
    roles: Axis of a kernel -> whether it is summed over ("in") or makes output channels ("out").
    layers: Module path -> layer that can be narrowed.
    groups: (atom, group) for all atoms that can be cut, in forward order.
  """

  axes: Axes
  results: Mapping[Place, Sequence[tuple[Axis, ...]]]
  contractions: Sequence[Contraction]
  roles: Roles
  layers: Mapping[tuple[str, ...], Layer]
  groups: Sequence[tuple[Axis, ChannelGroup]]


def interpret(program: Program, variables: Mapping[str, Any], call: Call) -> tuple[Axes, AxisInterpreter]:
  """Returns the axes of all variables, and the interpreter after it ran the program."""
  axes: dict[ParamKey, tuple[Axis, ...]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
    if path_of(path) in axes:
      raise InputError(f"variables must be nested dictionaries of arrays, got several in {'/'.join(path_of(path))}.")
    axes[path_of(path)] = tuple(map(Axis, jnp.shape(leaf)))
  operands = [Value(variable, zeroed_by=frozenset({key})) for key, variable in axes.items()]
  for array in call.arrays:
    operands.append(Value(fixed_axes(array.shape, "it is the network's input"), producers=frozenset({0})))
  interpreter = AxisInterpreter()
  for value in interpreter.run(program.closed.jaxpr, operands):
    for axis in value.axes:
      fix(axis, "it is the network's output")
  return axes, interpreter


def analyze(program: Program, variables: Mapping[str, Any], call: Call) -> Analysis:
  """Fixes what cannot be cut exactly, and gathers the rest in groups."""
  axes, interpreter = interpret(program, variables, call)
  found = interpreter.contractions
  fix_unmaskable(found, axes)
  roles = _roles(found, axes)
  layers = _layers(found, axes, roles, program.features)
  _fix_unprunable(axes, roles)
  return Analysis(axes, interpreter.results, found, roles, layers, _groups(found, axes, roles))


def fix_unmaskable(contractions: Sequence[Contraction], axes: Axes) -> None:
  """Fixes what is summed over without a stored kernel that can be masked there (attention's query and key)."""
  for contraction in contractions:
    for axis, _ in contraction.reduced:
      for atom in atoms(axis):
        if not any(key[0] == "params" and _has_atom(axes[key], atom) for key in contraction.kernel):
          fix(atom, "it is summed over with something else than a stored kernel, so that a mask would not be exact")


def _has_atom(axes: Sequence[Axis], atom: Axis) -> bool:
  return any(atom is other for axis in axes for other in atoms(axis))


def _roles(contractions: Sequence[Contraction], axes: Axes) -> Roles:
  """Returns the role of each axis of a kernel.

  Where a kernel is computed from several variables (`gain * kernel`), the parameter with most axes has the role.
  """
  roles: dict[tuple[ParamKey, int], Role] = {}
  for contraction in contractions:
    used: list[tuple[Role, Axis]] = [("in", kernel) for _, kernel in contraction.reduced]
    for role, axis in used + [("out", axis) for axis in contraction.free]:
      holders = {key: found for key in contraction.kernel if (found := _positions(axes[key], axis))}
      if not holders:
        continue
      main = max(holders, key=lambda key: (key[0] == "params", len(axes[key]), key))
      if role == "in":
        for atom in atoms(axis):
          if not _has_atom(axes[main], atom):
            fix(atom, "its kernel is computed from several variables, of which one alone would be masked")
      for i in holders[main]:
        if roles.setdefault((main, i), role) != role:
          fix(axes[main][i], "a kernel has it as input channels and, used a second time, as output channels")
  return roles


def _positions(candidates: Sequence[Axis], axis: Axis) -> list[int]:
  """Returns which of a variable's axes `axis` is; by identity if it was only cast or transposed on the way."""
  same = [i for i, candidate in enumerate(candidates) if candidate is axis]
  if same:
    return same
  found = {id(atom) for atom in atoms(axis)}
  return [i for i, candidate in enumerate(candidates) if found & {id(atom) for atom in atoms(candidate)}]


def _layers(
  contractions: Sequence[Contraction], axes: Axes, roles: Roles, features: Mapping[tuple[str, ...], int]
) -> dict[tuple[str, ...], Layer]:
  multipliers = {key: contraction.multiplier for contraction in contractions for key in contraction.kernel}
  layers: dict[tuple[str, ...], Layer] = {}
  for (key, i), role in roles.items():
    if role == "out" and key[0] == "params" and features.get(key[1:-1]) == axes[key][i].size:
      layers.setdefault(key[1:-1], Layer(key[1:], i, multipliers[key]))
  return layers


def _fix_unprunable(axes: Axes, roles: Roles) -> None:
  """Fixes channels that are repeated in a product, or have no kernel at either end."""
  produced: set[int] = set()
  consumed: set[int] = set()
  for (key, i), role in roles.items():
    (produced if role == "out" else consumed).update(id(atom) for atom in atoms(axes[key][i]))
  for variable in axes.values():
    for axis in variable:
      fix_repeated_factors(axis)
      for atom in atoms(axis):
        if atom.size == 1:
          fix(atom, "it is a single channel")
        elif id(atom) not in produced:
          fix(atom, "no kernel has it as output channels")
        elif id(atom) not in consumed:
          fix(atom, "no kernel reads it as input channels")


def _groups(contractions: Sequence[Contraction], axes: Axes, roles: Roles) -> list[tuple[Axis, ChannelGroup]]:
  """Returns (atom, group) for all atoms that can be cut, in forward order."""
  uses: dict[int, list[tuple[ParamKey, int]]] = {}
  for key, variable in axes.items():
    for i, axis in enumerate(variable):
      for atom in {id(atom): atom for atom in atoms(axis)}.values():
        uses.setdefault(id(atom), []).append((key, i))
  shared = _common_prefix([key[1:-1] for key in axes])
  names: dict[str, int] = {}
  found: dict[int, tuple[Axis, ChannelGroup]] = {}
  for contraction in contractions:
    for axis in contraction.free:
      for atom in atoms(axis):
        if atom.fixed or id(atom) in found:
          continue
        used = uses.get(id(atom), [])
        producers = [key for key, i in used if key in contraction.kernel and roles.get((key, i)) == "out"]
        if not producers:  # here it only passes through, or no variable has it
          continue
        members = tuple(_member(axes, roles, key, i, atom) for key, i in used)
        name = "/".join(producers[0][1:-1]) or producers[0][-1]
        names[name] = names.get(name, 0) + 1
        scope = _common_prefix([member.path[:-1] for member in members])
        found[id(atom)] = (
          atom,
          ChannelGroup(
            name=name if names[name] == 1 else f"{name}:{names[name]}",
            size=atom.size,
            members=members,
            scope=scope,
            is_block=len(scope) > len(shared),
            joined=atom.joined,
          ),
        )
  return list(found.values())


def _member(axes: Axes, roles: Roles, key: ParamKey, i: int, atom: Axis) -> Member:
  channels = channel_index(axes[key][i], atom)
  return Member(key[0], key[1:], i, roles.get((key, i), "vector"), len(axes[key]), channels)


def _common_prefix(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
  same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
  return tuple(names[0] for names in same)


Terms = list[tuple[int, tuple[int, ...]]]
"""A polynomial: (coefficient, indices of groups) monomials."""


def costs(analysis: Analysis, offered: Sequence[Axis]) -> dict[str, ChannelPolynomial]:
  """Returns `ChannelGraph.costs`; `offered` are the atoms of the groups, in their order."""
  order = {id(atom): k for k, atom in enumerate(offered)}
  macs = [[(c.constant * n, f) for n, f in _product_terms(c.factors, order)] for c in analysis.contractions]
  prunable = [terms for terms in macs if any(factors for _, factors in terms)]
  params = [_product_terms(variable, order) for key, variable in analysis.axes.items() if key[0] == "params"]
  found = {"macs": macs, "prunable_macs": prunable, "params": params}
  return {name: polynomial(list(itertools.chain(*terms)), len(order)) for name, terms in found.items()}


def _product_terms(axes: Sequence[Axis], order: Mapping[int, int]) -> Terms:
  """Expands the product of the sizes of `axes`."""
  terms: Terms = [(1, ())]
  for axis in axes:
    terms = [(c * d, f + g) for c, f in terms for d, g in _size_terms(axis, order)]
  return terms


def _size_terms(axis: Axis, order: Mapping[int, int]) -> Terms:
  """Expands the size of an axis."""
  axis = find(axis)
  if axis.kind is None:
    return [(1, (order[id(axis)],))] if id(axis) in order else [(axis.size, ())]
  if axis.kind == "concatenation":
    return list(itertools.chain(*(_size_terms(part, order) for part in axis.parts)))
  return _product_terms(axis.parts, order)


def shapes_after_cut(analysis: Analysis, kept: Sequence[tuple[Axis, int]]) -> dict[Place, list[tuple[int, ...]]]:
  """Returns the shapes of the results where cutting changes one: place of an equation -> shapes of its results.

  `kept` gives the number of channels that each atom keeps.
  """
  size = sizes_after_cut(kept)
  found = {}
  for place, results in analysis.results.items():
    shapes = [tuple(map(size, axes)) for axes in results]
    if shapes != [tuple(axis.size for axis in axes) for axes in results]:
      found[place] = shapes
  return found


def reasons_left_out(
  analysis: Analysis, offered: Sequence[Axis], left_out_by_choice: str
) -> tuple[tuple[ParamKey, int, str], ...]:
  """Returns `ChannelGraph.fixed`; `offered` are the atoms of the groups."""
  chosen = {id(atom) for atom in offered}
  reasons = []
  for (key, i), role in analysis.roles.items():
    left_out = [atom for atom in atoms(analysis.axes[key][i]) if id(atom) not in chosen]
    if role == "out" and left_out:
      fixed = next((atom.fixed for atom in left_out if atom.fixed), None)
      reasons.append((key, i, fixed or left_out_by_choice))
  kernels = {key for key, _ in analysis.roles}
  for key, variable in analysis.axes.items():
    is_kept = key[0] == "params" and len(variable) > 1 and any(id(atom) not in chosen for atom in atoms(variable[-1]))
    if is_kept and key not in kernels:
      reasons.append((key, len(variable) - 1, "it is not a kernel that a mask could zero exactly"))
  return tuple(reasons)
