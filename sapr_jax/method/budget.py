"""The MACs budget: the penalty that leads the generator to it, and the projection that meets it."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels import ChannelGraph, Masks
from sapr_jax.errors import InputError


def macs_penalty(graph: ChannelGraph, masks: Masks, p: float) -> jax.Array:
  """Penalizes masks whose MACs exceed the budget.

      log(max(T, p T_total) / (p T_total))

  where T are the MACs with `masks` of the layers that touch a channel group and T_total those of the dense network. It
  is zero within the budget, and its gradient does not depend on the size of the network.

  Args:
    graph: The channel graph.
    masks: Group name -> array `[group.size]`, differentiable.
    p: Share of the prunable MACs to keep, in (0, 1].

  Returns:
    Scalar, at least 0.

  Raises:
    InputError: If p is a number and not in (0, 1], or `masks` does not fit `graph`.
  """
  check_share(p)
  budget = p * graph.prunable_macs()
  return jnp.log(jnp.maximum(graph.prunable_macs(masks), budget) / budget)


def project_to_budget(
  graph: ChannelGraph, scores: Mapping[str, Any], p: float, *, min_width: int = 1, round_to: int = 1
) -> dict[str, np.ndarray]:
  """Keeps the highest-ranked channels that the MACs budget allows.

  All channels of the network are ranked together by score. The threshold is lowered as far as the budget allows, and
  then single steps of the groups that still fit are added in order of rank, so that what is left of the budget is less
  than any group's next step.

  Args:
    graph: The channel graph.
    scores: Group name -> `[group.size]`, higher is kept first: the generator's outputs.
    p: Share of the prunable MACs to keep, in (0, 1].
    min_width: Channels that each group keeps at least (all of a group that has fewer).
    round_to: Widths are multiples of this, or the group's full size.

  Returns:
    Group name -> 0/1 float32 array `[group.size]`, whose `graph.prunable_macs` is at most p times the dense one's.

  Raises:
    InputError: If p is not in (0, 1], the scores do not fit `graph` or hold a NaN, `min_width` or `round_to` is below
      1, or even the least widths exceed the budget.
  """
  check_budget(graph, p, min_width=min_width, round_to=round_to)
  _check_scores(graph, scores)
  ladders = [_widths(group.size, min_width, round_to) for group in graph.groups]
  order = [np.argsort(-np.asarray(scores[group.name], np.float64), kind="stable") for group in graph.groups]
  ranked = [np.asarray(scores[g.name], np.float64)[o] for g, o in zip(graph.groups, order, strict=True)]
  budget = p * graph.prunable_macs()

  def macs(steps: np.ndarray) -> int:
    return graph.costs["prunable_macs"](np.array([ladder[step] for ladder, step in zip(ladders, steps, strict=True)]))

  steps = np.zeros(len(ladders), np.int64)
  # A step is taken at the score of the last channel that it adds.
  prices = [
    [scores_k[ladder[s + 1] - 1] for s in range(len(ladder) - 1)]
    for ladder, scores_k in zip(ladders, ranked, strict=True)
  ]
  thresholds = np.unique([price for row in prices for price in row])[::-1]
  low, high = 0, len(thresholds)  # keeping the steps of the first `low` thresholds fits
  while low < high:
    middle = (low + high + 1) // 2
    if macs(_steps_above(prices, thresholds[middle - 1])) <= budget:
      low = middle
    else:
      high = middle - 1
  if low:
    steps = _steps_above(prices, thresholds[low - 1])
  while (step := _next_step(steps, prices, macs, budget)) is not None:
    steps[step] += 1

  masks = {}
  for group, ladder, chosen, taken in zip(graph.groups, ladders, order, steps, strict=True):
    mask = np.zeros(group.size, np.float32)
    mask[chosen[: ladder[taken]]] = 1.0
    masks[group.name] = mask
  return masks


def check_budget(graph: ChannelGraph, p: float, *, min_width: int = 1, round_to: int = 1) -> None:
  """Checks that some masks meet the budget; arguments as in `project_to_budget`.

  Raises:
    InputError: If p is not in (0, 1], `min_width` or `round_to` is below 1, or the least widths exceed the budget.
  """
  check_share(p)
  for name, value in (("min_width", min_width), ("round_to", round_to)):
    if not isinstance(value, int | np.integer) or value < 1:
      raise InputError(f"{name}={value!r} is out of range; expected a whole number of at least 1.")
  least = graph.costs["prunable_macs"](
    np.array([_widths(group.size, min_width, round_to)[0] for group in graph.groups])
  )
  if least > p * graph.prunable_macs():
    raise InputError(
      f"p={p} cannot be met: the smallest widths (min_width={min_width}, round_to={round_to}) already take"
      f" {least / graph.prunable_macs():.4f} of the prunable MACs; raise p or lower min_width and round_to."
    )


def check_share(p: Any) -> None:
  """Raises InputError unless p is in (0, 1]; a traced p is not looked at."""
  if isinstance(p, jax.core.Tracer):
    return
  if jnp.ndim(p) or not isinstance(p, numbers.Real | np.ndarray | jax.Array) or not 0.0 < float(p) <= 1.0:
    raise InputError(f"p={p} is not a share of the MACs to keep; expected 0 < p <= 1.")


def _check_scores(graph: ChannelGraph, scores: Mapping[str, Any]) -> None:
  if extra := sorted(map(str, set(scores) - {group.name for group in graph.groups})):
    raise InputError(f"scores names an unknown group {extra[0]!r}; expected the names in graph.groups.")
  for group in graph.groups:
    if group.name not in scores:
      raise InputError(f"scores misses the group {group.name!r}; expected one array for each of graph.groups.")
    if np.shape(scores[group.name]) != (group.size,):
      raise InputError(
        f"The scores of group {group.name!r} have shape {np.shape(scores[group.name])}; expected ({group.size},)."
      )
    if np.isnan(scores[group.name]).any():
      raise InputError(f"The scores of group {group.name!r} hold a NaN; the generator or what it learns from diverged.")


def _widths(size: int, min_width: int, round_to: int) -> list[int]:
  """Returns the widths that a group may take, ascending."""
  widths = [width for width in range(min_width, size) if width % round_to == 0]
  return [*widths, size]


def _steps_above(prices: list[list[float]], threshold: float) -> np.ndarray:
  return np.array([sum(1 for price in row if price >= threshold) for row in prices], np.int64)


def _next_step(
  steps: np.ndarray, prices: list[list[float]], macs: Callable[[np.ndarray], int], budget: float
) -> int | None:
  """Returns the group whose next step has the highest score among those that fit."""
  candidates = sorted((k for k, row in enumerate(prices) if steps[k] < len(row)), key=lambda k: -prices[k][steps[k]])
  for k in candidates:
    trial = steps.copy()
    trial[k] += 1
    if macs(trial) <= budget:
      return k
  return None
