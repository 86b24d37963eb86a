"""What a run is made of, built from its configuration once: data on the devices, model, graph, optimizers."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sapr_jax import artifacts, data, models
from sapr_jax.channels import ChannelGraph, mask_params, trace_channels
from sapr_jax.errors import InputError
from sapr_jax.method import (
  ArchitectureGenerator,
  add_partial_group_lasso,
  channel_norms,
  check_budget,
  partial_regularization,
)
from sapr_jax.training import cpu, processes, schedules, state, steps
from sapr_jax.training.devices import MappedSteps, data_mesh, replicate
from sapr_jax.training.feed import Feed, make_feed
from sapr_jax.training.rounding import resolve_round_to

# Streams of random numbers and orders: one a purpose, so that none depends on how much another draws.
_INIT, _GENERATOR_INIT, TRAIN, GENERATOR, FINETUNE, MASKS, STATISTICS = range(7)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What does not change during a run.

  Attributes:
    config: The configuration, checked.
    mesh: All devices.
    feed: The images.
    input_shape: `(1, height, width, channels)`.
    model: The dense network.
    variables: Its initial variables.
    graph: Its channel graph.
    generator: The architecture generator.
    generator_images: Indices of the training images that the generator learns on, int32 `[M]`.
    round_to: What the widths of the sub-network are multiples of.
  """

  config: Any
  mesh: Mesh
  feed: Feed
  input_shape: tuple[int, int, int, int]
  model: nn.Module
  variables: dict[str, Any]
  graph: ChannelGraph
  generator: ArchitectureGenerator
  generator_images: np.ndarray
  round_to: int

  def key(self, stream: int) -> jax.Array:
    """The run's randomness for one purpose."""
    return jax.random.fold_in(jax.random.key(self.config.seed), stream)

  def steps_per_epoch(self, phase: Any) -> int:
    """Optimizer steps in an epoch of `config.train` or `config.finetune`; the incomplete last batch is left out."""
    return self.feed.num_train // phase.batch_size

  @property
  def hold_epoch(self) -> int:
    """After how many epochs of training the masks are not renewed any more."""
    epoch = self.config.prune.hold_epoch
    return self.config.train.epochs if epoch is None else epoch

  def weight_schedule(self, phase: Any) -> schedules.Schedule:
    """The learning rate of `config.train` or `config.finetune` over optimizer steps."""
    return schedules.learning_rate_schedule(phase, self.steps_per_epoch(phase))

  @functools.cached_property
  def train_tx(self) -> optax.GradientTransformationExtraArgs:
    """SGD with the partial regularization: a penalty before it or a proximal step after it."""
    phase, prune = self.config.train, self.config.prune
    schedule = self.weight_schedule(phase)
    sgd = schedules.sgd(phase, schedule)
    if prune.form == "penalty":
      return optax.chain(add_partial_group_lasso(self.graph, prune.gamma, weighting=prune.weighting), sgd)
    proximal = partial_regularization(
      self.graph, schedule, prune.gamma, momentum=phase.momentum, weighting=prune.weighting
    )
    return optax.chain(sgd, proximal)

  @functools.cached_property
  def finetune_tx(self) -> optax.GradientTransformation:
    return schedules.sgd(self.config.finetune, self.weight_schedule(self.config.finetune))

  @functools.cached_property
  def generator_tx(self) -> optax.GradientTransformation:
    return optax.adamw(self.config.generator.learning_rate, weight_decay=self.config.generator.weight_decay)

  def fingerprint(self) -> dict[str, Any]:
    """Returns what must be the same on all processes, in little space."""
    feed = self.feed
    return {
      "the number of images": [feed.num_train, feed.num_test],
      "the number of classes": feed.num_classes,
      "the shape of the images": list(feed.image_shape),
      "their mean and deviation": [feed.preprocessing.mean, feed.preprocessing.std],
      "the checksum of the first weights": processes.fingerprint(self.variables),
    }

  def initial_network(self) -> state.NetworkState:
    return replicate(state.network_state(self.variables, self.train_tx), self.mesh)

  def initial_generator(self) -> state.GeneratorState:
    key = self.key(_GENERATOR_INIT)
    return replicate(state.generator_state(self.generator, self.generator_tx, key), self.mesh)

  def mapped(self, step: Any) -> MappedSteps:
    """Maps a step of the network, dense or pruned, over the devices."""
    return cpu.map_step(step, self.mesh, self.variables["params"], fast=self.config.fast_cpu)

  @functools.cached_property
  def generator_outputs(self) -> Any:
    """The generator's outputs `[K, max C]` from its variables, compiled."""
    return jax.jit(self.generator.apply)

  @functools.cached_property
  def channel_norms(self) -> Any:
    """Group name -> norms of its channels in each kernel, from the parameters, compiled."""
    return jax.jit(lambda params: channel_norms(params, self.graph))

  @functools.cached_property
  def masked(self) -> Any:
    """The parameters with the dropped channels masked, from parameters and masks, compiled."""
    return jax.jit(lambda params, masks: mask_params(params, self.graph, masks))

  @functools.cached_property
  def evaluation(self) -> MappedSteps:
    """Evaluates the dense network, with or without masks in its parameters."""
    return self.mapped(steps.evaluation_step(self.model, self.feed.preprocessing))


