"""Inputs of a step: images on the devices, their augmentation and normalization."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from sapr_jax import data


def image_size(fields: Any) -> int:
  """Returns the size of streamed images, in pixels; `fields` is `config.data`."""
  return int(fields.image_size or 224)


def default_resize(size: int) -> int:
  """Returns the length to which the shorter side is resized in evaluation where nothing else is said."""
  return round(size * 8 / 7)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """Augmentation and normalization of uint8 images.

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

  def augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
    """Crops and flips images `[batch, height, width, channels]` at random; they stay uint8."""
    return data.augment(key, images, padding=self.crop_padding, flip=self.flip)

  def normalize(self, images: jax.Array) -> jax.Array:
    """Returns uint8 images as the network takes them."""
    return data.normalize(images, jnp.asarray(self.mean), jnp.asarray(self.std))


@flax.struct.dataclass
class Shared:
  """Arrays that all steps of a pass read.

  Attributes:
    images: uint8 `[N, height, width, channels]`; None where batches bring their images.
    labels: int32 `[N]`; None likewise.
    key: Randomness of the pass; steps fold their number in.
    variables: Variables of the network, for steps that do not train it.
  """

  images: jax.Array | None = None
  labels: jax.Array | None = None
  key: jax.Array | None = None
  variables: Any = None

  def read(self, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Returns images and labels of a batch: an array of indices, or `{"images": ..., "labels": ...}`."""
    if self.images is None or self.labels is None:
      return batch["images"], batch["labels"]
    return self.images[batch], self.labels[batch]
