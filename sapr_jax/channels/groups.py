"""What the walk over the program found, judged once all axes are known: layers, groups, what stays and why."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sapr_jax.channels.atoms import Axis, atoms, channel_index, find, fix, fix_repeated_factors
from sapr_jax.channels.graph import SELECTIONS, ChannelGroup, Layer, Member, Selection
from sapr_jax.channels.rules import Contraction, ParamKey

Axes = Mapping[ParamKey, tuple[Axis, ...]]
Roles = Mapping[tuple[ParamKey, int], str]


@dataclasses.dataclass(frozen=True)
class Judgement:
  """What can be cut in a network.

  Attributes:
    roles: Axis of a variable -> "in" or "out", for kernels.
    layers: Module path -> layer whose `features` can be narrowed.
    groups: (atom, group) for all atoms that can be cut, in forward order.
  """

  roles: Roles
  layers: Mapping[tuple[str, ...], Layer]
  groups: Sequence[tuple[Axis, ChannelGroup]]


def judge(contractions: Sequence[Contraction], axes: Axes, features: Mapping[tuple[str, ...], int]) -> Judgement:
  """Fixes what cannot be cut exactly, and gathers the rest in groups.

  Args:
    contractions: What the walk found.
    axes: The axes of all variables, as the walk left them.
    features: Module path -> its field `features`.
  """
  _fix_unmaskable(contractions, axes)
  roles = _roles(contractions, axes)
  layers = _layers(contractions, axes, roles, features)
  _fix_unprunable(axes, roles, layers)
  return Judgement(roles, layers, _groups(contractions, axes, roles))


def _fix_unmaskable(contractions: Sequence[Contraction], axes: Axes) -> None:
  """Fixes what is summed over without a stored kernel that can be masked there (attention's query and key)."""
  for contraction in contractions:
    for axis, _ in contraction.reduced:
      for atom in atoms(axis):
        if not any(key[0] == "params" and _has_atom(axes[key], atom) for key in contraction.kernel):
          fix(atom, "it is summed over with something else than a stored kernel, so that a mask would not be exact")


def _has_atom(axes: Sequence[Axis], atom: Axis) -> bool:
  return any(atom is other for axis in axes for other in atoms(axis))


def _roles(contractions: Sequence[Contraction], axes: Axes) -> Roles:
  """Tells for each axis of a kernel whether it is summed over ("in") or makes output channels ("out").

  Where a kernel is computed from several variables (`gain * kernel`), the parameter with most axes has the role.
  """
  roles: dict[tuple[ParamKey, int], str] = {}
  for contraction in contractions:
    for role, used in (("in", [kernel for _, kernel in contraction.reduced]), ("out", contraction.free)):
      for axis in used:
        holders = {key: found for key in contraction.kernel if (found := _positions(axes[key], axis))}
        if not holders:
          continue
        main = max(holders, key=lambda key: (key[0] == "params", len(axes[key]), key))
        for i in holders[main]:
          if roles.setdefault((main, i), role) != role:
            fix(axes[main][i], "a kernel has it as input channels and, used once more, as output channels")
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


def _fix_unprunable(axes: Axes, roles: Roles, layers: Mapping[tuple[str, ...], Layer]) -> None:
  """Fixes channels that are repeated in a product, have no kernel at either end, or whose layer cannot be narrowed."""
  produced: set[int] = set()
  consumed: set[int] = set()
  for (key, i), role in roles.items():
    (produced if role == "out" else consumed).update(id(atom) for atom in atoms(axes[key][i]))
  for key, variable in axes.items():
    for i, axis in enumerate(variable):
      fix_repeated_factors(axis)
      if roles.get((key, i)) == "out" and not _is_narrowed(axis, layers.get(key[1:-1]), axes):
        fix(axis, f"{'/'.join(key[1:-1]) or 'the model'} has no integer field `features` that sets it")
      for atom in atoms(axis):
        if atom.size == 1:
          fix(atom, "it is a single channel")
        elif id(atom) not in produced:
          fix(atom, "no kernel has it as output channels")
        elif id(atom) not in consumed:
          fix(atom, "no kernel reads it as input channels")


def _is_narrowed(axis: Axis, layer: Layer | None, axes: Axes) -> bool:
  return layer is not None and find(axes[("params", *layer.kernel)][layer.out_axis]) is find(axis)


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
        name = "/".join(producers[0][1:-1])
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
  role: Any = roles.get((key, i), "vector")
  return Member(collection=key[0], path=key[1:], axis=i, role=role, ndim=len(axes[key]), channels=channels)


def _common_prefix(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
  prefix = paths[0]
  for path in paths[1:]:
    length = next(
      (i for i, (a, b) in enumerate(zip(prefix, path, strict=False)) if a != b), min(len(prefix), len(path))
    )
    prefix = prefix[:length]
  return prefix


Terms = list[tuple[int, tuple[int, ...]]]
"""A polynomial: (coefficient, indices of groups) monomials."""


def macs_terms(contraction: Contraction, order: Mapping[int, int]) -> Terms:
  """Expands the MACs of a contraction. `order` is the index of the group of an atom, by the atom's id."""
  return [(contraction.constant * c, f) for c, f in product_terms(contraction.factors, order)]


def product_terms(axes: Sequence[Axis], order: Mapping[int, int]) -> Terms:
  """Expands the product of the sizes of `axes`."""
  terms: Terms = [(1, ())]
  for axis in axes:
    terms = [(c * d, f + g) for c, f in terms for d, g in size_terms(axis, order)]
  return terms


def size_terms(axis: Axis, order: Mapping[int, int]) -> Terms:
  """Expands the size of an axis."""
  axis = find(axis)
  if axis.kind is None:
    return [(1, (order[id(axis)],))] if id(axis) in order else [(axis.size, ())]
  if axis.kind == "concatenation":
    return list(itertools.chain(*(size_terms(part, order) for part in axis.parts)))
  return product_terms(axis.parts, order)


def reasons_left_out(
  axes: Axes, roles: Roles, order: Mapping[int, int], select: Selection | str
) -> tuple[tuple[ParamKey, int, str], ...]:
  """Returns why the output axes of kernels are not offered."""
  reasons = []
  for (key, i), role in roles.items():
    left_out = [atom for atom in atoms(axes[key][i]) if id(atom) not in order]
    if role == "out" and left_out:
      fixed = next((atom.fixed for atom in left_out if atom.fixed), None)
      reasons.append((key, i, fixed or f"it can be cut exactly, but select={select!r} leaves it out"))
  kernels = {key for key, _ in roles}
  for key, variable in axes.items():
    if key[0] == "params" and len(variable) > 1 and key not in kernels:
      reasons.append((key, len(variable) - 1, "it is no kernel that a mask could zero exactly"))
  return tuple(reasons)


def no_group_message(select: Selection | str, found: Sequence[ChannelGroup], axes: Axes, roles: Roles) -> str:
  would = [f"{name!r} would offer {n}" for name, test in SELECTIONS.items() if (n := sum(map(test, found)))]
  reasons: dict[str, list[str]] = {}
  for key, _, reason in reasons_left_out(axes, roles, {}, select):
    if not reason.startswith("it can be cut exactly"):
      names = reasons.setdefault(reason, [])
      names.extend({"/".join(key[1:-1])} - set(names))
  why = "; ".join(f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}: {r}" for r, names in reasons.items())
  advice = f"select={', '.join(would)}" if would else "no other choice would find one either"
  return f"select={select!r} finds no channel group to prune; {advice}." + (f" Fixed: {why}." if why else "")
