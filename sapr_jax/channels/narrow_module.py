"""The pruned network of Flax linen: an unchanged module with fewer channels in some of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
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
from sapr_jax.checks import is_integer, shown
from sapr_jax.errors import InputError

Widths = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]


class NarrowModule(nn.Module):
  """Runs an unchanged Flax module with fewer channels in some of its layers.

  Its variables have the same paths as those of `base`, and smaller shapes. It is used like any module: initialized,
  applied in training mode, differentiated, put into another one. There are two ways to narrow a module. Where its code
  takes widths from the fields `features` of its layers, they get other values (`widths`). Where code computes a width
  or holds it as a number, the program of the dense module is evaluated with the shapes that are left (`cuts`); then
  only `__call__` can be run, and each call outside of `jax.jit` traces it again.

  Attributes:
    base: The module as its author wrote it.
    widths: Path of a layer, with slashes -> its changed fields: `(("block1/conv1", (("features", 13),)), ...)`.
    cuts: Axes of variables that are cut: `(("params/attention/key/kernel", 1, 12, ((12, 8),)), ...)`: the axis had 12
      entries, which are 12 channels, of which 8 stay. Relative to `base` with `widths`.
  """

  base: nn.Module
  widths: Widths = ()
  cuts: tuple[Cut, ...] = ()

  def __post_init__(self) -> None:
    check_module(self.base)
    if not _are_widths(self.widths):
      raise InputError(
        f"widths must be (path of a layer, ((field, size), ...)) for each layer, got {shown(self.widths)}; prune"
        " returns such a module."
      )
    if not are_cuts(self.cuts):
      raise InputError(
        f"cuts must be (path of a variable, axis, size, ((size, kept), ...)) for each axis, got {shown(self.cuts)};"
        " prune returns such a module."
      )
    super().__post_init__()

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._evaluate(*args, **kwargs) if self.cuts else self._run_narrowed(*args, **kwargs)

  def _run_narrowed(self, *args: Any, **kwargs: Any) -> Any:
    changes = {path: dict(fields) for path, fields in self.widths}
    root = len(self.path)

    def narrow(next_fun, args, kwargs, context):
      layer = context.module
      fields = changes.get("/".join(layer.path[root:])) if hasattr(layer, "features") else None
      if fields is None or all(getattr(layer, name) == value for name, value in fields.items()):
        return next_fun(*args, **kwargs)
      return getattr(layer.clone(parent=layer.scope, **fields), context.method_name)(*args, **kwargs)

    with nn.intercept_methods(narrow):
      return self.base.copy(parent=self.scope)(*args, **kwargs)

  def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
    """Evaluates the program of the dense module."""
    scope: Any = self.scope
    module = NarrowModule(self.base, self.widths, parent=None)
    rngs = {name: self.make_rng(name) for name in scope.rngs}
    is_new = self.is_initializing()
    mutable = False if is_new else scope.mutable

    def apply(variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
      found = module.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)
      return (found, {}) if mutable is False else found

    try:
      variables = dict(module.init(rngs, *args, **kwargs) if is_new else self.variables)
      whole = abstract(variables) if is_new else _grown(variables, self.cuts)
      dense = _Dense(apply, whole, rngs, args, kwargs)
      if is_new:
        variables = dense.cut(variables, self.cuts)
      results, updates = dense.run(variables, self.cuts, rngs, args, kwargs)
    except ProgramError as error:
      raise InputError(
        f"The pruned network cannot be run like this: {error}. Leave its group out, by exclude= in trace_channels."
      ) from error
    for collection, tree in (variables if is_new else updates).items():
      for name, value in tree.items():
        self.put_variable(collection, name, value)
    return results


class _Dense:
  """The dense module, traced for one call in the mode that it is in."""

  def __init__(self, apply: Any, variables: Any, rngs: Any, args: Any, kwargs: Any):
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
    self.interpreter = AxisInterpreter(training=bool(rngs))
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
    for path, i, _, parts in cuts:
      axis = self.axes[tuple(path.split("/"))][i]
      if [atom.size for atom in atoms(axis)] != [size for size, _ in parts]:
        raise ProgramError(f"axis {i} of {path} is made of other channels here than where they were cut")
      for atom, (_, kept) in zip(atoms(axis), parts, strict=True):
        if found.setdefault(id(atom), (atom, kept))[1] != kept:
          raise ProgramError(f"axis {i} of {path} has the channels of another variable, of which {kept} stay")
    return [(atom, kept) for atom, kept in found.values() if kept < atom.size]


def _with_numbers(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(n if is_integer(n) else 2 for n in array.shape), array.dtype)


def _grown(variables: Any, cuts: Sequence[Cut]) -> Any:
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


def check_module(model: Any) -> None:
  """Raises `InputError` unless `model` is a module of Flax linen."""
  if isinstance(model, nn.Module):
    return
  kind = "an NNX module" if any(cls.__module__.startswith("flax.nnx") for cls in type(model).__mro__) else shown(model)
  raise InputError(f"model must be a Flax linen module, such as nn.Dense(3), got {kind}; wrap other code in a module.")


def _are_widths(widths: Any) -> bool:
  try:
    return all(
      isinstance(path, str) and all(isinstance(name, str) and is_integer(size) and size > 0 for name, size in fields)
      for path, fields in widths
    )
  except (TypeError, ValueError):
    return False


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
