"""How strong the regularization is over a whole schedule: the norm that a dropped channel can lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sapr_jax.checks import check_number, is_integer, shown
from sapr_jax.errors import InputError


def shrinkage_of(
  gamma: float, learning_rate: float | Callable[[Any], Any], steps: int | range, *, momentum: float = 0.0
) -> float:
  """Returns the norm that a dropped channel can lose in each kernel, the mean over groups.

      sum over steps of learning_rate(step) / (1 - momentum) * gamma

  Compare it with the norms of filters, of 0.5 to 1.5: a shrinkage of 4 surely takes them to zero against the gradient
  of the loss, one of 0.1 does little. Weights other than `relative_weights` change what it means.

  Args:
    gamma: Strength of the regularization, in either form.
    learning_rate: A number, or a schedule of the step.
    steps: Number of optimizer steps, or those in which masks are in force: `range(start, end)`.
    momentum: That of SGD; 0 where momentum is a mean of gradients.

  Raises:
    InputError: If an argument is out of range.
  """
  check_number("gamma", gamma, "at least 0", lambda x: x >= 0)
  check_number("momentum", momentum, "in [0, 1)", lambda x: 0 <= x < 1)
  if is_integer(steps) and 0 <= steps < 2**31:  # type: ignore[operator]
    steps = range(int(steps))  # type: ignore[arg-type]
  if not isinstance(steps, range) or (steps and min(steps[0], steps[-1]) < 0):
    raise InputError(f"steps must be a number of steps or a range of them, got {shown(steps)}.")
  if callable(learning_rate):
    total = float(np.sum(jax.jit(jax.vmap(learning_rate))(np.arange(steps.start, steps.stop, steps.step))))
  else:
    check_number("learning_rate", learning_rate, "a number of at least 0, or a schedule", lambda x: x >= 0)
    total = float(learning_rate) * len(steps)
  return total / (1.0 - momentum) * gamma


def gamma_for(
  shrinkage: float, learning_rate: float | Callable[[Any], Any], steps: int | range, *, momentum: float = 0.0
) -> float:
  """Returns the gamma with which a dropped channel can lose the norm `shrinkage` over a schedule: see `shrinkage_of`.

  Args:
    shrinkage: The norm to lose; about 4 where a trained network is to be cut without loss.
    learning_rate: A number, or a schedule of the step.
    steps: Number of optimizer steps, or those in which masks are in force: `range(start, end)`.
    momentum: That of SGD.

  Raises:
    InputError: If an argument is out of range, or the learning rate is 0 in all steps.

  Example:
    >>> import sapr_jax as sapr
    >>> round(sapr.gamma_for(4, learning_rate=0.01, steps=800, momentum=0.9), 3)
    0.05
  """
  check_number("shrinkage", shrinkage, "at least 0", lambda x: x >= 0)
  unit = shrinkage_of(1.0, learning_rate, steps, momentum=momentum)
  if not unit > 0:
    raise InputError(f"learning_rate must be above 0 in some of the steps {shown(steps)}, got a sum of {unit}.")
  return float(shrinkage) / unit
