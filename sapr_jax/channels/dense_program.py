"""The program of a dense network for one call, run on the variables of a network with fewer channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels.analysis import fix_unmaskable
from sapr_jax.channels.atoms import Axis, atoms, channel_index, fix
from sapr_jax.channels.call import Call, abstract_arrays, is_array
from sapr_jax.channels.narrow_program import Cut, Kept, NarrowProgram
from sapr_jax.channels.program import ProgramError
from sapr_jax.channels.rules import AxisInterpreter, ParamKey, Value, fixed_axes
from sapr_jax.channels.trees import abstract, path_of
from sapr_jax.checks import is_integer
from sapr_jax.errors import InputError


@contextlib.contextmanager
def program_errors_in_one_line() -> Iterator[None]:
  """Turns a `ProgramError` within the block into an `InputError`."""
  try:
    yield
  except ProgramError as error:
    raise InputError(
      f"The pruned network cannot be run like this: {error}. Leave its group out, by exclude= in trace_channels."
    ) from error


class DenseProgram:
  """The program of a dense network for one call, in the mode that it is in.

  Args:
    apply: (variables, rngs, *args, **kwargs) -> (results, variables that it changed).
    variables: Those of the dense network, abstract.
    rngs: Random keys.
    args: What the network is applied to.
    kwargs: Likewise.
    training: See `AxisInterpreter`.
  """

  def __init__(self, apply: Any, variables: Any, rngs: Any, args: Any, kwargs: Any, training: bool):
    call = Call(*abstract_arrays((args, kwargs)))

    def flat(variables: Any, rngs: Any, *arrays: Any) -> Any:
      args, kwargs = call.filled(arrays)
      return apply(variables, rngs, *args, **kwargs)

    trace = jax.make_jaxpr(flat, return_shape=True)
    self.closed, shapes = trace(variables, abstract(rngs), *call.arrays)
    # Sizes that are symbols, in an export for any batch, do not compare: their identities are found with numbers.
    arrays = list(map(_with_numbers, call.arrays))
    numbered = self.closed if arrays == call.arrays else trace(variables, abstract(rngs), *arrays)[0]
    self.structure = jax.tree.structure(shapes)
    self.axes: dict[ParamKey, tuple[Axis, ...]] = {
      path_of(place): tuple(map(Axis, leaf.shape)) for place, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    operands = [Value(axes, zeroed_by=frozenset({key})) for key, axes in self.axes.items()]
    for leaf in (*jax.tree.leaves(rngs), *arrays):
      operands.append(Value(fixed_axes(leaf.shape, "it is the network's input"), producers=frozenset({0})))
    self.operands = [operand.axes for operand in operands]
    self.interpreter = AxisInterpreter(training=training)
    results = self.interpreter.run(numbered.jaxpr, operands)
    fix_unmaskable(self.interpreter.contractions, self.axes)
    for value in results[: len(jax.tree.leaves(shapes[0]))]:  # the others are variables
      for axis in value.axes:
        fix(axis, "it is the network's output")

  def run(self, variables: Any, cuts: Sequence[Cut], rngs: Any, args: Any, kwargs: Any) -> Any:
    """Returns the results of `apply` on the variables that are left."""
    arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if is_array(leaf)]
    program = NarrowProgram(self.interpreter, self._kept(cuts))
    operands = [*jax.tree.leaves(variables), *jax.tree.leaves(rngs), *arrays]
    return jax.tree.unflatten(self.structure, program.run(self.closed, operands, self.operands))

  def cut(self, variables: Any, cuts: Sequence[Cut]) -> dict[str, Any]:
    """Leaves the first of the channels of each axis."""
    self._kept(cuts)
    axes_of = {(path, i): parts for path, i, _, parts in cuts}

    def narrow(place: Any, leaf: Any) -> Any:
      for i, axis in enumerate(self.axes[path_of(place)]):
        parts = axes_of.get(("/".join(path_of(place)), i), ())
        stays = np.ones(axis.size, bool)
        for atom, (_, kept) in zip(atoms(axis), parts, strict=False):
          stays &= channel_index(axis, atom) < kept
        leaf = leaf if stays.all() else jnp.take(leaf, np.flatnonzero(stays), i)
      return leaf

    return dict(jax.tree_util.tree_map_with_path(narrow, variables))

  def _kept(self, cuts: Sequence[Cut]) -> Kept:
    found: dict[int, tuple[Axis, int]] = {}
    by_path = {"/".join(key): axes for key, axes in self.axes.items()}  # some names have slashes, as in nn.WeightNorm
    for path, i, _, parts in cuts:
      axis = by_path[path][i]
      if [atom.size for atom in atoms(axis)] != [size for size, _ in parts]:
        raise ProgramError(f"axis {i} of {path} is made of other channels here than where they were cut")
      for atom, (_, kept) in zip(atoms(axis), parts, strict=True):
        if found.setdefault(id(atom), (atom, kept))[1] != kept:
          raise ProgramError(f"axis {i} of {path} has the channels of another variable, of which {kept} stay")
    return [(atom, kept) for atom, kept in found.values() if kept < atom.size]


def _with_numbers(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  if all(map(is_integer, array.shape)):
    return array
  return jax.ShapeDtypeStruct(tuple(n if is_integer(n) else 2 for n in array.shape), array.dtype)


def grown(variables: Any, cuts: Sequence[Cut]) -> Any:
  """Returns the abstract variables of the dense module."""
  sizes = {(path, i): size for path, i, size, _ in cuts}

  def grow(place: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    path = "/".join(path_of(place))
    return jax.ShapeDtypeStruct(tuple(sizes.get((path, i), n) for i, n in enumerate(leaf.shape)), leaf.dtype)

  return jax.tree_util.tree_map_with_path(grow, variables)


def merged_cuts(old: Sequence[Cut], new: Sequence[Cut]) -> tuple[Cut, ...] | None:
  """Returns the cuts that do what `old` does and then `new`; None if these do not tell."""
  found = {(path, i): (size, parts) for path, i, size, parts in old}
  for path, i, size, parts in new:
    if (path, i) not in found:
      found[path, i] = (size, parts)
      continue
    before = found[path, i][1]
    places = [k for k, (_, kept) in enumerate(before) if kept == 1] if len(before) != len(parts) else []
    rest = [k for k in range(len(before)) if k not in places]  # an axis of size 1 has no identity
    if [before[k][1] for k in rest] != [size for size, _ in parts]:
      return None
    together = list(before)
    for k, (_, kept) in zip(rest, parts, strict=True):
      together[k] = (before[k][0], kept)
    found[path, i] = (found[path, i][0], tuple(together))
  return tuple((path, i, *found[path, i]) for path, i in sorted(found))


def together(old: Sequence[Cut], new: Sequence[Cut]) -> tuple[Cut, ...]:
  """Returns `merged_cuts`; raises `InputError` if there are none."""
  found = merged_cuts(old, new)
  if found is None:
    raise InputError("The network was cut so far that its channels cannot be told apart; prune the dense one at once.")
  return found


def are_cuts(cuts: Any) -> bool:
  """Says whether a value may be `NarrowModule.cuts`, or what JSON makes of it."""
  try:
    return all(
      isinstance(path, str)
      and all(map(is_integer, (axis, size)))
      and all(is_integer(n) and is_integer(kept) and 0 < kept <= n <= size for n, kept in parts)
      for path, axis, size, parts in cuts
    )
  except (TypeError, ValueError):
    return False
