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
import numpy as np
from ml_collections import ConfigDict

from sapr_jax import artifacts, models, report, training
from sapr_jax.artifacts.files import write_json
from sapr_jax.channels import ChannelGraph, Masks, count_macs, prune
from sapr_jax.errors import InputError
from sapr_jax.method import project_to_budget
from sapr_jax.training import epochs, loop, steps
from sapr_jax.training import workdir as layout
from sapr_jax.training.checks import check_config
from sapr_jax.training.devices import replicate
from sapr_jax.training.interruption import Interruption
from sapr_jax.training.setup import Setup, build, initial_network
from study.rows import Job

_SCRATCH_KEY = 0


def run_method(job: Job) -> None:
  """The method itself, with whatever the configuration changes in it."""
  training.run(job.config, job.workdir)


def run_one_shot(job: Job) -> None:
  """Cuts the dense network of a finished run by the L1 norms of its filters, and fine-tunes it."""
  assert job.source is not None
  setup = _build(job)
  _, variables = artifacts.load(job.source / layout.DENSE)
  masks = l1_masks(setup, variables["params"], within_layers=job.row.choice == "uniform")
  small_model, small_variables = prune(setup.model, variables, setup.graph, masks)
  tuned = train_plainly(setup, job.workdir, small_model, small_variables)
  _write_summary(
    setup,
    job.workdir,
    dense=(setup.model, variables),
    subnetwork=(small_model, small_variables),
    pruned=(small_model, tuned),
  )


def run_uniform_width(job: Job) -> None:
  """Trains a network whose layers all are narrower, from scratch, for the epochs of training and fine-tuning."""
  config = job.config.copy_and_resolve_references()
  config.finetune = scratch_phase(config)
  setup = _build(job, config)
  narrow = config.copy_and_resolve_references()
  narrow.model.width_multiplier = nearest_width(setup)
  model, variables = initial_network(narrow, setup.feed.num_classes, setup.input_shape)
  trained = train_plainly(setup, job.workdir, model, variables)
  _write_summary(setup, job.workdir, pruned=(model, trained))


def run_recalibration(job: Job) -> None:
  """Measures the sub-network of a finished run again, with running statistics of its own; trains nothing."""
  assert job.source is not None
  setup = _build(job)
  stage = loop.pruning_stage(setup)
  with contextlib.closing(artifacts.Checkpointer(job.source / "checkpoints" / "train")) as checkpointer:
    state, position = loop.restore(setup, stage, checkpointer)
  if position.epoch < job.config.train.epochs:
    raise InputError(f"{job.source} holds no checkpoint of the end of its training; remove that run to do it again.")
  variables, masks = jax.device_get((state["network"].variables, state["masks"]))
  layout.make_workdir(job.workdir, job.config)
  started = time.monotonic()
  subnetwork = _cut_and_recalibrated(setup, variables, masks)
  _write_summary(setup, job.workdir, time.monotonic() - started, subnetwork=subnetwork)


def run_selection(job: Job) -> None:
  """Chooses channels of the dense network of a finished run, and cuts it; no weight is trained.

  `job.row.choice` is "uniform" or "global", by the L1 norms of filters, or "generator": one that has as many passes
  over its images as in a run, all of them with these weights.
  """
  assert job.source is not None
  setup = _build(job)
  _, variables = artifacts.load(job.source / layout.DENSE)
  layout.make_workdir(job.workdir, job.config)
  started = time.monotonic()
  if job.row.choice == "generator":
    with Interruption() as interruption:
      masks = generator_masks(setup, variables, interruption)
  else:
    masks = l1_masks(setup, variables["params"], within_layers=job.row.choice == "uniform")
  subnetwork = _cut_and_recalibrated(setup, variables, masks)
  _write_summary(setup, job.workdir, time.monotonic() - started, subnetwork=subnetwork)


KINDS: Mapping[str, Callable[[Job], None]] = {
  "ours": run_method,
  "one_shot": run_one_shot,
  "width": run_uniform_width,
  "recalibrated": run_recalibration,
  "selection": run_selection,
}
"""`Row.kind` -> what runs it. Each leaves `summary.json` in the work directory when it is done, and records."""


# ----------------------------------------------------------------------------------------------------------------------
# What they are made of
# ----------------------------------------------------------------------------------------------------------------------


def l1_scores(graph: ChannelGraph, params: Any, *, within_layers: bool) -> dict[str, np.ndarray]:
  """Scores channels by the L1 norm of the filter that produces them.

  Args:
    graph: The channel graph.
    params: Parameters of the dense network.
    within_layers: Whether a score is the channel's rank in its group, so that all groups keep the same share; otherwise
      it is the norm over the mean of its group, and all channels of the network compete.

  Returns:
    Group name -> `[group.size]`, higher is kept first; for `project_to_budget`.

  References:
    Li et al., Pruning filters for efficient ConvNets, 2017, which keeps equal shares within a stage.
  """
  scores = {}
  for group in graph.groups:
    filters = next(member for member in group.members if member.role == "out")
    kernel: Any = params
    for name in filters.path:
      kernel = kernel[name]
    norms = np.abs(np.moveaxis(np.asarray(kernel), filters.axis, 0)).reshape(group.size, -1).sum(axis=1)
    ranks = np.argsort(np.argsort(norms, kind="stable"), kind="stable")
    scores[group.name] = (ranks + 1) / group.size if within_layers else norms / norms.mean()
  return scores


