"""The handwritten digits that scikit-learn ships: real images, small and without a download."""

import gzip
import importlib.util
import pathlib

import numpy as np

from sapr_jax.data.dataset import DataSpec, ImageDataset, ImageSplit, balanced_indices, chosen_splits
from sapr_jax.errors import InputError

_NUM_TEST_IMAGES = 600
_MAX_LEVEL = 16.0
# Not the run's seed: results of different runs are compared on the same test images.
_SPLIT_SEED = 0


def load(spec: DataSpec) -> ImageDataset:
  """Loads 1,197 training and 600 test images of the digits 0 to 9, 8x8 pixels, one channel.

  The split is fixed, with 60 test images of every digit. The 17 levels of the source are spread over 0 .. 255.
  """
  package = importlib.util.find_spec("sklearn")
  if package is None or package.origin is None:
    raise InputError("source=digits needs scikit-learn, which is not installed; run: pip install scikit-learn")
  # What `sklearn.datasets.load_digits` reads: importing that takes seconds.
  with gzip.open(pathlib.Path(package.origin).with_name("datasets") / "data/digits.csv.gz", "rt") as file:
    table = np.loadtxt(file, delimiter=",")
  images = np.rint(table[:, :-1].reshape(-1, 8, 8, 1) * (255.0 / _MAX_LEVEL)).astype(np.uint8)
  labels = table[:, -1].astype(np.int32)
  is_test = np.zeros(len(labels), bool)
  is_test[balanced_indices(labels, _NUM_TEST_IMAGES, _SPLIT_SEED)] = True
  train, test = (ImageSplit(images[part], labels[part]) for part in (~is_test, is_test))
  return ImageDataset("digits", *chosen_splits(train, test, spec), tuple("0123456789"))
