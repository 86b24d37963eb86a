"""A generator that starts from knowledge: from an importance of the channels, and at the budget.

As the paper has it, the generator starts from nothing and keeps nearly all channels. In a short search its ranking is
then still mostly that of its random weights, see `progress`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels import ChannelGraph
from sapr_jax.errors import InputError
from sapr_jax.method.budget import Budget
from sapr_jax.method.generator import keep_probability
from sapr_jax.method.importance import Scores

_HEADS_SCALE = 0.05
"""Factor of the first kernel of the heads: small beside a deviation of the prior, but not zero, which learns slowly."""

_HALVINGS = 60
"""Of an interval, which then is as small as float64 has it."""


def outputs_of_prior(
  graph: ChannelGraph, scores: Scores, budget: Budget, *, strength: float, bias: float
) -> dict[str, np.ndarray]:
  """Computes the outputs o with which a generator begins: importances in place of noise, and samples at the budget.

      o[c] = strength * score[c] / deviation of all scores + shift - b

  The shift is the one for which widths as wide as the draws of Eq. 1 are in the mean cost what the budget allows.

  Args:
    graph: The channel graph.
    scores: Importance of each channel, comparable between groups: see `relative_to_group_mean`.
    budget: The budget.
    strength: Standard deviations of g, of about 1, to which one deviation of the scores amounts.
    bias: b of Eq. 1.

  Returns:
    Group name -> `[group.size]`, in the order of the scores.

  Raises:
    InputError: If the scores are all the same.

  References:
    `keep_probability` for the distribution of the draws.
  """
  values = {group.name: np.asarray(scores[group.name], np.float64) for group in graph.groups}
  deviation = float(np.std(np.concatenate(list(values.values()))))
  if not deviation > 0:
    raise InputError("the importances of a prior must differ between channels, got the same for all; take another one.")
  scaled = {name: strength * score / deviation for name, score in values.items()}

  def cost(shift: float) -> float:
    widths = [float(np.sum(keep_probability(jnp.asarray(row + shift), bias=0.0))) for row in scaled.values()]
    return float(budget.cost(jnp.asarray(widths)))

  widest = max(float(np.abs(row).max()) for row in scaled.values())
  low, high = -widest - 30.0, widest + 30.0  # nothing is kept, and everything
  for _ in range(_HALVINGS):
    middle = (low + high) / 2
    low, high = (middle, high) if cost(middle) <= budget.limit else (low, middle)
  return {name: row + low - bias for name, row in scaled.items()}


def start_from(variables: Any, graph: ChannelGraph, outputs: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the variables of a generator that gives about `outputs`, and learns to deviate from them.

  The outputs become the bias of the heads, and their kernel is scaled down.

  Args:
    variables: Variables of an `ArchitectureGenerator` that has learned nothing.
    graph: Its channel graph.
    outputs: Group name -> `[group.size]`.
  """
  params = dict(variables["params"])
  bias = np.array(params["heads_bias"])
  for row, group in zip(bias, graph.groups, strict=True):
    row[: group.size] = outputs[group.name]
  params["heads_bias"] = jnp.asarray(bias)
  params["heads_kernel"] = params["heads_kernel"] * _HEADS_SCALE
  return {**variables, "params": params}


def reorder(scores: Scores, importance: Scores) -> dict[str, np.ndarray]:
  """Hands out the scores of each group again: the highest to the most important channel, and so on.

  The widths that `project_to_budget` chooses stay the same. Which channels of a group fill them, the importance says.

  Example:
    >>> import numpy as np
    >>> reorder({"conv": np.array([3.0, 1.0, 2.0])}, {"conv": np.array([0.1, 0.3, 0.2])})
    {'conv': array([1., 3., 2.])}
  """

  def one(values: Any, order_by: Any) -> np.ndarray:
    values = np.asarray(values)
    result = np.empty_like(values)
    result[np.argsort(-np.asarray(order_by), kind="stable")] = -np.sort(-values)
    return result

  return {name: one(values, importance[name]) for name, values in jax.device_get(dict(scores)).items()}
