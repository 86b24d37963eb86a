"""Learning-rate schedules and optimizers, from the fields of a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optax

Schedule = Callable[[Any], Any]


def _step_decay(phase: Any, steps_per_epoch: int) -> Schedule:
  boundaries = {epoch * steps_per_epoch: phase.decay_factor for epoch in phase.decay_epochs}
  return optax.piecewise_constant_schedule(phase.learning_rate, boundaries)


def _cosine(phase: Any, steps_per_epoch: int) -> Schedule:
  return optax.cosine_decay_schedule(phase.learning_rate, max(1, phase.epochs * steps_per_epoch))


SCHEDULES: Mapping[str, Callable[[Any, int], Schedule]] = {"step": _step_decay, "cosine": _cosine}
"""Name -> function of (phase, steps per epoch); a phase is `config.train` or `config.finetune`."""


def learning_rate_schedule(phase: Any, steps_per_epoch: int) -> Schedule:
  """Returns the learning rate as a function of the optimizer's step.

  Args:
    phase: `config.train` or `config.finetune`: fields schedule, learning_rate, decay_epochs, decay_factor, epochs.
    steps_per_epoch: Optimizer steps in an epoch.
  """
  return SCHEDULES[phase.schedule](phase, steps_per_epoch)


def sgd(phase: Any, schedule: Schedule) -> optax.GradientTransformation:
  """SGD with momentum and weight decay on every parameter, as in PyTorch's training examples (supplement A)."""
  return optax.chain(
    optax.add_decayed_weights(phase.weight_decay), optax.sgd(schedule, phase.momentum or None, nesterov=phase.nesterov)
  )
