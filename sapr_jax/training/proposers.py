"""Proposers rank the channels of the network before an epoch; the run projects their scores onto the budget."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np
import optax

from sapr_jax.channels import ChannelGraph
from sapr_jax.method import (
  IMPORTANCES,
  ArchitectureGenerator,
  Scores,
  SearchOptions,
  random_scores,
  relative_to_group_mean,
  split_by_group,
  taylor,
)
from sapr_jax.runtime.devices import MappedStep, replicate
from sapr_jax.training import steps
from sapr_jax.training.passes import Passes, Purpose
from sapr_jax.training.state import GeneratorState

PROPOSERS = ("generator", *IMPORTANCES)
"""Values of `prune.proposer`."""


class Proposer(Protocol):
  """Ranks the channels of a network."""

  def init(self) -> Any:
    """Returns the first state, a pytree of arrays that is saved with the run; () if there is none."""

  def propose(self, state: Any, variables: Any, epoch: int) -> tuple[Any, Scores | None, dict[str, float]]:
    """Ranks the channels before an epoch.

    Args:
      state: State after the epoch before, on the devices; donated.
      variables: Variables of the network, on the devices; they stay as they are.
      epoch: From 0.

    Returns:
      (state, scores, measurements for the records). The scores must be the same on every process; None leaves the
      masks in force as they are.
    """


@dataclasses.dataclass(frozen=True)
class GeneratorProposer:
  """The paper's: an architecture generator that learns on a part of the training images, one pass an epoch.

  Attributes:
    passes: The run.
    model: The network.
    graph: Its channel graph.
    tx: The generator's optimizer.
    options: The objective of the search.
    images: Indices of the training images that it learns on, int32 `[M]`.
    batch_size: Images in a batch.
    train: Whether the network is in training mode meanwhile, see `steps.generator_step`.
  """

  passes: Passes
  model: nn.Module
  graph: ChannelGraph
  tx: optax.GradientTransformation
  options: SearchOptions
  images: np.ndarray
  batch_size: int
  train: bool = False

  @functools.cached_property
  def generator(self) -> ArchitectureGenerator:
    """The generator for the groups of the graph."""
    return ArchitectureGenerator.for_graph(self.graph)

  @functools.cached_property
  def _step(self) -> MappedStep:
    preprocessing = self.passes.feed.preprocessing
    return self.passes.map(
      steps.generator_step(
        self.model, self.generator, self.graph, self.tx, preprocessing, self.options, train=self.train
      )
    )

  @functools.cached_property
  def _outputs(self) -> Any:
    return jax.jit(self.generator.apply)

  def init(self) -> GeneratorState:
    return GeneratorState.create(self.generator.init(self.passes.key(Purpose.GENERATOR_INIT)), self.tx)

  def propose(
    self, state: GeneratorState, variables: Any, epoch: int
  ) -> tuple[GeneratorState, Scores, dict[str, float]]:
    purpose = Purpose.GENERATOR
    calls = self.passes.feed.training(self.batch_size, purpose=purpose, epoch=epoch, images=self.images)
    state, metrics = self._step.run(state, self.passes.shared(purpose, variables), calls)
    scores = split_by_group(jax.device_get(self._outputs(state.variables)), self.graph)
    return state, scores, {f"generator_{name}": float(np.mean(values)) for name, values in metrics.items()}


@dataclasses.dataclass(frozen=True)
class ImportanceProposer:
  """A criterion of `method.importance` on the weights as they are, each score relative to the mean of its group.

  Attributes:
    name: Key of `IMPORTANCES`.
    passes: The run.
    model: The network.
    graph: Its channel graph.
    images: Indices of the training images whose gradients "taylor" reads, int32 `[M]`.
    batch_size: Images in a batch.
  """

  name: str
  passes: Passes
  model: nn.Module
  graph: ChannelGraph
  images: np.ndarray
  batch_size: int

  @functools.cached_property
  def _step(self) -> MappedStep:
    return self.passes.map(steps.gradient_step(self.model, self.passes.feed.preprocessing))

  def init(self) -> tuple[()]:
    return ()

  def propose(self, state: tuple[()], variables: Any, epoch: int) -> tuple[tuple[()], Scores, dict[str, float]]:
    params = jax.device_get(variables["params"])
    if self.name == "random":  # the same in every epoch
      scores = random_scores(params, self.graph, self.passes.key(Purpose.IMPORTANCE))
    elif self.name == "taylor":
      scores = taylor(params, self.graph, self._gradients(variables, epoch))
    else:
      scores = IMPORTANCES[self.name](params, self.graph)
    return state, relative_to_group_mean(jax.device_get(scores)), {}

  def _gradients(self, variables: Any, epoch: int) -> Any:
    """Sums the gradients of the loss over one pass."""
    purpose = Purpose.IMPORTANCE
    zeros = replicate(jax.tree.map(np.zeros_like, jax.device_get(variables["params"])), self.passes.mesh)
    calls = self.passes.feed.training(self.batch_size, purpose=purpose, epoch=epoch, images=self.images)
    return jax.device_get(self._step.run(zeros, self.passes.shared(purpose, variables), calls)[0])
