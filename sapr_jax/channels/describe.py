"""Puts a channel graph into words: a table of its groups, and the reasons why other channels stay."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from sapr_jax.channels.graph import ChannelGraph, ChannelGroup

_WIDTH = 100
"""Columns of a line; those of most terminals and notebooks."""

_NAME_WIDTH = 40
_HEAD = ("group", "channels", "of MACs", "joined", "members")


def macs_shares(graph: ChannelGraph) -> list[float]:
  """Returns for each group the share of the dense network's MACs in layers that touch it.

  A layer between two groups counts for both, so that shares may add up to more than 1.
  """
  full, total, shares = graph.kept(), graph.macs(), []
  for place in range(len(graph.groups)):
    without = full.copy()
    without[place] = 0
    shares.append((total - graph.costs["macs"](without)) / max(1, total))
  return shares


def describe_groups(graph: ChannelGraph) -> str:
  """Returns the counts of a graph in one line, and a table with a line for each group."""
  head = (
    f"{len(graph.groups)} channel groups, {graph.macs():,} MACs, {graph.prunable_macs():,} in layers that touch them"
  )
  rows = [
    (end_of(group.name, _NAME_WIDTH), f"{group.size}", f"{share:.1%}", "yes" if group.joined else "no")
    for group, share in zip(graph.groups, macs_shares(graph), strict=True)
  ]
  widths = [max(map(len, column)) for column in zip(_HEAD[:4], *rows, strict=True)]
  members = [_members(group, _WIDTH - sum(widths) - 2 * len(widths)) for group in graph.groups]
  lines = [_line(row, widths, last) for row, last in zip((_HEAD[:4], *rows), (_HEAD[4], *members), strict=True)]
  return "\n".join([head, *lines])


def describe_reasons(graph: ChannelGraph) -> str:
  """Returns each reason of `graph.fixed` once, and below it the kernels that it holds for."""
  kernels: dict[str, list[str]] = {}
  for key, axis, reason in graph.fixed:
    path = key[1:-1] if key[-1] == "kernel" else key[1:]
    is_last = axis == len(graph.shapes[key]) - 1
    kernels.setdefault(reason, []).append("/".join(path) + ("" if is_last else f" axis {axis}"))
  return "\n".join(
    line
    for reason, names in kernels.items()
    for text, indent in ((f"{reason}:", ""), (", ".join(alike(names)), "  "))
    for line in textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ")
  )


def alike(names: Iterable[str]) -> list[str]:
  """Returns names in short: more than two that differ in their numbers alone are one pattern, with their count.

  Example:
    >>> alike(["stem", "block1/conv2", "block2/conv2", "block3/conv2"])
    ['stem', 'block*/conv* (3)']
  """
  found: dict[str, dict[str, None]] = {}
  for name in names:
    found.setdefault(re.sub(r"\d+", "*", name), {})[name] = None
  return [
    text for pattern, same in found.items() for text in ([f"{pattern} ({len(same)})"] if len(same) > 2 else list(same))
  ]


def end_of(name: str, width: int) -> str:
  """Returns the end of a name that is longer than `width` characters, after an ellipsis."""
  return name if len(name) <= width else f"...{name[3 - width :]}"


def _members(group: ChannelGroup, width: int) -> str:
  """Returns the modules of a group in at most `width` characters: writers of its channels, what goes along, readers."""
  roles: dict[str, set[str]] = {}
  producer = group.name.split(":")[0]
  for role in ("out", "vector", "in"):
    for member in sorted(group.members, key=lambda member: "/".join(member.path[:-1]) != producer):
      if member.role == role:
        module = "/".join(member.path[len(group.scope) : -1]) or member.path[-1]
        roles.setdefault(module, set()).add(role)
  names = [" ".join([name, *(role for role in ("in", "out") if role in of)]) for name, of in roles.items()]
  kernels = [name for name, of in zip(names, roles.values(), strict=True) if of != {"vector"}]
  shorter = [(alike(names), ""), *((alike(kernels)[:n], ", ...") for n in range(len(kernels), 0, -1))]
  fitting = (text for shown, end in shorter if len(text := ", ".join(shown) + end) <= width)
  return next(fitting, f"{len(roles)} modules")


def _line(cells: tuple[str, ...], widths: list[int], last: str) -> str:
  name, size, share, joined = (
    cell.ljust(width) if place in (0, 3) else cell.rjust(width)
    for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
  )
  return f"{name}  {size}  {share}  {joined}  {last}".rstrip()
