"""Cutting: pure functions from the trees of the dense network to those of the sub-network or of the pruned one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sapr_jax.channels.graph import ChannelGraph, Masks, check_masks
from sapr_jax.channels.rules import inner_jaxprs
from sapr_jax.channels.trace import trace_program
from sapr_jax.errors import InputError

Tree = TypeVar("Tree")
Widths = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]


class NarrowModule(nn.Module):
  """Runs an unchanged Flax module with fewer channels in some of its layers.

  Its variables lie at the same paths as those of `base`, only smaller; use it like any module (init, apply, jit, grad).

  Attributes:
    base: The module as its author wrote it.
    widths: Path of a layer, with slashes -> its changed fields: `(("block1/conv1", (("features", 13),)), ...)`.
  """

  base: nn.Module
  widths: Widths

  def setup(self) -> None:
    nn.share_scope(self, self.base)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    changes = {path: dict(fields) for path, fields in self.widths}
    root = len(self.path)

    def narrow(next_fun, args, kwargs, context):
      layer = context.module
      fields = changes.get("/".join(layer.path[root:])) if hasattr(layer, "features") else None
      if fields is None or all(getattr(layer, name) == value for name, value in fields.items()):
        return next_fun(*args, **kwargs)
      return getattr(layer.clone(parent=layer.scope, **fields), context.method_name)(*args, **kwargs)

    with nn.intercept_methods(narrow):
      return self.base(*args, **kwargs)


def mask_params(params: Tree, graph: ChannelGraph, masks: Masks) -> Tree:
  """Returns the parameters with which the dense network behaves as the sub-network.

  A group's mask multiplies the input axis of the kernels that read it. That gates the feature map exactly and asks
  nothing of the normalizations, biases and activations in between; gradients flow to the masks likewise.

  Args:
    params: Parameters of the dense network.
    graph: Its channel graph.
    masks: Group name -> array `[group.size]`; 1 keeps. May be traced, and fractional.

  Raises:
    InputError: If `masks` does not fit `graph`.
  """
  check_masks(graph, masks)
  flat = traverse_util.flatten_dict(params)
  for path, members in graph.members_by_variable("params").items():
    for name, member in members:
      if member.role == "in":
        gate = member.along_axis(jnp.asarray(masks[name]), 1)
        flat[path] = flat[path] * gate.astype(flat[path].dtype)
  return traverse_util.unflatten_dict(flat)


def prune_tree(tree: Tree, graph: ChannelGraph, masks: Masks) -> Tree:
  """Slices every array in `tree` that stands for a variable of the dense network.

  Works on variables and on anything that holds trees of their shape: the momentum in an optimizer state, an exponential
  moving average. An array counts if the last dictionary keys of its place are the path of a variable and its shape is
  that variable's.

  Args:
    tree: Any pytree.
    graph: Channel graph of the dense network.
    masks: Group name -> 0/1 array `[group.size]`, concrete.

  Returns:
    A new tree; arrays that are not cut are the same objects.

  Raises:
    InputError: If `masks` does not fit `graph` or drops a whole group.
  """
  check_masks(graph, masks, allow_empty=False)
  keep = _kept_entries(graph, masks)

  def cut(place: Any, leaf: Any) -> Any:
    names = tuple(str(key) for entry in place if (key := getattr(entry, "key", None)) is not None)
    for start in range(len(names)):
      for collection in (None, "params"):
        key = names[start:] if collection is None else (collection, *names[start:])
        if key in keep and jnp.shape(leaf) == graph.shapes[key]:
          return _take(leaf, keep[key])
    return leaf

  return jax.tree_util.tree_map_with_path(cut, tree)


def _take(array: Any, kept: Mapping[int, np.ndarray]) -> Any:
  # On the host: on a device every new shape would be a program to compile.
  cut = np.asarray(array)
  for axis, entries in kept.items():
    cut = np.take(cut, entries, axis)
  return jnp.asarray(cut) if isinstance(array, jax.Array) else cut


def _kept_entries(graph: ChannelGraph, masks: Masks) -> dict[tuple[str, ...], dict[int, np.ndarray]]:
  """Returns variable -> axis -> indices of the entries that stay."""
  keep: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
  for group in graph.groups:
    mask = np.asarray(masks[group.name]) != 0
    for member in group.members:
      axes = keep.setdefault((member.collection, *member.path), {})
      entries = np.append(mask, True)[member.channels]
      axes[member.axis] = axes.get(member.axis, np.ones_like(entries)) & entries
  return {key: {axis: np.flatnonzero(kept) for axis, kept in axes.items()} for key, axes in keep.items()}


def prune(
  model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks
) -> tuple[nn.Module, dict[str, Any]]:
  """Cuts the dropped channels out of a network.

  The result computes what the masked network computes. This is checked: the small model must be the same program as the
  dense one but for its shapes. Where it is not (the model's code may compute a number from a width, as in
  `y * y.shape[-1] ** -0.5`), both are run on a random input and must agree.

  Args:
    model: The dense network.
    variables: Its variables, all collections.
    graph: Its channel graph.
    masks: Group name -> 0/1 array `[group.size]`, concrete; 1 keeps.

  Returns:
    (`NarrowModule`, its variables). Nothing in the arguments is changed.

  Raises:
    InputError: If `masks` does not fit `graph` or drops a whole group, or if the cut model would compute something
      else; the message names the group.
  """
  small_variables = prune_tree(dict(variables), graph, masks)
  small = _narrow(model, graph, masks)
  difference = _difference(small, small_variables, graph)
  if difference and not _agree(model, variables, small, small_variables, graph, masks):
    culprit = _culprit(model, variables, graph, masks)
    raise InputError(
      f"Cutting group {culprit!r} changes what the model computes ({difference}): its code derives a number from that"
      f" width. Leave the group out by trace_channels(select=lambda group: group.name != {culprit!r} and ...)."
    )
  return small, small_variables


def _narrow(model: nn.Module, graph: ChannelGraph, masks: Masks) -> NarrowModule:
  keep = _kept_entries(graph, masks)
  base, widths = (model.base, {p: dict(f) for p, f in model.widths}) if isinstance(model, NarrowModule) else (model, {})
  for path, layer in graph.layers.items():
    entries = keep.get(("params", *layer.kernel), {}).get(layer.out_axis)
    if entries is None or entries.size == graph.shapes[("params", *layer.kernel)][layer.out_axis]:
      continue
    fields = {"features": int(entries.size)}
    if layer.multiplier is not None:
      fields["feature_group_count"] = int(entries.size) // layer.multiplier
    widths["/".join(path)] = fields
  return NarrowModule(base, tuple((path, tuple(sorted(fields.items()))) for path, fields in sorted(widths.items())))


# ----------------------------------------------------------------------------------------------------------------------
# Checking the cut
# ----------------------------------------------------------------------------------------------------------------------

# Parameters of primitives that follow the shapes of the operands.
_SHAPE_PARAMS = frozenset(
  {"new_sizes", "shape", "feature_group_count", "sharding", "out_sharding", "slice_sizes", "name"}
)


def _difference(small: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph) -> str | None:
  """Compares the program of the small model with the dense one's; says where they differ beyond shapes."""
  try:
    program, _ = trace_program(small, variables, graph.inputs, graph.apply_kwargs)
  except Exception as error:
    return f"tracing the small model fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
  return _compare(graph.jaxpr.jaxpr, graph.jaxpr.consts, program.jaxpr, program.consts)


