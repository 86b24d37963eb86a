"""Batches of a run: a small data set lies on the devices, a large one is streamed from disk."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sapr_jax import data
from sapr_jax.errors import InputError
from sapr_jax.runtime.devices import default_steps_per_call, process_slice, replicate
from sapr_jax.training.inputs import Preprocessing, Shared, default_resize, image_size
from sapr_jax.training.skipping import SkippedImages


def open_feed(config: Any, mesh: Mesh) -> Feed:
  """Opens the data set of `config`.

  Raises:
    InputError: If it cannot be read.
  """
  return StreamedFeed(config) if config.data.stream else ResidentFeed(config, mesh)


def data_spec(config: Any) -> data.DataSpec:
  """Returns the data set that `config.data` names."""
  fields = config.data
  return data.DataSpec(
    source=fields.source,
    name=fields.name,
    path=fields.path,
    train_images=fields.train_images,
    test_images=fields.test_images,
    validation_images=fields.validation_images,
    seed=config.seed,
    skip_broken=fields.skip_broken,
  )


class Feed(abc.ABC):
  """The images of a run, wherever they lie.

  Attributes:
    num_train: Number of training images.
    num_test: Number of test images.
    class_names: Names of the classes, in the order of their labels.
    image_shape: `(height, width, channels)` of the network's input.
    preprocessing: The part of it that is left to the steps.
    resize: Length to which the shorter side of an image is resized in evaluation; None if images are of one size.
    fingerprint: See `data.fingerprint`.
    skipped: Broken images that were met so far.
    train: Training images on the devices; empty if batches bring their images.
    test: The same for test images.
  """

  image_shape: tuple[int, int, int]
  preprocessing: Preprocessing
  resize: int | None = None
  train = test = Shared()

  def __init__(self, dataset: data.ImageDataset | data.EncodedDataset, config: Any):
    self.num_train, self.num_test = len(dataset.train), len(dataset.test)
    self.class_names = dataset.class_names
    self.fingerprint, self.skipped = data.fingerprint(dataset), SkippedImages(config.data.skip_broken)
    self._seed, self._eval_batch_size = config.seed, config.eval_batch_size

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.class_names)

  @property
  def inputs(self) -> data.Inputs:
    """What a network that is trained on these images takes."""
    mean, std = self.preprocessing.mean, self.preprocessing.std
    return data.Inputs(self.image_shape, mean=mean, std=std, resize=self.resize, class_names=self.class_names)

  def training(
    self, batch_size: int, *, purpose: int, epoch: int, first: int = 0, images: np.ndarray | None = None
  ) -> Iterator[Any]:
    """Yields the batches of each call of a mapped step in one epoch, `[n, batch, ...]`.

    Args:
      batch_size: Images in a batch; the incomplete last batch is left out.
      purpose: Number that keeps orders and augmentation of different passes apart.
      epoch: From 0.
      first: How many batches to leave out, because they are done.
      images: Indices of the training images to read, int32 `[M]`; None for all.
    """
    count = self.num_train if images is None else len(images)
    order = data.epoch_batches(count, batch_size, seed=self._seed, epoch=epoch, purpose=purpose)
    return self._training_calls(order if images is None else images[order], purpose, epoch, first)

  def evaluation(self) -> Iterator[Any]:
    """Yields the calls on all test images: (batch, weights)."""
    return self._evaluation_calls(*data.evaluation_batches(self.num_test, self._eval_batch_size))

  @abc.abstractmethod
  def _training_calls(self, order: np.ndarray, purpose: int, epoch: int, first: int) -> Iterator[Any]: ...

  @abc.abstractmethod
  def _evaluation_calls(self, order: np.ndarray, weights: np.ndarray) -> Iterator[Any]: ...


class ResidentFeed(Feed):
  """The whole data set on every device, as uint8: a batch is an array of indices, and a call runs many steps."""

  def __init__(self, config: Any, mesh: Mesh):
    dataset, fields = data.load_dataset(data_spec(config)), config.data
    super().__init__(dataset, config)
    for split, broken in dataset.broken.items():
      self.skipped.add(split, broken)
    self.image_shape = dataset.image_shape
    if fields.mean is not None and len(fields.mean) != self.image_shape[-1]:
      cure = "leave it unset to take the mean of the images"
      if config.init.weights is not None:
        cure = "it is that of the network in init.weights, or given"
      raise InputError(
        f"data.mean must have one number for each of the {self.image_shape[-1]} channels of these images, got"
        f" {len(fields.mean)}: {fields.mean}; {cure}."
      )
    if fields.crop_padding >= (shorter := min(self.image_shape[:2])):
      raise InputError(
        f"data.crop_padding must be below the {shorter} pixels of the images' shorter side, got {fields.crop_padding};"
        " crops would hold nothing of the image."
      )
    mean, std = dataset.channel_statistics()
    self.preprocessing = Preprocessing(
      mean=tuple(fields.mean or map(float, mean)),
      std=tuple(fields.std or map(float, std)),
      crop_padding=fields.crop_padding,
      flip=fields.flip,
    )
    splits = [(split.images, split.labels) for split in (dataset.train, dataset.test)]
    self.train, self.test = (Shared(*arrays) for arrays in replicate(splits, mesh))
    self._steps_per_call = config.steps_per_call or default_steps_per_call(mesh)

  def _training_calls(self, order: np.ndarray, purpose: int, epoch: int, first: int) -> Iterator[Any]:
    return self._calls(order, first)  # augmentation is on the device

  def _evaluation_calls(self, order: np.ndarray, weights: np.ndarray) -> Iterator[Any]:
    return self._calls((order, weights))

  def _calls(self, batches: Any, first: int = 0) -> Iterator[Any]:
    total, batch_size = jax.tree.leaves(batches)[0].shape
    local, most = process_slice(batch_size), self._steps_per_call
    # Fewer steps in a call where that leaves no remainder: it would be one more program to compile.
    size = next((size for size in range(most, most // 2, -1) if total % size == 0), most)
    for start in range(first, total, size):
      yield jax.tree.map(lambda x: x[start : start + size, local], batches)  # noqa: B023  (run at once)


class StreamedFeed(Feed):
  """Images that are decoded, cropped and flipped on the host while the devices compute."""

  def __init__(self, config: Any):
    self._dataset, fields = data.open_dataset(data_spec(config)), config.data
    super().__init__(self._dataset, config)
    size = image_size(fields)
    self.image_shape, self.resize = (size, size, 3), int(fields.eval_resize or default_resize(size))
    self.preprocessing = Preprocessing(mean=tuple(fields.mean), std=tuple(fields.std))
    self._train_recipe = data.TrainingRecipe(size, flip=fields.flip)
    self._test_recipe = data.EvaluationRecipe(size, resize=self.resize)
    self._workers = _default_workers() if fields.workers is None else fields.workers
    self._skip_broken = fields.skip_broken

  def _training_calls(self, order: np.ndarray, purpose: int, epoch: int, first: int) -> Iterator[Any]:
    calls = self._calls("train", order, self._train_recipe, purpose, epoch, first)
    return (batch for batch, _ in calls)

  def _evaluation_calls(self, order: np.ndarray, weights: np.ndarray) -> Iterator[Any]:
    calls = self._calls("test", order, self._test_recipe, 0, 0, 0)
    for (batch, whole), counted in zip(calls, weights[:, None, process_slice(order.shape[1])], strict=True):
      yield batch, counted * whole

  def _calls(
    self, split: str, order: np.ndarray, recipe: data.Recipe, purpose: int, epoch: int, first: int
  ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yields the images and labels of each call, and which of them are no substitutes for broken images."""
    batches = data.stream_batches(
      getattr(self._dataset, split),
      order,
      recipe=recipe,
      seed=self._seed,
      purpose=purpose,
      epoch=epoch,
      first=first,
      workers=self._workers,
      skip_broken=self._skip_broken,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    for batch in batches:
      self.skipped.add(split, batch["broken"])
      yield {name: batch[name][None] for name in ("images", "labels")}, batch["weights"][None]


def _default_workers() -> int:
  """Returns 0 for threads where they keep all cores busy (benchmarks/input_pipeline.py), else a process for each."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return 0 if cores <= 4 else min(cores, 32)
