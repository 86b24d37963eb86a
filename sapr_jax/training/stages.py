"""The two stages of a run as the loop takes them: training with the method, and fine-tuning."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax import report
from sapr_jax.channels import Masks, mask_params
from sapr_jax.errors import DivergedError
from sapr_jax.method import Weighting, channel_norms, relative_weights, set_masks
from sapr_jax.runtime import replicate
from sapr_jax.training import optimizers
from sapr_jax.training.distillation import Distillation
from sapr_jax.training.experiment import Experiment
from sapr_jax.training.loop import Record, Stage
from sapr_jax.training.passes import Passes, Purpose, WeightPass
from sapr_jax.training.proposers import Proposer
from sapr_jax.training.state import TrainState


def training_stage(experiment: Experiment, proposer: Proposer, weighting: Weighting = relative_weights) -> Stage:
  """Trains the dense network with partial regularization; from E_start on, masks are in force.

  They are renewed before every epoch. The search that proposes them may begin earlier, and end earlier than training.
  """
  config, passes, graph = experiment.config, experiment.passes, experiment.graph
  schedule, steps_per_epoch = _schedule(config.train, passes), passes.feed.num_train // config.train.batch_size
  tx = optimizers.regularized_optimizer(
    config.train, schedule, graph, optimizers.regularization(config, steps_per_epoch, weighting)
  )
  distilled = any(config[name].distillation.weight for name in ("train", "finetune"))
  # Until E_start the masks in the optimizer state keep all channels, and the regularization does nothing.
  state = TrainState.create(
    experiment.variables,
    tx,
    proposer=proposer.init(),
    teacher=jax.tree.map(jnp.copy, experiment.variables) if distilled else (),
  )
  model = experiment.model
  masked = jax.jit(lambda params, masks: mask_params(params, graph, masks))
  norms = jax.jit(lambda params: channel_norms(params, graph))
  start = config.prune.start_epoch
  searched = range(*experiment.search_epochs)

  def renew_masks(state: TrainState, epoch: int) -> tuple[TrainState, Record]:
    if distilled and epoch == start:  # a copy, as the state is donated
      state = dataclasses.replace(state, teacher=jax.tree.map(jnp.copy, state.variables))
    if epoch not in searched:
      return state, {}
    clock = time.monotonic()
    proposed, scores, record = proposer.propose(state.proposer, state.variables, epoch)
    proposed = replicate(proposed, passes.mesh)
    if scores is None:
      return dataclasses.replace(state, proposer=proposed), record
    if bad := next((name for name, values in scores.items() if np.isnan(values).any()), None):
      raise DivergedError(
        f"the scores of group {bad!r} hold a NaN before epoch {epoch + 1} of train: what they come from diverged; lower"
        " generator.learning_rate or train.learning_rate. The last checkpoint is kept."
      )
    before, masks = jax.device_get(state.masks), experiment.project(scores)
    record = {"generator_seconds": time.monotonic() - clock, **record}
    if epoch < start:  # it is searched for, and not yet in force
      return dataclasses.replace(state, proposer=proposed), record
    if epoch > start:  # the first masks have no predecessor
      record["hamming_distance"] = hamming_distance(before, masks)
    return dataclasses.replace(state, proposer=proposed, opt_state=set_masks(state.opt_state, masks)), record

  def evaluate(state: TrainState, epoch: int) -> Record:
    evaluated = _is_evaluated(epoch, config.train.epochs, config)
    record = _prefixed("test", passes.evaluate(model, state.variables)) if evaluated else {}
    if epoch < start:
      return record
    if evaluated:
      variables = {**state.variables, "params": masked(state.params, state.masks)}
      record |= _prefixed("subnetwork", passes.evaluate(model, variables))
    masks = jax.device_get(state.masks)
    return {
      **record,
      "cost": experiment.budget.cost.name,
      "cost_share": experiment.budget.cost(graph.kept(masks)) / experiment.budget.full,
      "macs_share_of_network": graph.macs(masks) / graph.macs(),
      **norm_summary(jax.device_get(norms(state.params)), masks),
      "widths": {name: int(mask.sum()) for name, mask in masks.items()},
    }

  def phase(epoch: int) -> str:
    epochs = config.train.epochs
    if epoch < min(start, searched.start):
      return (
        f"\nTraining, epochs 1 to {min(start, searched.start)} of {epochs}: the whole network learns as any other does."
      )
    if epoch < start:
      return (
        f"\nSearch, epochs {searched.start + 1} to {start} of {epochs}: the network learns as before, and before each"
        " epoch its channels are ranked. None is dropped yet."
      )
    chosen = f"within {experiment.budget.share:.1%} of {report.cost_in_words(experiment.budget.cost.name)}"
    if epoch not in searched:
      return f"\nPruning, epochs {searched.stop + 1} to {epochs} of {epochs}: the choice of channels stands."
    return (
      f"\nPruning, epochs {start + 1} to {min(searched.stop, epochs)} of {epochs}: before each epoch the channels to"
      f" keep are chosen, {chosen}.\nThe others are dropped: they still learn, but are pushed towards zero, so that"
      " cutting them costs little.\n"
      "  if cut now      accuracy without the dropped channels; should come close to that of the whole network\n"
      "  shrunk to       size of the dropped channels' weights as a share of the kept ones'; should come close to 0\n"
      "  choice changed  share of the channels on which it differs from the epoch before; should come close to 0"
    )

  return Stage(
    name="train",
    epochs=config.train.epochs,
    epochs_before=0,
    learning_rate=schedule,
    first_state=replicate(state, passes.mesh),
    weights=WeightPass(
      passes, model, tx, config.train, Purpose.TRAIN, _distillation(config.train, model, start * steps_per_epoch)
    ),
    evaluate=evaluate,
    renew_masks=renew_masks,
    phase=phase,
  )


def finetuning_stage(
  experiment: Experiment, model: nn.Module, variables: Any, *, phase: Any = None, teacher: Any = None
) -> Stage:
  """Trains a network as an ordinary one, such as the pruned one; unless `phase` is given, as `config.finetune` says.

  `teacher` has the variables of the dense network that it is distilled from, where the phase asks for that; None for
  the first ones.
  """
  config, passes = experiment.config, experiment.passes
  phase = config.finetune if phase is None else phase
  schedule = _schedule(phase, passes)
  tx = optimizers.optimizer(phase, schedule)
  duration = f"{phase.epochs} epoch{'s' if phase.epochs > 1 else ''}"

  def evaluate(state: TrainState, epoch: int) -> Record:
    if not _is_evaluated(epoch, phase.epochs, config):
      return {}
    return _prefixed("test", passes.evaluate(model, state.variables))

  distillation = _distillation(phase, experiment.model)
  known = experiment.variables if teacher is None else teacher
  # From the host, as the state is donated.
  state = TrainState.create(variables, tx, teacher=() if distillation is None else jax.device_get(known))
  return Stage(
    name="finetune",
    epochs=phase.epochs,
    epochs_before=config.train.epochs,
    learning_rate=schedule,
    first_state=replicate(state, passes.mesh),
    weights=WeightPass(passes, model, tx, phase, Purpose.FINETUNE, distillation),
    evaluate=evaluate,
    phase=lambda epoch: f"\nFine-tuning, {duration}: the dropped channels are cut, and what is left learns on.",
  )


def _schedule(phase: Any, passes: Passes) -> optimizers.Schedule:
  return optimizers.learning_rate_schedule(phase, passes.feed.num_train // phase.batch_size)


def _is_evaluated(epoch: int, epochs: int, config: Any) -> bool:
  return (epoch + 1) % config.evaluate.every_epochs == 0 or epoch + 1 == epochs


def _distillation(phase: Any, dense: nn.Module, first_step: int = 0) -> Distillation | None:
  fields = phase.distillation
  return Distillation(dense, fields.weight, fields.temperature, first_step) if fields.weight else None


def hamming_distance(before: Masks, after: Masks) -> float:
  """Returns the share of channels on which two architectures differ (supplement D, Fig. 2)."""
  changed = sum(int(np.sum(before[name] != after[name])) for name in after)
  return changed / sum(len(mask) for mask in after.values())


def norm_summary(norms: dict[str, list[np.ndarray]], masks: Masks) -> Record:
  """Returns mean and greatest norm of the dropped channels' slices, and the mean of the kept ones'."""
  kept = np.concatenate([n[np.asarray(masks[name]) > 0] for name, rows in norms.items() for n in rows])
  dropped = np.concatenate([n[np.asarray(masks[name]) == 0] for name, rows in norms.items() for n in rows])
  summary = {"kept_norm_mean": float(kept.mean())}
  if dropped.size:
    summary |= {"dropped_norm_mean": float(dropped.mean()), "dropped_norm_max": float(dropped.max())}
  return summary


def _prefixed(prefix: str, metrics: dict[str, float]) -> Record:
  return {f"{prefix}_{name}": value for name, value in metrics.items()}
