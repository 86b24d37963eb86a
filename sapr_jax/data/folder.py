"""Image files in folders: `train/<class>/*` and `test/<class>/*`."""

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sapr_jax.data.dataset import ImageDataset, ImageSplit, balanced_indices
from sapr_jax.errors import InputError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})

_LAYOUT = "expected train/<class>/* and test/<class>/*"
_GRAYSCALE_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
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
  if path is None:
    raise InputError(f"source=folder needs the path of a folder; {_LAYOUT} in it")
  root = Path(path)
  class_names = _find_classes(root)
  train_files, train_labels = _choose_files(root / "train", class_names, train_images, seed)
  test_files, test_labels = _choose_files(root / "test", class_names, test_images, seed)
  images = _read_images([*train_files, *test_files])
  num_train = len(train_files)
  return ImageDataset(
    name=root.resolve().name,
    train=ImageSplit(images=images[:num_train], labels=train_labels),
    test=ImageSplit(images=images[num_train:], labels=test_labels),
    class_names=class_names,
  )


def _find_classes(root: Path) -> tuple[str, ...]:
  """Returns the sorted class names, after checking that both splits have the same ones."""
  if not root.is_dir():
    raise InputError(f"there is no folder {str(root)!r}; {_LAYOUT} in it")
  found = _visible_folders(root)
  for split in ("train", "test"):
    if split not in found:
      raise InputError(
        f"folder {str(root)!r} has no {split!r} folder; {_LAYOUT}, found {_listed(found)}; "
        f"rename the folder that holds the {split} images, or link to it"
      )
  train_classes, test_classes = (set(_visible_folders(root / name)) for name in ("train", "test"))
  if train_classes != test_classes:
    raise InputError(
      f"the splits of {str(root)!r} have different classes; expected the same ones: only in train: "
      f"{_listed(train_classes - test_classes)}; only in test: "
      f"{_listed(test_classes - train_classes)}"
    )
  if not train_classes:
    raise InputError(f"folder {str(root / 'train')!r} has no class folder; {_LAYOUT}")
  return tuple(sorted(train_classes))


def _choose_files(
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
  from PIL import Image

  try:
    # One read instead of the dozens of short ones that Pillow would make: faster for small files.
    with open(path, "rb", buffering=0) as file:
      image = Image.open(io.BytesIO(file.read()))
    mode = image.mode
    if mode in _GRAYSCALE_MODES or mode in _COLOUR_MODES:
      rgb = image if mode == "RGB" else image.convert("RGB")
      return np.asarray(rgb), mode in _GRAYSCALE_MODES
  except Exception as error:  # Each decoder of Pillow raises what it likes on a broken file.
    reason = " ".join(str(error).split())
    raise InputError(
      f"cannot read image {path!r}; expected a whole image file, so replace or remove it ({reason})"
    ) from error
  raise InputError(f"image {path!r} has pixels of Pillow mode {mode!r}; expected 8 bits a channel, so convert it")


def _visible_folders(folder: Path) -> list[str]:
  with os.scandir(folder) as entries:
    return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def _image_files(folder: Path) -> list[str]:
  """Paths of the image files directly in `folder`, sorted by name."""
  with os.scandir(folder) as entries:
    names = [
      entry.name
      for entry in entries
      if not entry.name.startswith(".") and os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file()
    ]
  return [os.path.join(folder, file_name) for file_name in sorted(names)]


def _listed(names: Iterable[str]) -> str:
  """Names in sorted order, cut short so that the message stays readable."""
  ordered = sorted(names)
  if not ordered:
    return "none"
  shown = ", ".join(repr(item) for item in ordered[:_MAX_NAMES_SHOWN])
  return shown if len(ordered) <= _MAX_NAMES_SHOWN else f"{shown} and {len(ordered)} in all"


def _size(image: np.ndarray) -> str:
  return f"{image.shape[0]}x{image.shape[1]}"
