"""Identities of array axes: which axes of which arrays are the same set of channels.

Every axis of every traced value is an `Axis`. Two axes that must be cut together are made one by `unify`, a union-find.
An axis can also be found to be *made of* others, and then only its parts carry an identity:

  * a product, `(major, minor)`: the result of a reshape. Flattening `[H, W, C]` gives the product `H * W * C`, so a
    Dense layer after it knows which rows of its kernel belong to which channel.
  * a concatenation: the result of `jnp.concatenate`, so the consumer knows which slice came from where. Likewise, an
    axis that is sliced or split is the concatenation of the pieces, and a padded one of the padding and what it pads.

Axes without parts are the *atoms*. An axis that must keep its size is *fixed*, with a reason that a person can read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

Kind = Literal["product", "concatenation"]

_INDIVISIBLE = "it is reshaped or joined across the boundaries of channels"


@dataclasses.dataclass(eq=False)
class Axis:
  """An axis of a traced value. Compare axes by `find(a) is find(b)`.

  Attributes:
    size: Number of entries.
    fixed: Why the axis must keep its size, or None. Meaningful for atoms (see `atoms`).
    joined: Whether two different activations are added along it at each position, as on a residual stream. Likewise for
      atoms.
    kind: How `parts` form the axis; None for an atom.
    parts: The axes it is made of, major first for a product, in order for a concatenation.
  """

  size: int
  fixed: str | None = None
  joined: bool = False
  kind: Kind | None = None
  parts: tuple[Axis, ...] = ()
  _same_as: Axis | None = dataclasses.field(default=None, repr=False)


def find(axis: Axis) -> Axis:
  """Returns the representative of all axes that were unified with `axis`."""
  while axis._same_as is not None:
    if axis._same_as._same_as is not None:
      axis._same_as = axis._same_as._same_as  # path halving
    axis = axis._same_as
  return axis


def product(parts: Sequence[Axis]) -> Axis:
  """Returns the axis that flattening `parts` (major first) gives."""
  flat = _flatten(parts, "product")
  if not flat:
    return Axis(1)
  if len(flat) == 1:
    return flat[0]
  return Axis(math.prod(part.size for part in flat), kind="product", parts=tuple(flat))


def concatenation(parts: Sequence[Axis]) -> Axis:
  """Returns the axis that concatenating along `parts` gives."""
  flat = _flatten(parts, "concatenation")
  if not flat:
    return Axis(0)
  if len(flat) == 1:
    return flat[0]
  return Axis(sum(part.size for part in flat), kind="concatenation", parts=tuple(flat))


def _flatten(parts: Sequence[Axis], kind: Kind) -> list[Axis]:
  """Replaces parts of the same kind by their own parts, and leaves out those that change nothing."""
  neutral_size = 1 if kind == "product" else 0
  flat: list[Axis] = []
  for part in map(find, parts):
    if part.kind == kind:
      part.parts = tuple(_flatten(part.parts, kind))  # keeps an axis that is divided again and again shallow
      flat.extend(part.parts)
    elif part.size != neutral_size:
      flat.append(part)
  return flat


def atoms(axis: Axis) -> Iterator[Axis]:
  """Yields the atoms that `axis` is made of, in order; one may come twice."""
  axis = find(axis)
  if axis.kind is None:
    yield axis
  for part in axis.parts:
    yield from atoms(part)


def fix(axis: Axis, reason: str) -> None:
  """Fixes the size of all atoms of `axis`. The first reason given is the one that is kept."""
  for atom in atoms(axis):
    atom.fixed = atom.fixed or reason


def mark_joined(axis: Axis) -> None:
  """Notes that two different activations are added along `axis`."""
  for atom in atoms(axis):
    atom.joined = True


def unify(a: Axis, b: Axis) -> None:
  """Makes `a` and `b`, of equal size, the same set of channels in the same order.

  Where their parts do not line up, both are fixed: they still agree, as neither can be cut.
  """
  a, b = find(a), find(b)
  if a is b:
    return
  if a.size != b.size:
    raise ValueError(f"Axes of sizes {a.size} and {b.size} cannot be the same channels.")
  if a.size <= 1:
    return  # a broadcast dimension has no identity
  if a.kind is None:
    _bind(a, b)
  elif b.kind is None:
    _bind(b, a)
  elif a.kind == b.kind == "product":
    _unify_parts(a, b, "product", _factor)
  else:
    _unify_parts(a, b, "concatenation", _cut)


def _bind(atom: Axis, target: Axis) -> None:
  # Parts are strictly smaller than the whole, so `target` cannot contain `atom`, which has the size of the whole.
  atom._same_as = target
  if atom.fixed:
    fix(target, atom.fixed)
  if atom.joined:
    mark_joined(target)


def _set_parts(atom: Axis, kind: Kind, *sizes: int) -> list[Axis]:
  """Divides `atom` into new atoms, which inherit what is known of it."""
  parts = [Axis(size, fixed=atom.fixed, joined=atom.joined) for size in sizes]
  atom.kind, atom.parts = kind, tuple(parts)
  return parts


def _unify_parts(a: Axis, b: Axis, kind: Kind, divide: Callable[[Axis, int], tuple[Axis, Axis] | None]) -> None:
  """Unifies two axes part by part, as products or as concatenations; the larger of two parts that differ is divided.

  An axis that is not of this `kind` counts as one part.
  """
  left, right = _flatten([a], kind), _flatten([b], kind)
  while left and right:
    x, y = left.pop(0), right.pop(0)
    if x.size == y.size:
      unify(x, y)
    else:
      (big, rest), small = ((x, left), y) if x.size > y.size else ((y, right), x)
      pieces = divide(big, small.size)
      if pieces is None:
        for axis in (x, y, *left, *right):
          fix(axis, _INDIVISIBLE)
        return
      unify(pieces[0], small)
      rest.insert(0, pieces[1])
    # A unification may have divided what is still to come.
    left, right = _flatten(left, kind), _flatten(right, kind)


def _factor(axis: Axis, major: int) -> tuple[Axis, Axis] | None:
  """Divides an atom into a product of which the major part has size `major`, if that divides it."""
  if axis.kind is not None or axis.size % major:
    return None
  first, second = _set_parts(axis, "product", major, axis.size // major)
  return first, second


def _cut(axis: Axis, first: int) -> tuple[Axis, Axis] | None:
  """Divides an axis into its first `first` entries and the others, if its parts allow it; neither may be empty."""
  axis = find(axis)
  if axis.kind is None:
    head, tail = _set_parts(axis, "concatenation", first, axis.size - first)
    return head, tail
  if axis.kind == "concatenation":
    return _cut_concatenation(axis, first)
  major, *minors = _flatten([axis], "product")
  minor = product(minors)
  pieces = None if first % minor.size else _cut(major, first // minor.size)
  return pieces and (product([pieces[0], minor]), product([pieces[1], minor]))


def _cut_concatenation(axis: Axis, first: int) -> tuple[Axis, Axis] | None:
  head: list[Axis] = []
  tail = _flatten([axis], "concatenation")
  while tail[0].size <= first:
    head.append(tail.pop(0))
    first -= head[-1].size
    if not first:
      return concatenation(head), concatenation(tail)
  pieces = _cut(tail[0], first)
  return pieces and (concatenation([*head, pieces[0]]), concatenation([pieces[1], *tail[1:]]))


def channel_index(axis: Axis, atom: Axis) -> np.ndarray:
  """Returns which channel of `atom` each entry of `axis` belongs to.

  Returns:
    int array `[axis.size]`: the channel, or -1 where the entry belongs to none.
  """
  axis = find(axis)
  if axis is atom:
    return np.arange(axis.size)
  if axis.kind is None:
    return np.full(axis.size, -1)
  parts = [channel_index(part, atom) for part in axis.parts]
  if axis.kind == "concatenation":
    return np.concatenate(parts)
  index = parts[0]
  for part in parts[1:]:
    # At most one factor contains the atom (`fix_repeated_factors`), and the others say -1.
    index = np.maximum(index[:, None], part[None, :]).reshape(-1)
  return index


def copied(axis: Axis, copies: dict[int, Axis]) -> Axis:
  """Returns a copy of `axis` of which nothing is shared; `copies` maps ids of axes to the copies made so far."""
  axis = find(axis)
  if id(axis) not in copies:
    parts = tuple(copied(part, copies) for part in axis.parts)
    copies[id(axis)] = dataclasses.replace(axis, parts=parts)
  return copies[id(axis)]


def sizes_after_cut(kept: Sequence[tuple[Axis, int]]) -> Callable[[Axis], int]:
  """Returns the function from an axis to its size, where each atom of `kept` has so many channels."""
  sizes = {id(atom): size for atom, size in kept}

  def size(axis: Axis) -> int:
    axis = find(axis)
    if id(axis) in sizes:
      return sizes[id(axis)]
    if axis.kind is None:
      return axis.size
    combine = sum if axis.kind == "concatenation" else math.prod
    return combine(map(size, axis.parts))

  return size


def fix_repeated_factors(axis: Axis) -> None:
  """Fixes atoms that occur in several factors of one product: an outer product of channels with themselves."""
  axis = find(axis)
  for part in axis.parts:
    fix_repeated_factors(part)
  if axis.kind == "product":
    seen: set[int] = set()
    for part in axis.parts:
      found = {id(atom): atom for atom in atoms(part)}
      for key in seen & found.keys():
        fix(found[key], "it is multiplied with itself (an outer product)")
      seen |= found.keys()
