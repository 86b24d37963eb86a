"""Image files in folders: `train/<class>/*` and `test/<class>/*`."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sapr_jax.data.dataset import ImageDataset, ImageSplit, balanced_indices
from sapr_jax.data.decoding import decode_exactly, unreadable
from sapr_jax.errors import InputError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})

_SPLITS = ("train", "test")
_MAX_NAMES_SHOWN = 5


def load_folder(
  *,
  name: str = "folder",
  path: str | None = None,
  train_images: int | None = None,
  test_images: int | None = None,
  seed: int = 0,
) -> ImageDataset:
  """Loads a labelled image set from a folder that holds `train/<class>/*` and `test/<class>/*`.

  Classes are numbered in the sorted order of their names, and the files of a class are taken in
  sorted order. Files with an ending not in `EXTENSIONS` and names that start with a dot are
  ignored. Only the chosen files are read, so a small subset of a large folder loads quickly.

  Args:
    name: Ignored; the set is called after the folder.
    path: Folder that holds `train/` and `test/`.
    train_images: Size of a class-balanced random subset of the training images; None takes all.
    test_images: The same for the test images.
    seed: Seed of the subsets.

  Returns:
    The data set. Its images have one channel if every image that was read is grayscale, and are
    converted to RGB otherwise.

  Raises:
    InputError: If a folder is missing or empty, the splits have different classes, or an image
      cannot be read or has another size than the first one; the message names the folder or file.
  """
  del name
  root = find_root(path, _SPLITS)
  class_names = find_classes(root, _SPLITS)
  train_files, train_labels = choose_files(root / "train", class_names, train_images, seed)
  test_files, test_labels = choose_files(root / "test", class_names, test_images, seed)
  images = _read_images([*train_files, *test_files])
  num_train = len(train_files)
  return ImageDataset(
    name=root.resolve().name,
    train=ImageSplit(images=images[:num_train], labels=train_labels),
    test=ImageSplit(images=images[num_train:], labels=test_labels),
    class_names=class_names,
  )


def find_root(path: str | None, splits: tuple[str, str]) -> Path:
  """Returns the folder of a data set, after checking that it holds a folder for both `splits`.

  Raises:
    InputError: If `path` is None or there is no such folder, or a split is missing in it.
  """
  if path is None:
    raise InputError(f"source=folder needs the path of a folder; {_layout(splits)} in it")
  root = Path(path)
  if not root.is_dir():
    raise InputError(f"there is no folder {str(root)!r}; {_layout(splits)} in it")
  found = visible_folders(root)
  for split in splits:
    if split not in found:
      raise InputError(
        f"folder {str(root)!r} has no {split!r} folder; {_layout(splits)}, found {_listed(found)}; "
        f"rename the folder that holds the {split} images, or link to it"
      )
  return root


def find_classes(root: Path, splits: tuple[str, str]) -> tuple[str, ...]:
  """Returns the sorted class names, after checking that both splits have the same ones.

  Raises:
    InputError: If a split has no class folder, or they differ in them.
  """
  classes = {split: set(visible_folders(root / split)) for split in splits}
  for split in splits:
    if not classes[split]:
      raise InputError(
        f"folder {str(root / split)!r} has no class folder; {_layout(splits)}, so sort its files into them"
      )
  first, second = splits
  if classes[first] != classes[second]:
    raise InputError(
      f"the splits of {str(root)!r} have different classes; expected the same ones: only in {first}: "
      f"{_listed(classes[first] - classes[second])}; only in {second}: "
      f"{_listed(classes[second] - classes[first])}"
    )
  return tuple(sorted(classes[first]))


def choose_files(
  split_folder: Path, class_names: Sequence[str], size: int | None, seed: int
) -> tuple[list[str], np.ndarray]:
  """Lists the image files of a split and takes the balanced subset, before any file is opened.

  Returns:
    Paths of the chosen files, and their labels as int32 `[size]`.
  """
  files: list[str] = []
  labels: list[int] = []
  for label, class_name in enumerate(class_names):
    class_files = _image_files(split_folder / class_name)
    if not class_files:
      raise InputError(
        f"class folder {str(split_folder / class_name)!r} holds no image; expected files ending in "
        f"{', '.join(sorted(EXTENSIONS))}"
      )
    files.extend(class_files)
    labels.extend([label] * len(class_files))
  all_labels = np.array(labels, np.int32)
  try:
    chosen = balanced_indices(all_labels, size, seed)
  except InputError as error:
    raise InputError(f"in {str(split_folder)!r}: {error}") from error
  return [files[index] for index in chosen], all_labels[chosen]


def _read_images(paths: Sequence[str]) -> np.ndarray:
  """Reads image files of one size.

  One thread: Pillow holds the interpreter lock for most of the time that a small image takes, so
  that more threads make 32x32 images slower, not faster.

  Returns:
    uint8 `[N, H, W, 1]` if every image is grayscale, else `[N, H, W, 3]`.
  """
  first, all_grayscale = _read_image(paths[0])
  images = np.empty((len(paths), *first.shape), np.uint8)
  for index, path in enumerate(paths):
    image, is_grayscale = _read_image(path)
    if image.shape != first.shape:
      raise InputError(
        f"image {path!r} is {_size(image)} but the first image, {paths[0]!r}, is {_size(first)} "
        "(height x width); expected images of one size"
      )
    images[index] = image
    all_grayscale &= is_grayscale
  return np.ascontiguousarray(images[..., :1]) if all_grayscale else images


def _read_image(path: str) -> tuple[np.ndarray, bool]:
  """Returns an image as uint8 `[H, W, 3]`, and whether it is stored as grayscale."""
  image, is_grayscale = decode_exactly(read_bytes(path), path)
  return np.asarray(image), is_grayscale


def read_bytes(path: str) -> bytes:
  """Returns the content of an image file; raises `InputError` with its name if it cannot be read."""
  try:
    # One read instead of the dozens of short ones that Pillow would make: faster for small files.
    with open(path, "rb", buffering=0) as file:
      return file.read()
  except OSError as error:
    raise unreadable(path, error) from error


def visible_folders(folder: Path) -> list[str]:
  """Names of the folders directly in `folder`, in no order, without those that start with a dot."""
  with os.scandir(folder) as entries:
    return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def _image_files(folder: Path) -> list[str]:
  """Paths of the image files directly in `folder`, sorted by name."""
  with os.scandir(folder) as entries:
    names = [
      entry.name
      for entry in entries
      if not entry.name.startswith(".")
      and os.path.splitext(entry.name)[1].lower() in EXTENSIONS
      # A broken link stands for an image that is missing, which reading it will say.
      and (entry.is_file() or not os.path.exists(entry.path))
    ]
  return [os.path.join(folder, file_name) for file_name in sorted(names)]


def _layout(splits: tuple[str, str]) -> str:
  return "expected " + " and ".join(f"{split}/<class>/*" for split in splits)


def _listed(names: Iterable[str]) -> str:
  """Names in sorted order, cut short so that the message stays readable."""
  ordered = sorted(names)
  if not ordered:
    return "none"
  shown = ", ".join(repr(item) for item in ordered[:_MAX_NAMES_SHOWN])
  return shown if len(ordered) <= _MAX_NAMES_SHOWN else f"{shown} and {len(ordered)} in all"


def _size(image: np.ndarray) -> str:
  return f"{image.shape[0]}x{image.shape[1]}"
