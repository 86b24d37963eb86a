"""Image sets from TensorFlow Datasets, read without TensorFlow.

TensorFlow Datasets downloads a set and prepares it as files with random access. Reading those
needs no TensorFlow; preparing most sets for the first time, CIFAR-10 among them, does.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from sapr_jax.data.dataset import ImageDataset, ImageSplit, subset
from sapr_jax.errors import InputError, one_line

_OTHER_SOURCE = "or use source=folder with image files of your own"
_SPLITS = ("train", "test")


def load_tfds(
  *,
  name: str = "cifar10",
  path: str | None = None,
  train_images: int | None = None,
  test_images: int | None = None,
  seed: int = 0,
) -> ImageDataset:
  """Loads a data set of TensorFlow Datasets that has images and labels; downloads it if need be.

  Args:
    name: Name in the catalog, such as "cifar10", "cifar100" or "mnist".
    path: Folder in which data sets are downloaded and kept (`data_dir` of TensorFlow Datasets).
      None takes the environment variable TFDS_DATA_DIR or else `~/tensorflow_datasets`.
    train_images: Size of a class-balanced random subset of the training images; None takes all.
    test_images: The same for the test images.
    seed: Seed of the subsets.

  Returns:
    The data set; class names are those of the feature "label".

  Raises:
    InputError: If tensorflow-datasets or what it needs to prepare the set is not installed, `name`
      is unknown, the set cannot be downloaded or prepared, it lacks a split "train" or "test" or a
      feature "image" or "label", its images differ in size, or a subset is larger than its split.
  """
  builder = prepare(name, path)
  check_splits(name, builder.info.splits, _SPLITS)
  check_features(name, builder.info.features)
  train_source, test_source = builder.as_data_source(split=list(_SPLITS))
  return ImageDataset(
    name=name,
    train=subset(_read_split(name, "train", train_source), train_images, seed),
    test=subset(_read_split(name, "test", test_source), test_images, seed),
    class_names=tuple(builder.info.features["label"].names),
  )


def prepare(name: str, path: str | None) -> Any:
  """Downloads and prepares a set if need be.

  Returns:
    The `tfds.core.DatasetBuilder` of a set that lies ready on disk, in a format with random access.

  Raises:
    InputError: If the set is unknown or cannot be prepared, as in `load_tfds`.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise InputError(
      "source=tfds needs TensorFlow Datasets, which is not installed or lacks a package; run: "
      f"pip install tensorflow-datasets ({one_line(error, 200)}), {_OTHER_SOURCE}"
    ) from error
  known = tfds.list_builders(with_community_datasets=False)
  if re.split("[/:]", name)[0] not in known:
    near = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else "see tensorflow.org/datasets/catalog"
    raise InputError(f"TensorFlow Datasets has no set {name!r}; {hint}")
  try:
    # Format named explicitly: with a data_dir, the default would be one without random access.
    builder = tfds.builder(name, data_dir=path, file_format=tfds.core.FileFormat.ARRAY_RECORD)
    builder.download_and_prepare()
  # Downloading and preparing run code of each set, which raises errors of many unrelated types.
  except Exception as error:
    raise InputError(_explain(name, path, error)) from error
  return builder


def _explain(name: str, path: str | None, error: Exception) -> str:
  """Says what is to be done about an error while a set was being prepared."""
  package = _missing_package(error)
  if package is not None:
    command = f"pip install {package}"
    return f"preparing {name!r} for the first time needs {package}; run: {command}, {_OTHER_SOURCE}"
  if "Manual directory" in str(error):
    return (
      f"{name!r} is not free to download; put its files into the folder downloads/manual in "
      f"{path or 'the default folder of TensorFlow Datasets'}, {_OTHER_SOURCE} ({one_line(error, 400)})"
    )
  if "File format is already set" in str(error):
    return (
      f"{name!r} lies in {path or 'the default folder of TensorFlow Datasets'} in a file format "
      f"without random access; give another path to prepare it anew, {_OTHER_SOURCE}"
    )
  return (
    f"TensorFlow Datasets could not download and prepare {name!r}; check the network and the space "
    f"on disk, {_OTHER_SOURCE} ({one_line(error, 200)})"
  )


def keep_encoded() -> Any:
  """Returns the `tfds` decoder that leaves an image as the bytes of its file."""
  from tensorflow_datasets import decode

  return decode.SkipDecoding()


def check_splits(name: str, found: Collection[str], expected: Sequence[str]) -> None:
  """Checks that the set has the splits that are wanted of it."""
  missing = [split for split in expected if split not in found]
  if missing:
    raise InputError(
      f"TensorFlow Datasets set {name!r} has no split {missing[0]!r}, only "
      f"{', '.join(sorted(found))}; choose a set with the splits {' and '.join(expected)}, "
      f"{_OTHER_SOURCE}"
    )


def check_features(name: str, features: Any) -> None:
  """Checks that the set has 8-bit images and class labels under the usual names."""
  found = ", ".join(sorted(features))
  for feature in ("image", "label"):
    if feature not in features:
      raise InputError(
        f"TensorFlow Datasets set {name!r} has no feature {feature!r}, only {found}; choose a set "
        f"for image classification, {_OTHER_SOURCE}"
      )
  if not getattr(features["label"], "num_classes", None):
    raise InputError(
      f"feature 'label' of TensorFlow Datasets set {name!r} is no class label; choose a set for "
      f"image classification, {_OTHER_SOURCE}"
    )


def _read_split(name: str, split: str, source: Any) -> ImageSplit:
  """Reads every example of a `tfds` data source into arrays."""
  images: np.ndarray | None = None
  labels = np.empty(len(source), np.int32)
  for index in range(len(source)):
    example = source[index]
    image, labels[index] = example["image"], example["label"]
    if images is None:
      images = np.empty((len(source), *image.shape), np.uint8)
    if image.dtype != np.uint8 or image.shape != images.shape[1:]:
      raise InputError(
        f"image {index} of split {split!r} of TensorFlow Datasets set {name!r} is {image.dtype} "
        f"{image.shape} but the first is {images.shape[1:]}; expected uint8 images of one size"
      )
    images[index] = image
  if images is None:
    raise InputError(f"split {split!r} of TensorFlow Datasets set {name!r} holds no image")
  return ImageSplit(images=images, labels=labels)


def _missing_package(error: BaseException | None) -> str | None:
  """Returns the package whose import failed at the root of `error`, if that is what happened."""
  while error is not None:
    # TensorFlow Datasets raises such errors anew without their name; the cause still has it.
    if isinstance(error, ModuleNotFoundError) and error.name:
      return error.name.split(".")[0]
    error = error.__cause__ or error.__context__
  return None
