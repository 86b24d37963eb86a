"""The steps, written per device: weights, generator, batch statistics, evaluation.

Each builder returns a function (carry, shared, batch) -> (carry, metrics) for `devices.MappedSteps`. Images are uint8;
normalization and what `Preprocessing` asks for in augmentation are part of the step. Either the whole data set is in
`shared`, and a batch is an array of indices; or a batch brings its images, `{"images": ..., "labels": ...}`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sapr_jax import data
from sapr_jax.channels import ChannelGraph, Masks, masked_apply
from sapr_jax.method import ArchitectureGenerator, SearchMetrics, SearchOptions, architecture_loss, macs_budget
from sapr_jax.training.devices import Step, device_key, mean_over_devices, sum_over_devices
from sapr_jax.training.state import GeneratorState, NetworkState


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How uint8 images become inputs of the network.

  Attributes:
    mean: Mean of each channel, of images in [0, 1].
    std: Standard deviation of each channel.
    crop_padding: Random crops of the training images are taken after padding by this many pixels; 0 for none.
    flip: Whether training images are flipped at random.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop_padding: int = 0
  flip: bool = False

  def train(self, key: jax.Array, images: jax.Array) -> jax.Array:
    """Augments and normalizes `[batch, height, width, channels]` uint8 images."""
    return self.evaluate(self.augment(key, images))

  def augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
    """Crops and flips images at random; they stay uint8."""
    return data.augment(key, images, padding=self.crop_padding, flip=self.flip)

  def evaluate(self, images: jax.Array) -> jax.Array:
    """Normalizes images, without augmentation."""
    return data.normalize(images, jnp.asarray(self.mean), jnp.asarray(self.std))


@flax.struct.dataclass
class Shared:
  """What all steps of an epoch read.

  Attributes:
    images: uint8 `[N, height, width, channels]`; None where batches bring their images.
    labels: int32 `[N]`; None likewise.
    key: Randomness of the run; steps fold their number in.
    masks: Group name -> 0/1 array: the masks in force, for the weight step.
    variables: Variables of the network, for the generator step and evaluation.
  """

  images: jax.Array | None = None
  labels: jax.Array | None = None
  key: Any = None
  masks: Any = None
  variables: Any = None

  def read(self, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Returns images and labels of a batch."""
    if self.images is None or self.labels is None:
      return batch["images"], batch["labels"]
    return self.images[batch], self.labels[batch]


def weight_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  preprocessing: Preprocessing,
  *,
  accumulate: int = 1,
  unroll: bool = True,
) -> Step:
  """Builds the step that trains the weights; the carry is a `NetworkState`.

  The device's part of the batch goes through the network in `accumulate` pieces, one after the other, so that only one
  piece's activations are in memory (in a loop; of unrolled pieces XLA for CPUs keeps all). Gradients and metrics are
  means over the pieces, and batch statistics follow them. The optimizer, the regularization and the exchange between
  devices come once.

  Args:
    model: The network; called as `model(x, train=True)` with a key named "dropout".
    tx: Its optimizer; a partial regularization in it gets the masks in force.
    preprocessing: Augmentation and normalization.
    accumulate: Number of pieces; divides the device's part of the batch.
    unroll: Whether the pieces are a program each in place of a loop, see `devices.loops_are_slow`.
  """

  optimizer = optax.with_extra_args_support(tx)

  def gradient(state: NetworkState, piece: Any) -> Any:
    images, labels, key = piece
    x = preprocessing.evaluate(images)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
      variables = {**state.variables, "params": params}
      logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
      return loss, (updated.get("batch_stats", {}), {"loss": loss, "accuracy": accuracy})

    return jax.grad(loss_fn, has_aux=True)(state.params)

  def step(state: NetworkState, shared: Shared, batch: Any) -> tuple[NetworkState, dict[str, jax.Array]]:
    image_key, dropout_key = jax.random.split(device_key(jax.random.fold_in(shared.key, state.step)))
    images, labels = shared.read(batch)
    whole = (preprocessing.augment(image_key, images), labels)
    if accumulate == 1:
      grads, (batch_stats, metrics) = gradient(state, (*whole, dropout_key))
    else:
      pieces = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), whole)
      pieces = (*pieces, jax.random.split(dropout_key, accumulate))
      grads, batch_stats, metrics = _mean_over_pieces(gradient, state, pieces, unroll)
    grads, batch_stats, metrics = mean_over_devices((grads, batch_stats, metrics))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, masks=shared.masks)
    new_state = NetworkState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
    )
    return new_state, metrics

  return step


