"""Runs of the CIFAR-10 study in this package: the method, and what else one can do with the same images and epochs."""

from __future__ import annotations

import bisect
import contextlib
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sapr_jax import artifacts, models, report, training
from sapr_jax.artifacts.files import write_json
from sapr_jax.channels import ChannelGraph, Masks, count_macs, prune
from sapr_jax.errors import InputError
from sapr_jax.method import Scores, l1_norm, rank_within_groups, relative_to_group_mean
from sapr_jax.runtime import Interruption, replicate
from sapr_jax.training import Experiment, stages, workdir as layout
from sapr_jax.training.experiment import first_network
from sapr_jax.training.passes import recalibrate_batch_norm
from sapr_jax.training.position import Position
from sapr_jax.training.run import run_stage
from study.rows import Job
from study.variants import Variant, variant_of

Variables = dict[str, Any]

CRITERIA: Mapping[str, Callable[[Scores], Scores]] = {
  "uniform": rank_within_groups,
  "global": relative_to_group_mean,
}
"""`Row.choice` -> what it makes of the L1 norms of filters: all groups keep the same share, or all channels compete.

References:
  Li et al., Pruning filters for efficient ConvNets, 2017, which keeps equal shares within a stage.
"""


def run_method(job: Job) -> None:
  """Runs the method, in the variant of the row."""
  variant = variant_of(job.row.name)
  training.run(job.config, job.workdir, proposer=variant.proposer, weighting=variant.weighting)


def run_one_shot(job: Job) -> None:
  """Cuts the dense network of a finished run by the L1 norms of its filters, and fine-tunes it."""
  assert job.source is not None
  experiment = _build(job)
  _, variables = artifacts.load(job.source / layout.DENSE)
  model, small = prune(experiment.model, variables, experiment.graph, _l1_masks(job, experiment, variables))
  tuned = train_plainly(job, experiment, model, small)
  _write_summary(job, experiment, dense=(experiment.model, variables), subnetwork=(model, small), pruned=(model, tuned))


def run_uniform_width(job: Job) -> None:
  """Trains a network whose layers all are narrower, from scratch, for the epochs of training and fine-tuning."""
  experiment = _build(job)
  narrow = job.config.copy_and_resolve_references()
  narrow.model.width_multiplier = nearest_width(experiment)
  narrow.init.weights = None  # which fit the wide network only
  model, variables = first_network(narrow, experiment.passes.feed.num_classes, experiment.input_shape)
  trained = train_plainly(job, experiment, model, variables, scratch_phase(job.config))
  _write_summary(job, experiment, pruned=(model, trained))


def run_adapted(job: Job) -> None:
  """Trains the whole network for one epoch on all images, from which other rows start."""
  phase = ConfigDict(job.config.train.to_dict())
  phase.epochs, phase.schedule = 1, "cosine"
  _train_whole(job, phase)


def run_trained(job: Job) -> None:
  """Trains the whole network as its configuration says, from which other rows start."""
  _train_whole(job, job.config.train)


def _train_whole(job: Job, phase: ConfigDict) -> None:
  experiment = _build(job)
  trained = train_plainly(job, experiment, experiment.model, experiment.variables, phase)
  artifacts.save(job.workdir / layout.DENSE, experiment.model, trained)
  _write_summary(job, experiment, dense=(experiment.model, trained), pruned=(experiment.model, trained))


def run_recalibration(job: Job) -> None:
  """Measures the sub-network of a finished run again, with running statistics of its own; trains nothing."""
  assert job.source is not None
  experiment = _build(job)
  variables, masks = end_of_training(experiment, job.source)
  _measure_recalibrated(job, experiment, variables, lambda: masks)


def run_selection(job: Job) -> None:
  """Chooses channels of the dense network of a finished run, and cuts it; no weight is trained.

  `job.row.choice` is a key of `CRITERIA`, or "generator": a generator that has as many passes over its images as in a
  run, all of them with these weights.
  """
  assert job.source is not None
  experiment = _build(job)
  _, variables = artifacts.load(job.source / layout.DENSE)

  def choose() -> Masks:
    if job.row.choice == "generator":
      return experiment.project(generator_scores(experiment, variables, variant_of(job.row.name)))
    return _l1_masks(job, experiment, variables)

  _measure_recalibrated(job, experiment, variables, choose)


KINDS: Mapping[str, Callable[[Job], None]] = {
  "method": run_method,
  "one_shot": run_one_shot,
  "width": run_uniform_width,
  "adapted": run_adapted,
  "trained": run_trained,
  "recalibrated": run_recalibration,
  "selection": run_selection,
}
"""`Row.kind` -> what runs it. Each leaves `summary.json` in the work directory when it is done, and records."""


def _build(job: Job) -> Experiment:
  """Checks the configuration and the work directory as `training.run` does, and builds the parts of the run."""
  training.check_config(job.config)
  layout.check_workdir(job.workdir, job.config)
  return training.build(job.config)


def _l1_masks(job: Job, experiment: Experiment, variables: Variables) -> Masks:
  norms = l1_norm(variables["params"], experiment.graph)
  return experiment.project(CRITERIA[job.row.choice](jax.device_get(norms)))