def _compare(a: Any, a_consts: Any, b: Any, b_consts: Any) -> str | None:
  if len(a.eqns) != len(b.eqns):
    return f"its program has {len(b.eqns)} operations instead of {len(a.eqns)}"
  partner = dict(zip((*a.invars, *a.constvars), (*b.invars, *b.constvars), strict=False))
  for x, y in zip(a_consts, b_consts, strict=False):
    if jnp.shape(x) != jnp.shape(y) or not np.array_equal(x, y):
      return "a constant array differs"
  for x, y in zip(a.eqns, b.eqns, strict=True):
    if x.primitive is not y.primitive or len(x.invars) != len(y.invars):
      return f"`{y.primitive.name}` stands in place of `{x.primitive.name}`"
    for u, v in zip(x.invars, y.invars, strict=True):
      if hasattr(u, "val") != hasattr(v, "val"):
        return f"`{x.primitive.name}` has another operand"
      if hasattr(u, "val"):
        if not np.array_equal(u.val, v.val):
          return f"`{x.primitive.name}` uses {v.val} where the dense model uses {u.val}"
      elif partner.get(u) is not v:
        return f"`{x.primitive.name}` has another operand"
    if difference := _compare_params(x, y):
      return difference
    partner.update(zip(x.outvars, y.outvars, strict=True))
  return None


def _compare_params(x: Any, y: Any) -> str | None:
  for name in x.params.keys() & y.params.keys() - _SHAPE_PARAMS:
    u, v = x.params[name], y.params[name]
    # Others are functions and objects that JAX makes anew at each trace.
    if isinstance(u, bool | int | float | str | tuple) and not _holds_jaxpr(u) and u != v:
      return f"`{x.primitive.name}` has {name}={v} instead of {u}"
  for (u, u_consts), (v, v_consts) in zip(inner_jaxprs(x), inner_jaxprs(y), strict=True):
    if difference := _compare(u, u_consts, v, v_consts):
      return difference
  return None


def _holds_jaxpr(param: Any) -> bool:
  return isinstance(param, tuple) and any(hasattr(entry, "eqns") or hasattr(entry, "jaxpr") for entry in param)


def _agree(
  model: nn.Module,
  variables: Mapping[str, Any],
  small: nn.Module,
  small_variables: Mapping[str, Any],
  graph: ChannelGraph,
  masks: Masks,
) -> bool:
  """Runs the masked and the small model on a random input."""
  inputs = jax.random.normal(jax.random.key(0), (2, *graph.inputs.shape[1:]), graph.inputs.dtype)
  masked = {**variables, "params": mask_params(variables["params"], graph, masks)}
  try:
    got = small.apply(small_variables, inputs, **graph.apply_kwargs)
  except Exception:  # the model's own code may fail in any way
    return False
  want = model.apply(masked, inputs, **graph.apply_kwargs)
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return all(
    np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(b))))
    for a, b in pairs
  )


def _culprit(model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks) -> str:
  """Finds the first group whose cut alone changes the result."""
  pruned = [group for group in graph.groups if not np.asarray(masks[group.name]).all()]
  for group in pruned:
    alone = {**graph.full_masks(), group.name: masks[group.name]}
    small, small_variables = _narrow(model, graph, alone), prune_tree(dict(variables), graph, alone)
    if not _agree(model, variables, small, small_variables, graph, alone):
      return group.name
  return pruned[0].name


__all__ = ["NarrowModule", "mask_params", "prune", "prune_tree"]
