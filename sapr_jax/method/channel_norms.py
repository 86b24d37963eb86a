"""Sums over the entries of each channel: what penalty, proximal operator and importances are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sapr_jax.channels import ChannelGraph, Member, check_graph, map_members


def is_producer(member: Member) -> bool:
  """Returns whether the member is the output axis of a kernel: its slices are filters, depthwise ones included."""
  return member.role == "out"


def is_reader(member: Member) -> bool:
  """Returns whether the member is the input axis of a kernel: its slices are weights that read a channel."""
  return member.role == "in"


def is_kernel(member: Member) -> bool:
  """Returns whether the member is an axis of a kernel, not of a bias or a normalization."""
  return is_producer(member) or is_reader(member)


def sum_by_channel(values: jax.Array, member: Member) -> jax.Array:
  """Sums `values`, shaped like the member's variable, over all entries of each channel; returns `[group.size]`.

  It is the transpose of `Member.along_axis`, flattened and concatenated axes included.
  """
  others = tuple(axis for axis in range(values.ndim) if axis != member.axis)
  sums = jnp.sum(values, axis=others)
  if member.is_whole_axis:
    return sums
  size = int(member.channels.max()) + 1
  # Entries of no channel (-1) are collected in one segment more, and left out.
  return jax.ops.segment_sum(sums, jnp.where(member.channels < 0, size, member.channels), size + 1)[:size]


def channel_sums(
  params: Any, graph: ChannelGraph, entries: Callable[[jax.Array], jax.Array], counts: Callable[[Member], bool]
) -> dict[str, list[jax.Array]]:
  """Sums `entries(parameter)` over each channel's slice of each member that counts.

  Returns:
    Group name -> one array `[group.size]` for each member of `params` that `counts` accepts.

  Raises:
    InputError: If `params` does not fit `graph`.
  """
  check_graph(graph)
  sums: dict[str, list[jax.Array]] = {group.name: [] for group in graph.groups}

  def note(leaf: jax.Array, members: Sequence[tuple[str, Member]]) -> jax.Array:
    for name, member in output_first(members):
      if counts(member):
        sums[name].append(sum_by_channel(entries(jnp.asarray(leaf)), member))
    return leaf

  map_members(note, params, graph)
  return sums


def channel_norms(params: Any, graph: ChannelGraph) -> dict[str, list[jax.Array]]:
  """Computes the Euclidean norm of each channel in each kernel of its group.

  Returns:
    Group name -> one array `[group.size]` for each kernel, producers and readers.
  """
  squares = channel_sums(params, graph, jnp.square, is_kernel)
  return {name: [safe_sqrt(each) for each in of_group] for name, of_group in squares.items()}


def output_first(members: Sequence[tuple[str, Member]]) -> list[tuple[str, Member]]:
  """Orders the axes of a parameter: output axes before the others."""
  return sorted(members, key=lambda entry: not is_producer(entry[1]))


def safe_sqrt(squares: jax.Array) -> jax.Array:
  """Square root with gradient zero at zero."""
  positive = squares > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