def _mean_over_pieces(gradient: Any, state: NetworkState, pieces: Any, unroll: bool) -> tuple[Any, Any, Any]:
  """Returns means of gradients and metrics over the pieces, and the batch statistics after the last."""
  count = jax.tree.leaves(pieces)[0].shape[0]
  first = jax.tree.map(lambda x: x[0], pieces)
  grads, (_, metrics) = jax.eval_shape(gradient, state, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))

  def add(carry: Any, piece: Any) -> tuple[Any, None]:
    # A piece may not begin before the one before is done with its memory.
    (sums, batch_stats), piece = jax.lax.optimization_barrier((carry, piece))
    grads, (batch_stats, metrics) = gradient(state.replace(batch_stats=batch_stats), piece)  # type: ignore[attr-defined]
    return (jax.tree.map(jnp.add, sums, (grads, metrics)), batch_stats), None

  (sums, batch_stats), _ = jax.lax.scan(add, (zeros, state.batch_stats), pieces, unroll=unroll)
  grads, metrics = jax.tree.map(lambda x: x / count, sums)
  return grads, batch_stats, metrics


def generator_step(
  model: nn.Module,
  generator: ArchitectureGenerator,
  graph: ChannelGraph,
  tx: optax.GradientTransformation,
  preprocessing: Preprocessing,
  *,
  p: float,
  macs_weight: float,
  bias: float,
  temperature: float,
  batch_statistics: bool,
) -> Step:
  """Builds the step that trains the generator with the weights fixed; the carry is a `GeneratorState`.

  The loss is the cross-entropy of the network with sampled masks plus `macs_weight` times `budget_penalty`. All devices
  sample the same masks.

  Args:
    model: The network; called as `model(x, train=...)`.
    generator: The `ArchitectureGenerator`.
    graph: The channel graph.
    tx: The generator's optimizer.
    preprocessing: Augmentation and normalization.
    p: Share of the prunable MACs to keep.
    macs_weight: Coefficient of the MACs penalty.
    bias: b of Eq. 1.
    temperature: tau of Eq. 1.
    batch_statistics: Whether the network is in training mode, dropout included, and normalizes by the statistics of
      each device's part of the batch; otherwise it is in evaluation mode, with the dense network's running ones.
  """

  options = SearchOptions(macs_budget(graph, p), macs_weight, bias, temperature)

  def step(state: GeneratorState, shared: Shared, batch: Any) -> tuple[GeneratorState, dict[str, jax.Array]]:
    mask_key, image_key, dropout_key = jax.random.split(jax.random.fold_in(shared.key, state.step), 3)
    images, labels = shared.read(batch)
    x = preprocessing.train(device_key(image_key), images)
    rngs = {"dropout": device_key(dropout_key)}

    def network_loss(masks: Masks) -> jax.Array:
      mode = {"train": batch_statistics, "mutable": ["batch_stats"], "rngs": rngs}
      logits, _ = masked_apply(model, shared.variables, graph, masks, x, **mode)  # new running ones are thrown away
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def objective(params: Any) -> tuple[jax.Array, SearchMetrics]:
      variables = {**state.variables, "params": params}
      return architecture_loss(generator, variables, graph, network_loss, mask_key, options)

    grads, metrics = jax.grad(objective, has_aux=True)(state.params)
    updates, opt_state = tx.update(mean_over_devices(grads), state.opt_state, state.params)
    new_state = GeneratorState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      constants=state.constants,
      opt_state=opt_state,
    )
    return new_state, mean_over_devices({"loss": metrics.loss, "macs_share": metrics.cost_share})

  return step


def statistics_step(model: nn.Module, preprocessing: Preprocessing) -> Step:
  """Builds the step that moves the running statistics as the weight step does, and nothing else.

  The carry is {"step", "batch_stats"}, `shared.variables` the network's; their own statistics are not read.

  Args:
    model: The network; called as `model(x, train=True)` with a key named "dropout".
    preprocessing: Augmentation and normalization.
  """

  def step(carry: dict[str, Any], shared: Shared, batch: Any) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    image_key, dropout_key = jax.random.split(device_key(jax.random.fold_in(shared.key, carry["step"])))
    images, _ = shared.read(batch)
    variables = {**shared.variables, "batch_stats": carry["batch_stats"]}
    x = preprocessing.train(image_key, images)
    _, updated = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key})
    return {"step": carry["step"] + 1, "batch_stats": mean_over_devices(updated["batch_stats"])}, {}

  return step


def evaluation_step(model: nn.Module, preprocessing: Preprocessing) -> Step:
  """Builds the step that counts correct answers; the carry is {"correct", "loss", "count"}, summed over images.

  A batch is (batch as above, weights); an image of weight 0 only fills the batch.
  """

  def step(
    carry: dict[str, jax.Array], shared: Shared, batch: Any
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    batch, weights = batch
    images, labels = shared.read(batch)
    logits: Any = model.apply(shared.variables, preprocessing.evaluate(images), train=False)  # running statistics
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    sums = sum_over_devices(
      {
        "correct": jnp.sum(weights * (jnp.argmax(logits, axis=-1) == labels)),
        "loss": jnp.sum(weights * losses),
        "count": jnp.sum(weights),
      }
    )
    return jax.tree.map(jnp.add, carry, sums), {}

  return step
