"""One image of a file made ready for a network of the ImageNet family: cropped, resized, and in training mirrored.

The recipes are those of torchvision. Training differs from it in the resampling alone: bilinear without antialiasing,
after a JPEG was decoded to 1/2, 1/4 or 1/8 where the crop is large enough for it. Evaluation does not differ at all.
Both give uint8, so that a batch is small on its way to the device; `normalize` is for there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from sapr_jax.data.decoding import decode_exactly, decode_quickly, image_size

if TYPE_CHECKING:
  from PIL import Image

_ATTEMPTS = 10
_DRAWS_PER_ATTEMPT = 4
_MAX_REDUCTION = 8


class Recipe(Protocol):
  """A function from an image file to an example for the network."""

  @property
  def size(self) -> int:
    """Height and width of the examples."""

  def __call__(self, encoded: bytes, name: str, bits: np.random.BitGenerator) -> np.ndarray:
    """Returns uint8 `[size, size, 3]`; `name` is for messages, `bits` all the randomness there is."""


class Crop(NamedTuple):
  """A rectangle of an image, in pixels."""

  top: int
  left: int
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class TrainingRecipe:
  """A random crop of random area and aspect ratio, resized to a square and mirrored half of the time.

  Attributes:
    size: Height and width of the result.
    scale: Least and greatest area of the crop, as a share of the image's.
    ratio: Least and greatest width / height of the crop.
    flip: Whether to mirror.
  """

  size: int = 224
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: bool = True

  def __call__(self, encoded: bytes, name: str, bits: np.random.BitGenerator) -> np.ndarray:
    import cv2

    draws = _uniform(bits, 1 + _ATTEMPTS * _DRAWS_PER_ATTEMPT)
    height, width = image_size(encoded, name)
    crop = random_resized_crop(height, width, draws[1:], self.scale, self.ratio)
    reduction = self._reduction(crop)
    pixels = decode_quickly(encoded, name, reduction)
    if pixels.shape[:2] != (height, width):
      crop = _reduced(crop, reduction)
    region = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    resized = cv2.resize(region, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
    return cv2.flip(resized, 1) if self.flip and draws[0] < 0.5 else resized

  def _reduction(self, crop: Crop) -> int:
    """By how much the decoder may shrink both sides with the crop still at least as large as the result."""
    reduction = 1
    while reduction < _MAX_REDUCTION and min(crop.height, crop.width) >= 2 * reduction * self.size:
      reduction *= 2
    return reduction


@dataclasses.dataclass(frozen=True)
class EvaluationRecipe:
  """The shorter side resized, then the centre cut out: pixel for pixel what torchvision gives on Pillow images.

  Attributes:
    size: Height and width of the result.
    resize: Length to which the shorter side is resized first, at least `size`.
  """

  size: int = 224
  resize: int = 256

  def __call__(self, encoded: bytes, name: str, bits: np.random.BitGenerator) -> np.ndarray:
    del bits
    return self.crop(decode_exactly(encoded, name)[0])

  def crop(self, image: Image.Image) -> np.ndarray:
    """Does the same with an image that is decoded; it keeps its channels."""
    from PIL import Image

    height, width = resized_size(image.height, image.width, self.resize)
    top, left = round((height - self.size) / 2), round((width - self.size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + self.size, top + self.size)))


def random_resized_crop(
  height: int, width: int, draws: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
  """Chooses a crop as torchvision's `RandomResizedCrop` does.

  Up to ten times an area and an aspect ratio are drawn; the first rectangle that fits is placed at random. If none
  fits, as in very long images, it is the largest centred one with a permitted ratio.

  Args:
    height, width: Of the image, in pixels.
    draws: float64 `[40]`, uniform on [0, 1): area, log of the ratio, top and left of each attempt.
    scale, ratio: See `TrainingRecipe`.

  Example:
    >>> import numpy as np
    >>> from sapr_jax.data.recipe import random_resized_crop
    >>> random_resized_crop(100, 200, np.full(40, 0.5), (0.5, 0.5), (1.0, 1.0))
    Crop(top=0, left=50, height=100, width=100)
  """
  low, high = math.log(ratio[0]), math.log(ratio[1])
  for area_draw, ratio_draw, top_draw, left_draw in draws.reshape(_ATTEMPTS, _DRAWS_PER_ATTEMPT).tolist():
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
    aspect = math.exp(low + (high - low) * ratio_draw)
    crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      top, left = int((height - crop_height + 1) * top_draw), int((width - crop_width + 1) * left_draw)
      return Crop(top, left, crop_height, crop_width)
  crop_height, crop_width = height, width
  if width / height < ratio[0]:
    crop_height = round(width / ratio[0])
  elif width / height > ratio[1]:
    crop_width = round(height * ratio[1])
  return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def resized_size(height: int, width: int, shorter: int) -> tuple[int, int]:
  """Size of an image whose shorter side is resized to `shorter`; the longer one is truncated to whole pixels."""
  if width <= height:
    return int(shorter * height / width), shorter
  return shorter, int(shorter * width / height)


def _reduced(crop: Crop, reduction: int) -> Crop:
  """The same crop of an image whose pixels are `reduction` x `reduction` of the original ones."""
  top, left = round(crop.top / reduction), round(crop.left / reduction)
  bottom, right = round((crop.top + crop.height) / reduction), round((crop.left + crop.width) / reduction)
  return Crop(top, left, bottom - top, right - left)


def _uniform(bits: np.random.BitGenerator, count: int) -> np.ndarray:
  """float64 `[count]` on [0, 1), from raw bits: NumPy promises those, not `Generator.random`, across its versions."""
  return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53