def build(config: Any) -> Setup:
  """Opens the data, creates the network and traces its channels.

  Raises:
    InputError: If the data or the first weights cannot be read, a batch does not fit, the network has no channels to
      prune, or no masks can meet the budget.
  """
  mesh = data_mesh()
  feed = make_feed(config, mesh)
  _check_batches(config, feed.num_train, mesh.devices.size)
  input_shape = (1, *feed.image_shape)
  model, variables = initial_network(config, feed.num_classes, input_shape)
  graph = trace_channels(model, variables, input_shape, select=config.prune.select)
  # A budget that no masks can meet shows now, not at E_start.
  round_to = resolve_round_to(config.prune, graph, mesh.devices.flat[0].platform)
  check_budget(graph, config.prune.p, min_width=config.prune.min_width, round_to=round_to)
  return Setup(
    config=config,
    mesh=mesh,
    feed=feed,
    input_shape=input_shape,
    model=model,
    variables=variables,
    graph=graph,
    generator=ArchitectureGenerator.for_graph(graph),
    generator_images=_generator_images(config, feed.num_train),
    round_to=round_to,
  )


def initial_network(
  config: Any, num_classes: int, input_shape: tuple[int, int, int, int]
) -> tuple[nn.Module, dict[str, Any]]:
  """Returns the dense network and its first variables: drawn at random, or read from `config.init.weights`."""
  model = models.create(
    config.model.name,
    num_classes=num_classes,
    width_multiplier=config.model.width_multiplier,
    dtype=jnp.dtype(config.model.dtype),
    remat=config.model.remat,
  )
  if config.init.weights is not None:
    return _read_network(pathlib.Path(config.init.weights), model, input_shape)
  key = jax.random.fold_in(jax.random.key(config.seed), _INIT)
  return model, jax.jit(model.init)(key, jnp.zeros(input_shape))


def _read_network(
  path: pathlib.Path, model: nn.Module, input_shape: tuple[int, int, int, int]
) -> tuple[nn.Module, dict[str, Any]]:
  """Reads first weights: a directory that `artifacts.save` wrote, or a file of PyTorch."""
  if path.is_dir():
    model, variables = artifacts.load(path, base=model)
  else:
    variables = artifacts.import_torch(path, model, input_shape)
  if (name := state.first_not_finite(variables)) is not None:
    raise InputError(f"{path} has entries of {name} that are not finite; give weights of a run that did not diverge.")
  return model, variables


def _generator_images(config: Any, num_train: int) -> np.ndarray:
  size = round(config.generator.data_share * num_train)
  return data.epoch_order(num_train, seed=config.seed, epoch=0, purpose="generator subset")[:size]


def _check_batches(config: Any, num_train: int, num_devices: int) -> None:
  generator_images = round(config.generator.data_share * num_train)
  for name, batch, images, pieces in (
    ("train.batch_size", config.train.batch_size, num_train, config.train.accumulate),
    ("finetune.batch_size", config.finetune.batch_size, num_train, config.finetune.accumulate),
    ("generator.batch_size", config.generator.batch_size, generator_images, 1),
    ("eval_batch_size", config.eval_batch_size, None, 1),
  ):
    parts = num_devices * pieces
    if batch % parts:
      lower = batch // parts * parts
      near = f"{lower} or {lower + parts}" if lower else str(parts)
      times = f" times {name.split('.')[0]}.accumulate={pieces}" if pieces > 1 else ""
      raise InputError(f"{name}={batch} does not divide by the {num_devices} devices{times}; {near} would.")
    if images is not None and batch > images:
      raise InputError(f"{name}={batch} is more than the {images} images there are; lower it, or use more images.")
