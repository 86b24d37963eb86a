"""A network on random images that lie on the devices, and its steps as calls to time."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from PIL import Image

from benchmarks.measuring import seconds_of, time_in_turns
from sapr_jax import models, trace_channels
from sapr_jax.channels import ChannelGraph, Masks
from sapr_jax.method import macs_budget, project_to_budget, regularize_by_prox
from sapr_jax.models import with_fast_layers
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

  def on(self, mesh: Mesh) -> Pieces:
    """Returns the same on another mesh."""
    return dataclasses.replace(self, mesh=mesh, shared=replicate(self.shared, mesh))

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


def write_images(folder: pathlib.Path, train: int, shape: tuple[int, int], *, copies: int = 1) -> None:
  """Writes random images of two classes: so many for training, and 16 for testing.

  Args:
    folder: To hold `train/<class>/*` and `test/<class>/*`.
    train: Different images for training.
    shape: Height and width. Those above 32 pixels become JPEG files with about as many bytes a pixel as photographs.
    copies: Names that each training image has.
  """
  rng = np.random.default_rng(0)
  for split, count in (("train", train), ("test", 16)):
    for number in range(count):
      files = folder / split / f"class{number % 2}"
      files.mkdir(parents=True, exist_ok=True)
      if max(shape) <= 32:
        first = files / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(first)
      else:
        first, (height, width) = files / f"{number}.jpg", shape
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-18, 19, (height, width, 1))
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(first, quality=90)
      for copy in range(1, copies if split == "train" else 1):
        os.link(first, first.with_name(f"{number}_{copy}{first.suffix}"))


def weight_tx(graph: ChannelGraph | None = None) -> optax.GradientTransformationExtraArgs:
  """SGD with momentum and weight decay; with a graph, the proximal step after it."""
  sgd = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))
  return optax.with_extra_args_support(sgd) if graph is None else optax.chain(sgd, proximal_step(graph))


def proximal_step(graph: ChannelGraph) -> optax.GradientTransformationExtraArgs:
  return regularize_by_prox(graph, LEARNING_RATE, GAMMA, momentum=MOMENTUM)


def matmul_rate(dtype: str) -> float:
  """Returns the multiply-accumulates a second of a large matrix product: what the device can reach in that dtype."""
  size, calls = (1024, 2) if jax.devices()[0].platform == "cpu" else (8192, 10)
  # Random values, as some devices are faster with zeros.
  a, b = (jax.random.normal(jax.random.key(seed), (size, size), jnp.dtype(dtype)) for seed in range(2))
  product = jax.jit(jnp.matmul)

  def call() -> None:
    for _ in range(calls):  # the device goes from one to the next
      result = product(a, b)
    jax.block_until_ready(result)

  return calls * size**3 / min(time_in_turns({"product": call})["product"])


def share_of_peak(row: Mapping[str, Any], seconds: float) -> str:
  """Formats the rate of a weight step over that of a matrix product, "" where that was not measured.

  Args:
    row: With "macs" of an image, "batch" and "matmul_rate".
    seconds: Of a step, whose backward pass takes twice the forward's MACs.
  """
  return f"{3 * row['macs'] * row['batch'] / seconds / row['matmul_rate']:.1%}" if "matmul_rate" in row else ""


def compile_seconds(function: Callable[[Any], jax.Array], argument: Any) -> float:
  """Returns the time to trace and compile the gradient of a function."""
  jax.clear_caches()
  return seconds_of(lambda: jax.jit(jax.grad(function)).lower(argument).compile())


def forward(model: Any, variables: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
  """Returns a call that computes the logits of a batch and waits for them; on a CPU, with the layers fast there."""
  variables, x = jax.device_put(variables), jax.random.normal(jax.random.key(0), shape)

  def logits(variables: Any, x: jax.Array) -> jax.Array:
    return model.apply(variables, x, train=False)

  on_cpu = jax.devices()[0].platform == "cpu"
  compiled = jax.jit(with_fast_layers(logits) if on_cpu else logits).lower(variables, x).compile()
  return lambda: jax.block_until_ready(compiled(variables, x))


def random_scores(graph: ChannelGraph, seed: int = 0) -> dict[str, np.ndarray]:
  """Draws scores from a normal distribution: projected onto a budget, they give uneven widths, as a generator's do."""
  rng = np.random.default_rng(seed)
  return {group.name: rng.normal(size=group.size) for group in graph.groups}


def random_masks(graph: ChannelGraph, p: float, *, round_to: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
  """Projects random scores onto a share of the prunable MACs."""
  return project_to_budget(graph, random_scores(graph, seed), macs_budget(graph, p), round_to=round_to)


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
