"""Masking and cutting: pure functions from the trees of the dense network to trees of the masked or pruned one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels.graph import ChannelGraph, Masks, Member, check_masks
from sapr_jax.errors import InputError

Tree = TypeVar("Tree")


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
      raise InputError(f"params: {'/'.join(path)} must have shape {traced} as it was traced, got {jnp.shape(leaf)}.")
    return change(leaf, members[path])

  changed = jax.tree_util.tree_map_with_path(visit, params)
  if missing:
    raise InputError(f"params lacks {'/'.join(min(missing))}; it must be variables['params'] of the traced network.")
  return changed


def mask_params(params: Tree, graph: ChannelGraph, masks: Masks) -> Tree:
  """Returns the parameters with which the dense network behaves as the sub-network.

  A group's mask multiplies the input axis of the kernels that read it. That gates the feature map exactly and asks
  nothing of the normalizations, biases and activations in between; gradients flow to the masks likewise.

  Args:
    params: Parameters of the dense network.
    graph: Its channel graph.
    masks: Group name -> array `[group.size]`; 1 keeps. May be traced, and fractional.

  Raises:
    InputError: If `masks` or `params` does not fit `graph`.
  """
  check_masks(graph, masks)

  def mask(leaf: Any, members: Sequence[tuple[str, Member]]) -> Any:
    for name, member in members:
      if member.role == "in":
        leaf = jnp.asarray(leaf)
        leaf = leaf * member.along_axis(jnp.asarray(masks[name]), 1).astype(leaf.dtype)
    return leaf

  return map_members(mask, params, graph)


def prune_tree(tree: Tree, graph: ChannelGraph, masks: Masks) -> Tree:
  """Slices every array in `tree` that has the path and the shape of a variable of the dense network.

  Works on variables, and on any tree that holds others of the same structure: the momentum in an optimizer state, an
  exponential moving average. Only the last keys of an array's path must match, with or without the collection.

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
  keep = kept_entries(graph, masks)
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


def kept_entries(graph: ChannelGraph, masks: Masks) -> dict[tuple[str, ...], dict[int, np.ndarray]]:
  """Returns variable -> axis -> indices of the entries that stay."""
  keep: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
  for group in graph.groups:
    mask = np.asarray(masks[group.name]) != 0
    for member in group.members:
      axes = keep.setdefault((member.collection, *member.path), {})
      entries = np.append(mask, True)[member.channels]
      axes[member.axis] = axes.get(member.axis, np.ones_like(entries)) & entries
  return {key: {axis: np.flatnonzero(kept) for axis, kept in axes.items()} for key, axes in keep.items()}


def abstract(tree: Tree) -> Tree:
  """Returns a tree of the shapes and dtypes of arrays, as `jax.ShapeDtypeStruct`s."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), tree)


def path_of(place: Any) -> tuple[str, ...]:
  """Returns the dictionary keys and names of fields on the way to a leaf."""
  names = (getattr(entry, "key", getattr(entry, "name", None)) for entry in place)
  return tuple(str(name) for name in names if name is not None)
