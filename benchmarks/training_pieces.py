"""A network on random images that lie on the devices, and its steps as calls to time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from benchmarks.measuring import seconds_of
from sapr_jax import models, trace_channels
from sapr_jax.channels import ChannelGraph, Masks
from sapr_jax.method import macs_budget, project_to_budget, regularize_by_prox
from sapr_jax.runtime import cpu, data_mesh, replicate
from sapr_jax.runtime.devices import Step
from sapr_jax.training import steps
from sapr_jax.training.inputs import Preprocessing, Shared
from sapr_jax.training.state import TrainState

LEARNING_RATE = 0.01  # random labels at a higher one may diverge
MOMENTUM = 0.9
GAMMA = 5e-4


@dataclasses.dataclass(frozen=True)
class Pieces:
  """Inputs of a training step: network, channel graph, masks, and images on all devices of the mesh."""

  mesh: Mesh
  model: nn.Module
  variables: Any
  graph: ChannelGraph
  masks: Masks
  shared: Shared
  preprocessing: Preprocessing

  def state(self, tx: optax.GradientTransformation) -> TrainState:
    """Returns the first state of the weight step."""
    state = TrainState.create(self.variables, tx)
    return TrainState.create(self.variables, tx, masks=self.masks) if state.masks else state

  def weight_step(self, tx: optax.GradientTransformation) -> Step:
    return steps.weight_step(self.model, tx, self.preprocessing)

  def call(
    self,
    step: Step,
    state: Any,
    batch: int,
    *,
    variables: Any = None,
    steps_per_call: int = 1,
    fast_cpu: bool = True,
  ) -> Callable[[], Any]:
    """Returns a call that runs a step on random batches, in one compiled program, and waits for it.

    Args:
      step: See `training.steps`.
      state: State before the first step. Each call goes on from the last.
      batch: Images of a step, on all devices together.
      variables: `shared.variables` of the step.
      steps_per_call: Steps of a call.
      fast_cpu: As in the config; nothing to accelerators.
    """
    mapped = cpu.map_step(step, self.mesh, self.variables["params"], fast=fast_cpu)
    shared = dataclasses.replace(self.shared, variables=replicate(variables, self.mesh))
    rows = len(self.shared.labels)  # type: ignore[arg-type]
    order = np.random.default_rng(1).integers(0, rows, (steps_per_call, batch), dtype=np.int32)
    state = replicate(state, self.mesh)

    def call() -> Any:
      nonlocal state
      state, metrics = mapped(state, shared, mapped.place(order))
      return jax.block_until_ready((state, metrics))

    return call


def pieces(
  name: str, *, dtype: str = "float32", width_multiplier: float = 1.0, image_size: int = 32, images: int = 256
) -> Pieces:
  """Creates a network with ten classes (1000 for images of 224 pixels), its graph, and random uint8 images."""
  classes = 1000 if image_size == 224 else 10
  model = models.create(name, num_classes=classes, width_multiplier=width_multiplier, dtype=jnp.dtype(dtype))
  shape = (1, image_size, image_size, 3)
  variables = random_variables(model, shape)
  graph, mesh, rng = trace_channels(model, variables, shape), data_mesh(), np.random.default_rng(0)
  shared = Shared(
    images=jnp.asarray(rng.integers(0, 256, (images, *shape[1:]), dtype=np.uint8)),
    labels=jnp.asarray(rng.integers(0, classes, images, dtype=np.int32)),
    key=jax.random.key(0),
  )
  preprocessing = Preprocessing((0.5,) * 3, (0.25,) * 3, crop_padding=4, flip=True)
  return Pieces(mesh, model, variables, graph, random_masks(graph, 0.5), replicate(shared, mesh), preprocessing)


def weight_tx(graph: ChannelGraph | None = None) -> optax.GradientTransformationExtraArgs:
  """SGD with momentum and weight decay; with a graph, the proximal step after it."""
  sgd = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))
  return optax.with_extra_args_support(sgd) if graph is None else optax.chain(sgd, proximal_step(graph))


def proximal_step(graph: ChannelGraph) -> optax.GradientTransformationExtraArgs:
  return regularize_by_prox(graph, LEARNING_RATE, GAMMA, momentum=MOMENTUM)


def compile_seconds(function: Callable[[Any], jax.Array], argument: Any) -> float:
  """Returns the time to trace and compile the gradient of a function."""
  jax.clear_caches()
  return seconds_of(lambda: jax.jit(jax.grad(function)).lower(argument).compile())


def random_masks(graph: ChannelGraph, p: float, *, round_to: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
  """Projects scores drawn from a normal distribution onto the budget: uneven widths, as a generator's are."""
  rng = np.random.default_rng(seed)
  scores = {group.name: rng.normal(size=group.size) for group in graph.groups}
  return project_to_budget(graph, scores, macs_budget(graph, p), round_to=round_to)


def random_variables(model: nn.Module, input_shape: tuple[int, ...], seed: int = 0) -> Any:
  """Draws variables with NumPy, as compiling `init` of a large network takes long.

  Kernels are normal with He's deviation, scales and variances one, biases and means zero.
  """
  rng = np.random.default_rng(seed)

  def draw(place: Any, leaf: Any) -> np.ndarray:
    if leaf.ndim > 1:
      return ((2 / np.prod(leaf.shape[:-1])) ** 0.5 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
    return np.full(leaf.shape, float(place[-1].key in ("scale", "var")), leaf.dtype)

  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(input_shape))
  return jax.tree_util.tree_map_with_path(draw, shapes)
