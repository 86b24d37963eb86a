"""Folders that are opened but not read: which files, with which labels, and what is refused."""

import errno
import io
import os
import pickle

import numpy as np
import pytest

from sapr_jax.data import DataSpec, open_dataset

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def encoded(value: int) -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (4, 3), (value, value, value)).save(buffer, "png")
  return buffer.getvalue()


def value_of(content: bytes) -> int:
  return int(np.asarray(Image.open(io.BytesIO(content)))[0, 0, 0])


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(encoded(value))


@pytest.fixture
def root(tmp_path):
  """Two classes, with 3 and 2 training images and one image each to evaluate on."""
  folder = tmp_path / "pets"
  for name, values in (("dög", (10, 11)), ("cat", (0, 1, 2))):
    for number, value in enumerate(values):
      write(folder / "train" / name / f"{number}.JPEG", value)
    write(folder / "val" / name / "0.png", values[0] + 100)
  return folder


def test_classes_and_files_come_in_sorted_order(root):
  dataset = open_dataset(DataSpec("folder", path=str(root)))
  assert (dataset.name, dataset.class_names) == ("pets", ("cat", "dög"))
  assert (len(dataset.train), len(dataset.test)) == (5, 2)
  examples = [dataset.train[index] for index in range(5)]
  assert [(value_of(content), label) for content, label, _ in examples] == [(0, 0), (1, 0), (2, 0), (10, 1), (11, 1)]
  assert [name for _, _, name in examples][::3] == [str(root / "train/cat/0.JPEG"), str(root / "train/dög/0.JPEG")]
  assert [value_of(dataset.test[index][0]) for index in range(2)] == [100, 110]


def test_a_pickled_source_reads_the_same(root):
  source = open_dataset(DataSpec("folder", path=str(root))).train
  copy = pickle.loads(pickle.dumps(source))
  assert [copy[index] for index in range(5)] == [source[index] for index in range(5)]


def test_val_counts_before_test_which_counts_where_there_is_no_val(root):
  write(root / "test" / "unlabelled" / "0.png", 0)
  assert len(open_dataset(DataSpec("folder", path=str(root))).test) == 2
  for name in ("unlabelled/0.png", "cat/0.png", "dög/0.png"):
    write(root / "test" / name, 0)
  (root / "test" / "unlabelled" / "0.png").unlink()
  (root / "test" / "unlabelled").rmdir()
  (root / "val").rename(root / "unused")
  assert [value_of(open_dataset(DataSpec("folder", path=str(root))).test[i][0]) for i in range(2)] == [0, 0]


def test_a_subset_is_balanced_and_follows_the_seed(root):
  for number in range(20):
    write(root / "train" / "cat" / f"more{number}.JPEG", 20 + number)
  chosen = [open_dataset(DataSpec("folder", path=str(root), train_images=4, seed=seed)).train for seed in (3, 3, 4)]
  assert [[label for _, label, _ in map(source.__getitem__, range(4))] for source in chosen] == [[0, 0, 1, 1]] * 3
  first, same, other = ([split[index][2] for index in range(4)] for split in chosen)
  assert first == same != other


def test_held_out_training_files_are_evaluated_in_place_of_others(root):
  dataset = open_dataset(DataSpec("folder", path=str(root), validation_images=2, seed=5))
  names = [[split[index][2] for index in range(len(split))] for split in (dataset.train, dataset.test)]
  everything = sorted(str(path) for path in (root / "train").glob("*/*"))
  assert sorted(names[0] + names[1]) == everything and len(names[1]) == 2
  assert sorted(dataset.test[index][1] for index in range(2)) == [0, 1]


def test_a_file_that_is_gone_is_refused_by_name(root, refused):
  source = open_dataset(DataSpec("folder", path=str(root))).train
  (root / "train" / "cat" / "1.JPEG").unlink()
  with refused("cannot be read (No such file", str(root / "train" / "cat" / "1.JPEG")):
    source[1]


def test_bad_folders_are_refused(root, tmp_path, refused):
  with refused("source=folder needs the path", "train/<class>/* and val/<class>/*"):
    open_dataset(DataSpec("folder"))
  with refused("there is no folder", "absent"):
    open_dataset(DataSpec("folder", path=str(tmp_path / "absent")))
  with refused("cannot choose 6 of 5 images", str(root / "train")):
    open_dataset(DataSpec("folder", path=str(root), train_images=6))
  (root / "val" / "dög" / "0.png").rename(root / "val" / "dög" / "0.txt")
  with refused("holds no image", str(root / "val" / "dög")):
    open_dataset(DataSpec("folder", path=str(root)))
  write(root / "train" / "owl" / "0.png", 0)
  with refused("different classes", "only in train: 'owl'", "only in val: none"):
    open_dataset(DataSpec("folder", path=str(root)))
  (root / "val").rename(root / "validation")
  with refused("has no 'val' folder", "found 'train', 'validation'", "rename"):
    open_dataset(DataSpec("folder", path=str(root)))


def test_a_flat_folder_as_imagenet_ships_it_is_refused_with_the_cure(root, refused):
  (root / "val").rename(root / "old")
  write(root / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
  with refused(str(root / "val"), "has no class folder", "sort its files into them"):
    open_dataset(DataSpec("folder", path=str(root)))


def test_unknown_sources_and_those_that_fit_in_memory_are_refused(refused):
  with refused("unknown data source 'imagenet'", "tfds, folder"):
    open_dataset(DataSpec("imagenet"))
  with refused("'digits' cannot be streamed", "tfds, folder", "into memory"):
    open_dataset(DataSpec("digits"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_links_in_a_circle_pipes_and_lost_links_are_named_when_read(root, refused, split):
  folder = root / split / "cat"
  (folder / "circle.png").symlink_to(folder / "circle.png")
  (folder / "lost.png").symlink_to(folder / "absent.png")
  os.mkfifo(folder / "pipe.png")
  (root / split / "circle").symlink_to(root / split / "circle")  # no class
  dataset = open_dataset(DataSpec("folder", path=str(root)))
  source = getattr(dataset, "test" if split == "val" else split)
  first = len(source) - 3 - (1 if split == "val" else 2)
  for place, name, why in ((0, "circle", "Too many levels"), (1, "lost", "No such file"), (2, "pipe", "not a file")):
    with refused(str(folder / f"{name}.png"), why, "remove it"):
      source[first + place]


def test_folders_and_files_that_cannot_be_read_are_called_that(root, refused, monkeypatch):
  def deny(*arguments):
    raise PermissionError(errno.EACCES, "Permission denied")

  source = open_dataset(DataSpec("folder", path=str(root))).train
  for function, read in (
    ("open", lambda: source[0]),
    ("scandir", lambda: open_dataset(DataSpec("folder", path=str(root)))),
  ):
    with monkeypatch.context() as patch, refused("cannot be read (Permission denied)"):
      patch.setattr(os, function, deny)
      read()


def test_paths_too_long_or_not_in_utf8_are_no_crash(root, refused):
  with refused("there is no folder"):
    open_dataset(DataSpec("folder", path="x" * 5000))
  other = os.fsdecode(os.fsencode(root.parent) + b"/\xff")
  root.rename(other)
  os.rename(f"{other}/train/cat/0.JPEG", os.fsencode(f"{other}/train/cat/") + b"\xfe.JPEG")
  source = open_dataset(DataSpec("folder", path=other)).train
  assert value_of(source[2][0]) == 0
  assert source[2][2].encode(errors="surrogateescape").endswith(b"\xff/train/cat/\xfe.JPEG")
