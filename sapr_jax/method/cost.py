"""Costs of a sub-network, as functions of how many channels each group keeps."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Protocol

from sapr_jax.channels import ChannelGraph
from sapr_jax.channels.graph import ChannelPolynomial
from sapr_jax.checks import shown
from sapr_jax.errors import InputError
from sapr_jax.method.latency import LatencyTable, latency_cost


class Cost(Protocol):
  """A cost of sub-networks: MACs, parameters, a measured latency.

  It should be nondecreasing in the width of every group. `project_to_budget` meets the budget for any cost, but only
  for a nondecreasing one does it find the lowest threshold that the budget allows. `budget_penalty` needs a gradient;
  a table gets one by interpolation.
  """

  @property
  def name(self) -> str:
    """A short name for messages and records, such as "latency_ms"."""

  def __call__(self, kept: Any) -> Any:
    """Evaluates the cost.

    Args:
      kept: Number of kept channels of each group, `[K]`, in the order of `graph.groups`; see `ChannelGraph.kept`.

    Returns:
      For an int64 NumPy array an exact number, an int where the cost is one; for any other array (fractional masks, JAX
      arrays, traced or not) a floating scalar that is differentiable in `kept`.
    """


@dataclasses.dataclass(frozen=True)
class PolynomialCost:
  """A cost that the channel graph knows as a polynomial.

  Attributes:
    name: Its key in `COSTS` and in `ChannelGraph.costs`.
    polynomial: Its value in the numbers of kept channels.
  """

  name: str
  polynomial: ChannelPolynomial

  def __call__(self, kept: Any) -> Any:
    return self.polynomial(kept)


def prunable_macs(graph: ChannelGraph) -> Cost:
  """Multiply-accumulates for one image in the layers that touch a channel group: the paper's cost."""
  return PolynomialCost("prunable_macs", graph.costs["prunable_macs"])


def macs(graph: ChannelGraph) -> Cost:
  """Multiply-accumulates of the whole network for one image."""
  return PolynomialCost("macs", graph.costs["macs"])


def params(graph: ChannelGraph) -> Cost:
  """Number of parameters of the whole network, without running statistics."""
  return PolynomialCost("params", graph.costs["params"])


COSTS: dict[str, Callable[..., Cost]] = {
  "prunable_macs": prunable_macs,
  "macs": macs,
  "params": params,
  "latency": latency_cost,
}
"""Name -> function of a channel graph, and of a `table` of measurements if it has such a parameter."""


def measured_costs() -> list[str]:
  """Returns the names of those that take a table."""
  return [name for name, make in COSTS.items() if "table" in inspect.signature(make).parameters]


def cost_of(name: str, graph: ChannelGraph, table: Callable[[], LatencyTable] | None = None) -> Cost:
  """Returns the cost of that name; the function gives the table of one that needs it.

  Raises:
    InputError: If there is no such cost, or it needs a table and none is given.
  """
  if name not in COSTS:
    raise InputError(f"cost must be one of {', '.join(map(repr, COSTS))}, got {shown(name)}.")
  make = COSTS[name]
  if name not in measured_costs():
    return make(graph)
  if table is None:
    raise InputError(f"cost must come with its measurements, got {name!r} alone; write {make.__name__}(graph, table).")
  return make(graph, table())
