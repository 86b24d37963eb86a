"""Passes over the images: mapping steps over the devices, feeding them, evaluating, recalibrating."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from sapr_jax.channels import ChannelGraph, Masks, reader_moments
from sapr_jax.errors import DivergedError
from sapr_jax.method import with_moments
from sapr_jax.runtime import cpu
from sapr_jax.runtime.devices import MappedStep, Step, loops_are_slow, replicate
from sapr_jax.training import steps
from sapr_jax.training.distillation import Distillation
from sapr_jax.training.feed import Feed
from sapr_jax.training.inputs import Shared
from sapr_jax.training.state import TrainState


class Purpose(enum.IntEnum):
  """Streams of random numbers and orders of images, so that none depends on how much another draws.

  The numbers are part of what makes runs repeatable; do not change them.
  """

  INIT = 0
  GENERATOR_INIT = 1
  TRAIN = 2
  GENERATOR = 3
  FINETUNE = 4
  MASKS = 5
  STATISTICS = 6
  IMPORTANCE = 7
  COMPENSATION = 8


@dataclasses.dataclass(frozen=True)
class Passes:
  """Runs steps on the images of a run.

  Attributes:
    mesh: All devices.
    feed: The images.
    seed: Seed of the run.
    params: Parameters of the network, for their shapes; see `runtime.cpu.map_step`.
    fast_cpu: `config.fast_cpu`.
  """

  mesh: Mesh
  feed: Feed
  seed: int
  params: Any
  fast_cpu: bool
  _evaluations: dict[nn.Module, MappedStep] = dataclasses.field(default_factory=dict, init=False, repr=False)

  def key(self, purpose: Purpose) -> jax.Array:
    """Returns the randomness of the run for one purpose."""
    return jax.random.fold_in(jax.random.key(self.seed), purpose)

  def map(self, step: Step) -> MappedStep:
    """Maps a step of the network, dense or pruned, over the devices."""
    return cpu.map_step(step, self.mesh, self.params, fast=self.fast_cpu)

  def shared(self, purpose: Purpose, variables: Any = None) -> Shared:
    """Returns what the steps of a pass over training images read."""
    return dataclasses.replace(self.feed.train, key=replicate(self.key(purpose), self.mesh), variables=variables)

  def evaluate(self, model: nn.Module, variables: Any) -> dict[str, float]:
    """Returns accuracy in [0, 1] and mean cross-entropy ("loss") on all test images; compiles once for a model.

    Raises:
      DivergedError: If the loss is not finite.
    """
    if model not in self._evaluations:
      self._evaluations[model] = self.map(steps.evaluation_step(model, self.feed.preprocessing))
    shared = dataclasses.replace(self.feed.test, variables=variables)
    metrics = run_evaluation(self._evaluations[model], self.mesh, shared, self.feed.evaluation())
    del metrics["images"]
    if not math.isfinite(metrics["loss"]):
      raise DivergedError(
        f"the loss on the test images is {metrics['loss']}: training diverged. The last checkpoint is kept; start again"
        " with a lower learning rate."
      )
    return metrics


def run_evaluation(step: MappedStep, mesh: Mesh, shared: Shared, calls: Iterable[Any]) -> dict[str, float]:
  """Runs an evaluation step on all calls; returns accuracy in [0, 1], mean cross-entropy ("loss"), number of images."""
  zeros = {name: np.zeros((), np.float32) for name in ("correct", "loss", "count")}
  sums, _ = step.run(replicate(zeros, mesh), shared, calls)
  correct, loss, count = (float(jax.device_get(sums[name])) for name in ("correct", "loss", "count"))
  return {"accuracy": correct / count, "loss": loss / count, "images": count}


class WeightPass:
  """Trains the weights of a network, one epoch after the other."""

  def __init__(
    self,
    passes: Passes,
    model: nn.Module,
    tx: optax.GradientTransformation,
    phase: Any,
    purpose: Purpose,
    distillation: Distillation | None = None,
  ):
    """Maps the weight step of `model` with the optimizer `tx`; `phase` is `config.train` or `config.finetune`."""
    feed, unroll = passes.feed, loops_are_slow(passes.mesh)
    step = steps.weight_step(
      model, tx, feed.preprocessing, accumulate=phase.accumulate, unroll=unroll, distillation=distillation
    )
    self._step, self._shared, self._feed = passes.map(step), passes.shared(purpose), feed
    self._batch_size, self._purpose = phase.batch_size, purpose
    self.steps_per_epoch = feed.num_train // phase.batch_size
    self.metrics_queue = self._step.metrics_queue

  def batches(self, epoch: int, first: int = 0) -> Iterator[Any]:
    """Yields the batches of each call of `step` in an epoch from step `first` on, on the devices."""
    calls = self._feed.training(self._batch_size, purpose=self._purpose, epoch=epoch, first=first)
    return map(self._step.place, calls)

  def step(self, state: TrainState, batches: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    """Starts n steps; returns the state (the old one is donated) and metrics `[n]`. The host does not wait."""
    return self._step(state, self._shared, batches)


def recalibrate_batch_norm(
  passes: Passes,
  model: nn.Module,
  variables: Any,
  *,
  batches: int,
  batch_size: int,
) -> dict[str, Any]:
  """Measures the running statistics of a network again, on batches of training images.

  The activations of a network that was cut differ from those of the one whose statistics it inherits. The batches are
  those of several epochs if one has too few.

  Returns:
    The variables with the new statistics, on the host; the variables as they are if they have none.
  """
  if not batches or "batch_stats" not in variables:
    return variables
  purpose = Purpose.STATISTICS
  # From the host, as the state is donated.
  state = {"step": np.zeros((), np.int32), "batch_stats": jax.device_get(variables["batch_stats"])}
  step = passes.map(steps.recalibration_step(model, passes.feed.preprocessing))
  state, variables_on_devices = replicate((state, variables), passes.mesh)
  calls = _first_batches(passes, purpose, batches, batch_size)
  state, _ = step.run(state, passes.shared(purpose, variables_on_devices), calls)
  return {**variables, "batch_stats": jax.device_get(state["batch_stats"])}


def fit_to_cut(
  passes: Passes, model: nn.Module, graph: ChannelGraph, variables: Any, masks: Masks, *, batches: int, batch_size: int
) -> dict[str, Any]:
  """Fits the weights that stay to make up for the channels that go, on batches of training images; see `compensate`.

  Returns:
    The variables of the dense network, on the host; as they are if there are no batches.
  """
  if not batches:
    return variables
  purpose = Purpose.COMPENSATION
  image = jax.ShapeDtypeStruct((1, *passes.feed.image_shape), np.float32)
  shapes = jax.eval_shape(lambda variables, x: reader_moments(model, variables, graph, masks, x), variables, image)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  step = passes.map(steps.moments_step(model, graph, masks, passes.feed.preprocessing))
  sums, variables_on_devices = replicate((zeros, variables), passes.mesh)
  calls = _first_batches(passes, purpose, batches, batch_size)
  sums, _ = step.run(sums, passes.shared(purpose, variables_on_devices), calls)
  return jax.device_get(with_moments(variables, graph, masks, jax.device_get(sums)))


def _first_batches(passes: Passes, purpose: Purpose, batches: int, batch_size: int) -> Iterator[Any]:
  """Yields calls with so many batches of training images in all, those of several epochs if one has too few."""
  left, per_epoch = batches, passes.feed.num_train // batch_size
  for epoch in range(-(-batches // per_epoch)):
    for call in passes.feed.training(batch_size, purpose=purpose, epoch=epoch):
      yield jax.tree.map(lambda x: x[:left], call)  # noqa: B023  (run at once)
      left -= len(jax.tree.leaves(call)[0])
      if left <= 0:
        return
