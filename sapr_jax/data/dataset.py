"""Data sets, in host memory or as encoded files, what names them, and class-balanced subsets."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sapr_jax.data.order import epoch_order
from sapr_jax.errors import InputError

# One gray level: a channel that varies less than that is constant for all purposes.
_MIN_STD = 1.0 / 255.0
_STATISTICS_CHUNK = 1024
# Not the run's seed: results of different runs are compared on the same images, and none may start from another's.
_VALIDATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """Names a data set and its subsets; a source ignores the fields it has no use for.

  Attributes:
    source: A key of `SOURCES`: "tfds" (TensorFlow Datasets), "folder" (image files in one folder a class) or "digits"
      (1,797 images of 8x8 pixels that scikit-learn ships; needs no download).
    name: Which data set, for "tfds", such as "cifar10" or "imagenet2012"; a folder gives its own name.
    path: For "folder", the folder that holds `train/` and `test/`. For "tfds", where data sets are kept; None takes the
      environment variable TFDS_DATA_DIR or else `~/tensorflow_datasets`.
    train_images: Size of a random subset of the training images; None takes all.
    test_images: The same for the test images.
    validation_images: So many training images are held out and stand in for the test images, so that a choice can be
      made without these; None for none. They are balanced as subsets are, and the same for every seed.
    seed: Seed of the subsets, in [0, 2**32). It does not move images between the splits.
    skip_broken: How many broken images are left out of a set that is read into memory before it is refused.
  """

  source: str
  name: str = "cifar10"
  path: str | None = None
  train_images: int | None = None
  test_images: int | None = None
  validation_images: int | None = None
  seed: int = 0
  skip_broken: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSplit:
  """Images of one split, uint8 `[N, H, W, C]`, and their labels, int32 `[N]`, class numbers from 0."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
  """A labelled image set in memory; all images have one shape, and `class_names` are in label order.

  `broken` has what is wrong with each image that was left out, by its split ("train" or "test") and place in it.
  """

  name: str
  train: ImageSplit
  test: ImageSplit
  class_names: tuple[str, ...]
  broken: Mapping[str, dict[int, str]] = dataclasses.field(default_factory=dict)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """`(H, W, C)` of every image."""
    height, width, channels = self.train.images.shape[1:]
    return height, width, channels

  def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over the training images, scaled to [0, 1].

    Both are float32 `[C]` and exact, from the histogram of the 256 gray levels. The standard deviation is at least
    1/255, so that a constant channel can be divided by it.
    """
    images = self.train.images
    num_channels = images.shape[-1]
    counts = np.zeros((num_channels, 256), np.int64)
    for start in range(0, len(images), _STATISTICS_CHUNK):
      chunk = images[start : start + _STATISTICS_CHUNK]
      for channel in range(num_channels):
        counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255.0
    frequencies = counts / counts.sum(axis=1, keepdims=True)
    mean = frequencies @ levels
    variance = (frequencies * (levels - mean[:, None]) ** 2).sum(axis=1)
    return mean.astype(np.float32), np.maximum(np.sqrt(variance), _MIN_STD).astype(np.float32)


class EncodedSource(Protocol):
  """Image files with their labels, read at random places. Worker processes get a pickled copy."""

  def __len__(self) -> int:
    """Number of images."""

  def __getitem__(self, index: int) -> tuple[bytes, int, str]:
    """Returns the content of an image file, its label, and what messages call it."""

  def listing(self) -> bytes:
    """Returns what is known of the images without reading them, wherever their folder lies."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedDataset:
  """A labelled set of image files; `class_names` are in label order."""

  name: str
  train: EncodedSource
  test: EncodedSource
  class_names: tuple[str, ...]


def balanced_indices(labels: np.ndarray, size: int | None, seed: int) -> np.ndarray:
  """Chooses items so that the classes are as evenly filled as their sizes allow.

  The items of each class are shuffled, then taken in turns, one of each class, until there are `size`. For one seed, a
  smaller choice is therefore contained in a larger one.

  Returns:
    int32 `[size]`, increasing indices into `labels`; all of them if `size` is None.

  Raises:
    InputError: If there are fewer than `size` items.

  Example:
    >>> labels = np.array([0, 0, 0, 0, 1, 2, 2])
    >>> np.bincount(labels[balanced_indices(labels, 5, seed=0)]).tolist()
    [2, 1, 2]
  """
  if size is None:
    return np.arange(len(labels), dtype=np.int32)
  if not isinstance(size, int | np.integer) or not 1 <= size <= len(labels):
    raise InputError(
      f"cannot choose {size!r} of {len(labels)} images; expected a number from 1 to {len(labels)}, or none for all"
    )
  shuffled = epoch_order(len(labels), seed=seed, epoch=0, purpose="subset")
  by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
  class_sizes = np.bincount(labels)
  first_of_class = np.cumsum(class_sizes) - class_sizes
  turn = np.arange(len(labels)) - first_of_class[labels[by_class]]
  # Within a turn the classes come in random order, so that no class is favoured by its number.
  class_order = epoch_order(len(class_sizes), seed=seed, epoch=0, purpose="subset classes")
  chosen = by_class[np.lexsort((class_order[labels[by_class]], turn))[:size]]
  return np.sort(chosen)


def training_indices(labels: np.ndarray, spec: DataSpec) -> tuple[np.ndarray, np.ndarray | None]:
  """Chooses the training images, and those among all of them that are held out, if `spec` asks for any.

  Args:
    labels: Labels of all training images.
    spec: Says how many of each are wanted.

  Returns:
    Two arrays of increasing indices into `labels` without a common one; None in place of the second without a wish.

  Raises:
    InputError: If there are too few images.
  """
  if spec.validation_images is None:
    return balanced_indices(labels, spec.train_images, spec.seed), None
  held_out = balanced_indices(labels, spec.validation_images, _VALIDATION_SEED)
  others = np.setdiff1d(np.arange(len(labels), dtype=np.int32), held_out)
  return others[balanced_indices(labels[others], spec.train_images, spec.seed)], held_out


def chosen_splits(train: ImageSplit, test: ImageSplit, spec: DataSpec) -> tuple[ImageSplit, ImageSplit]:
  """Returns the images to train on and those to evaluate, of all that there are."""
  indices, held_out = training_indices(train.labels, spec)
  evaluated = subset(test, spec.test_images, spec.seed) if held_out is None else _take(train, held_out)
  return _take(train, indices), evaluated


def subset(split: ImageSplit, size: int | None, seed: int) -> ImageSplit:
  """Takes the images that `balanced_indices` chooses, keeping their order."""
  return split if size is None else _take(split, balanced_indices(split.labels, size, seed))


def _take(split: ImageSplit, indices: np.ndarray) -> ImageSplit:
  if len(indices) == len(split):
    return split
  return ImageSplit(images=split.images[indices], labels=split.labels[indices])
