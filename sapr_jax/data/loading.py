"""Where a data set comes from: the names that a config may give, and what each of them loads."""

from typing import Protocol, TypeVar

from sapr_jax.data.dataset import ImageDataset
from sapr_jax.data.digits import load_digits
from sapr_jax.data.folder import load_folder
from sapr_jax.data.tfds import load_tfds
from sapr_jax.errors import InputError

DatasetT = TypeVar("DatasetT", covariant=True)


class Source(Protocol[DatasetT]):
  """What every source is called with; a source ignores what it has no use for."""

  def __call__(
    self,
    *,
    name: str,
    path: str | None,
    train_images: int | None,
    test_images: int | None,
    seed: int,
  ) -> DatasetT: ...


SOURCES: dict[str, Source[ImageDataset]] = {
  "tfds": load_tfds,
  "folder": load_folder,
  "digits": load_digits,
}


def load_dataset(
  source: str,
  *,
  name: str = "cifar10",
  path: str | None = None,
  train_images: int | None = None,
  test_images: int | None = None,
  seed: int = 0,
) -> ImageDataset:
  """Loads a labelled image set into host memory.

  Args:
    source: A key of `SOURCES`: "tfds" (TensorFlow Datasets), "folder" (image files in one folder a
      class) or "digits" (1,797 images of 8x8 pixels that scikit-learn ships; needs no download).
    name: Which data set, for "tfds"; the other sources ignore it.
    path: For "folder", the folder that holds `train/` and `test/`. For "tfds", where data sets are
      kept; None is its default, `~/tensorflow_datasets`. "digits" ignores it.
    train_images: Size of a class-balanced random subset of the training images; None takes all.
    test_images: The same for the test images.
    seed: Seed of the subsets, in [0, 2**32). It does not move images between the splits.

  Returns:
    The data set, images as uint8 `[N, H, W, C]`.

  Raises:
    InputError: If `source` is unknown, or the source cannot be read; the message says how to mend
      it.

  Example:
    >>> load_dataset("digits", train_images=100, test_images=50).train.images.shape
    (100, 8, 8, 1)
  """
  if source not in SOURCES:
    raise InputError(f"unknown data source {source!r}; expected one of {', '.join(SOURCES)}")
  return SOURCES[source](name=name, path=path, train_images=train_images, test_images=test_images, seed=seed)
