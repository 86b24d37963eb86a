"""What training steps are made of, on random images that lie on the devices: for benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from sapr_jax.training.devices import data_mesh, replicate

from sapr_jax import models, trace_channels
from sapr_jax.channels import ChannelGraph
from sapr_jax.method import macs_budget, project_to_budget, regularize_by_prox
from sapr_jax.training import steps

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


def weight_tx(graph: ChannelGraph | None) -> optax.GradientTransformationExtraArgs:
  """SGD with momentum and weight decay; with a graph, the proximal step after it."""
  sgd = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))
  if graph is None:
    return optax.with_extra_args_support(sgd)
  return optax.chain(sgd, regularize_by_prox(graph, LEARNING_RATE, GAMMA, momentum=MOMENTUM))


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