def l1_masks(setup: Setup, params: Any, *, within_layers: bool) -> Masks:
  """Returns the masks that the L1 norms of filters propose, see `l1_scores`."""
  limits = setup.config.prune
  scores = l1_scores(setup.graph, params, within_layers=within_layers)
  return project_to_budget(setup.graph, scores, limits.p, min_width=limits.min_width, round_to=limits.round_to)


def generator_masks(setup: Setup, variables: Any, interruption: Interruption) -> Masks:
  """Returns the masks of a generator that learns on these weights in as many epochs as it does in a run.

  Raises:
    InterruptedRunError: If SIGTERM or SIGINT asked it to stop; it starts anew the next time.
  """
  stage = loop.pruning_stage(setup)
  assert stage.generator_steps is not None
  generator, variables = stage.state["generator"], replicate(variables, setup.mesh)
  for epoch in range(setup.config.prune.start_epoch, setup.hold_epoch):
    if interruption.requested():
      interruption.stop()
    generator, _ = epochs.train_generator(setup, stage.generator_steps, generator, variables, epoch=epoch)
  return epochs.masks_in_force(setup, generator, epoch=setup.hold_epoch - 1)


def scratch_phase(config: Any) -> ConfigDict:
  """Returns the schedule of training, stretched to the epochs of training and fine-tuning together."""
  phase = ConfigDict(config.train.to_dict())
  phase.epochs = config.train.epochs + config.finetune.epochs
  phase.decay_epochs = tuple(round(epoch * phase.epochs / config.train.epochs) for epoch in config.train.decay_epochs)
  return phase


def budget_macs(graph: ChannelGraph, p: float) -> float:
  """Returns the MACs of the whole network that a budget allows."""
  return graph.macs() - (1.0 - p) * graph.prunable_macs()


def nearest_width(setup: Setup) -> float:
  """Returns the width multiplier at which the dense network comes nearest to the budget."""
  config = setup.config
  widths = [config.model.width_multiplier * k / 64 for k in range(1, 65)]

  def macs(width: float) -> int:
    model = models.create(config.model.name, num_classes=setup.feed.num_classes, width_multiplier=width)
    variables = jax.eval_shape(model.init, jax.random.key(_SCRATCH_KEY), jnp.zeros(setup.input_shape))
    return count_macs(model, variables, setup.input_shape)

  target = budget_macs(setup.graph, config.prune.p)
  above = min(bisect.bisect_left(widths, target, key=macs), len(widths) - 1)
  return min(widths[max(above - 1, 0)], widths[above], key=lambda width: abs(macs(width) - target))


def train_plainly(setup: Setup, workdir: pathlib.Path, model: nn.Module, variables: Any) -> Any:
  """Trains a network in the fine-tuning phase of the configuration, without the method; resumes where it was stopped.

  Returns:
    The variables after the last epoch.

  Raises:
    InputError: If the work directory cannot be used, or training diverges.
    InterruptedRunError: If SIGTERM or SIGINT asked it to stop; its work is saved.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(layout.locked(workdir, setup.config))
    interruption = stack.enter_context(Interruption())
    recorder = stack.enter_context(contextlib.closing(artifacts.Recorder(workdir)))
    keep = setup.config.checkpoint.keep
    checkpointer = stack.enter_context(
      contextlib.closing(artifacts.Checkpointer(workdir / "checkpoints" / "finetune", keep))
    )
    stage = loop.finetuning_stage(setup, model, jax.device_get(variables))  # the state is donated
    state, position = loop.restore(setup, stage, checkpointer)
    state = loop.train(setup, stage, state, position, checkpointer, recorder, interruption)
  return jax.device_get(state["network"].variables)


def _cut_and_recalibrated(setup: Setup, variables: Any, masks: Masks) -> tuple[nn.Module, Any]:
  """Returns the sub-network as a model of its own, with running statistics of its own."""
  model, small = prune(setup.model, variables, setup.graph, masks)
  batches = setup.config.prune.statistics_batches
  return model, epochs.renew_statistics(setup, model, small, batches=batches, between_calls=lambda: None)


def _build(job: Job, config: Any = None) -> Setup:
  """Checks the configuration and the work directory as `training.run` does, and builds the run."""
  config = job.config if config is None else config
  check_config(config)
  layout.check_workdir(job.workdir, config)
  return build(config)


def _write_summary(
  setup: Setup, workdir: pathlib.Path, seconds: float = 0.0, **networks: tuple[nn.Module, Any]
) -> None:
  """Evaluates networks and writes the summary; "dense" without its accuracy stands for the unpruned network."""
  summary: dict[str, Any] = {"dense": {"macs": setup.graph.macs()}}
  for name, (model, variables) in networks.items():
    evaluation = setup.mapped(steps.evaluation_step(model, setup.feed.preprocessing))
    summary[name] = {
      "macs": count_macs(model, variables, setup.input_shape),
      "params": artifacts.count_params(variables),
      **epochs.evaluate(setup, evaluation, replicate(variables, setup.mesh)),
    }
  summary["run"] = {"seconds": seconds, "versions": report.versions(), "device": jax.devices()[0].device_kind}
  write_json(workdir / layout.SUMMARY, summary)
