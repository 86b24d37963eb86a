"""A budget on what a sub-network costs: the penalty that leads the generator to it, the projection that meets it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels import ChannelGraph, Masks, check_graph, check_masks
from sapr_jax.checks import check_array, check_concrete, check_integer, check_number, check_type, shown
from sapr_jax.errors import InputError
from sapr_jax.method.cost import COSTS, Cost, PolynomialCost, cost_of

_MACS_OF = {"prunable": "prunable_macs", "network": "macs"}


@dataclasses.dataclass(frozen=True)
class Budget:
  """An upper limit on a cost. `macs_budget`, `params_budget` and `make_budget` make one, and check it.

  Attributes:
    cost: What is limited.
    limit: The most that a sub-network may cost.
    full: What the dense network costs.
  """

  cost: Cost
  limit: float
  full: float

  def __post_init__(self) -> None:
    _check_cost(self.cost)
    for name, value in (("limit", self.limit), ("full", self.full)):
      check_number(name, value, "a number above 0", lambda x: x > 0, may_be_traced=True)

  @property
  def share(self) -> float:
    """The limit as a share of the dense network's cost."""
    return self.limit / self.full


def macs_budget(
  graph: ChannelGraph,
  p: float | None = None,
  *,
  amount: float | None = None,
  of: Literal["prunable", "network"] = "prunable",
) -> Budget:
  """Limits the multiply-accumulates for one image.

  Args:
    graph: The channel graph.
    p: Share of the dense network's MACs to keep, in (0, 1].
    amount: Number of MACs to keep, in place of `p`.
    of: "prunable" counts the layers that touch a channel group, as the paper does; "network" counts all of them.

  Raises:
    InputError: If both or neither of `p` and `amount` are given, or one is out of range; see `make_budget`.

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(2, (3, 3))])
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 10, 10, 3)))
    >>> graph = sapr.trace_channels(model, variables, (1, 10, 10, 3), select="unjoined")
    >>> sapr.macs_budget(graph, 0.5).limit
    18000.0
    >>> sapr.macs_budget(graph, amount=9_000, of="network").share
    0.25
  """
  if not isinstance(of, str) or of not in _MACS_OF:
    raise InputError(f"of must be one of {', '.join(map(repr, _MACS_OF))}, got {shown(of)}.")
  return _budget(graph, _MACS_OF[of], "p", p, amount)


def params_budget(graph: ChannelGraph, p: float | None = None, *, amount: float | None = None) -> Budget:
  """Limits the number of parameters of the whole network, to the share `p` of the dense one's or to `amount`.

  Raises:
    InputError: If both or neither of `p` and `amount` are given, or one is out of range; see `make_budget`.
  """
  return _budget(graph, "params", "p", p, amount)


def make_budget(
  graph: ChannelGraph, cost: str | Cost, share: float | None = None, amount: float | None = None
) -> Budget:
  """Limits any cost.

  Args:
    graph: The channel graph.
    cost: A name in `COSTS`, or a cost: of your own, or `latency_cost(graph, table)`.
    share: Share of the dense network's cost to keep, in (0, 1].
    amount: The limit itself, in place of `share`.

  Raises:
    InputError: If `cost` is unknown, both or neither of `share` and `amount` are given, `share` is not in (0, 1],
      `amount` exceeds the dense network's cost, or the limit is below the cost of one channel a group.
  """
  return _budget(graph, cost, "share", share, amount)


def _budget(graph: ChannelGraph, cost: str | Cost, name: str, share: float | None, amount: float | None) -> Budget:
  """Limits any cost; the caller knows its share by `name`."""
  check_graph(graph)
  cost = _check_cost(cost_of(cost, graph) if isinstance(cost, str) and cost in COSTS else cost)
  if (share is None) == (amount is None):
    raise InputError(
      f"A budget must be given as a share or as an amount, got {'neither' if share is None else 'both'}; write"
      " macs_budget(graph, 0.5) or macs_budget(graph, amount=30e6)."
    )
  full = cost(graph.kept())
  check_number(f"The cost {cost.name} of the dense network", full, "a number above 0", lambda x: x > 0)
  full = float(full)
  if share is not None:
    check_number(name, share, "a number in (0, 1]", lambda x: 0 < x <= 1, cure="it is the share of the cost to keep")
    limit = float(share) * full
  else:
    must = f"above 0 and at most {amount_in_words(full)} {cost.name}, all there are"
    check_number("amount", amount, must, lambda x: 0 < x <= full)
    limit = float(amount)  # type: ignore[arg-type]
  budget = Budget(cost, limit, full)
  check_budget(graph, budget)
  return budget


