"""Runs of the CIFAR-10 study in this package: the method, and what else one can do with the same images and epochs."""

from __future__ import annotations

import bisect
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
from sapr_jax.method import Scores, l1_norm, rank_within_groups, relative_to_group_mean
from sapr_jax.training import Experiment
from sapr_jax.training import workdir as layout
from sapr_jax.training.experiment import first_network
from study import parts
from study.parts import Variables
from study.rows import Job
from study.variants import variant_of

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
  experiment = parts.build(job.config, job.workdir)
  _, variables = artifacts.load(job.source / layout.DENSE)
  model, small = prune(
    experiment.model, variables, experiment.graph, experiment.project(_l1_scores(job, experiment, variables))
  )
  tuned = parts.train_plainly(experiment, job.workdir, model, small)
  _write_summary(job, experiment, dense=(experiment.model, variables), subnetwork=(model, small), pruned=(model, tuned))


def run_uniform_width(job: Job) -> None:
  """Trains a network whose layers all are narrower, from scratch, for the epochs of training and fine-tuning."""
  config = job.config.copy_and_resolve_references()
  config.finetune = scratch_phase(config)
  experiment = parts.build(config, job.workdir)
  narrow = config.copy_and_resolve_references()
  narrow.model.width_multiplier = nearest_width(experiment)
  model, variables = first_network(narrow, experiment.passes.feed.num_classes, experiment.input_shape)
  _write_summary(job, experiment, pruned=(model, parts.train_plainly(experiment, job.workdir, model, variables)))


def run_recalibration(job: Job) -> None:
  """Measures the sub-network of a finished run again, with running statistics of its own; trains nothing."""
  assert job.source is not None
  experiment = parts.build(job.config, job.workdir)
  variables, masks = parts.end_of_training(experiment, job.source)
  _measure_recalibrated(job, experiment, variables, lambda: masks)


def run_selection(job: Job) -> None:
  """Chooses channels of the dense network of a finished run, and cuts it; no weight is trained.

  `job.row.choice` is a key of `CRITERIA`, or "generator": a generator that has as many passes over its images as in a
  run, all of them with these weights.
  """
  assert job.source is not None
  experiment = parts.build(job.config, job.workdir)
  _, variables = artifacts.load(job.source / layout.DENSE)

  def choose() -> Masks:
    if job.row.choice == "generator":
      return experiment.project(parts.generator_scores(experiment, variables, variant_of(job.row.name)))
    return experiment.project(_l1_scores(job, experiment, variables))

  _measure_recalibrated(job, experiment, variables, choose)


KINDS: Mapping[str, Callable[[Job], None]] = {
  "method": run_method,
  "one_shot": run_one_shot,
  "width": run_uniform_width,
  "recalibrated": run_recalibration,
  "selection": run_selection,
}
"""`Row.kind` -> what runs it. Each leaves `summary.json` in the work directory when it is done, and records."""


def _l1_scores(job: Job, experiment: Experiment, variables: Variables) -> Scores:
  return CRITERIA[job.row.choice](l1_norm(variables["params"], experiment.graph))


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
  config = experiment.config
  widths = [config.model.width_multiplier * k / 64 for k in range(1, 65)]

  def macs(width: float) -> int:
    model = models.create(config.model.name, num_classes=experiment.passes.feed.num_classes, width_multiplier=width)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(experiment.input_shape))
    return count_macs(model, variables, experiment.input_shape)

  target = budget_macs(experiment.graph, config.prune.p)
  above = min(bisect.bisect_left(widths, target, key=macs), len(widths) - 1)
  return min(widths[max(above - 1, 0)], widths[above], key=lambda width: abs(macs(width) - target))


def _measure_recalibrated(job: Job, experiment: Experiment, variables: Variables, choose: Callable[[], Masks]) -> None:
  """Chooses channels, cuts the network, gives the sub-network running statistics of its own, and measures it."""
  layout.make_workdir(job.workdir, job.config)
  started = time.monotonic()
  model, small = prune(experiment.model, variables, experiment.graph, choose())
  small = parts.recalibrated(experiment, model, small)
  _write_summary(job, experiment, time.monotonic() - started, subnetwork=(model, small))


def _write_summary(
  job: Job, experiment: Experiment, seconds: float = 0.0, **networks: tuple[nn.Module, Variables]
) -> None:
  """Evaluates networks and writes the summary; "dense" without its accuracy stands for the unpruned network."""
  summary: dict[str, Any] = {"dense": {"macs": experiment.graph.macs()}}
  for name, (model, variables) in networks.items():
    macs, params = count_macs(model, variables, experiment.input_shape), artifacts.count_params(variables)
    summary[name] = {"macs": macs, "params": params, **parts.evaluate(experiment, model, variables)}
  summary["run"] = {"seconds": seconds, "versions": report.versions(), "device": jax.devices()[0].device_kind}
  write_json(job.workdir / layout.SUMMARY, summary)
