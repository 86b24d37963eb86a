"""The two stages of a run as the loop takes them: training with the method, and fine-tuning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from sapr_jax.channels import Masks, mask_params
from sapr_jax.method import Weighting, channel_norms, relative_weights
from sapr_jax.runtime.devices import loops_are_slow, replicate
from sapr_jax.training import optimizers, steps
from sapr_jax.training.experiment import Experiment
from sapr_jax.training.loop import Record, Stage
from sapr_jax.training.passes import Passes, Purpose
from sapr_jax.training.proposers import Proposer
from sapr_jax.training.state import TrainState


def training_stage(experiment: Experiment, proposer: Proposer, weighting: Weighting = relative_weights) -> Stage:
  """Trains the dense network with partial regularization; from E_start on, masks are renewed before every epoch."""
  config, passes, graph = experiment.config, experiment.passes, experiment.graph
  schedule = _schedule(config.train, passes)
  tx = optimizers.regularized_sgd(config.train, schedule, graph, config.prune, weighting)
  # Until E_start all channels are kept, and the regularization does nothing.
  state = TrainState.create(experiment.variables, tx, masks=graph.full_masks(), proposer=proposer.init())
  model = experiment.model
  masked = jax.jit(lambda params, masks: mask_params(params, graph, masks))
  norms = jax.jit(lambda params: channel_norms(params, graph))
  start = config.prune.start_epoch

  def renew_masks(state: TrainState, epoch: int) -> tuple[TrainState, Record]:
    if epoch < start:
      return state, {}
    clock = time.monotonic()
    proposed, scores, record = proposer.propose(state.proposer, state.variables, epoch)
    if scores is None:
      return dataclasses.replace(state, proposer=proposed), record
    before, masks = jax.device_get(state.masks), experiment.project(scores)
    record = {"generator_seconds": time.monotonic() - clock, **record}
    if epoch > start:  # the first masks have no predecessor
      record["hamming_distance"] = hamming_distance(before, masks)
    return dataclasses.replace(state, proposer=proposed, masks=replicate(masks, passes.mesh)), record

  def evaluate(state: TrainState, epoch: int) -> Record:
    record = _prefixed("test", passes.evaluate(model, state.variables))
    if epoch < start:
      return record
    variables = {**state.variables, "params": masked(state.params, state.masks)}
    masks = jax.device_get(state.masks)
    return {
      **record,
      **_prefixed("subnetwork", passes.evaluate(model, variables)),
      "cost": experiment.budget.cost.name,
      "cost_share": experiment.budget.cost(graph.kept(masks)) / experiment.budget.full,
      "macs_share_of_network": graph.macs(masks) / graph.macs(),
      **norm_summary(jax.device_get(norms(state.params)), masks),
      "widths": {name: int(mask.sum()) for name, mask in masks.items()},
    }

  return _stage("train", config.train, 0, passes, Purpose.TRAIN, model, tx, schedule, state, evaluate, renew_masks)


def finetuning_stage(
  experiment: Experiment, model: nn.Module, variables: Any, *, phase: Any = None, epochs_before: int | None = None
) -> Stage:
  """Trains a network as an ordinary one.

  Args:
    experiment: The run.
    model: The network, such as the pruned one.
    variables: Its variables.
    phase: Its schedule; None for `config.finetune`.
    epochs_before: Epochs of the stages before; None for `config.train.epochs`.
  """
  config, passes = experiment.config, experiment.passes
  phase = config.finetune if phase is None else phase
  schedule = _schedule(phase, passes)
  tx = optimizers.sgd(phase, schedule)

  def evaluate(state: TrainState, epoch: int) -> Record:
    return _prefixed("test", passes.evaluate(model, state.variables))

  before = config.train.epochs if epochs_before is None else epochs_before
  state = TrainState.create(variables, tx)
  return _stage("finetune", phase, before, passes, Purpose.FINETUNE, model, tx, schedule, state, evaluate)


def _stage(
  name: str,
  phase: Any,
  epochs_before: int,
  passes: Passes,
  purpose: Purpose,
  model: nn.Module,
  tx: optax.GradientTransformation,
  schedule: optimizers.Schedule,
  state: TrainState,
  evaluate: Callable[[TrainState, int], Record],
  renew_masks: Callable[[TrainState, int], tuple[TrainState, Record]] | None = None,
) -> Stage:
  """Returns the stage that trains the weights of `model` with `tx`."""
  feed, unroll = passes.feed, loops_are_slow(passes.mesh)
  step = passes.map(steps.weight_step(model, tx, feed.preprocessing, accumulate=phase.accumulate, unroll=unroll))
  shared = passes.shared(purpose)

  def batches(epoch: int, first: int) -> Iterator[Any]:
    return map(step.place, feed.training(phase.batch_size, purpose=purpose, epoch=epoch, first=first))

  return Stage(
    name=name,
    epochs=phase.epochs,
    epochs_before=epochs_before,
    steps_per_epoch=feed.num_train // phase.batch_size,
    learning_rate=schedule,
    first_state=replicate(state, passes.mesh),
    batches=batches,
    step=lambda state, batches: step(state, shared, batches),
    metrics_queue=step.metrics_queue,
    evaluate=evaluate,
    renew_masks=renew_masks,
  )


def _schedule(phase: Any, passes: Passes) -> optimizers.Schedule:
  return optimizers.learning_rate_schedule(phase, passes.feed.num_train // phase.batch_size)


def hamming_distance(before: Masks, after: Masks) -> float:
  """Returns the share of channels on which two architectures differ (supplement D, Fig. 2)."""
  changed = sum(int(np.sum(before[name] != after[name])) for name in after)
  return changed / sum(len(mask) for mask in after.values())


def norm_summary(norms: dict[str, list[np.ndarray]], masks: Masks) -> Record:
  """Returns mean and greatest norm of the dropped channels' slices, and the mean of the kept ones'.

  Args:
    norms: From `channel_norms`.
    masks: The masks in force.
  """
  kept = np.concatenate([n[np.asarray(masks[name]) > 0] for name, rows in norms.items() for n in rows])
  dropped = np.concatenate([n[np.asarray(masks[name]) == 0] for name, rows in norms.items() for n in rows])
  summary = {"kept_norm_mean": float(kept.mean())}
  if dropped.size:
    summary |= {"dropped_norm_mean": float(dropped.mean()), "dropped_norm_max": float(dropped.max())}
  return summary


def _prefixed(prefix: str, metrics: dict[str, float]) -> Record:
  return {f"{prefix}_{name}": value for name, value in metrics.items()}
