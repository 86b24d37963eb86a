"""Summary of a finished run: what the dense, the masked and the pruned network cost and achieve."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from sapr_jax import artifacts, report
from sapr_jax.channels import Masks, count_macs
from sapr_jax.runtime import processes, replicate
from sapr_jax.training.experiment import Experiment
from sapr_jax.training.optimizers import regularization, shrinkage

Network = tuple[nn.Module, Any]
"""(model, variables)"""


def summarize(
  experiment: Experiment, masks: Masks, dense: Network, subnetwork: Network, pruned: Network
) -> dict[str, Any]:
  """Measures the networks of a run at its last epoch: `subnetwork` and `pruned` are compact.

  Returns:
    "dense", "subnetwork", "pruned" -> accuracy, MACs, parameters and latency; "run" -> facts about the run.
  """
  config, graph, passes = experiment.config, experiment.graph, experiment.passes
  macs = count_macs(*pruned, experiment.input_shape)
  if macs != graph.macs(masks):  # an invariant of the graph, cheap to check on every run
    raise RuntimeError(f"The pruned network has {macs} MACs; its masks predict {graph.macs(masks)}.")
  latency = processes.decided_by_main(lambda: _latency(config.report, experiment.input_shape, dense, pruned))

  def accuracy(model: nn.Module, variables: Any) -> dict[str, float]:
    return passes.evaluate(model, replicate(variables, passes.mesh))

  compact = {
    "macs": macs,
    "params": artifacts.count_params(pruned[1]),
    "prunable_macs_share": graph.prunable_macs(masks) / graph.prunable_macs(),
    "latency_ms": latency["pruned"],
  }
  return {
    "dense": {
      "macs": graph.macs(),
      "params": artifacts.count_params(dense[1]),
      "latency_ms": latency["dense"],
      **accuracy(*dense),
    },
    "subnetwork": compact | accuracy(*subnetwork),
    "pruned": compact | accuracy(*pruned),
    "run": {
      "model": config.model.name,
      "seed": config.seed,
      "finetune_epochs": config.finetune.epochs,
      "gamma": regularization(config, passes.feed.num_train // config.train.batch_size).gamma,
      "round_to": experiment.round_to,
      "statistics_batches": config.prune.statistics_batches,
      "widths": {name: int(mask.sum()) for name, mask in masks.items()},
      "versions": report.versions(),
      "device": jax.devices()[0].device_kind,
    },
  }


def _latency(
  options: Any, input_shape: tuple[int, ...], dense: Network, pruned: Network
) -> dict[str, dict[str, float]]:
  """Returns "dense", "pruned" -> batch size, as a string for JSON -> milliseconds of a forward pass."""
  found = {
    str(size): report.compare_programs(
      {"dense": dense, "pruned": pruned}, input_shape, size, repeats=options.latency_repeats
    )
    for size in options.latency_batch_sizes
  }
  return {name: {size: of[name]["latency_ms"] for size, of in found.items()} for name in ("dense", "pruned")}


def describe(experiment: Experiment) -> str:
  """Says what is trained, from which weights, what may be cut, and how strong the regularization is over the run."""
  config, graph, feed, budget = experiment.config, experiment.graph, experiment.passes.feed, experiment.budget
  per_epoch = feed.num_train // config.train.batch_size
  gamma = regularization(config, per_epoch).gamma
  evaluated = "test" if config.data.validation_images is None else "held-out training"
  images = f"{feed.num_train:,} training and {feed.num_test:,} {evaluated} images"
  count = experiment.passes.mesh.devices.size
  weights = "random weights" if config.init.weights is None else f"the weights of {config.init.weights}"
  devices = f"{count} device{'s' if count > 1 else ''} ({jax.devices()[0].device_kind})"
  if config.train.epochs:
    preparation = (
      f"The regularization can take {shrinkage(config, per_epoch, gamma):.3g} off the norm of a dropped channel over"
      f" the whole run (mean of the groups, gamma {gamma:.3g})."
    )
  else:
    batches = config.prune.compensation_batches
    some = f"{batches} batch{'es' if batches > 1 else ''}"
    stay = f"fitted on {some} to make up for them" if batches else "left as they are"
    preparation = f"Channels beyond that are cut at once, and the weights that stay are {stay}."
  patience = "\nThe first epoch of each part takes longer, as its programs are compiled."
  if config.train.epochs + config.finetune.epochs == 0:
    patience = ""
  return (
    f"{config.model.name} from {weights}, {images}, {devices}\n"
    f"It does {graph.macs():,} multiply-accumulates (MACs) for an image; {graph.prunable_macs():,} of them are"
    f" prunable, in {len(graph.groups)} groups\nof channels that are cut together. {budget.share:.1%} of"
    f" {report.cost_in_words(budget.cost.name)} may stay, in widths that are multiples of {experiment.round_to}.\n"
    f"{preparation}{patience}"
  )
