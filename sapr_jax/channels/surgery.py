"""Cutting: pure functions from the trees of the dense network to those of the pruned one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels.graph import ChannelGraph, Masks, Member, check_masks
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
      return self.base.copy(parent=self.scope)(*args, **kwargs)


def map_members(change: Callable[[Any, Sequence[tuple[str, Member]]], Any], params: Tree, graph: ChannelGraph) -> Tree:
  """Replaces each parameter that belongs to channel groups.

  Args:
    change: (parameter, its (group name, member) pairs) -> new parameter.
    params: Parameters of the dense network.
    graph: Its channel graph.

  Returns:
    A tree of the same structure; the other parameters are the same objects.

  Raises:
    InputError: If `params` lacks a parameter of the graph, or one has another shape than when it was traced.
  """
  members = graph.members_by_variable("params")
  missing = set(members)

  def visit(place: Any, leaf: Any) -> Any:
    path = path_of(place)
    if path not in members:
      return leaf
    missing.discard(path)
    if jnp.shape(leaf) != graph.shapes[("params", *path)]:
      traced = graph.shapes[("params", *path)]
      raise InputError(f"params has {'/'.join(path)} of shape {jnp.shape(leaf)}; the graph was traced with {traced}.")
    return change(leaf, members[path])

  changed = jax.tree_util.tree_map_with_path(visit, params)
  if missing:
    raise InputError(
      f"params lacks {'/'.join(min(missing))}; expected variables['params'] of the network that was traced."
    )
  return changed


def path_of(place: Any) -> tuple[str, ...]:
  """Returns the dictionary keys and names of fields on the way to a leaf."""
  names = (getattr(entry, "key", getattr(entry, "name", None)) for entry in place)
  return tuple(str(name) for name in names if name is not None)


def prune_tree(tree: Tree, graph: ChannelGraph, masks: Masks) -> Tree:
  """Slices every array in `tree` that stands for a variable of the dense network.

  Works on variables and on anything that holds trees of their shape: the momentum in an optimizer state, an exponential
  moving average. An array counts if the last keys of its place are the path of a variable, with or without its
  collection, and its shape is that variable's.

  Args:
    tree: Any pytree of arrays or `jax.ShapeDtypeStruct`s.
    graph: Channel graph of the dense network.
    masks: Group name -> 0/1 array `[group.size]`, concrete.

  Returns:
    A new tree; arrays that are not cut are the same objects.

  Raises:
    InputError: If `masks` does not fit `graph` or drops a whole group.
  """
  check_masks(graph, masks, allow_empty=False)
  keep = _kept_entries(graph, masks)
  collections = sorted({key[0] for key in graph.shapes}, key=lambda name: name != "params")

  def cut(place: Any, leaf: Any) -> Any:
    names = path_of(place)
    # The longest path that is a variable's: `block1/conv/kernel` is not `conv/kernel`.
    for start in range(len(names)):
      for key in (names[start:], *((collection, *names[start:]) for collection in collections)):
        if key in graph.shapes:
          return _take(leaf, keep[key]) if key in keep and jnp.shape(leaf) == graph.shapes[key] else leaf
    return leaf

  return jax.tree_util.tree_map_with_path(cut, tree)


def _take(array: Any, kept: Mapping[int, np.ndarray]) -> Any:
  if isinstance(array, jax.ShapeDtypeStruct):
    shape = tuple(kept[axis].size if axis in kept else size for axis, size in enumerate(array.shape))
    return jax.ShapeDtypeStruct(shape, array.dtype)
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


def narrow(model: nn.Module, graph: ChannelGraph, masks: Masks) -> NarrowModule:
  """Returns the module with the widths that `masks` leaves."""
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


__all__ = ["NarrowModule", "map_members", "narrow", "path_of", "prune_tree"]
