"""Training steps on random images that lie on the devices, built as a run builds them: for benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sapr_jax import models, trace_channels
from sapr_jax.channels import ChannelGraph
from sapr_jax.method import partial_regularization, project_to_budget
from sapr_jax.training import state, steps
from sapr_jax.training.devices import MappedSteps, data_mesh, replicate

LEARNING_RATE = 0.01  # random labels at a higher one may diverge
MOMENTUM = 0.9
GAMMA = 5e-4


@dataclasses.dataclass(frozen=True)
class Pieces:
  """What a training step needs: network, channel graph, and images on all devices of the mesh."""

  mesh: Mesh
  model: nn.Module
  variables: Any
  graph: ChannelGraph
  preprocessing: steps.Preprocessing
  shared: steps.Shared

  def calls(self, step: Any, carry: Any, batch: int, *, steps_per_call: int = 1) -> Callable[[], Any]:
    """Returns a call that runs the step so many times, in one compiled program, and waits for it.

    Args:
      step: See `training.steps`; reads `self.shared`.
      carry: State before the first step. Each call goes on from the last.
      batch: Images of a step, on all devices together.
      steps_per_call: Steps of a call.
    """
    rows = len(self.shared.labels)  # type: ignore[arg-type]
    order = np.random.default_rng(1).integers(0, rows, (steps_per_call, batch), dtype=np.int32)
    running = MappedSteps(step, self.mesh).run(replicate(carry, self.mesh), self.shared, itertools.repeat(order))
    return lambda: next(running)


def pieces(
  name: str, *, dtype: str = "float32", width_multiplier: float = 1.0, image_size: int = 32, images: int = 1024
) -> Pieces:
  """Creates a network with ten classes (1000 for images of 224 pixels), its graph, and random uint8 images."""
  classes = 1000 if image_size == 224 else 10
  model = models.create(name, num_classes=classes, width_multiplier=width_multiplier, dtype=jnp.dtype(dtype))
  shape = (1, image_size, image_size, 3)
  variables = random_variables(model, shape)
  graph, mesh, rng = trace_channels(model, variables, shape), data_mesh(), np.random.default_rng(0)
  shared = steps.Shared(
    images=jnp.asarray(rng.integers(0, 256, (images, *shape[1:]), dtype=np.uint8)),
    labels=jnp.asarray(rng.integers(0, classes, images, dtype=np.int32)),
    key=jax.random.key(0),
    masks=random_masks(graph, 0.5),
  )
  preprocessing = steps.Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, crop_padding=4, flip=True)
  return Pieces(mesh, model, variables, graph, preprocessing, replicate(shared, mesh))


def weight_step(made: Pieces, batch: int, *, method: bool = False, steps_per_call: int = 1) -> Callable[[], Any]:
  """Returns a call that trains the network on `steps_per_call` random batches and waits; SGD with momentum.

  With `method` the proximal step of the partial regularization follows, with masks that keep half of the MACs.
  """
  graph = made.graph if method else None
  tx = weight_tx(graph)
  step = steps.weight_step(made.model, tx, made.preprocessing, graph=graph)
  return made.calls(step, state.network_state(made.variables, tx), batch, steps_per_call=steps_per_call)


def weight_tx(graph: ChannelGraph | None) -> optax.GradientTransformationExtraArgs:
  """SGD with momentum and weight decay; with a graph, the proximal step after it."""
  sgd = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))
  if graph is None:
    return optax.with_extra_args_support(sgd)
  return optax.chain(sgd, partial_regularization(graph, LEARNING_RATE, GAMMA, momentum=MOMENTUM))


def random_masks(graph: ChannelGraph, p: float, *, round_to: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
  """Projects scores drawn from a normal distribution onto the budget: uneven widths, as a generator's are."""
  rng = np.random.default_rng(seed)
  scores = {group.name: rng.normal(size=group.size) for group in graph.groups}
  return project_to_budget(graph, scores, p, round_to=round_to)


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
