"""Image sets too large for memory: the bytes of each file are read when its turn comes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sapr_jax.data import folder, loading, tfds
from sapr_jax.data.dataset import balanced_indices
from sapr_jax.errors import InputError


class EncodedSource(Protocol):
  """Image files with their labels, read at random places. Worker processes get a pickled copy."""

  def __len__(self) -> int:
    """Number of images."""

  def __getitem__(self, index: int) -> tuple[bytes, int, str]:
    """Returns the content of an image file, its label, and what messages call it."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSplit:
  """The image files of one split.

  Attributes:
    source: Where they are read from.
    labels: int32 `[N]`, or None where a label is known only after its image has been read.
  """

  source: EncodedSource
  labels: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.source)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedDataset:
  """A labelled set of image files with a training and a test split.

  Attributes:
    name: What the set is called in logs and reports.
    train: Split to train on.
    test: Split to evaluate on.
    class_names: Name of each class, in label order.
  """

  name: str
  train: EncodedSplit
  test: EncodedSplit
  class_names: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.class_names)


class FolderSource:
  """Image files on disk.

  The paths are kept as one run of bytes: a list of a million strings would take five times the memory, in every
  worker process, and long to hand over.
  """

  def __init__(self, root: str, files: Sequence[str], labels: np.ndarray) -> None:
    """Keeps `files`, paths that begin with `root`, and their `labels`, int32 `[N]`."""
    self._root = root
    paths = [os.fsencode(file[len(root) :]) for file in files]
    self._paths = b"".join(paths)
    self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
    self._labels = labels

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> tuple[bytes, int, str]:
    start = self._ends[index - 1] if index else 0
    path = self._root + os.fsdecode(self._paths[start : self._ends[index]])
    return folder.read_bytes(path), int(self._labels[index]), path


class TfdsSource:
  """Image files within a data set of TensorFlow Datasets."""

  def __init__(self, examples: Any, indices: np.ndarray, name: str) -> None:
    """Keeps the `examples` at `indices` of a `tfds` data source whose images are left encoded."""
    self._examples = examples
    self._indices = indices
    self._name = name

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> tuple[bytes, int, str]:
    place = int(self._indices[index])
    example = self._examples[place]
    return example["image"], int(example["label"]), f"{self._name}[{place}]"


def _open_folder(
  *, name: str, path: str | None, train_images: int | None, test_images: int | None, seed: int
) -> EncodedDataset:
  """Opens `path/train/<class>/*` and `path/val/<class>/*`, or `path/test/<class>/*` where there is no `val`."""
  del name
  has_val, has_test = (path is not None and os.path.isdir(os.path.join(path, split)) for split in ("val", "test"))
  held_out = "test" if has_test and not has_val else "val"
  splits = ("train", held_out)
  root = folder.find_root(path, splits)
  class_names = folder.find_classes(root, splits)

  def open_split(split: str, size: int | None) -> EncodedSplit:
    files, labels = folder.choose_files(root / split, class_names, size, seed)
    return EncodedSplit(FolderSource(str(root / split), files, labels), labels)

  return EncodedDataset(
    name=root.resolve().name,
    train=open_split("train", train_images),
    test=open_split(held_out, test_images),
    class_names=class_names,
  )


def _open_tfds(
  *, name: str, path: str | None, train_images: int | None, test_images: int | None, seed: int
) -> EncodedDataset:
  """Opens the splits `train` and `validation`, or `test` where there is no `validation`."""
  builder = tfds.prepare(name, path)
  known = builder.info.splits
  held_out = "validation" if "validation" in known else "test"
  tfds.check_splits(name, known, ("train", held_out))
  tfds.check_features(name, builder.info.features)

  def open_split(split: str, size: int | None) -> EncodedSplit:
    examples = builder.as_data_source(split=split, decoders={"image": tfds.keep_encoded()})
    # One class for all: to balance the subset, the labels would have to be read along with every image.
    indices = balanced_indices(np.zeros(len(examples), np.int32), size, seed)
    return EncodedSplit(TfdsSource(examples, indices, f"{name}/{split}"))

  return EncodedDataset(
    name=name,
    train=open_split("train", train_images),
    test=open_split(held_out, test_images),
    class_names=tuple(builder.info.features["label"].names),
  )


STREAMED_SOURCES: dict[str, loading.Source[EncodedDataset]] = {
  "tfds": _open_tfds,
  "folder": _open_folder,
}


def open_dataset(
  source: str,
  *,
  name: str = "imagenet2012",
  path: str | None = None,
  train_images: int | None = None,
  test_images: int | None = None,
  seed: int = 0,
) -> EncodedDataset:
  """Opens a labelled set of image files without reading them; `stream_batches` does that.

  Args:
    source: A key of `STREAMED_SOURCES`: "folder" (image files in one folder a class; classes are numbered in the
      sorted order of their names, and the files of a class are taken in sorted order) or "tfds" (TensorFlow Datasets).
    name: Which data set, for "tfds". "folder" ignores it; the set is called after the folder.
    path: For "folder", the folder that holds `train/` and `val/`; `test/` is taken where there is no `val/`, as the
      test images of ImageNet have no labels. For "tfds", where data sets are kept; None is its default,
      `~/tensorflow_datasets`. Its split "test" likewise counts only where there is no "validation".
    train_images: Size of a random subset of the training images; None takes all. The subset is class-balanced for
      "folder", but not for "tfds", where labels are not known before an image is read.
    test_images: The same for the test images.
    seed: Seed of the subsets, in [0, 2**32).

  Returns:
    The data set.

  Raises:
    InputError: If `source` is unknown or cannot be streamed, or what it reads is missing or has another form; the
      message says how to mend it. Broken images are found when they are read.
  """
  if source in STREAMED_SOURCES:
    return STREAMED_SOURCES[source](name=name, path=path, train_images=train_images, test_images=test_images, seed=seed)
  known = ", ".join(STREAMED_SOURCES)
  if source in loading.SOURCES:
    raise InputError(f"data source {source!r} cannot be streamed, only {known}; load it into memory instead")
  raise InputError(f"unknown data source {source!r}; expected one of {known} to stream from")