def check_budget(graph: ChannelGraph, budget: Budget, *, min_width: int = 1, round_to: int = 1) -> None:
  """Checks that the smallest widths meet the budget; arguments as in `project_to_budget`.

  Raises:
    InputError: If `min_width` or `round_to` is not an integer of at least 1, or the smallest widths exceed the budget.
  """
  check_graph(graph)
  check_is_budget(budget)
  check_concrete("budget", budget.limit, "it")
  check_integer("min_width", min_width, 1)
  check_integer("round_to", round_to, 1)
  least = budget.cost(np.array([_widths(group.size, min_width, round_to)[0] for group in graph.groups], np.int64))
  if least > budget.limit:
    raise InputError(
      f"The budget must be at least {amount_in_words(least)} {budget.cost.name} ({least / budget.full:.4f} of all), the"
      f" cost of the smallest widths (min_width={min_width}, round_to={round_to}), got {amount_in_words(budget.limit)}"
      f" ({budget.share:.4f}); raise it, or lower min_width or round_to."
    )


def check_is_budget(budget: Any) -> None:
  check_type("budget", budget, Budget, "macs_budget(graph, 0.5) makes one of half the MACs")


def _check_cost(cost: Any) -> Cost:
  if not callable(cost) or not isinstance(getattr(cost, "name", None), str):
    raise InputError(
      f"cost must be one of {', '.join(COSTS)}, or a function with a `name`, got {shown(cost)}; see Cost."
    )
  return cost


def budget_penalty(graph: ChannelGraph, masks: Masks, budget: Budget) -> jax.Array:
  """Penalizes masks whose cost exceeds the budget.

      log(max(T, limit) / limit)

  where T is the cost with `masks`. It is zero within the budget, and its gradient does not depend on the size of the
  network.

  Args:
    graph: The channel graph.
    masks: Group name -> array `[group.size]`, differentiable.
    budget: The budget; its limit may be traced.

  Returns:
    Scalar, at least 0.

  Raises:
    InputError: If `masks` does not fit `graph`.
  """
  check_masks(graph, masks)
  check_is_budget(budget)
  cost = budget.cost(graph.kept(masks))
  cost = float(cost) if isinstance(cost, int) else cost  # of concrete masks; it may exceed int32
  return jnp.log(jnp.maximum(cost, budget.limit) / budget.limit)


def project_to_budget(
  graph: ChannelGraph, scores: Mapping[str, Any], budget: Budget, *, min_width: int = 1, round_to: int = 1
) -> dict[str, np.ndarray]:
  """Keeps the highest-ranked channels that the budget allows.

  All channels of the network are ranked together by score. The threshold is lowered as far as the budget allows, and
  then single steps of the groups that still fit are added in order of rank, so that what is left of the budget is less
  than any group's next step.

  A cost may rise in steps, as a measured latency does. Then groups first take only widths that are worth their cost:
  none that is as good as free to widen, nor one just above a step. What these leave of the budget goes to any width.

  The result never exceeds the budget, and no group could take one more step, whatever the cost. A cost that falls
  somewhere as a width grows can make the search stop at a higher threshold than need be.

  Args:
    graph: The channel graph.
    scores: Group name -> `[group.size]`, higher is kept first: the generator's outputs, or one of `IMPORTANCES`.
    budget: What the sub-network may cost.
    min_width: Channels that each group keeps at least (all of a group that has fewer).
    round_to: Widths are multiples of this, or the group's full size.

  Returns:
    Group name -> 0/1 float32 array `[group.size]`, whose cost is at most `budget.limit`.

  Raises:
    InputError: If the scores do not fit `graph` or hold a NaN, `min_width` or `round_to` is not an integer of at least
      1, or even the smallest widths exceed the budget.

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)])
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3)))
    >>> graph = sapr.trace_channels(model, variables, (1, 3), select="unjoined")
    >>> sapr.project_to_budget(graph, {"layers_0": [0.1, 0.4, 0.3, 0.2]}, sapr.macs_budget(graph, 0.5))
    {'layers_0': array([0., 1., 1., 0.], dtype=float32)}
  """
  check_budget(graph, budget, min_width=min_width, round_to=round_to)
  _check_scores(graph, scores)
  ladders = [_widths(group.size, min_width, round_to) for group in graph.groups]
  order = [np.argsort(-np.asarray(scores[group.name], np.float64), kind="stable") for group in graph.groups]
  ranked = [np.asarray(scores[g.name], np.float64)[o] for g, o in zip(graph.groups, order, strict=True)]

  def climb(ladders: Sequence[Sequence[int]], price: Callable[[np.ndarray], float], widths: Any) -> np.ndarray:
    """Returns the widths after all steps that fit: from `widths` on, or from the lowest threshold."""
    prices = [
      np.array([price(s[low:high]) for low, high in itertools.pairwise(ladder)])
      for s, ladder in zip(ranked, ladders, strict=True)
    ]

    def widths_after(steps: np.ndarray) -> np.ndarray:
      return np.array([ladder[step] for ladder, step in zip(ladders, steps, strict=True)], np.int64)

    def fits(steps: np.ndarray) -> bool:
      return budget.cost(widths_after(steps)) <= budget.limit

    if widths is None:
      steps = _steps_of_lowest_threshold(prices, fits)
    else:
      steps = np.array([ladder.index(width) for ladder, width in zip(ladders, widths, strict=True)], np.int64)
    while (group_index := _next_step(steps, prices, fits)) is not None:
      steps[group_index] += 1
    return widths_after(steps)

  # A step is taken at the score of the last channel that it adds, and at their mean where steps are uneven.
  worthwhile = [_worthwhile(budget.cost, graph.kept(), k, ladder) for k, ladder in enumerate(ladders)]
  if worthwhile == ladders:
    widths = climb(ladders, np.min, None)
  else:
    widths = climb(ladders, np.min, climb(worthwhile, np.mean, None))
  masks = {}
  for group, chosen, width in zip(graph.groups, order, widths, strict=True):
    mask = np.zeros(group.size, np.float32)
    mask[chosen[:width]] = 1.0
    masks[group.name] = mask
  return masks


