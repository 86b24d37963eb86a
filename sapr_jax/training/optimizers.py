"""Learning-rate schedules and optimizers, from the fields of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sapr_jax.channels import ChannelGraph
from sapr_jax.method import Weighting, regularize_by_penalty, regularize_by_prox, relative_weights, shrinkage_of

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

      rate(step) = schedule(step) * batch_size / base_batch_size * min(1, (step + 1) / warm-up steps)

  The first factor is there if `base_batch_size` is given, the second if `warmup_epochs` is above zero.

  Args:
    phase: `config.train` or `config.finetune`.
    steps_per_epoch: Optimizer steps in an epoch.

  References:
    Goyal et al., Accurate, large minibatch SGD, 2017: the linear scaling rule and the gradual warm-up.
  """
  of_float = SCHEDULES[phase.schedule](phase, steps_per_epoch)

  def schedule(step: Any) -> Any:
    return of_float(jnp.asarray(step, jnp.float32))  # optax leaves the conversion of an int32 to implicit promotion

  scale = 1.0 if phase.base_batch_size is None else phase.batch_size / phase.base_batch_size
  warmup = phase.warmup_epochs * steps_per_epoch
  if not warmup and scale == 1.0:
    return schedule
  return lambda step: schedule(step) * scale * (jnp.minimum(1.0, jnp.float32(step + 1) / warmup) if warmup else 1.0)


MIN_NDIM_OF_DECAYED: Mapping[str, int] = {"all": 0, "kernels": 2, "convolutions": 3}
"""Value of `weight_decay_of` -> the least `ndim` of a parameter that weight decay shrinks."""


def sgd(phase: Any, schedule: Schedule) -> optax.GradientTransformation:
  """SGD with momentum and weight decay, by default on all parameters, as in PyTorch's examples (supplement A)."""
  decay = optax.add_decayed_weights(phase.weight_decay, mask=_decayed(phase))
  return optax.chain(decay, optax.sgd(schedule, phase.momentum or None, nesterov=phase.nesterov))


def adamw(phase: Any, schedule: Schedule) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter, ICLR 2019); `phase.momentum` is its beta_1."""
  return optax.adamw(
    schedule, b1=phase.momentum, weight_decay=phase.weight_decay, mask=_decayed(phase), nesterov=phase.nesterov
  )


def _decayed(phase: Any) -> Callable[[Any], Any]:
  ndim = MIN_NDIM_OF_DECAYED[phase.weight_decay_of]
  return lambda params: jax.tree.map(lambda w: w.ndim >= ndim, params)


OPTIMIZERS: Mapping[str, Callable[[Any, Schedule], optax.GradientTransformation]] = {"sgd": sgd, "adamw": adamw}
"""Name -> function of (phase, learning rate as a function of the step); a phase is `config.train` or `config.finetune`.

`phase.weight_decay_of` says which parameters are decayed, see `MIN_NDIM_OF_DECAYED`.
"""


def optimizer(phase: Any, schedule: Schedule) -> optax.GradientTransformation:
  """Returns the optimizer that `phase.optimizer` names."""
  return OPTIMIZERS[phase.optimizer](phase, schedule)


@dataclasses.dataclass(frozen=True)
class Regularization:
  """The partial regularization of a run.

  Attributes:
    form: "penalty" or "proximal".
    gamma: Its strength.
    weighting: Weights of the groups, see `method.regularization`.
  """

  form: str
  gamma: float
  weighting: Weighting = relative_weights


def regularization(config: Any, steps_per_epoch: int, weighting: Weighting = relative_weights) -> Regularization:
  """Returns the regularization that `config.prune` asks for, by its gamma or by its shrinkage."""
  gamma, prune = config.prune.gamma, config.prune
  if prune.shrinkage is not None and (unit := shrinkage(config, steps_per_epoch, 1.0)):
    gamma = prune.shrinkage / unit
  return Regularization(prune.form, gamma, weighting)


def shrinkage(config: Any, steps_per_epoch: int, gamma: float) -> float:
  """Returns how much of its norm a dropped channel can lose, the mean over groups, in each kernel.

  sum over the steps from E_start on of learning_rate / (1 - momentum) * gamma
  """
  steps = range(config.prune.start_epoch * steps_per_epoch, config.train.epochs * steps_per_epoch)
  schedule = learning_rate_schedule(config.train, steps_per_epoch)
  return shrinkage_of(gamma, schedule, steps, momentum=config.train.momentum)


def regularized_optimizer(
  phase: Any, schedule: Schedule, graph: ChannelGraph, how: Regularization
) -> optax.GradientTransformationExtraArgs:
  """The optimizer with the partial regularization: a penalty before it, or a proximal step after it.

  Args:
    phase: `config.train`.
    schedule: The learning rate as a function of the step.
    graph: The channel graph of the network.
    how: The regularization.
  """
  # That masks come in time, the stage sees to; a call of the host would keep the program out of the cache on disk.
  options: Any = {"weighting": how.weighting, "expected_from": None}
  if how.form == "penalty":
    return optax.chain(regularize_by_penalty(graph, how.gamma, **options), optimizer(phase, schedule))
  prox = regularize_by_prox(graph, schedule, how.gamma, momentum=phase.momentum, **options)
  return optax.chain(optimizer(phase, schedule), prox)
