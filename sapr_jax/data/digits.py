"""The handwritten digits that scikit-learn ships: real images, small and without a download."""

import numpy as np

from sapr_jax.data.dataset import ImageDataset, ImageSplit, balanced_indices, subset
from sapr_jax.errors import InputError

_NUM_TEST_IMAGES = 600
_MAX_LEVEL = 16.0
# Not the run's seed: results of different runs are compared on the same test images.
_SPLIT_SEED = 0


def load_digits(
  *,
  name: str = "digits",
  path: str | None = None,
  train_images: int | None = None,
  test_images: int | None = None,
  seed: int = 0,
) -> ImageDataset:
  """Loads 1,197 training and 600 test images of the digits 0 to 9, 8x8 pixels, one channel.

  The split is fixed, with 60 test images of every digit.

  Args:
    name: Ignored; there is one such set.
    path: Ignored; the images come with scikit-learn.
    train_images: Size of a class-balanced random subset of the training images; None takes all.
    test_images: The same for the test images.
    seed: Seed of the subsets.

  Returns:
    The data set, images as uint8 `[N, 8, 8, 1]`, the 17 levels of the source spread over 0 .. 255.

  Raises:
    InputError: If scikit-learn is not installed, or a subset is larger than its split.
  """
  del name, path
  try:
    from sklearn import datasets
  except ImportError as error:
    raise InputError(
      "source=digits needs scikit-learn, which is not installed; run: pip install scikit-learn"
    ) from error
  bunch = datasets.load_digits()
  images = np.rint(bunch.images * (255.0 / _MAX_LEVEL)).astype(np.uint8)[..., None]
  labels = bunch.target.astype(np.int32)
  is_test = np.zeros(len(labels), bool)
  is_test[balanced_indices(labels, _NUM_TEST_IMAGES, _SPLIT_SEED)] = True
  train = ImageSplit(images=images[~is_test], labels=labels[~is_test])
  test = ImageSplit(images=images[is_test], labels=labels[is_test])
  return ImageDataset(
    name="digits",
    train=subset(train, train_images, seed),
    test=subset(test, test_images, seed),
    class_names=tuple(str(digit) for digit in bunch.target_names),
  )
