"""What the widths of the sub-network are multiples of, where the configuration leaves it open."""

from __future__ import annotations

from typing import Any

from sapr_jax.channels import ChannelGraph
from sapr_jax.errors import InputError
from sapr_jax.method import check_budget, macs_budget

DEFAULT_ROUND_TO = {
  "cpu": 8,  # measured, see docs/performance.md: faster than uneven widths at the same MACs, 16 is no better
  "gpu": 8,  # not measured here: tensor cores read 16 bytes at once, eight channels of bfloat16
  "tpu": 8,  # not measured here: registers have eight rows
}
"""Platform -> what widths are multiples of; 1 on any other."""

_LEAST_CHOICE = 8
"""Widths that each group must be able to take: where rounding would leave less, accuracy goes before speed."""


def resolve_round_to(prune: Any, graph: ChannelGraph, platform: str) -> int:
  """Returns `prune.round_to`; unset, what suits platform and network, or 1 if that cannot meet the budget."""
  if prune.round_to is not None:
    return prune.round_to
  value = default_round_to(platform, min(group.size for group in graph.groups))
  try:
    check_budget(graph, macs_budget(graph, prune.p), min_width=prune.min_width, round_to=value)
  except InputError:
    return 1
  return value


def default_round_to(platform: str, narrowest: int) -> int:
  """Returns what suits a platform, for a network whose narrowest group has so many channels."""
  value = DEFAULT_ROUND_TO.get(platform, 1)
  return value if narrowest >= _LEAST_CHOICE * value else 1
