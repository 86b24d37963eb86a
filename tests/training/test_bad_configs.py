"""What is wrong with a configuration is said in one line, before anything is written."""

from __future__ import annotations

import pytest
from PIL import Image

import sapr_jax as sapr
from configs import digits, resnet56_cifar10
from sapr_jax import training


def refused(config, workdir, *texts):
  with pytest.raises(sapr.InputError) as info:
    training.run(config, workdir)
  message = str(info.value)
  assert "\n" not in message
  for text in texts:
    assert text in message
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("field", "value", "texts"),
  [
    ("model.name", "resnet57", ["model.name='resnet57' is unknown", "resnet56"]),
    ("model.dtype", "float8", ["model.dtype='float8'", "float32, bfloat16"]),
    ("data.source", "web", ["data.source='web'", "tfds, folder, digits"]),
    ("data.train_images", 0, ["0"]),
    ("data.train_images", 5000, ["5000", "1197"]),
    ("data.crop_padding", -1, ["data.crop_padding=-1", "at least 0"]),
    ("train.epochs", 0, ["train.epochs=0", "at least 1"]),
    ("train.batch_size", 0, ["train.batch_size=0"]),
    ("train.batch_size", 2000, ["train.batch_size=2000", "1197 images"]),
    ("train.learning_rate", 0.0, ["train.learning_rate=0.0", "above 0"]),
    ("train.learning_rate", float("nan"), ["train.learning_rate=nan"]),
    ("train.schedule", "linear", ["train.schedule='linear'", "step, cosine"]),
    ("train.decay_epochs", (20, 40), ["train.decay_epochs=(20, 40)", "train.epochs=30"]),
    ("train.decay_epochs", (20, 10), ["rising"]),
    ("train.momentum", 1.0, ["train.momentum=1.0", "[0.0, 1.0)"]),
    ("finetune.epochs", -1, ["finetune.epochs=-1"]),
    ("prune.p", 0.0, ["p=0.0", "0 < p <= 1"]),
    ("prune.p", 1.01, ["p=1.01"]),
    ("prune.start_epoch", 30, ["prune.start_epoch=30", "train.epochs - 1 = 29"]),
    ("prune.gamma", -1e-3, ["prune.gamma=-0.001"]),
    ("prune.form", "prox", ["prune.form='prox'", "proximal, penalty"]),
    ("prune.weighting", "sum", ["prune.weighting='sum'", "relative, share, uniform"]),
    ("prune.select", "all", ["prune.select='all'", "blocks, unjoined, exact"]),
    ("prune.min_width", 0, ["prune.min_width=0"]),
    ("prune.round_to", 0, ["prune.round_to=0"]),
    ("generator.data_share", 0.0, ["generator.data_share=0.0"]),
    ("generator.data_share", 0.01, ["generator.batch_size=64", "12 images"]),
    ("generator.temperature", 0.0, ["generator.temperature=0.0"]),
    ("generator.bias", float("nan"), ["generator.bias=nan"]),
    ("prune.round_to", 64, ["p=0.49 cannot be met", "round_to=64"]),
    ("checkpoint.keep", 0, ["checkpoint.keep=0"]),
  ],
)
def test_a_field_out_of_range_is_refused(tmp_path, field, value, texts):
  if field.startswith(("data.train", "train.batch_size", "generator.data_share", "prune.round_to")):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  config = digits.get_config()
  config.update_from_flattened_dict({field: value})
  refused(config, tmp_path / "run", *texts)


def folder_config(path):
  config = resnet56_cifar10.get_config()
  config.data.source, config.data.path = "folder", str(path)
  return config


def images(root, classes=("cat", "dog")):
  for split in ("train", "test"):
    for name in classes:
      (root / split / name).mkdir(parents=True)
      Image.new("RGB", (8, 8)).save(root / split / name / "0.png")


def test_a_missing_folder_is_refused(tmp_path):
  refused(folder_config(tmp_path / "nowhere"), tmp_path / "run", str(tmp_path / "nowhere"), "train/<class>/*")


def test_an_empty_class_folder_is_refused(tmp_path):
  images(tmp_path / "data")
  (tmp_path / "data" / "train" / "dog" / "0.png").unlink()
  refused(folder_config(tmp_path / "data"), tmp_path / "run", str(tmp_path / "data" / "train" / "dog"))


def test_an_unreadable_image_is_refused(tmp_path):
  images(tmp_path / "data")
  (tmp_path / "data" / "test" / "cat" / "0.png").write_bytes(b"no image")
  refused(folder_config(tmp_path / "data"), tmp_path / "run", str(tmp_path / "data" / "test" / "cat" / "0.png"))


def test_a_work_directory_of_another_configuration_is_refused(tmp_path):
  from sapr_jax.training import workdir

  config = digits.get_config()
  workdir.make_workdir(tmp_path / "run", config)
  before = (tmp_path / "run" / "config.json").read_text()
  config.prune.p, config.train.epochs = 0.3, 31
  with pytest.raises(sapr.InputError, match=r"prune\.p was 0\.49 and is now 0\.3, train\.epochs was 30 and is now 31"):
    training.run(config, tmp_path / "run")
  assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_directory_of_something_else_is_refused(tmp_path):
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "1.jpg").write_text("x")
  (tmp_path / "file").write_text("x")
  for name, message in (("photos", "holds other files and no run"), ("file", "is a file")):
    with pytest.raises(sapr.InputError, match=message):
      training.run(digits.get_config(), tmp_path / name)
  assert [file.name for file in (tmp_path / "photos").iterdir()] == ["1.jpg"]


def test_what_does_not_change_the_result_may_differ(tmp_path):
  from sapr_jax.training import workdir

  config = digits.get_config()
  workdir.make_workdir(tmp_path / "run", config)
  config.steps_per_call, config.checkpoint.keep, config.data.path = 4, 5, "elsewhere"
  workdir.check_workdir(tmp_path / "run", config)
  config.seed = 1
  with pytest.raises(sapr.InputError, match="seed was 0 and is now 1"):
    workdir.check_workdir(tmp_path / "run", config)