def _widths(size: int, min_width: int, round_to: int) -> list[int]:
  """Returns the widths that a group may take, ascending."""
  widths = [width for width in range(min_width, size) if width % round_to == 0]
  return [*widths, size]


_REACH, _SLACK = 8, 0.25
"""Channels below and above a width that it is compared with, and how far it may lie above the line between two of them,
as a share of how much the cost rises over all of them."""


def _worthwhile(cost: Cost, full: np.ndarray, k: int, ladder: list[int]) -> list[int]:
  """Returns those widths of group k that are worth their cost while all other groups are whole.

  That is none from which the next is free, and none just above a step: where a mixture of a narrower and a wider one
  would cost much less. The first and the last are always among them.
  """
  if isinstance(cost, PolynomialCost):  # which has no steps
    return ladder
  prices = np.array([float(cost(np.where(np.arange(full.size) == k, width, full))) for width in ladder])
  found = ladder[:1]
  for i in range(1, len(ladder) - 1):
    below = [j for j in range(i) if ladder[i] - ladder[j] <= _REACH or j == i - 1]
    above = [j for j in range(i + 1, len(ladder)) if ladder[j] - ladder[i] <= _REACH or j == i + 1]
    shares = [[(ladder[i] - ladder[a]) / (ladder[b] - ladder[a]) for b in above] for a in below]
    lines = prices[below][:, None] * (1 - np.array(shares)) + prices[above] * np.array(shares)
    is_step = prices[i] - lines.min() > _SLACK * (prices[above[-1]] - prices[below[0]])
    if prices[i] < prices[i + 1] and not is_step:
      found.append(ladder[i])
  return [*found, ladder[-1]] if len(ladder) > 1 else found


def _steps_of_lowest_threshold(prices: Sequence[np.ndarray], fits: Callable[[np.ndarray], bool]) -> np.ndarray:
  """Returns how many steps each group takes at the lowest threshold that fits; none at all if no threshold does."""
  thresholds = np.unique(np.concatenate(prices))[::-1]

  def steps_above(count: int) -> np.ndarray:
    return np.array([np.sum(row >= thresholds[count - 1]) if count else 0 for row in prices], np.int64)

  low, high = 0, len(thresholds)  # taking the steps of the first `low` thresholds fits
  while low < high:
    middle = (low + high + 1) // 2
    if fits(steps_above(middle)):
      low = middle
    else:
      high = middle - 1
  return steps_above(low)


def _next_step(steps: np.ndarray, prices: Sequence[np.ndarray], fits: Callable[[np.ndarray], bool]) -> int | None:
  """Returns the group whose next step has the highest score among those that fit."""
  candidates = sorted((k for k, row in enumerate(prices) if steps[k] < len(row)), key=lambda k: -prices[k][steps[k]])
  for k in candidates:
    trial = steps.copy()
    trial[k] += 1
    if fits(trial):
      return k
  return None


def check_scores(scores: Any) -> None:
  """Raises `InputError` unless `scores` maps names of groups to arrays; they may be traced."""
  if not isinstance(scores, Mapping):
    raise InputError(f"scores must map the names in graph.groups to arrays, got {shown(scores)}.")
  for name, values in scores.items():
    check_array(f"The scores of group {shown(name)}", values, (None,))


def _check_scores(graph: ChannelGraph, scores: Mapping[str, Any]) -> None:
  check_scores(scores)
  check_concrete("scores", list(scores.values()), "project_to_budget")
  if extra := sorted(map(str, set(scores) - {group.name for group in graph.groups})):
    raise InputError(f"scores must name the groups in graph.groups, got an unknown group {extra[0]!r}.")
  for group in graph.groups:
    if group.name not in scores:
      raise InputError(f"scores must have one array for each of graph.groups, got none for {group.name!r}.")
    check_array(f"The scores of group {group.name!r}", scores[group.name], (group.size,))
    if np.isnan(np.asarray(scores[group.name], np.float64)).any():
      raise InputError(f"The scores of group {group.name!r} must be numbers, got a NaN; what they come from diverged.")


def amount_in_words(amount: float) -> str:
  """Writes an amount of any cost: MACs in full, milliseconds with their decimals."""
  return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"
