"""Inputs of a network: how images become what it takes, as data that can be saved with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.checks import check_array, check_dtype, is_integer, is_number, shown
from sapr_jax.data.augment import normalize
from sapr_jax.data.recipe import EvaluationRecipe
from sapr_jax.errors import InputError

_PIXELS = [0, 1]
"""Range of the pixels that mean and deviation refer to; it is written, so that readers of the file need not guess."""


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a network takes, and how images become that.

      input = (pixel - mean) / std,  pixel = byte / 255, which is in [0, 1]

  Attributes:
    shape: Shape of one input, without the batch: `(height, width, channels)` of images.
    dtype: Dtype of the inputs.
    mean: Mean of each channel, of pixels in [0, 1]; None, as `std`, for inputs that are not normalized.
    std: Standard deviation of each channel, likewise.
    resize: Length to which the shorter side of an image is resized before its centre, of size `shape`, is cut out; None
      if images have that size already.
    class_names: Names of the outputs, in their order; None if they are not known.

  Raises:
    InputError: If a field cannot be, or fields do not fit together.

  Example:
    >>> inputs = Inputs((8, 8, 1), mean=[0.5], std=[0.25], class_names=["cat", "dog"])
    >>> inputs.prepare(np.full((2, 8, 8, 1), 255, np.uint8))[0, 0, 0].tolist()
    [2.0]
  """

  shape: tuple[int, ...]
  dtype: str = "float32"
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  resize: int | None = None
  class_names: tuple[str, ...] | None = None

  def __post_init__(self) -> None:
    is_shape = _is_sequence(self.shape) and len(self.shape) > 0
    if not is_shape or not all(is_integer(size) and 0 < size < 2**31 for size in self.shape):
      raise InputError(f"shape must be sizes without the batch, such as (224, 224, 3), got {shown(self.shape)}.")
    self._set("shape", tuple(map(int, self.shape)))
    self._set("dtype", check_dtype("dtype", self.dtype).name)
    for name in ("mean", "std"):
      self._set(name, self._checked_numbers(name))
    if (self.mean is None) != (self.std is None):
      raise InputError(f"mean and std must both be given, or neither, got {self.mean} and {self.std}.")
    if self.std is not None and not all(number > 0 for number in self.std):
      raise InputError(f"std must be above 0, got {self.std}; the images are divided by it.")
    if self.mean is not None and not jnp.issubdtype(self.dtype, jnp.floating):
      raise InputError(f"dtype must be a floating one where mean and std are given, got {self.dtype!r}.")
    self._check_resize()
    self._check_class_names()

  def _set(self, name: str, value: Any) -> None:
    object.__setattr__(self, name, value)

  def _checked_numbers(self, name: str) -> tuple[float, ...] | None:
    value = getattr(self, name)
    if value is None:
      return None
    is_one = _is_sequence(value) and len(self.shape) == 3 and len(value) == self.shape[-1]
    # `is_number` first, as `float` of anything else may fail in any way.
    if not is_one or not all(is_number(x) and abs(x) <= 1e6 and math.isfinite(x) for x in value):
      raise InputError(
        f"{name} must have a number for each channel of images of shape {self.shape}, of pixels in [0, 1], got"
        f" {shown(value)}."
      )
    return tuple(map(float, value))

  def _check_resize(self) -> None:
    if self.resize is None:
      return
    is_image = len(self.shape) == 3 and self.shape[0] == self.shape[1] and self.shape[2] in (1, 3)
    if not is_image or not is_integer(self.resize) or not self.shape[0] <= self.resize < 2**16:
      raise InputError(
        f"resize must be unset, or at least the {self.shape[0]} pixels of square images with 1 or 3 channels, got"
        f" {shown(self.resize)} for the shape {self.shape}."
      )
    self._set("resize", int(self.resize))

  def _check_class_names(self) -> None:
    names = self.class_names
    if names is None:
      return
    if not _is_sequence(names) or not len(names) or not all(isinstance(name, str) for name in names):
      raise InputError(f"class_names must be the names of the outputs, such as ('cat', 'dog'), got {shown(names)}.")
    self._set("class_names", tuple(names))

  @property
  def input_shape(self) -> tuple[int, ...]:
    """Shape of a batch of one input, as `trace_channels` and `count_macs` want it."""
    return (1, *self.shape)

  @property
  def recipe(self) -> EvaluationRecipe | None:
    """The way from an image file to pixels; None where files have the right size already."""
    return None if self.resize is None else EvaluationRecipe(self.shape[0], self.resize)

  def prepare(self, images: Any) -> jax.Array:
    """Makes inputs of images: resizes and crops them where they have another size, and normalizes them.

    Args:
      images: uint8 `[N, height, width, channels]`; anything of shape `[N, *shape]` where inputs are not normalized.
        Images of the size of `shape` are taken as resized and cropped already, and may be traced.

    Returns:
      `[N, *shape]` of `dtype`.

    Raises:
      InputError: If images have another dtype, or a shape that cannot be.
    """
    return self.normalize(self.crop(images))

  def normalize(self, images: Any) -> jax.Array:
    """Normalizes images `[N, *shape]`, which may be traced; see `prepare`."""
    check_array("images", images)
    found = jnp.shape(images)
    if len(found) != len(self.shape) + 1 or found[1:] != self.shape:
      raise InputError(f"images must have the shape {_written(self.shape)}, got {found}.")
    if self.mean is None or self.std is None:
      return jnp.asarray(images).astype(self.dtype)
    if images.dtype != np.uint8:
      raise InputError(
        f"images must be bytes (uint8), which are normalized here, got {images.dtype}; a network takes normalized"
        " images as they are."
      )
    return normalize(jnp.asarray(images), jnp.asarray(self.mean), jnp.asarray(self.std), self.dtype)

  def crop(self, images: Any) -> Any:
    """Resizes and crops images of another size as evaluation does, on the host; uint8 `[N, *shape]`."""
    check_array("images", images)
    images = images if hasattr(images, "dtype") else np.asarray(images)
    found, recipe = tuple(images.shape), self.recipe
    if recipe is None or found[1:] == self.shape:
      return images
    if len(found) != 4 or found[-1] != self.shape[-1] or 0 in found[1:] or images.dtype != np.uint8:
      raise InputError(
        f"images must be bytes (uint8) of shape (n, height, width, {self.shape[-1]}), got {images.dtype} of {found}."
      )
    if isinstance(images, jax.core.Tracer):
      raise InputError(
        f"images of another size than {self.shape[:2]} must be concrete; prepare them outside of jax.jit."
      )
    from PIL import Image

    cropped = np.empty((found[0], *self.shape), np.uint8)
    for place, image in enumerate(np.asarray(images)):
      pixels = recipe.crop(Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]))
      cropped[place] = pixels.reshape(self.shape)
    return cropped

  def limits(self) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the least and greatest value that each channel can have, float32 `[C]`; None if not normalized."""
    if self.mean is None or self.std is None:
      return None
    mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
    return (0 - mean) / std, (1 - mean) / std

  def to_json(self) -> dict[str, Any]:
    """Returns the fields as plain JSON data, and which range of pixels mean and deviation refer to."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
    return fields if self.mean is None else {"pixels": list(_PIXELS), **fields}

  @classmethod
  def from_json(cls, document: Any) -> Inputs:
    """Returns the inputs that `to_json` wrote.

    Raises:
      InputError: If `document` is not such.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(document, Mapping) or document.keys() - {"pixels"} != names:
      raise InputError(f"document must be what Inputs.to_json returned, got {shown(document)}.")
    if document["mean"] is not None and document.get("pixels") != _PIXELS:
      raise InputError(f"pixels must be {_PIXELS}, the range that mean and std refer to, got {shown(document)}.")
    return cls(**{name: document[name] for name in names})


def _is_sequence(value: Any) -> bool:
  if isinstance(value, np.ndarray | jax.Array):
    return value.ndim == 1 and not isinstance(value, jax.core.Tracer)
  return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _written(shape: tuple[int, ...]) -> str:
  return f"(n, {', '.join(map(str, shape))})"
