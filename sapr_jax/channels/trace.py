"""From a Flax module to its `ChannelGraph`: traces the evaluation-mode `apply` and walks the jaxpr."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from sapr_jax.channels import graph as graph_lib
from sapr_jax.channels.atoms import Axis, atoms, channel_index, find, fix, fix_repeated_factors
from sapr_jax.channels.graph import ChannelGraph, ChannelGroup, Layer, Member, Selection
from sapr_jax.channels.rules import Contraction, ParamKey, Value, Walk, apply_rule, fixed_axes
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
  worst less prunable, and `ChannelGraph.explain` says why.

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
    InputError: If `select` is unknown, or offers no group; the message says which choice would.

  References:
    Gao et al., ICCV 2023, supplement B: one mask a block, on the output of the upper and the input of the lower layer.
  """
  if isinstance(select, str) and select not in graph_lib.SELECTIONS:
    raise InputError(
      f"select={select!r} is unknown; expected one of {', '.join(graph_lib.SELECTIONS)}, or a predicate."
    )
  inputs = jax.ShapeDtypeStruct((1, *input_shape[1:]), input_dtype)
  kwargs = dict(apply_kwargs or {})
  closed, narrowable = trace_program(model, variables, inputs, kwargs)

  shapes = {key: tuple(jnp.shape(leaf)) for key, leaf in traverse_util.flatten_dict(dict(variables)).items()}
  # Leaves of a nested dict come in the order of sorted keys, as in the jaxpr's invars.
  keys = _ordered_keys(variables)
  axes = {key: tuple(Axis(size) for size in shapes[key]) for key in keys}
  operands = [Value(axes[key], zeroed_by=frozenset({key})) for key in keys]
  operands.append(Value(fixed_axes(inputs.shape, "it is the network's input"), producers=frozenset({0})))

  walk = Walk(walk_jaxpr=lambda *args: _walk_jaxpr(walk, *args))
  for value in _walk_jaxpr(walk, closed.jaxpr, closed.consts, operands):
    for axis in value.axes:
      fix(axis, "it is the network's output")
  _fix_unmaskable(walk.contractions, axes)
  roles = _roles(walk.contractions, axes)
  layers = _layers(walk.contractions, axes, narrowable)
  _fix_unprunable(axes, roles, layers)

  found = _groups(walk.contractions, axes, roles)
  chosen = graph_lib.SELECTIONS[select] if isinstance(select, str) else select
  offered = [(atom, group) for atom, group in found if chosen(group)]
  if not offered:
    raise InputError(_no_group_message(select, [group for _, group in found], axes, roles))
  order = {id(atom): k for k, (atom, _) in enumerate(offered)}
  terms = [_terms(contraction, order) for contraction in walk.contractions]
  touching = [t for t in terms if any(factors for _, factors in t)]
  return ChannelGraph(
    groups=tuple(group for _, group in offered),
    fixed=_reasons(axes, roles, order, select),
    layers=layers,
    shapes=shapes,
    total=graph_lib.polynomial(list(itertools.chain(*terms)), len(offered)),
    prunable=graph_lib.polynomial(list(itertools.chain(*touching)), len(offered)),
    jaxpr=closed,
    inputs=inputs,
    apply_kwargs=kwargs,
  )


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
  inputs = jax.ShapeDtypeStruct((1, *input_shape[1:]), input_dtype)
  closed, _ = trace_program(model, variables, inputs, dict(apply_kwargs or {}))
  keys = _ordered_keys(variables)
  flat = traverse_util.flatten_dict(dict(variables))
  operands = [Value(tuple(map(Axis, jnp.shape(flat[key]))), zeroed_by=frozenset({key})) for key in keys]
  operands.append(Value(fixed_axes(inputs.shape, "input"), producers=frozenset({0})))
  walk = Walk(walk_jaxpr=lambda *args: _walk_jaxpr(walk, *args))
  _walk_jaxpr(walk, closed.jaxpr, closed.consts, operands)
  return sum(coefficient for contraction in walk.contractions for coefficient, _ in _terms(contraction, {}))


