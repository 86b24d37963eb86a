"""Sets of TensorFlow Datasets that are opened but not decoded: ImageNet's own builder, with images made here."""

import io
import pickle
import sys

import numpy as np
import pytest

from sapr_jax.data import DataSpec, EvaluationRecipe, open_dataset, stream_batches

tfds = pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("array_record", reason="needs array_record, which reads at random places")

NAME = "imagenet2012"


def prepare(path, monkeypatch, **sizes):
  """Prepares ImageNet with splits of the given sizes; image i is filled with i and has label i."""
  builder = tfds.builder(NAME, data_dir=path, file_format=tfds.core.FileFormat.ARRAY_RECORD)

  def examples(size):
    for index in range(size):
      file = io.BytesIO()
      Image.new("RGB", (20, 30), (index, index, index)).save(file, "jpeg")
      file.seek(0)
      yield index, {"file_name": f"{index}.JPEG", "image": file, "label": index}

  with monkeypatch.context() as patch:
    patch.setattr(type(builder), "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    splits = {split: examples(size) for split, size in sizes.items()}
    patch.setattr(type(builder), "_split_generators", lambda self, manager: splits)
    builder.download_and_prepare()


def opened(**fields):
  return open_dataset(DataSpec("tfds", name=NAME, **fields))


def value_of(content):
  return int(np.asarray(Image.open(io.BytesIO(content)))[0, 0, 0])


def test_train_and_validation_are_opened_without_decoding(tmp_path, monkeypatch):
  prepare(tmp_path, monkeypatch, train=6, validation=4, test=2)
  dataset = opened(path=str(tmp_path))
  assert (dataset.name, len(dataset.class_names)) == (NAME, 1000)
  assert dataset.class_names[:2] == ("n01440764", "n01443537")
  for split, size in ((dataset.train, 6), (dataset.test, 4)):
    examples = [pickle.loads(pickle.dumps(split))[index] for index in range(len(split))]
    assert sorted(label for _, label, _ in examples) == list(range(size))
    assert all(value_of(content) == label for content, label, _ in examples)
  assert dataset.train[3][2] == "imagenet2012/train[3]"


@pytest.mark.slow
def test_batches_come_from_threads_and_from_workers(tmp_path, monkeypatch):
  for package in ("cv2", "grain"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'sapr_jax[imagenet]'")
  prepare(tmp_path, monkeypatch, train=6, validation=4)
  split = opened(path=str(tmp_path)).train
  order = np.array([[5, 0, 0], [2, 1, 3]], np.int32)
  expected = [[split[index][1] for index in row] for row in order.tolist()]
  for workers in (0, 1):
    batches = list(
      stream_batches(
        split, order, recipe=EvaluationRecipe(size=4, resize=4), seed=0, purpose=0, epoch=0, workers=workers
      )
    )
    assert [batch["labels"].tolist() for batch in batches] == expected
    assert [batch["images"][:, 0, 0, 0].tolist() for batch in batches] == expected


def test_the_split_test_counts_where_there_is_no_validation(tmp_path, monkeypatch, refused):
  prepare(tmp_path / "two", monkeypatch, train=3, test=2)
  assert len(opened(path=str(tmp_path / "two")).test) == 2
  prepare(tmp_path / "one", monkeypatch, train=3)
  with refused("has no split 'test', only train", "source=folder"):
    opened(path=str(tmp_path / "one"))


def test_a_subset_is_random_and_follows_the_seed(tmp_path, monkeypatch, refused):
  prepare(tmp_path, monkeypatch, train=6, validation=2)

  def chosen(seed):
    split = opened(path=str(tmp_path), train_images=3, seed=seed).train
    return tuple(split[index][2] for index in range(len(split)))

  assert chosen(1) == chosen(1)
  assert len(set(chosen(1))) == 3
  assert len({chosen(seed) for seed in range(5)}) > 1
  with refused("cannot choose 9 of 6 images"):
    opened(path=str(tmp_path), train_images=9)


def test_imagenet_that_was_not_downloaded_by_hand_is_refused_with_the_cure(tmp_path, refused):
  with refused("not free to download", "downloads/manual", "ILSVRC2012_img_train.tar", "source=folder"):
    opened(path=str(tmp_path))


def test_a_missing_installation_is_refused_with_the_command(refused, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with refused("pip install tensorflow-datasets", "source=folder"):
    opened()
