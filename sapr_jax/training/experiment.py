"""Parts of a run, made from its configuration: images, network, channel graph, budget, proposer."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sapr_jax import artifacts, data, models
from sapr_jax.channels import ChannelGraph, Masks, trace_channels
from sapr_jax.errors import InputError
from sapr_jax.method import (
  Budget,
  LatencyTable,
  Scores,
  SearchOptions,
  check_budget,
  cost_of,
  default_round_to,
  make_budget,
  make_comparable,
  project_to_budget,
)
from sapr_jax.runtime import data_mesh, processes
from sapr_jax.training.adoption import compare_images, inputs_of_weights, with_inputs
from sapr_jax.training.config import check_streamed
from sapr_jax.training.feed import open_feed
from sapr_jax.training.initialization import initialize
from sapr_jax.training.latency import table_for
from sapr_jax.training.passes import Passes, Purpose
from sapr_jax.training.proposers import GeneratorProposer, ImportanceProposer, Knowledge, Proposer
from sapr_jax.training.state import first_not_finite
from sapr_jax.training.workdir import LATENCY


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Parts that both stages of a run share.

  Attributes:
    config: The configuration, checked, with what the run takes over from the network that it starts from.
    passes: Devices and images.
    model: The dense network.
    variables: Its first variables.
    graph: Its channel graph.
    budget: The most that the sub-network may cost.
    round_to: A number that the widths of the sub-network are multiples of.
  """

  config: Any
  passes: Passes
  model: nn.Module
  variables: dict[str, Any]
  graph: ChannelGraph
  budget: Budget
  round_to: int

  @property
  def input_shape(self) -> tuple[int, int, int, int]:
    """`(1, height, width, channels)`."""
    return (1, *self.passes.feed.image_shape)

  @property
  def search_epochs(self) -> tuple[int, int]:
    """The first epoch before which masks are proposed, and the first from which on they no longer are."""
    search, epochs = self.config.search, self.config.train.epochs
    start = self.config.prune.start_epoch if search.start_epoch is None else search.start_epoch
    # With no epoch of training the masks are still proposed once.
    return start, max(1, epochs) if search.end_epoch is None else search.end_epoch

  def project(self, scores: Scores) -> Masks:
    """Returns the masks of the highest scores that the budget allows."""
    min_width = self.config.prune.min_width
    return project_to_budget(self.graph, scores, self.budget, min_width=min_width, round_to=self.round_to)

  def fingerprint(self) -> dict[str, Any]:
    """Returns values that must be the same on all processes, in little space."""
    feed = self.passes.feed
    return {
      **feed.fingerprint,
      "the cost of the dense network": self.budget.full,
      "their mean and deviation": [feed.preprocessing.mean, feed.preprocessing.std],
      "the checksum of the first weights": processes.fingerprint(self.variables),
    }


def build(config: Any, workdir: pathlib.Path | None = None) -> Experiment:
  """Opens the data, creates the network and traces its channels.

  Args:
    config: The configuration.
    workdir: Where an earlier part of the run may have left its table of latencies.

  Raises:
    InputError: If the data or the first weights cannot be read, the weights are of a network of other inputs, random
      ones would be cut untrained, a batch does not fit, the network has no channels to prune, or no masks can meet the
      budget.
  """
  if config.init.weights is None and config.train.epochs == 0:
    raise InputError(
      "init.weights must be given where train.epochs=0, as the network would be cut at random weights, got none; name"
      " the trained weights: --config.init.weights=FILE."
    )
  mesh = data_mesh()
  inputs = inputs_of_weights(config)
  if inputs is not None:
    config = with_inputs(config, inputs)
  check_streamed(config.data)
  feed = open_feed(config, mesh)
  if inputs is not None:
    compare_images(inputs, feed.inputs, config.init.weights)
  check_batches(config, feed.num_train, mesh.devices.size)
  input_shape = (1, *feed.image_shape)
  model, variables = first_network(config, feed.num_classes, input_shape)
  prune = config.prune
  chosen = {"select": prune.select, "include": tuple(prune.include), "exclude": tuple(prune.exclude)}
  graph = trace_channels(model, variables, input_shape, **chosen)
  cost = cost_of(prune.cost, graph, lambda: _latency_table(config, model, variables, graph, workdir))
  budget = make_budget(graph, cost, share=prune.p if prune.limit is None else None, amount=prune.limit)
  # A budget that no masks can meet shows now, not at E_start.
  round_to = prune.round_to
  if round_to is None:
    round_to = default_round_to(graph, budget, mesh.devices.flat[0].platform, min_width=prune.min_width)
  check_budget(graph, budget, min_width=prune.min_width, round_to=round_to)
  passes = Passes(mesh, feed, config.seed, variables["params"], config.fast_cpu)
  return Experiment(config, passes, model, variables, graph, budget, round_to)


