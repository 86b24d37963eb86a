"""Image sets from TensorFlow Datasets, read without TensorFlow.

TensorFlow Datasets downloads a set and prepares it as files with random access. Reading those needs no TensorFlow;
preparing most sets for the first time, CIFAR-10 among them, does.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from sapr_jax.data.dataset import (
  DataSpec,
  EncodedDataset,
  ImageDataset,
  balanced_indices,
  chosen_splits,
  training_indices,
)
from sapr_jax.data.decoding import decode_dataset
from sapr_jax.errors import InputError, one_line

_OTHER_SOURCE = "or use source=folder with image files of your own"


def load(spec: DataSpec) -> ImageDataset:
  """Reads the splits `train` and `test`; the subsets are balanced once the labels are known."""
  whole = dataclasses.replace(spec, train_images=None, test_images=None, validation_images=None)
  dataset = decode_dataset(_open_splits(whole, _prepare(spec), "test"), spec.skip_broken)
  train, test = chosen_splits(dataset.train, dataset.test, spec)
  return dataclasses.replace(dataset, train=train, test=test)


def open(spec: DataSpec) -> EncodedDataset:
  """Opens the splits `train` and `validation`, or `test` where there is no `validation`."""
  builder = _prepare(spec)
  return _open_splits(spec, builder, "validation" if "validation" in builder.info.splits else "test")


class TfdsSource:
  """The examples at `indices` of a `tfds` data source whose images are left encoded."""

  def __init__(self, examples: Any, indices: np.ndarray, name: str) -> None:
    self._examples, self._indices, self._name = examples, indices, name

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> tuple[bytes, int, str]:
    place = int(self._indices[index])
    example = self._examples[place]
    return example["image"], int(example["label"]), f"{self._name}[{place}]"

  def listing(self) -> bytes:
    return self._name.encode() + self._indices.tobytes()


def _open_splits(spec: DataSpec, builder: Any, held_out: str) -> EncodedDataset:
  """Opens `train` and `held_out` of a prepared set, after checking its form."""
  from tensorflow_datasets import decode

  _check_form(spec.name, builder.info, ("train", held_out))

  def examples_of(split: str) -> tuple[Any, np.ndarray]:
    examples = builder.as_data_source(split=split, decoders={"image": decode.SkipDecoding()})
    # One class for all: to balance a subset, the labels would have to be read along with every image.
    return examples, np.zeros(len(examples), np.int32)

  examples, labels = examples_of("train")
  indices, validation = training_indices(labels, spec)
  train = TfdsSource(examples, indices, f"{spec.name}/train")
  if validation is not None:
    test = TfdsSource(examples, validation, f"{spec.name}/train")
  else:
    examples, labels = examples_of(held_out)
    test = TfdsSource(examples, balanced_indices(labels, spec.test_images, spec.seed), f"{spec.name}/{held_out}")
  return EncodedDataset(spec.name, train, test, tuple(builder.info.features["label"].names))


def _check_form(name: str, info: Any, splits: Sequence[str]) -> None:
  """Checks that the set has `splits`, with 8-bit images and class labels under the usual names."""
  import tensorflow_datasets as tfds

  features = info.features
  missing = [split for split in splits if split not in info.splits]
  problems = [f"it has no split {split!r}, only {', '.join(info.splits)}" for split in missing]
  for feature, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
    if feature not in features:
      problems.append(f"it has no feature {feature!r}, only {', '.join(sorted(features))}")
    elif not isinstance(features[feature], kind):
      got = type(features[feature]).__name__
      problems.append(f"its feature {feature!r} must be of type {kind.__name__}, got {got}")
  if not problems and (dtype := features["image"].np_dtype) != np.uint8:
    problems.append(f"its images must be uint8, got {dtype.__name__}")
  if problems:
    raise InputError(
      f"TensorFlow Datasets set {name!r} does not fit: {problems[0]}; choose one for image classification, "
      f"{_OTHER_SOURCE}"
    )


def _prepare(spec: DataSpec) -> Any:
  """Returns the builder of a set, in a format with random access, downloaded and prepared if need be."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise InputError(
      "source=tfds needs TensorFlow Datasets, which is not installed or lacks a package; run: "
      f"pip install tensorflow-datasets ({one_line(error, 200)}), {_OTHER_SOURCE}"
    ) from error
  name, path = spec.name, spec.path
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
    raise InputError(f"{_explain(name, path, error)}, {_OTHER_SOURCE}") from error
  return builder


def _explain(name: str, path: str | None, error: Exception) -> str:
  """Says what is to be done about an error while a set was being prepared."""
  if package := _missing_package(error):
    return f"preparing {name!r} for the first time needs {package}; run: pip install {package}"
  folder, text = path or "the default folder of TensorFlow Datasets", one_line(error, 400)
  if "Manual directory" in str(error):
    return f"{name!r} is not free to download; put its files into the folder downloads/manual in {folder} ({text})"
  if "File format is already set" in str(error):
    return f"{name!r} lies in {folder} in a format without random access; give another path to prepare it again"
  return f"TensorFlow Datasets could not download and prepare {name!r}; check the network and the disk ({text})"


def _missing_package(error: BaseException | None) -> str | None:
  """Returns the package whose import failed at the root of `error`, if that is what happened."""
  while error is not None:
    # TensorFlow Datasets raises such errors again without their name; the cause still has it.
    if isinstance(error, ModuleNotFoundError) and error.name:
      return error.name.split(".")[0]
    error = error.__cause__ or error.__context__
  return None