def trace_program(
  model: nn.Module, variables: Mapping[str, Any], inputs: jax.ShapeDtypeStruct, apply_kwargs: Mapping[str, Any]
) -> tuple[Any, frozenset[tuple[str, ...]]]:
  """Traces `model.apply`.

  Returns:
    The closed jaxpr, whose inputs are the leaves of `variables` and then the image; and the paths of the modules that
    have an integer field `features`.
  """
  narrowable = set()

  def note_features(next_fun, args, kwargs, context):
    if isinstance(getattr(context.module, "features", None), int):
      narrowable.add(context.module.path)
    return next_fun(*args, **kwargs)

  def apply(variables, x):
    with nn.intercept_methods(note_features):
      return model.apply(variables, x, **apply_kwargs)

  abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), dict(variables))
  return jax.make_jaxpr(apply)(abstract, inputs), frozenset(narrowable)


def _ordered_keys(variables: Mapping[str, Any]) -> list[ParamKey]:
  leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
  return [tuple(str(getattr(entry, "key", entry)) for entry in path) for path, _ in leaves]


def _walk_jaxpr(walk: Walk, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Value]) -> list[Value]:
  values: dict[Any, Value] = dict(zip(jaxpr.invars, operands, strict=True))
  for var in jaxpr.constvars:
    # An array in the model's code keeps its shape, whatever is cut around it.
    values[var] = Value(fixed_axes(var.aval.shape, "it meets a constant array of the model's code"))
  del consts

  def read(atom: Any) -> Value:
    if hasattr(atom, "val"):
      return Value(fixed_axes(jnp.shape(atom.val), "it meets a constant array of the model's code"))
    return values[atom]

  for eqn in jaxpr.eqns:
    results = apply_rule(walk, eqn, [read(atom) for atom in eqn.invars])
    values.update(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


# ----------------------------------------------------------------------------------------------------------------------
# What the walk found, judged once all axes are known
# ----------------------------------------------------------------------------------------------------------------------

Axes = Mapping[ParamKey, tuple[Axis, ...]]
Roles = Mapping[tuple[ParamKey, int], str]


def _fix_unmaskable(contractions: Sequence[Contraction], axes: Axes) -> None:
  """Fixes what is summed over without a stored kernel that can be masked there (attention's query and key)."""
  for contraction in contractions:
    for axis, _ in contraction.reduced:
      for atom in atoms(axis):
        if not any(_has_atom(axes[key], atom) for key in contraction.kernel):
          fix(atom, "it is summed over with something else than a stored kernel, so that a mask would not be exact")


def _has_atom(axes: Sequence[Axis], atom: Axis) -> bool:
  return any(atom is other for axis in axes for other in atoms(axis))


def _roles(contractions: Sequence[Contraction], axes: Axes) -> Roles:
  """Tells for each axis of a kernel whether it is summed over ("in") or makes output channels ("out")."""
  roles: dict[tuple[ParamKey, int], str] = {}
  for contraction in contractions:
    for key in contraction.kernel:
      for role, used in (("in", [kernel for _, kernel in contraction.reduced]), ("out", contraction.free)):
        for axis in used:
          for i in _positions(axes[key], axis):
            roles.setdefault((key, i), role)
  return roles


def _positions(candidates: Sequence[Axis], axis: Axis) -> list[int]:
  """Returns which of a variable's axes `axis` is; by identity if it was only cast or transposed on the way."""
  same = [i for i, candidate in enumerate(candidates) if candidate is axis]
  if same:
    return same
  found = {id(atom) for atom in atoms(axis)}
  return [i for i, candidate in enumerate(candidates) if found & {id(atom) for atom in atoms(candidate)}]


def _layers(
  contractions: Sequence[Contraction], axes: Axes, narrowable: frozenset[tuple[str, ...]]
) -> dict[tuple[str, ...], Layer]:
  layers = {}
  for contraction in contractions:
    if len(contraction.kernel) != 1 or len(contraction.free) != 1:
      continue
    (key,) = contraction.kernel
    positions = _positions(axes[key], contraction.free[0])
    if key[0] == "params" and key[1:-1] in narrowable and len(axes[key]) - 1 in positions:
      layers[key[1:-1]] = Layer(key[1:], len(axes[key]) - 1, contraction.multiplier)
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
      is_output = roles.get((key, i)) == "out"
      for atom in atoms(axis):
        if id(atom) not in produced:
          fix(atom, "no kernel has it as output channels")
        elif id(atom) not in consumed:
          fix(atom, "no kernel reads it as input channels")
        if is_output and (key[1:-1] not in layers or layers[key[1:-1]].kernel != key[1:]):
          fix(atom, f"{'/'.join(key[1:-1]) or 'the model'} has no integer field `features` that sets it")
        if atom.size == 1:
          fix(atom, "it is a single channel")


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
        members = tuple(_member(axes, roles, key, i, atom) for key, i in uses[id(atom)])
        producer = next(key for key in sorted(contraction.kernel) if _has_atom(axes[key], atom))
        name = "/".join(producer[1:-1])
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


def _terms(contraction: Contraction, order: Mapping[int, int]) -> list[tuple[int, tuple[int, ...]]]:
  """Expands the MACs of a contraction into (coefficient, indices of groups) monomials."""
  terms: list[tuple[int, tuple[int, ...]]] = [(contraction.constant, ())]
  for factor in contraction.factors:
    terms = [(c * d, f + g) for c, f in terms for d, g in _size_terms(factor, order)]
  return terms


def _size_terms(axis: Axis, order: Mapping[int, int]) -> list[tuple[int, tuple[int, ...]]]:
  axis = find(axis)
  if axis.kind is None:
    return [(1, (order[id(axis)],))] if id(axis) in order else [(axis.size, ())]
  parts = [_size_terms(part, order) for part in axis.parts]
  if axis.kind == "concatenation":
    return list(itertools.chain(*parts))
  terms: list[tuple[int, tuple[int, ...]]] = [(1, ())]
  for part in parts:
    terms = [(c * d, f + g) for c, f in terms for d, g in part]
  return terms


def _reasons(
  axes: Axes, roles: Roles, order: Mapping[int, int], select: Selection | str
) -> tuple[tuple[ParamKey, int, str], ...]:
  """Returns why the output axes of kernels are not offered."""
  reasons = []
  for (key, i), role in roles.items():
    left_out = [atom for atom in atoms(axes[key][i]) if id(atom) not in order]
    if role == "out" and left_out:
      fixed = next((atom.fixed for atom in left_out if atom.fixed), None)
      reasons.append((key, i, fixed or f"it can be cut exactly, but select={select!r} leaves it out"))
  return tuple(reasons)


def _no_group_message(select: Selection | str, found: Sequence[ChannelGroup], axes: Axes, roles: Roles) -> str:
  would = [f"{name!r} would offer {n}" for name, test in graph_lib.SELECTIONS.items() if (n := sum(map(test, found)))]
  reasons: dict[str, list[str]] = {}
  for key, _, reason in _reasons(axes, roles, {}, select):
    if not reason.startswith("it can be cut exactly"):
      reasons.setdefault(reason, []).append("/".join(key[1:-1]))
  why = "; ".join(f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}: {r}" for r, names in reasons.items())
  advice = f"select={', '.join(would)}" if would else "no other choice would find one either"
  return f"select={select!r} finds no channel group to prune; {advice}." + (f" Fixed: {why}." if why else "")


__all__ = ["count_macs", "trace_channels", "trace_program"]
