"""Proposers rank the channels of the network before an epoch; the run projects their scores onto the budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np
import optax

from sapr_jax.channels import ChannelGraph, Masks
from sapr_jax.method import (
  IMPORTANCES,
  ArchitectureGenerator,
  GeneratorState,
  Scores,
  SearchOptions,
  learned_share,
  outputs_of_prior,
  overlap,
  reorder,
  score_channels,
  split_by_group,
  start_from,
)
from sapr_jax.runtime.devices import MappedStep, replicate
from sapr_jax.training import steps
from sapr_jax.training.initialization import initialize
from sapr_jax.training.passes import Passes, Purpose

PROPOSERS = ("generator", *IMPORTANCES)
"""Values of `prune.proposer`."""

_IMAGES_OF_PROGRESS = 1024
"""Training images on which the loss of the projected masks is measured: few, as the search shall stay cheap."""


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
class Knowledge:
  """What a generator knows of the channels beforehand, from proposers that learn nothing.

  Attributes:
    prior: Ranks the channels as the generator begins; None for the random outputs of the paper's.
    strength: How much the generator holds to the prior, see `outputs_of_prior`.
    order: Ranks the channels of each group, while the generator decides on its width; None leaves both to it.
  """

  prior: Proposer | None = None
  strength: float = 1.0
  order: Proposer | None = None


@dataclasses.dataclass(frozen=True)
class GeneratorProposer:
  """The paper's: an architecture generator that learns on a part of the training images, one pass an epoch.

  Its records say how far the search is. "generator_overlap_last" and "generator_overlap_untrained" are the shares of
  the kept channels that the ranking before this pass, and the untrained one, keeps too. "generator_learned" says the
  latter without what chance does, see `learned_share`; a generator that starts from a prior has none. Far from the end
  of a search "generator_cost_share" is above the budget, and "generator_loss" (both of its samples) is far from
  "generator_projected_loss".

  Attributes:
    passes: The run.
    model: The network.
    graph: Its channel graph.
    tx: The generator's optimizer.
    options: The objective of the search.
    images: Indices of the training images that it learns on, int32 `[M]`.
    batch_size: Images in a batch.
    project: Scores -> the masks of the highest scores that the budget allows.
    train: Whether the network is in training mode meanwhile, see `steps.generator_step`.
    knowledge: What it starts from.
  """

  passes: Passes
  model: nn.Module
  graph: ChannelGraph
  tx: optax.GradientTransformation
  options: SearchOptions
  images: np.ndarray
  batch_size: int
  project: Callable[[Scores], Masks]
  train: bool = False
  knowledge: Knowledge = Knowledge()

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

  @functools.cached_property
  def _masked_loss(self) -> MappedStep:
    preprocessing = self.passes.feed.preprocessing
    return self.passes.map(steps.masked_loss_step(self.model, self.graph, preprocessing, train=self.train))

  def init(self) -> GeneratorState:
    variables = initialize(self.generator.init, self.passes.key(Purpose.GENERATOR_INIT))
    return GeneratorState.create(variables, self.tx, self._outputs(variables))

  def propose(
    self, state: GeneratorState, variables: Any, epoch: int
  ) -> tuple[GeneratorState, Scores, dict[str, float]]:
    if self.knowledge.prior is not None and int(state.step) == 0:
      state = self._start_from(self.knowledge.prior.propose((), variables, epoch)[1])
    order = None if self.knowledge.order is None else self.knowledge.order.propose((), variables, epoch)[1]

    def own(outputs: Any) -> Scores:
      return split_by_group(jax.device_get(outputs), self.graph)

    def scores(own: Scores) -> Scores:
      return own if order is None else reorder(own, order)

    untrained, before = own(state.untrained), own(self._outputs(state.variables))
    purpose = Purpose.GENERATOR
    calls = self.passes.feed.training(self.batch_size, purpose=purpose, epoch=epoch, images=self.images)
    state, metrics = self._step.run(state, self.passes.shared(purpose, variables), calls)
    after = own(self._outputs(state.variables))
    record = {name: float(np.mean(values)) for name, values in metrics.items()}
    if not any(np.isnan(values).any() for values in after.values()):  # which the run says of scores in general
      masks = self.project(scores(after))
      record |= {"overlap_last": overlap(masks, self.project(scores(before)))}
      record |= {"overlap_untrained": overlap(masks, self.project(scores(untrained)))}
      if self.knowledge.prior is None:  # an order would make all rankings alike
        record |= {"learned": learned_share(self.project(after), self.project(untrained))}
      record |= {"projected_loss": self._loss_of(masks, variables, epoch)}
    return state, scores(after), {f"generator_{name}": value for name, value in record.items()}

  def _start_from(self, scores: Scores | None) -> GeneratorState:
    """Returns the state of a generator that has learned nothing but knows these importances."""
    assert scores is not None
    outputs = outputs_of_prior(
      self.graph, scores, self.options.budget, strength=self.knowledge.strength, bias=self.options.bias
    )
    variables = start_from(self.init().variables, self.graph, outputs)
    state = GeneratorState.create(variables, self.tx, self._outputs(variables))
    return replicate(state, self.passes.mesh)

  def _loss_of(self, masks: Masks, variables: Any, epoch: int) -> float:
    """Returns the loss of the sub-network on some of the images that the generator learns on."""
    images = self.images[: max(self.batch_size, _IMAGES_OF_PROGRESS)]
    purpose = Purpose.GENERATOR
    calls = self.passes.feed.training(self.batch_size, purpose=purpose, epoch=epoch, images=images)
    state = replicate({"step": np.zeros((), np.int32), "masks": masks}, self.passes.mesh)
    _, metrics = self._masked_loss.run(state, self.passes.shared(purpose, variables), calls)
    return float(np.mean(metrics["loss"]))


@dataclasses.dataclass(frozen=True)
class ImportanceProposer:
  """A criterion of `method.importance` on the weights as they are.

  Attributes:
    name: Key of `IMPORTANCES`.
    passes: The run.
    model: The network.
    graph: Its channel graph.
    images: Indices of the training images whose gradients "taylor" reads, int32 `[M]`.
    batch_size: Images in a batch.
    compare: Makes the scores of different groups comparable.
  """

  name: str
  passes: Passes
  model: nn.Module
  graph: ChannelGraph
  images: np.ndarray
  batch_size: int
  compare: Callable[[Scores], Scores]

  @functools.cached_property
  def _step(self) -> MappedStep:
    return self.passes.map(steps.gradient_step(self.model, self.passes.feed.preprocessing))

  def init(self) -> tuple[()]:
    return ()

  def propose(self, state: tuple[()], variables: Any, epoch: int) -> tuple[tuple[()], Scores, dict[str, float]]:
    scores = score_channels(
      self.name,
      jax.device_get(variables["params"]),
      self.graph,
      gradients=lambda: self._gradients(variables, epoch),
      key=lambda: self.passes.key(Purpose.IMPORTANCE),  # the same in every epoch
    )
    return state, self.compare(jax.device_get(scores)), {}

  def _gradients(self, variables: Any, epoch: int) -> Any:
    """Sums the gradients of the loss over one pass."""
    purpose = Purpose.IMPORTANCE
    zeros = replicate(jax.tree.map(np.zeros_like, jax.device_get(variables["params"])), self.passes.mesh)
    calls = self.passes.feed.training(self.batch_size, purpose=purpose, epoch=epoch, images=self.images)
    return jax.device_get(self._step.run(zeros, self.passes.shared(purpose, variables), calls)[0])
