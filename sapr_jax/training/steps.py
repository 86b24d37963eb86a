"""The steps, written per device: weights, generator, gradients, batch statistics, evaluation.

Each builder returns a function (state, shared, batch) -> (state, metrics) for `runtime.MappedStep`. Normalization, and
the augmentation that `Preprocessing` asks for, are part of the step. Networks are called as `model(x, train=...)`, in
training with a key named "dropout".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sapr_jax.channels import ChannelGraph, Masks, masked_apply, reader_moments
from sapr_jax.data import Inputs
from sapr_jax.method import ArchitectureGenerator, GeneratorState, SearchOptions, learn
from sapr_jax.runtime.devices import Step, device_key, mean_over_devices, sum_over_devices
from sapr_jax.training.distillation import Distillation, distilled_loss
from sapr_jax.training.inputs import Preprocessing, Shared
from sapr_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def weight_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  preprocessing: Preprocessing,
  *,
  accumulate: int = 1,
  unroll: bool = True,
  distillation: Distillation | None = None,
) -> Step:
  """Builds the step that trains the weights; the state is a `TrainState`.

  The device's part of the batch goes through the network in `accumulate` pieces, one after the other, so that only one
  piece's activations are in memory (in a loop; if they are unrolled, XLA for CPUs keeps those of all). Gradients and
  metrics are means over the pieces, and batch statistics follow them. The optimizer, the regularization and the
  exchange between devices come once. With a distillation, the loss is that of `distilled_loss`.
  """

  def gradient(state: TrainState, piece: Any) -> Any:
    images, labels, key = piece
    x = preprocessing.normalize(images)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
      variables = {**state.variables, "params": params}
      logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      if distillation is not None:
        loss = _with_teacher(loss, logits, x, state, distillation)
      accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
      return loss, (updated.get("batch_stats", {}), {"loss": loss, "accuracy": accuracy})

    return jax.grad(loss_fn, has_aux=True)(state.params)

  def step(state: TrainState, shared: Shared, batch: Any) -> tuple[TrainState, Metrics]:
    image_key, dropout_key = jax.random.split(_step_key(shared, state.step))
    images, labels = shared.read(batch)
    whole = (preprocessing.augment(image_key, images), labels)
    if accumulate == 1:
      grads, (batch_stats, metrics) = gradient(state, (*whole, dropout_key))
    else:
      pieces = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), whole)
      pieces = (*pieces, jax.random.split(dropout_key, accumulate))
      grads, batch_stats, metrics = _mean_over_pieces(gradient, state, pieces, unroll)
    grads, batch_stats, metrics = mean_over_devices((grads, batch_stats, metrics))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(
      state, step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state
    ), metrics

  return step


def _step_key(shared: Shared, step: jax.Array) -> jax.Array:
  """Returns the randomness of a step on this device."""
  assert shared.key is not None
  return device_key(jax.random.fold_in(shared.key, step))


def _mean_over_pieces(
  gradient: Callable[[TrainState, Any], Any], state: TrainState, pieces: Any, unroll: bool
) -> tuple[Any, Any, Any]:
  """Returns means of gradients and metrics over the pieces, and the batch statistics after the last."""
  count = jax.tree.leaves(pieces)[0].shape[0]
  first = jax.tree.map(lambda x: x[0], pieces)
  grads, (_, metrics) = jax.eval_shape(gradient, state, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))

  def add(carry: Any, piece: Any) -> tuple[Any, None]:
    # A piece may not begin before the one before is done with its memory.
    (sums, batch_stats), piece = jax.lax.optimization_barrier((carry, piece))
    grads, (batch_stats, metrics) = gradient(dataclasses.replace(state, batch_stats=batch_stats), piece)
    return (jax.tree.map(jnp.add, sums, (grads, metrics)), batch_stats), None

  (sums, batch_stats), _ = jax.lax.scan(add, (zeros, state.batch_stats), pieces, unroll=unroll)
  grads, metrics = jax.tree.map(lambda x: x / count, sums)
  return grads, batch_stats, metrics


def _with_teacher(
  loss: jax.Array, logits: jax.Array, x: jax.Array, state: TrainState, distillation: Distillation
) -> jax.Array:
  """Returns the loss with what the teacher says of the same inputs, in evaluation mode, from its first step on."""
  weight, temperature = distillation.weight, distillation.temperature

  def mixed() -> jax.Array:
    taught: Any = distillation.teacher.apply(state.teacher, x, train=False)
    return distilled_loss(loss, logits, jax.lax.stop_gradient(taught), weight, temperature)

  if distillation.first_step == 0:
    return mixed()
  return jax.lax.cond(state.step >= distillation.first_step, mixed, lambda: loss)


def generator_step(
  model: nn.Module,
  generator: ArchitectureGenerator,
  graph: ChannelGraph,
  tx: optax.GradientTransformation,
  preprocessing: Preprocessing,
  options: SearchOptions,
  *,
  train: bool = False,
) -> Step:
  """Builds the step that trains the generator with the weights fixed; the state is a `GeneratorState`.

  All devices sample the same masks. By default the network is in evaluation mode, with the running statistics of the
  dense network. With `train` it is in training mode, dropout included, and normalizes by the statistics of each
  device's part of the batch.
  """

  def step(state: GeneratorState, shared: Shared, batch: Any) -> tuple[GeneratorState, Metrics]:
    assert shared.key is not None
    mask_key, image_key, dropout_key = jax.random.split(jax.random.fold_in(shared.key, state.step), 3)
    images, labels = shared.read(batch)
    x = preprocessing.normalize(preprocessing.augment(device_key(image_key), images))
    rngs = {"dropout": device_key(dropout_key)}

    def network_loss(masks: Masks) -> jax.Array:
      # The running statistics that training mode would move are thrown away.
      mode = {"train": train, "mutable": ["batch_stats"], "rngs": rngs}
      logits, _ = masked_apply(model, shared.variables, graph, masks, x, **mode)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    new_state, metrics = learn(state, generator, graph, tx, network_loss, mask_key, options, mean=mean_over_devices)
    return new_state, mean_over_devices({"loss": metrics.loss, "cost_share": metrics.cost_share})

  return step


def masked_loss_step(
  model: nn.Module, graph: ChannelGraph, preprocessing: Preprocessing, *, train: bool = False
) -> Step:
  """Builds the step that measures the loss of a sub-network as `generator_step` does that of its samples.

  The state is {"step", "masks"}, and only the number moves.
  """

  def step(state: dict[str, Any], shared: Shared, batch: Any) -> tuple[dict[str, Any], Metrics]:
    image_key, dropout_key = jax.random.split(_step_key(shared, state["step"]))
    images, labels = shared.read(batch)
    x = preprocessing.normalize(preprocessing.augment(image_key, images))
    mode = {"train": train, "mutable": ["batch_stats"], "rngs": {"dropout": dropout_key}}
    logits, _ = masked_apply(model, shared.variables, graph, state["masks"], x, **mode)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return {**state, "step": state["step"] + 1}, mean_over_devices({"loss": loss})

  return step


def gradient_step(model: nn.Module, preprocessing: Preprocessing) -> Step:
  """Builds the step that sums the gradients of the loss in evaluation mode; the state is a tree of sums."""

  def step(sums: Any, shared: Shared, batch: Any) -> tuple[Any, Metrics]:
    images, labels = shared.read(batch)

    def loss_fn(params: Any) -> jax.Array:
      logits: Any = model.apply({**shared.variables, "params": params}, preprocessing.normalize(images), train=False)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = mean_over_devices(jax.value_and_grad(loss_fn)(shared.variables["params"]))
    return jax.tree.map(jnp.add, sums, grads), {"loss": loss}

  return step


def moments_step(model: nn.Module, graph: ChannelGraph, masks: Masks, preprocessing: Preprocessing) -> Step:
  """Builds the step that sums what the kernels that read channels see; the state has the sums, see `reader_moments`."""

  def step(sums: Any, shared: Shared, batch: Any) -> tuple[Any, Metrics]:
    images, _ = shared.read(batch)
    moments = reader_moments(model, shared.variables, graph, masks, preprocessing.normalize(images))
    return jax.tree.map(jnp.add, sums, sum_over_devices(moments)), {}

  return step


def recalibration_step(model: nn.Module, preprocessing: Preprocessing) -> Step:
  """Builds the step that moves the running statistics as the weight step does, and nothing else.

  The state is {"step", "batch_stats"}; the statistics in `shared.variables` are not read.
  """

  def step(state: dict[str, Any], shared: Shared, batch: Any) -> tuple[dict[str, Any], Metrics]:
    image_key, dropout_key = jax.random.split(_step_key(shared, state["step"]))
    images, _ = shared.read(batch)
    variables = {**shared.variables, "batch_stats": state["batch_stats"]}
    x = preprocessing.normalize(preprocessing.augment(image_key, images))
    _, updated = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key})
    number = state["step"] + 1
    return {"step": number, "batch_stats": mean_over_devices(updated["batch_stats"])}, {"step": number}

  return step


def evaluation_step(
  model: nn.Module, preprocessing: Preprocessing | Inputs, apply_kwargs: Mapping[str, Any] | None = None
) -> Step:
  """Builds the step that counts correct answers; the state is {"correct", "loss", "count"}, summed over images.

  A batch is (batch of images, weights); an image of weight 0 only fills the batch. `apply_kwargs` tell the model that
  it is evaluated; by default `train=False` does.
  """
  mode: Any = {"train": False} if apply_kwargs is None else apply_kwargs

  def step(state: Metrics, shared: Shared, batch: Any) -> tuple[Metrics, Metrics]:
    batch, weights = batch
    images, labels = shared.read(batch)
    logits: Any = model.apply(shared.variables, preprocessing.normalize(images), **mode)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    sums = sum_over_devices(
      {
        "correct": jnp.sum(weights * (jnp.argmax(logits, axis=-1) == labels).astype(weights.dtype)),
        "loss": jnp.sum(weights * losses),
        "count": jnp.sum(weights),
      }
    )
    return jax.tree.map(jnp.add, state, sums), sums

  return step
