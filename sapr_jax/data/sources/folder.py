"""Image files in folders: `train/<class>/*` and `test/<class>/*`, or `val/<class>/*` in place of `test` to stream.

Classes are numbered in the sorted order of their names, and the files of a class are taken in sorted order. Files with
an ending not in `EXTENSIONS` and names that start with a dot are ignored.
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from sapr_jax.data.dataset import (
  DataSpec,
  EncodedDataset,
  EncodedSource,
  ImageDataset,
  balanced_indices,
  training_indices,
)
from sapr_jax.data.decoding import decode_dataset
from sapr_jax.errors import InputError, one_line

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})
_MAX_NAMES_SHOWN = 5


def load(spec: DataSpec) -> ImageDataset:
  """Reads the chosen files of `train` and `test`, and no others: a small subset of a large folder loads quickly."""
  return decode_dataset(_list_files(spec, "test"), spec.skip_broken)


def open(spec: DataSpec) -> EncodedDataset:
  """Lists the files of `train` and `val`, or `test` where there is no `val`."""
  has_val, has_test = (spec.path is not None and os.path.isdir(Path(spec.path, split)) for split in ("val", "test"))
  return _list_files(spec, "test" if has_test and not has_val else "val")


def open_split(path: str, splits: Sequence[str]) -> tuple[EncodedSource, tuple[str, ...]]:
  """Lists the files of the first of `splits` that the folder has, and no others.

  Returns:
    Its images and the names of its classes, in the order of their labels.

  Raises:
    InputError: If there is no such folder, or no class or image in it.
  """
  root = Path(path)
  expected = f"expected {' or '.join(f'{split}/<class>/*' for split in splits)} in it"
  if not os.path.isdir(root):
    raise InputError(f"there is no folder {path!r}; {expected}")
  found = _visible_folders(root)
  split = next((split for split in splits if split in found), None)
  if split is None:
    names = " or ".join(map(repr, splits))
    raise InputError(f"folder {path!r} has no {names} folder; {expected}, found {_listed(found)}")
  class_names = tuple(sorted(_visible_folders(root / split)))
  if not class_names:
    raise InputError(f"folder {str(root / split)!r} has no class folder; {expected}, so sort its files into them")
  (source,) = _choose_files(root / split, class_names, lambda labels: (balanced_indices(labels, None, 0),))
  assert source is not None
  return source, class_names


class FolderSource:
  """Image files on disk: paths that begin with `root`, and their labels, int32 `[N]`."""

  def __init__(self, root: str, files: Sequence[str], labels: np.ndarray) -> None:
    # An array: a list of ImageNet's paths takes three times the memory in every worker, and ten times as long to send.
    self._paths = np.array([os.fsencode(file[len(root) :]) for file in files])
    self._root, self._labels = root, labels

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> tuple[bytes, int, str]:
    path = self._root + os.fsdecode(self._paths[index])
    return _read(path), int(self._labels[index]), path

  def listing(self) -> bytes:
    return self._paths.tobytes() + self._labels.tobytes()


def _read(path: str) -> bytes:
  """Reads a regular file; anything else could block for ever."""
  try:
    # Without the flag, a pipe would wait here for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
      if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise InputError(f"image {path!r} is not a file but a device, pipe or folder; remove it")
      return file.read()
  except OSError as error:
    raise _unreadable("image", path, error, "make it readable or remove it") from error


def _unreadable(kind: str, path: str | Path, error: OSError, cure: str) -> InputError:
  return InputError(f"{kind} {str(path)!r} cannot be read ({error.strerror or one_line(error)}); {cure}")


def _list_files(spec: DataSpec, held_out: str) -> EncodedDataset:
  root, class_names = _find_classes(spec.path, ("train", held_out))
  train, test = _choose_files(root / "train", class_names, lambda labels: training_indices(labels, spec))
  if test is None:
    (test,) = _choose_files(
      root / held_out, class_names, lambda labels: (balanced_indices(labels, spec.test_images, spec.seed),)
    )
  assert train is not None and test is not None
  return EncodedDataset(root.resolve().name, train, test, class_names)


def _find_classes(path: str | None, splits: tuple[str, str]) -> tuple[Path, tuple[str, ...]]:
  """Returns the folder of a data set and its sorted class names, after checking that both splits have the same ones."""
  expected = f"expected {splits[0]}/<class>/* and {splits[1]}/<class>/*"
  if path is None:
    raise InputError(f"source=folder needs the path of a folder; {expected} in it")
  root = Path(path)
  if not os.path.isdir(root):
    raise InputError(f"there is no folder {path!r}; {expected} in it")
  found, classes = _visible_folders(root), []
  for split in splits:
    if split not in found:
      raise InputError(
        f"folder {path!r} has no {split!r} folder; {expected}, found {_listed(found)}; rename the folder that holds "
        f"the {split} images, or link to it"
      )
    classes.append(set(_visible_folders(root / split)))
    if not classes[-1]:
      raise InputError(f"folder {str(root / split)!r} has no class folder; {expected}, so sort its files into them")
  first, second = classes
  if first != second:
    raise InputError(
      f"the splits of {path!r} have different classes; expected the same ones: only in {splits[0]}: "
      f"{_listed(first - second)}; only in {splits[1]}: {_listed(second - first)}"
    )
  return root, tuple(sorted(first))


def _choose_files(
  folder: Path, class_names: Sequence[str], choose: Callable[[np.ndarray], Sequence[np.ndarray | None]]
) -> list[EncodedSource | None]:
  """Lists the image files of a split and takes those that `choose` names by the labels, before any file is opened."""
  by_class = [_image_files(folder / class_name) for class_name in class_names]
  files = [file for class_files in by_class for file in class_files]
  labels = np.repeat(np.arange(len(by_class), dtype=np.int32), [len(class_files) for class_files in by_class])
  try:
    chosen = choose(labels)
  except InputError as error:
    raise InputError(f"in {str(folder)!r}: {error}") from error
  return [
    None if indices is None else FolderSource(str(folder), [files[index] for index in indices], labels[indices])
    for indices in chosen
  ]


def _visible_folders(folder: Path) -> list[str]:
  """Names of the folders directly in `folder`, in no order, without those that start with a dot."""
  return [entry.name for entry in _visible_entries(folder) if _is_folder(entry)]


def _visible_entries(folder: Path) -> list[os.DirEntry[str]]:
  """What lies directly in `folder`, in no order, without names that start with a dot."""
  try:
    with os.scandir(folder) as entries:
      return [entry for entry in entries if not entry.name.startswith(".")]
  except OSError as error:
    raise _unreadable("folder", folder, error, "let this user read it") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # links in a circle
    return False


def _image_files(folder: Path) -> list[str]:
  """Paths of the image files directly in `folder`, sorted by name."""
  # A link that leads nowhere stands for an image that is missing, and a pipe for one too: reading them will say so.
  names = [
    entry.name
    for entry in _visible_entries(folder)
    if os.path.splitext(entry.name)[1].lower() in EXTENSIONS and not _is_folder(entry)
  ]
  if not names:
    raise InputError(
      f"class folder {str(folder)!r} holds no image; expected files ending in {', '.join(sorted(EXTENSIONS))}"
    )
  return [os.path.join(folder, name) for name in sorted(names)]


def _listed(names: Iterable[str]) -> str:
  """Names in sorted order, cut short so that the message stays readable."""
  ordered = sorted(names)
  shown = ", ".join(repr(item) for item in ordered[:_MAX_NAMES_SHOWN]) or "none"
  return shown if len(ordered) <= _MAX_NAMES_SHOWN else f"{shown} and {len(ordered)} in all"
