"""Masking and cutting: pure functions from the trees of the dense network to trees of the masked or pruned one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels.graph import ChannelGraph, Masks, Member, check_graph, check_masks
from sapr_jax.checks import check_concrete, check_tree, is_real, shown
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
  check_graph(graph)
  check_tree("params", params)
  members = graph.members_by_variable("params")
  missing = set(members)

  def visit(place: Any, leaf: Any) -> Any:
    path = path_of(place)
    if path not in members:
      return leaf
    missing.discard(path)
    traced, is_array = graph.shapes[("params", *path)], is_real(leaf)
    if np.shape(leaf) != traced or not is_array:
      found = np.shape(leaf) if is_array else shown(leaf)
      raise InputError(f"params: {'/'.join(path)} must have shape {traced} as it was traced, got {found}.")
    return change(leaf, members[path])

  changed = jax.tree_util.tree_map_with_path(visit, params)
  if missing:
    raise InputError(f"params lacks {'/'.join(min(missing))}; it must be variables['params'] of the traced network.")
  return changed


def check_params(params: Any, graph: ChannelGraph) -> None:
  """Raises `InputError` unless `params` has each parameter of the graph, in the shape that was traced."""
  map_members(lambda leaf, members: leaf, params, graph)


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
  exponential moving average. Only the last keys of an array's path must match, with or without the collection. Masks in
  it, a dictionary that has an array `[group.size]` for each group, are cut likewise: `masks` itself becomes all ones.

  Args:
    tree: Any pytree of arrays or `jax.ShapeDtypeStruct`s.
    graph: Channel graph of the dense network.
    masks: Group name -> 0/1 array `[group.size]`, concrete.

  Returns:
    A new tree; arrays that are not cut are the same objects.

  Raises:
    InputError: If `masks` does not fit `graph` or drops a whole group; or if an array can belong to a variable that is
      cut, but has another shape (the factored state of adafactor or sm3, all parameters in one array by
      `optax.flatten`), so that it cannot be cut; the message names it.
  """
  check_masks(graph, masks, allow_empty=False)
  check_tree("tree", tree)
  check_concrete("tree", tree, "prune")
  keep = {key: kept for key, kept in kept_entries(graph, masks).items() if _is_cut(kept, graph.shapes[key])}
  collections = sorted({key[0] for key in graph.shapes}, key=lambda name: name != "params")
  total = sum(math.prod(shape) for key, shape in graph.shapes.items() if key[0] == "params")

  def cut(place: Any, leaf: Any) -> Any:
    if is_by_group(leaf):
      kept = {name: {0: np.flatnonzero(np.asarray(masks[name]))} for name in leaf}
      # An array may be boxed, as in the optimizer state of NNX.
      return {name: jax.tree.map(functools.partial(_take, kept=kept[name]), box) for name, box in leaf.items()}
    names = path_of(place)
    # The longest path that is a variable's: `block1/conv/kernel` is not `conv/kernel`.
    for start in range(len(names)):
      for key in (names[start:], *((collection, *names[start:]) for collection in collections)):
        if key in graph.shapes:
          if key not in keep or np.size(leaf) == 1:  # one number for the whole variable, or nothing in its place
            return leaf
          if np.shape(leaf) != graph.shapes[key]:
            return suspect(place, leaf, f"belong to {'/'.join(key)} {graph.shapes[key]}")
          return _take(leaf, keep[key])
    if keep and np.shape(leaf) == (total,):
      return suspect(place, leaf, "hold all parameters in one array")
    return leaf

  suspects: list[str] = []
  sizes = {group.name: (group.size,) for group in graph.groups}

  def is_by_group(node: Any) -> bool:
    """Says whether a node maps groups to arrays of numbers, as masks in the state of a regularization do."""
    if not isinstance(node, dict) or {n: getattr(leaf, "shape", None) for n, leaf in node.items()} != sizes:
      return False
    return not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in node.values())

  def suspect(place: Any, leaf: Any, reason: str) -> Any:
    suspects.append(f"tree{jax.tree_util.keystr(place)} of shape {np.shape(leaf)} seems to {reason}")
    return leaf

  small = jax.tree_util.tree_map_with_path(cut, tree, is_leaf=is_by_group)
  if suspects:
    more = f" (and {len(suspects) - 1} more)" if suspects[1:] else ""
    raise InputError(
      f"{suspects[0]}{more}, and cannot be cut; make the optimizer's state again by tx.init(small_params), or leave"
      " this part out."
    )
  return small


def _is_cut(kept: Mapping[int, np.ndarray], shape: Sequence[int]) -> bool:
  return any(entries.size < shape[axis] for axis, entries in kept.items())


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


def check_variables(variables: Any) -> None:
  """Raises `InputError` unless `variables` maps names of collections to trees of arrays, abstract ones included."""
  if not isinstance(variables, Mapping):
    raise InputError(f"variables must map collections to arrays, as model.init returns them, got {shown(variables)}.")
  check_tree("variables", dict(variables))
  for place, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
      raise InputError(f"variables must hold arrays alone, got {shown(leaf)} at {'/'.join(path_of(place))}.")


def abstract(tree: Tree) -> Tree:
  """Returns a tree of the shapes and dtypes of arrays, as `jax.ShapeDtypeStruct`s."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), tree)


def path_of(place: Any) -> tuple[str, ...]:
  """Returns the dictionary keys and names of fields on the way to a leaf.

  Without the field of a box that holds the leaf, as `nnx.Variable` does: so trees of linen and of NNX have the same.
  """
  if place and getattr(place[-1], "name", None) == "value":
    place = place[:-1]
  names = (getattr(entry, "key", getattr(entry, "name", None)) for entry in place)
  return tuple(str(name) for name in names if name is not None)