def _latency_table(
  config: Any, model: nn.Module, variables: Any, graph: ChannelGraph, workdir: pathlib.Path | None
) -> LatencyTable:
  """Returns the table that the run began with, or the one that the configuration names, or measures one."""
  path, batch_size = config.prune.latency_table, config.prune.latency_batch_size
  if workdir is not None and (workdir / LATENCY).exists():
    path = workdir / LATENCY
  if path is None and jax.process_count() > 1:
    raise InputError(
      "prune.latency_table must be given to a run of several processes, which would all measure other times; `sapr"
      " latency` makes one."
    )
  return table_for(model, variables, graph, path=path, batch_size=batch_size, dtype=config.model.dtype)


def first_network(
  config: Any, num_classes: int, input_shape: tuple[int, int, int, int]
) -> tuple[nn.Module, dict[str, Any]]:
  """Returns the dense network and its first variables: drawn at random, or read from `config.init.weights`.

  Raises:
    InputError: If the weights cannot be read, do not fit, or are not finite.
  """
  model = models.create(
    config.model.name,
    num_classes=num_classes,
    width_multiplier=config.model.width_multiplier,
    dtype=jnp.dtype(config.model.dtype),
    remat=config.model.remat,
  )
  if config.init.weights is None:
    key = jax.random.fold_in(jax.random.key(config.seed), Purpose.INIT)
    return model, initialize(model.init, key, np.zeros(input_shape, np.float32))
  path = pathlib.Path(config.init.weights)
  if path.is_dir():
    model, variables = artifacts.load(path, base=model)
  else:
    variables = artifacts.import_torch(path, model, input_shape)
  if (name := first_not_finite(variables)) is not None:
    raise InputError(f"{path} has entries of {name} that are not finite; give weights of a run that did not diverge.")
  return model, variables


def make_proposer(experiment: Experiment) -> Proposer:
  """Makes the proposer that `config.prune.proposer` names."""
  config, passes = experiment.config, experiment.passes
  fields = config.generator
  images = _generator_images(config, passes.feed.num_train)
  model, graph = experiment.model, experiment.graph

  def compare(scores: Scores) -> Scores:
    return make_comparable(scores, graph, experiment.budget.cost, **config.importance)

  def importance(name: str) -> Proposer:
    return ImportanceProposer(name, passes, model, graph, images, fields.batch_size, compare)

  if config.prune.proposer != "generator":
    return importance(config.prune.proposer)
  tx = optax.adamw(fields.learning_rate, weight_decay=fields.weight_decay)
  options = SearchOptions(experiment.budget, fields.budget_weight, fields.bias, fields.temperature)
  knowledge = Knowledge(
    None if fields.prior is None else importance(fields.prior),
    fields.prior_strength,
    None if fields.order is None else importance(fields.order),
  )
  return GeneratorProposer(
    passes, model, graph, tx, options, images, fields.batch_size, experiment.project, knowledge=knowledge
  )


def _generator_images(config: Any, num_train: int) -> np.ndarray:
  size = round(config.generator.data_share * num_train)
  return data.epoch_order(num_train, seed=config.seed, epoch=0, purpose="generator subset")[:size]


def check_batches(config: Any, num_train: int, num_devices: int) -> None:
  """Checks that every batch divides over the devices, and that there are enough images for one.

  Raises:
    InputError: If one does not; the message names the sizes nearest to it that would.
  """
  batches = [
    ("train.batch_size", config.train.batch_size, num_train, config.train.accumulate),
    ("finetune.batch_size", config.finetune.batch_size, num_train, config.finetune.accumulate),
    ("eval_batch_size", config.eval_batch_size, None, 1),
  ]
  if config.prune.proposer in ("generator", "taylor"):  # the others read no images
    generator_images = round(config.generator.data_share * num_train)
    batches.append(("generator.batch_size", config.generator.batch_size, generator_images, 1))
  for name, batch, images, pieces in batches:
    parts = num_devices * pieces
    if batch % parts:
      lower = batch // parts * parts
      near = f"{lower} or {lower + parts}" if lower else str(parts)
      times = f" times {name.split('.')[0]}.accumulate={pieces}" if pieces > 1 else ""
      raise InputError(f"{name}={batch} must be a multiple of the {num_devices} devices{times}; use {near}.")
    if images is not None and batch > images:
      raise InputError(f"{name}={batch} is more than the {images} images there are; lower it, or use more images.")
