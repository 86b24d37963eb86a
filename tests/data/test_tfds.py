"""TensorFlow Datasets with tiny sets made here: no download, and no TensorFlow needed."""

import io
import sys

import numpy as np
import pytest

from sapr_jax.data import DataSpec, load_dataset

tfds = pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("array_record", reason="needs array_record, which reads at random places")

SPLIT_SIZES = {"train": 6, "test": 4}


def encoded(index: int, width: int = 4) -> bytes:
  """A 3 x `width` PNG filled with `index`; as bytes, so that TensorFlow need not encode it."""
  buffer = io.BytesIO()
  Image.new("RGB", (width, 3), (index, index, index)).save(buffer, "png")
  return buffer.getvalue()


class SaprTiny(tfds.core.GeneratorBasedBuilder):
  """Image i is filled with i and has label i % 2."""

  VERSION = tfds.core.Version("1.0.0")
  # Not that of a package: to look for files in one, TensorFlow Datasets 4.9.10 imports
  # importlib_resources, which it does not install.
  __module__ = "tiny_sets"
  pkg_dir_path = tfds.core.Path(__file__).parent

  unlabelled = False
  image_name = "image"
  image_dtype = np.uint8
  splits = tuple(SPLIT_SIZES)
  label = tfds.features.ClassLabel(names=["even", "odd"])

  def _info(self):
    features = {
      self.image_name: tfds.features.Image(shape=(3, None, 3), dtype=self.image_dtype, encoding_format="png"),
      "label": self.label,
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(SPLIT_SIZES[split]) for split in self.splits}

  def _generate_examples(self, size):
    for index in range(size):
      yield index, {self.image_name: self.image(index), "label": -1 if self.unlabelled else index % 2}

  def image(self, index):
    return encoded(index)


class SaprTinyNoTest(SaprTiny):
  splits = ("train",)


class SaprTinyNoImage(SaprTiny):
  image_name = "picture"


class SaprTinyNumber(SaprTiny):
  label = tfds.features.Scalar(np.int64)


class SaprTinyWide(SaprTiny):
  image_dtype = np.uint16


class SaprTinySizes(SaprTiny):
  def image(self, index):
    return encoded(index, width=4 + index % 2)


class SaprTinyUnlabelled(SaprTiny):
  unlabelled = True


class SaprTinyMissingPackage(SaprTiny):
  def image(self, index):
    import a_package_that_nobody_has

    return a_package_that_nobody_has.image(index)


class SaprTinyMissingDeeper(SaprTiny):
  def image(self, index):
    # As TensorFlow Datasets does when TensorFlow is missing while it writes a split.
    cause = ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow.io")
    raise ModuleNotFoundError("Failed to write split train") from cause


class SaprTinyOffline(SaprTiny):
  def image(self, index):
    raise ConnectionError("no route\nto the host")


def load(name, path, **kwargs):
  return load_dataset(DataSpec("tfds", name, str(path), **kwargs))


def test_images_labels_and_names_arrive(tmp_path):
  dataset = load("sapr_tiny", tmp_path)
  assert (dataset.name, dataset.class_names) == ("sapr_tiny", ("even", "odd"))
  assert dataset.image_shape == (3, 4, 3)
  for split, size in ((dataset.train, 6), (dataset.test, 4)):
    values = split.images[:, 0, 0, 0]
    assert sorted(values.tolist()) == list(range(size))
    assert np.array_equal(split.labels, values % 2)


def test_a_prepared_set_is_read_from_its_folder_again(tmp_path):
  first, again = load("sapr_tiny", tmp_path), load("sapr_tiny", tmp_path)
  assert (tmp_path / "sapr_tiny" / "1.0.0").is_dir()
  assert np.array_equal(first.train.images, again.train.images)


def test_a_subset_is_balanced_and_follows_the_seed(tmp_path):
  chosen = [load("sapr_tiny", tmp_path, train_images=4, seed=seed).train for seed in range(4)]
  assert all(np.bincount(split.labels).tolist() == [2, 2] for split in chosen)
  assert len({split.images.tobytes() for split in chosen}) > 1


def test_reading_needs_no_tensorflow(tmp_path, monkeypatch):
  load("sapr_tiny", tmp_path)
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  assert len(load("sapr_tiny", tmp_path).train) == 6


def test_unknown_names_are_refused_with_the_nearest(tmp_path, refused):
  with refused("no set 'cifar1O'", "did you mean cifar10"):
    load("cifar1O", tmp_path)
  with refused("no set 'not a name'", "tensorflow.org/datasets/catalog"):
    load("not a name", tmp_path)


def test_sets_of_another_form_are_refused(tmp_path, refused):
  with refused("has no split 'test', only train", "source=folder"):
    load("sapr_tiny_no_test", tmp_path)
  with refused("has no feature 'image', only label, picture"):
    load("sapr_tiny_no_image", tmp_path)
  with refused("'label'", "must be of type ClassLabel, got Scalar"):
    load("sapr_tiny_number", tmp_path)
  with refused("must be uint8, got uint16"):
    load("sapr_tiny_wide", tmp_path)
  with refused("'sapr_tiny_sizes/train[", "is 3x4", "is 3x5", "one size"):
    load("sapr_tiny_sizes", tmp_path)
  with refused("'sapr_tiny_unlabelled' have no label"):
    load("sapr_tiny_unlabelled", tmp_path)


def test_what_is_missing_to_prepare_is_named(tmp_path, refused):
  with refused("pip install a_package_that_nobody_has", "source=folder"):
    load("sapr_tiny_missing_package", tmp_path)
  with refused("needs tensorflow; run: pip install tensorflow,", "source=folder"):
    load("sapr_tiny_missing_deeper", tmp_path)
  with refused("could not download and prepare", "no route to the host", "source=folder"):
    load("sapr_tiny_offline", tmp_path)


def test_a_format_without_random_access_is_refused(tmp_path, refused):
  load("sapr_tiny", tmp_path)
  info = tmp_path / "sapr_tiny" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with refused(str(tmp_path), "without random access", "another path"):
    load("sapr_tiny", tmp_path)


def test_a_missing_installation_is_refused_with_the_command(tmp_path, refused, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with refused("pip install tensorflow-datasets", "source=folder"):
    load("sapr_tiny", tmp_path)
