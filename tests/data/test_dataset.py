"""Splits, their statistics, and class-balanced subsets."""

import numpy as np
import pytest

from sapr_jax.data import DataSpec, EncodedDataset, ImageDataset, ImageSplit, fingerprint, load_dataset, subset
from sapr_jax.data.sources.folder import FolderSource


def make_split(labels: list[int], shape: tuple[int, int, int] = (2, 2, 3)) -> ImageSplit:
  """A split whose image i is filled with the value i."""
  images = np.empty((len(labels), *shape), np.uint8)
  images[:] = np.arange(len(labels))[:, None, None, None]
  return ImageSplit(images=images, labels=np.array(labels, np.int32))


def make_dataset(train: ImageSplit, test: ImageSplit, num_classes: int = 2) -> ImageDataset:
  names = tuple(f"class {number}" for number in range(num_classes))
  return ImageDataset(name="made up", train=train, test=test, class_names=names)


def test_channel_statistics_by_hand():
  # Channel 0 is half 0 and half 255; channel 1 is constant; channel 2 is one quarter 255.
  pixels = np.array([[[0, 51, 0], [255, 51, 0]], [[0, 51, 255], [255, 51, 0]]], np.uint8)
  train = ImageSplit(images=pixels[:, None], labels=np.array([0, 1], np.int32))
  mean, std = make_dataset(train, train).channel_statistics()
  np.testing.assert_allclose(mean, [0.5, 0.2, 0.25], rtol=1e-6)
  np.testing.assert_allclose(std, [0.5, 1 / 255, np.sqrt(3) / 4], rtol=1e-6)
  assert mean.dtype == std.dtype == np.float32


def test_channel_statistics_equal_numpy_over_several_chunks_and_ignore_the_test_images():
  images = np.random.default_rng(0).integers(0, 256, (2500, 3, 2, 2), dtype=np.uint8)
  train = ImageSplit(images=images, labels=np.zeros(2500, np.int32))
  mean, std = make_dataset(train, make_split([0, 1], (3, 2, 2))).channel_statistics()
  np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-6)


def test_dataset_properties():
  dataset = make_dataset(make_split([0, 1, 2], (4, 5, 1)), make_split([2], (4, 5, 1)), 3)
  assert dataset.image_shape == (4, 5, 1)
  assert (len(dataset.train), len(dataset.test)) == (3, 1)


def test_subset_of_equal_classes_by_hand():
  labels = [0, 1, 2] * 4
  chosen = subset(make_split(labels), 6, seed=0)
  assert np.bincount(chosen.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
  ("size", "sorted_counts"),
  [(1, [0, 0, 1]), (3, [1, 1, 1]), (5, [1, 2, 2]), (8, [1, 3, 4]), (12, [1, 3, 8])],
)
def test_subset_of_unequal_classes_is_as_even_as_they_allow(size, sorted_counts):
  split = make_split([0] * 8 + [1] + [2] * 3)
  chosen = subset(split, size, seed=4)
  assert sorted(np.bincount(chosen.labels, minlength=3).tolist()) == sorted_counts


def test_subset_keeps_each_image_with_its_label_and_takes_none_twice():
  split = make_split([0, 1, 1, 0, 2, 2, 0, 1, 2, 0])
  chosen = subset(split, 7, seed=1)
  sources = chosen.images[:, 0, 0, 0]
  assert np.array_equal(chosen.labels, split.labels[sources])
  assert np.array_equal(sources, np.unique(sources))


def test_subset_depends_on_the_seed_alone_and_grows_with_its_size():
  split = make_split([0, 1] * 50)
  sources = {
    (size, seed): subset(split, size, seed).images[:, 0, 0, 0].tolist() for size in (10, 11, 60) for seed in (0, 1)
  }
  assert sources[10, 0] == subset(split, 10, 0).images[:, 0, 0, 0].tolist()
  assert sources[10, 0] != sources[10, 1]
  assert set(sources[10, 0]) < set(sources[11, 0]) < set(sources[60, 0])


def test_subset_favours_no_class_by_its_number():
  split = make_split([0, 1, 2] * 3)
  first = {int(subset(split, 1, seed).labels[0]) for seed in range(30)}
  assert first == {0, 1, 2}


def test_subset_of_size_none_is_the_whole_split():
  split = make_split([0, 1])
  assert subset(split, None, seed=0) is split


def test_bad_subsets_are_refused(refused):
  split = make_split([0, 1, 0])
  with refused("cannot choose 4 of 3 images"):
    subset(split, 4, seed=0)
  with refused("cannot choose 0 of 3 images"):
    subset(split, 0, seed=0)


def test_an_unknown_source_is_refused_with_the_known_ones(refused):
  with refused("unknown data source 'cifar'", "tfds, folder, digits"):
    load_dataset(DataSpec("cifar"))


def in_memory(*, value=0, label=1, names=("a", "b")):
  images = np.zeros((3, 2, 4, 1), np.uint8)
  images[2, 1, 3] = value
  split = ImageSplit(images, np.array([0, 1, label], np.int32))
  return ImageDataset("set", split, split, names)


def test_fingerprints_tell_pixels_labels_and_classes_apart():
  same, expected = fingerprint(in_memory()), {"the number of images": [3, 3], "the number of classes": 2}
  assert same == fingerprint(in_memory()) and same.items() >= expected.items()

  def differing(**changes):
    return {name for name, value in fingerprint(in_memory(**changes)).items() if value != same[name]}

  assert differing(value=1) == {"the checksum of the images"}
  assert differing(label=0) == {"the checksum of the labels"}
  assert differing(names=("ab", "")) == {"the checksum of the class names"}


def test_fingerprints_of_files_see_names_labels_and_a_sample_of_the_contents(tmp_path):
  def found(files, labels, folder="here"):
    for name, content in files.items():
      (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / folder / name).write_bytes(content)
    root = str(tmp_path / folder)
    source = FolderSource(root, [f"{root}/{name}" for name in files], np.array(labels, np.int32))
    return fingerprint(EncodedDataset("set", source, source, ("a", "b")))

  first = found({"1": b"one", "2": b"two"}, [0, 1])
  assert first == found({"1": b"one", "2": b"two"}, [0, 1], "elsewhere")
  for other, what in (
    (found({"1": b"one", "3": b"two"}, [0, 1]), {"the checksum of the file names and labels"}),
    (found({"1": b"one", "2": b"TWO"}, [0, 1]), {"the checksum of 4 of the files"}),
    (
      found({"1": b"one", "2": b"two"}, [0, 0]),
      {"the checksum of the file names and labels", "the checksum of 4 of the files"},
    ),
  ):
    assert {name for name in first if other[name] != first[name]} == what
