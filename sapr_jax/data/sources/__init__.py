"""Sources of images: a new one is one file here and one line in `SOURCES`."""

import dataclasses
from collections.abc import Callable

from sapr_jax.data.dataset import DataSpec, EncodedDataset, ImageDataset
from sapr_jax.data.sources import digits, folder, tfds
from sapr_jax.data.sources.folder import open_split
from sapr_jax.errors import InputError

__all__ = ["SOURCES", "Source", "load_dataset", "open_dataset", "open_split"]


@dataclasses.dataclass(frozen=True)
class Source:
  """Reads all images into memory with `load`; lists the files to stream from disk with `open`, where that can be."""

  load: Callable[[DataSpec], ImageDataset]
  open: Callable[[DataSpec], EncodedDataset] | None = None


SOURCES: dict[str, Source] = {
  "tfds": Source(tfds.load, tfds.open),
  "folder": Source(folder.load, folder.open),
  "digits": Source(digits.load),
}


def load_dataset(spec: DataSpec) -> ImageDataset:
  """Loads a labelled image set into host memory; subsets are class-balanced.

  Raises:
    InputError: If the source is unknown or cannot be read, or the images differ in size.

  Example:
    >>> from sapr_jax.data import DataSpec, load_dataset
    >>> load_dataset(DataSpec("digits", train_images=100, test_images=50)).train.images.shape
    (100, 8, 8, 1)
  """
  return _source(spec).load(spec)


def open_dataset(spec: DataSpec) -> EncodedDataset:
  """Opens a labelled set of image files without reading them; `stream_batches` does that.

  It is evaluated on `val` (folder) or `validation` (tfds), and on `test` only where that is missing, as the test images
  of ImageNet have no labels. Subsets of "tfds" are not class-balanced, as a label is known only with its image.

  Raises:
    InputError: If the source is unknown, cannot be streamed or cannot be opened. Broken images are found when read.
  """
  source = _source(spec)
  if source.open is None:
    streamed = ", ".join(name for name, source in SOURCES.items() if source.open)
    raise InputError(f"data source {spec.source!r} cannot be streamed, only {streamed}; load it into memory instead")
  return source.open(spec)


def _source(spec: DataSpec) -> Source:
  if spec.source not in SOURCES:
    raise InputError(f"unknown data source {spec.source!r}; expected one of {', '.join(SOURCES)}")
  return SOURCES[spec.source]
