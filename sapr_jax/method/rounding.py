"""Widths that suit the hardware: the number that they should be multiples of."""

from __future__ import annotations

from sapr_jax.channels import ChannelGraph, check_graph
from sapr_jax.errors import InputError
from sapr_jax.method.budget import Budget, check_budget
from sapr_jax.method.latency import LatencyCost

DEFAULT_ROUND_TO = {
  "cpu": 8,  # measured, see docs/performance.md: faster than uneven widths at the same MACs, 16 is no better
  "gpu": 8,  # not measured here: tensor cores read 16 bytes at once, eight channels of bfloat16
  "tpu": 8,  # not measured here: registers have eight rows
}
"""Platform -> default; 1 on any other."""

_LEAST_CHOICE = 8
"""Number of widths that each group must be able to take: with fewer, rounding would cost accuracy."""


def default_round_to(graph: ChannelGraph, budget: Budget, platform: str, *, min_width: int = 1) -> int:
  """Returns the `round_to` of `project_to_budget` that suits a platform and a network.

  Args:
    graph: The channel graph of the network.
    budget: The budget that widths must meet.
    platform: "cpu", "gpu" or "tpu", as a `jax.Device` has it.
    min_width: Channels that each group keeps at least.

  Returns:
    1 where the budget is in latency, whose table has the steps of the hardware; where the narrowest group would have
    less than eight widths to choose from; and where rounded widths cannot meet the budget.
  """
  check_graph(graph)
  if isinstance(budget.cost, LatencyCost):
    return 1
  value = DEFAULT_ROUND_TO.get(platform, 1)
  if min(group.size for group in graph.groups) < _LEAST_CHOICE * value:
    return 1
  try:
    check_budget(graph, budget, min_width=min_width, round_to=value)
  except InputError:
    return 1
  return value
