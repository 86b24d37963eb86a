"""The digits of scikit-learn: scale, split and subsets."""

import sys

import numpy as np
import pytest

from sapr_jax.data import DataSpec, load_dataset

pytest.importorskip("sklearn", reason="needs scikit-learn")


def test_digits_have_the_documented_shape_and_scale():
  dataset = load_dataset(DataSpec("digits"))
  assert dataset.train.images.shape == (1197, 8, 8, 1)
  assert dataset.test.images.shape == (600, 8, 8, 1)
  assert dataset.class_names == tuple("0123456789")
  # Levels 0 .. 16 become rint(255 * level / 16); level 8 is 127.5, which rounds to even.
  levels = np.unique(np.concatenate([dataset.train.images, dataset.test.images]))
  assert len(levels) == 17
  assert (levels[0], levels[1], levels[8], levels[16]) == (0, 16, 128, 255)


def test_the_splits_are_the_images_of_the_source_each_once():
  from sklearn import datasets

  bunch = datasets.load_digits()
  dataset = load_dataset(DataSpec("digits"))
  loaded = [
    (int(label), np.rint(image[..., 0].astype(float) * 16 / 255).astype(int).tobytes())
    for split in (dataset.train, dataset.test)
    for image, label in zip(split.images, split.labels, strict=True)
  ]
  source = zip(bunch.target.tolist(), bunch.images.astype(int), strict=True)
  assert sorted(loaded) == sorted((label, image.tobytes()) for label, image in source)


def test_the_test_split_is_balanced_and_the_same_for_every_seed():
  first, second = load_dataset(DataSpec("digits", seed=0)), load_dataset(DataSpec("digits", seed=1))
  assert np.bincount(first.test.labels).tolist() == [60] * 10
  assert np.array_equal(first.test.images, second.test.images)
  assert np.array_equal(first.train.images, second.train.images)


def test_subsets_are_balanced_and_follow_the_seed():
  first = load_dataset(DataSpec("digits", train_images=50, test_images=20, seed=0))
  second = load_dataset(DataSpec("digits", train_images=50, test_images=20, seed=1))
  assert np.bincount(first.train.labels).tolist() == [5] * 10
  assert np.bincount(first.test.labels).tolist() == [2] * 10
  assert not np.array_equal(first.train.images, second.train.images)


def test_held_out_training_images_are_balanced_the_same_for_every_seed_and_in_no_training():
  held_out = [
    load_dataset(DataSpec("digits", train_images=1000, test_images=3, validation_images=100, seed=seed))
    for seed in (0, 1)
  ]
  assert np.array_equal(held_out[0].test.images, held_out[1].test.images)
  assert np.bincount(held_out[0].test.labels).tolist() == [10] * 10
  whole = {image.tobytes() for image in load_dataset(DataSpec("digits")).train.images}
  for dataset in held_out:
    trained, evaluated = ({image.tobytes() for image in split.images} for split in (dataset.train, dataset.test))
    assert len(dataset.train) == 1000 and not trained & evaluated and trained | evaluated <= whole


def test_too_large_a_subset_and_a_missing_package_are_refused(refused, monkeypatch):
  with refused("cannot choose 601 of 600 images"):
    load_dataset(DataSpec("digits", test_images=601))
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with refused("source=digits", "pip install scikit-learn"):
    load_dataset(DataSpec("digits"))
