"""One pass over images of each kind: of the weights, of the generator, of the batch statistics, and an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from sapr_jax import data
from sapr_jax.channels import Masks
from sapr_jax.method import project_to_budget, split_by_group
from sapr_jax.training import setup as setup_lib
from sapr_jax.training import steps as steps_lib
from sapr_jax.training.devices import MappedSteps, replicate
from sapr_jax.training.position import Position
from sapr_jax.training.setup import Setup
from sapr_jax.training.state import GeneratorState, NetworkState


def train_weights(
  setup: Setup,
  steps: MappedSteps,
  network: NetworkState,
  position: Position,
  *,
  phase: Any,
  stream: int,
  masks: Masks | None = None,
  after_call: Callable[[NetworkState, int], None],
) -> NetworkState:
  """Trains the weights until the end of the epoch.

  Args:
    setup: The run.
    steps: The mapped weight step.
    network: State at `position`; donated.
    position: Where the stage is; moved on, with the metrics of the steps.
    phase: `config.train` or `config.finetune`.
    stream: Which stream of orders and random numbers (`setup.TRAIN`, `setup.FINETUNE`).
    masks: The masks in force.
    after_call: Called with the state and the number of steps done since the last call.

  Returns:
    The state after the epoch.
  """
  epoch = position.epoch
  order = data.epoch_batches(setup.feed.num_train, phase.batch_size, seed=setup.config.seed, epoch=epoch, purpose=stream)
  calls = setup.feed.training(order, stream=stream, epoch=epoch, first=position.step)
  shared = dataclasses.replace(setup.feed.train, key=replicate(setup.key(stream), setup.mesh), masks=masks)
  for state, metrics in steps.run(network, shared, calls):
    network, before = state, position.step
    position.add(jax.device_get(metrics))
    after_call(network, position.step - before)
  return network


def train_generator(
  setup: Setup, steps: MappedSteps, generator: GeneratorState, variables: Any, *, epoch: int
) -> tuple[GeneratorState, dict[str, float]]:
  """Trains the generator for one pass over its images, with the weights fixed.

  Returns:
    (state, mean loss and sampled share of the prunable MACs).
  """
  batch_size = setup.config.generator.batch_size
  order = data.epoch_batches(
    len(setup.generator_images), batch_size, seed=setup.config.seed, epoch=epoch, purpose=setup_lib.GENERATOR
  )
  calls = setup.feed.training(setup.generator_images[order], stream=setup_lib.GENERATOR, epoch=epoch)
  key = replicate(setup.key(setup_lib.GENERATOR), setup.mesh)
  shared = dataclasses.replace(setup.feed.train, key=key, variables=variables)
  history = []
  for state, metrics in steps.run(generator, shared, calls):
    generator = state
    history.append(jax.device_get(metrics))
  return generator, {name: float(np.mean(np.concatenate([h[name] for h in history]))) for name in history[0]}


def masks_in_force(setup: Setup, generator: GeneratorState, *, epoch: int) -> dict[str, np.ndarray]:
  """Returns the masks that the generator now proposes, projected onto the budget; the same on every host.

  Sampled ones rank the channels by o + g of Eq. 1 in place of o. The last ones are cut, so that they are always the
  most likely ones.
  """
  prune = setup.config.prune
  outputs = jax.device_get(setup.generator_outputs(generator.variables))
  if prune.masks == "sampled" and epoch + 1 < setup.hold_epoch:
    key = jax.random.fold_in(setup.key(setup_lib.MASKS), epoch)
    outputs = outputs + np.asarray(jax.random.gumbel(key, outputs.shape, outputs.dtype))
  scores = split_by_group(outputs, setup.graph)
  return project_to_budget(setup.graph, scores, prune.p, min_width=prune.min_width, round_to=setup.round_to)


def renew_statistics(
  setup: Setup, model: nn.Module, variables: Any, *, batches: int, between_calls: Callable[[], None]
) -> dict[str, Any]:
  """Measures the running statistics of a network anew, on batches of training images.

  A network that was cut has other activations than the one whose statistics it inherits.

  Args:
    setup: The run.
    model: The network.
    variables: Its variables.
    batches: How many batches; those of several epochs, if one has fewer.
    between_calls: Called after each call.

  Returns:
    The variables with the new statistics.
  """
  size, stream = setup.config.train.batch_size, setup_lib.STATISTICS
  per_epoch = setup.steps_per_epoch(setup.config.train)
  orders = [
    data.epoch_batches(setup.feed.num_train, size, seed=setup.config.seed, epoch=epoch, purpose=stream)
    for epoch in range(-(-batches // per_epoch))
  ]
  calls = setup.feed.training(np.concatenate(orders)[:batches], stream=stream, epoch=0)
  shared = dataclasses.replace(
    setup.feed.train, key=replicate(setup.key(stream), setup.mesh), variables=replicate(variables, setup.mesh)
  )
  # From the host, as the carry is donated.
  carry = {"step": np.zeros((), np.int32), "batch_stats": jax.device_get(variables["batch_stats"])}
  steps = setup.mapped(steps_lib.statistics_step(model, setup.feed.preprocessing))
  for state, _ in steps.run(replicate(carry, setup.mesh), shared, calls):
    carry = state
    between_calls()
  return {**variables, "batch_stats": jax.device_get(carry["batch_stats"])}


def evaluate(setup: Setup, steps: MappedSteps, variables: Any) -> dict[str, float]:
  """Evaluates on all test images.

  Returns:
    Accuracy in [0, 1] and mean cross-entropy.
  """
  sums = replicate({name: np.zeros((), np.float32) for name in ("correct", "loss", "count")}, setup.mesh)
  shared = dataclasses.replace(setup.feed.test, variables=variables)
  for total, _ in steps.run(sums, shared, setup.feed.evaluation()):
    sums = total
  totals = {name: float(value) for name, value in jax.device_get(sums).items()}
  return {"accuracy": totals["correct"] / totals["count"], "loss": totals["loss"] / totals["count"]}


def hamming_distance(before: Masks, after: Masks) -> float:
  """Returns the share of channels on which two architectures differ (supplement D, Fig. 2)."""
  changed = sum(int(np.sum(before[name] != after[name])) for name in after)
  return changed / sum(len(mask) for mask in after.values())


def norm_summary(setup: Setup, params: Any, masks: Masks) -> dict[str, float]:
  """Returns mean and greatest norm of the dropped channels' slices, and the mean of the kept ones'."""
  norms = jax.device_get(setup.channel_norms(params))
  kept = np.concatenate([n[np.asarray(masks[name]) > 0] for name, rows in norms.items() for n in rows])
  dropped = np.concatenate([n[np.asarray(masks[name]) == 0] for name, rows in norms.items() for n in rows])
  summary = {"kept_norm_mean": float(kept.mean())}
  if dropped.size:
    summary |= {"dropped_norm_mean": float(dropped.mean()), "dropped_norm_max": float(dropped.max())}
  return summary