def generator_scores(experiment: Experiment, variables: Variables, variant: Variant) -> Scores:
  """Returns the last scores of a generator that learns on these weights in as many epochs as it does in a run."""
  config, mesh, proposer = experiment.config, experiment.passes.mesh, variant.proposer(experiment)
  state, on_devices = replicate((proposer.init(), variables), mesh)
  scores: Scores | None = None
  for epoch in range(config.prune.start_epoch, config.train.epochs):
    state, scores, _ = proposer.propose(state, on_devices, epoch)
  assert scores is not None, "a variant that holds its masks has no scores at the end"
  return scores


def end_of_training(experiment: Experiment, workdir: pathlib.Path) -> tuple[Variables, Masks]:
  """Returns the variables of the dense network and the masks of a finished run, from its last checkpoint.

  Raises:
    InputError: If that is not the end of its training.
  """
  stage = stages.training_stage(experiment, training.make_proposer(experiment))
  with contextlib.closing(artifacts.Checkpointer(workdir / "checkpoints" / "train")) as checkpointer:
    state, saved = checkpointer.restore(stage.first_state)
  if Position.of_checkpoint(saved, stage.weights.steps_per_epoch).epoch < stage.epochs:
    raise InputError(f"{workdir} holds no checkpoint of the end of its training; remove that run to do it again.")
  variables, masks = jax.device_get((state.variables, state.masks))
  return variables, masks


def train_plainly(
  job: Job, experiment: Experiment, model: nn.Module, variables: Variables, phase: ConfigDict | None = None
) -> Variables:
  """Trains a network without the method; resumes where it was stopped.

  Args:
    job: The run.
    experiment: Its parts.
    model: The network.
    variables: Its first variables.
    phase: Its schedule; None for that of fine-tuning.

  Returns:
    The variables after the last epoch.

  Raises:
    DivergedError: If training diverges.
    InterruptedRunError: If SIGTERM or SIGINT asked it to stop; its work is saved.
  """
  layout.make_workdir(job.workdir, job.config)
  stage = stages.finetuning_stage(experiment, model, jax.device_get(variables), phase=phase)  # its state is donated
  with Interruption() as interruption, contextlib.closing(artifacts.Recorder(job.workdir)) as recorder:
    state = run_stage(stage, job.config, job.workdir / "checkpoints" / "finetune", recorder, interruption)
  return jax.device_get(state.variables)


def scratch_phase(config: ConfigDict) -> ConfigDict:
  """Returns the schedule of training, stretched to the epochs of training and fine-tuning together."""
  phase = ConfigDict(config.train.to_dict())
  phase.epochs = config.train.epochs + config.finetune.epochs
  phase.decay_epochs = tuple(round(epoch * phase.epochs / config.train.epochs) for epoch in config.train.decay_epochs)
  return phase


def budget_macs(graph: ChannelGraph, p: float) -> float:
  """Returns the MACs of the whole network that a budget allows."""
  return graph.macs() - (1.0 - p) * graph.prunable_macs()


def nearest_width(experiment: Experiment) -> float:
  """Returns the width multiplier at which the dense network comes nearest to the budget."""
  fields, num_classes = experiment.config.model, experiment.passes.feed.num_classes
  widths = [fields.width_multiplier * k / 64 for k in range(1, 65)]

  def macs(width: float) -> int:
    model = models.create(fields.name, num_classes=num_classes, width_multiplier=width)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(experiment.input_shape))
    return count_macs(model, variables, experiment.input_shape)

  target = budget_macs(experiment.graph, experiment.config.prune.p)
  above = min(bisect.bisect_left(widths, target, key=macs), len(widths) - 1)
  return min(widths[max(above - 1, 0)], widths[above], key=lambda width: abs(macs(width) - target))


def _measure_recalibrated(job: Job, experiment: Experiment, variables: Variables, choose: Callable[[], Masks]) -> None:
  """Chooses channels, cuts the network, gives the sub-network running statistics of its own, and measures it."""
  layout.make_workdir(job.workdir, job.config)
  started, config = time.monotonic(), job.config
  model, small = prune(experiment.model, variables, experiment.graph, choose())
  batches, batch_size = config.prune.statistics_batches, config.train.batch_size
  small = recalibrate_batch_norm(experiment.passes, model, small, batches=batches, batch_size=batch_size)
  _write_summary(job, experiment, time.monotonic() - started, subnetwork=(model, small))


def _write_summary(
  job: Job, experiment: Experiment, seconds: float = 0.0, **networks: tuple[nn.Module, Variables]
) -> None:
  """Evaluates networks and writes the summary; "dense" without its accuracy stands for the unpruned network."""
  passes, summary = experiment.passes, {"dense": {"macs": experiment.graph.macs()}}
  for name, (model, variables) in networks.items():
    summary[name] = {
      "macs": count_macs(model, variables, experiment.input_shape),
      "params": artifacts.count_params(variables),
      **passes.evaluate(model, replicate(variables, passes.mesh)),
    }
  run = {"seconds": seconds, "versions": report.versions(), "device": jax.devices()[0].device_kind}
  write_json(job.workdir / layout.SUMMARY, {**summary, "run": run})
