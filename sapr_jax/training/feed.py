"""How images reach the steps: a small data set lies on the devices, a large one is read from disk as it is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sapr_jax import data
from sapr_jax.errors import InputError
from sapr_jax.training.devices import default_steps_per_call, process_slice, replicate
from sapr_jax.training.steps import Preprocessing, Shared


class Feed(Protocol):
  """The images of a run, wherever they lie.

  Attributes:
    num_train: Number of training images.
    num_test: Number of test images.
    num_classes: Number of classes.
    image_shape: `(height, width, channels)` of what the network sees.
    preprocessing: What is left to do in the steps.
    train: What the steps on training images read; empty if batches bring their images.
    test: The same for test images.
  """

  num_train: int
  num_test: int
  num_classes: int
  image_shape: tuple[int, int, int]
  preprocessing: Preprocessing
  train: Shared
  test: Shared

  def training(self, order: np.ndarray, *, stream: int, epoch: int, first: int = 0) -> Iterator[Any]:
    """Yields the batches of each call of the mapped step, `[n, batch, ...]`.

    Args:
      order: Indices of training images, int32 `[batches, batch]`.
      stream: Stream of random numbers, for augmentation on the host.
      epoch: From 0, likewise.
      first: How many batches to leave out, because they are done.
    """

  def evaluation(self) -> Iterator[Any]:
    """Yields the calls on all test images: (batch, weights)."""


class ResidentFeed:
  """The whole data set on every device, as uint8: a batch is an array of indices, and a call runs many steps."""

  def __init__(self, config: Any, mesh: Mesh):
    dataset = data.load_dataset(_spec(config))
    self.num_train, self.num_test = len(dataset.train), len(dataset.test)
    self.num_classes, self.image_shape = dataset.num_classes, dataset.image_shape
    mean, std = dataset.channel_statistics()
    if config.data.mean is not None and len(config.data.mean) != self.image_shape[-1]:
      raise InputError(
        f"data.mean={config.data.mean} has {len(config.data.mean)} numbers; these images have {self.image_shape[-1]}"
        " channels: give one number for each, or none to take them from the images."
      )
    self.preprocessing = Preprocessing(
      mean=tuple(config.data.mean or map(float, mean)),
      std=tuple(config.data.std or map(float, std)),
      crop_padding=config.data.crop_padding,
      flip=config.data.flip,
    )
    self.train, self.test = (_on_devices(split, mesh) for split in (dataset.train, dataset.test))
    self._eval_batch_size = config.eval_batch_size
    self._steps_per_call = config.steps_per_call or default_steps_per_call(mesh)

  def training(self, order: np.ndarray, *, stream: int, epoch: int, first: int = 0) -> Iterator[Any]:
    del stream, epoch  # augmentation is on the device
    return self._calls(order, first)

  def evaluation(self) -> Iterator[Any]:
    return self._calls(data.evaluation_batches(self.num_test, self._eval_batch_size))

  def _calls(self, batches: Any, first: int = 0) -> Iterator[Any]:
    total, batch_size = jax.tree.leaves(batches)[0].shape
    local, most = process_slice(batch_size), self._steps_per_call
    # Fewer steps in a call where that leaves no remainder: it would be one more program to compile.
    size = next((size for size in range(most, most // 2, -1) if total % size == 0), most)
    for start in range(first, total, size):
      yield jax.tree.map(lambda x: x[start : start + size, local], batches)  # noqa: B023  (run at once)


class StreamedFeed:
  """Images that are decoded, cropped and flipped by worker processes while the devices compute."""

  def __init__(self, config: Any):
    fields = config.data
    dataset = data.open_dataset(_spec(config))
    self._dataset, self._seed, self._eval_batch_size = dataset, config.seed, config.eval_batch_size
    self.num_train, self.num_test = len(dataset.train), len(dataset.test)
    self.num_classes, self.image_shape = dataset.num_classes, (fields.image_size, fields.image_size, 3)
    self.preprocessing = Preprocessing(mean=tuple(fields.mean), std=tuple(fields.std))
    self.train, self.test = Shared(), Shared()
    self._train_recipe = data.TrainingRecipe(fields.image_size, flip=fields.flip)
    self._test_recipe = data.EvaluationRecipe(fields.image_size, resize=fields.eval_resize)
    self._workers = _default_workers() if fields.workers is None else fields.workers

  def training(self, order: np.ndarray, *, stream: int, epoch: int, first: int = 0) -> Iterator[Any]:
    return self._calls(self._dataset.train, order, self._train_recipe, stream, epoch, first)

  def evaluation(self) -> Iterator[Any]:
    order, weights = data.evaluation_batches(self.num_test, self._eval_batch_size)
    local = process_slice(self._eval_batch_size)
    calls = self._calls(self._dataset.test, order, self._test_recipe, 0, 0, 0)
    for call, batch_weights in zip(calls, weights, strict=True):
      yield call, batch_weights[None, local]

  def _calls(
    self, split: data.EncodedSplit, order: np.ndarray, recipe: data.Recipe, stream: int, epoch: int, first: int
  ) -> Iterator[Any]:
    batches = data.stream_batches(
      split,
      order,
      recipe=recipe,
      seed=self._seed,
      purpose=stream,
      epoch=epoch,
      first=first,
      workers=self._workers,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    for batch in batches:
      yield jax.tree.map(lambda x: x[None], batch)


def make_feed(config: Any, mesh: Mesh) -> Feed:
  """Opens the data set of `config`.

  Raises:
    InputError: If it cannot be read.
  """
  return StreamedFeed(config) if config.data.stream else ResidentFeed(config, mesh)


def _spec(config: Any) -> data.DataSpec:
  fields = config.data
  return data.DataSpec(
    fields.source, fields.name, fields.path, fields.train_images, fields.test_images, seed=config.seed
  )


def _default_workers() -> int:
  """Returns 0 for threads where they keep all cores busy (benchmarks/input_pipeline.py), else a process for each."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return 0 if cores <= 4 else min(cores, 32)


def _on_devices(split: data.ImageSplit, mesh: Mesh) -> Shared:
  return replicate(Shared(images=jnp.asarray(split.images), labels=jnp.asarray(split.labels)), mesh)


__all__ = ["Feed", "ResidentFeed", "StreamedFeed", "make_feed"]
