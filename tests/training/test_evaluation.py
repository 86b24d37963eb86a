"""Accuracy of any model: what a run measured is measured again, on arrays and on files, and misuse is refused."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_run import SMALL

import sapr_jax as sapr
from sapr_jax import data
from sapr_jax.training import evaluation


class Brightness(nn.Module):
  """Two classes, dark and light: the mean of the image against zero."""

  @nn.compact
  def __call__(self, x):
    shift = self.param("shift", nn.initializers.zeros, ())
    mean = x.mean(axis=(1, 2, 3))[:, None] + shift
    return jnp.concatenate([-mean, mean], axis=-1)


MODEL, VARIABLES = Brightness(), {"params": {"shift": jnp.zeros(())}}
INPUTS = sapr.Inputs((4, 4, 1), mean=[0.5], std=[0.5], class_names=["dark", "light"])
IMAGES = np.array([10, 20, 250, 240, 30], np.uint8)[:, None, None, None] * np.ones((4, 4, 1), np.uint8)
LABELS = np.array([0, 0, 1, 1, 1])  # the last is wrong


@pytest.fixture(scope="module")
def digits_split():
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  return data.load_dataset(data.DataSpec("digits", test_images=SMALL["data.test_images"])).test


@pytest.mark.parametrize("network", ["dense", "pruned"])
def test_a_saved_model_is_as_accurate_as_its_metrics_say(whole, digits_split, network):
  path = whole[0] / network
  metrics = sapr.load_info(path).metrics
  got = sapr.evaluate(path, data=digits_split)
  assert got["accuracy"] == metrics["accuracy"] == whole[1][network]["accuracy"]
  assert got["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
  assert got["images"] == metrics["images"] == 100


def test_images_that_are_normalized_already_give_the_same(whole, digits_split):
  path = whole[0] / "pruned"
  inputs = sapr.load_info(path).inputs
  normalized = inputs.prepare(digits_split.images)
  got = sapr.evaluate(*sapr.load(path), data=(normalized, digits_split.labels), batch_size=64)
  assert got["accuracy"] == sapr.load_info(path).metrics["accuracy"]


def test_another_normalization_shows_or_is_refused(whole, digits_split):
  path = whole[0] / "pruned"
  images, labels = digits_split.images, digits_split.labels
  inputs = sapr.load_info(path).inputs
  wrong = dataclasses.replace(inputs, mean=(0.9,), std=(0.05,))
  got = sapr.evaluate(*sapr.load(path), data=(images, labels), inputs=wrong)
  assert got["loss"] > sapr.load_info(path).metrics["loss"]
  with pytest.raises(sapr.InputError, match=r"must be normalized as inputs say, .* between -0\.8.* got 0 to 255"):
    sapr.evaluate(path, data=(images.astype(np.float32), labels))
  with pytest.raises(sapr.InputError, match=r"inputs must say how images of bytes become inputs"):
    sapr.evaluate(*sapr.load(path), data=(images, labels))


def test_every_image_counts_once_and_one_program_is_compiled(monkeypatch):
  compiled, evaluate = [], evaluation.evaluation_step

  def counting(*args):
    step = evaluate(*args)

    def traced(*args):
      compiled.append(args)
      return step(*args)

    return traced

  monkeypatch.setattr(evaluation, "evaluation_step", counting)
  variables = {"params": {"shift": jnp.full((), 1e-3)}}
  inputs = dataclasses.replace(INPUTS, std=(0.25,))  # of no other test, whose program would be there already
  for batch_size in (2, 2):
    got = sapr.evaluate(MODEL, variables, (IMAGES, LABELS), inputs=inputs, batch_size=batch_size)
    assert got["accuracy"] == pytest.approx(4 / 5) and got["images"] == 5
  assert len(compiled) == 1
  logits = MODEL.apply(variables, inputs.prepare(IMAGES))
  want = -jax.nn.log_softmax(logits)[np.arange(5), LABELS].mean()
  assert got["loss"] == pytest.approx(float(want), rel=1e-5)


def write_files(folder, images=IMAGES, labels=LABELS, names=("dark", "light"), split="test"):
  for number, (image, label) in enumerate(zip(images, labels, strict=True)):
    place = folder / split / names[label]
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze()).save(place / f"{number}.png")
  return folder


def test_a_folder_is_evaluated_like_its_images(tmp_path):
  write_files(tmp_path)
  got = sapr.evaluate(MODEL, VARIABLES, tmp_path, inputs=INPUTS, batch_size=2)
  assert got == sapr.evaluate(MODEL, VARIABLES, (IMAGES, LABELS), inputs=INPUTS, batch_size=2)
  unnamed = dataclasses.replace(INPUTS, class_names=None)
  assert sapr.evaluate(MODEL, VARIABLES, str(tmp_path), inputs=unnamed, batch_size=2) == got


def test_folders_are_the_classes_of_their_name(tmp_path):
  write_files(tmp_path, split="val")
  swapped = dataclasses.replace(INPUTS, class_names=("light", "dark", "none"))
  padded = Three()
  got = sapr.evaluate(padded, {}, tmp_path, inputs=swapped)
  assert got["accuracy"] == pytest.approx(1 / 5)  # the names are swapped


class Three(nn.Module):
  """`Brightness` with a third class that is never chosen, and no parameters."""

  def __call__(self, x):
    mean = x.mean(axis=(1, 2, 3))[:, None]
    return jnp.concatenate([-mean, mean, jnp.full_like(mean, -1e3)], axis=-1)


def test_files_are_resized_as_in_a_run(tmp_path):
  rng = np.random.default_rng(0)
  inputs = sapr.Inputs((4, 4, 3), mean=[0.5] * 3, std=[0.5] * 3, resize=6)
  images = [rng.integers(0, 256, (9, 12, 3), np.uint8) for _ in range(4)]
  labels = [0, 1, 0, 1]
  write_files(tmp_path, images, labels, split="val")
  write_files(tmp_path, images[:2], labels[:2], split="test")
  got = sapr.evaluate(MODEL, VARIABLES, tmp_path, inputs=inputs)
  assert got["images"] == 4  # val comes first, as in a run on streamed images
  assert sapr.evaluate(MODEL, VARIABLES, tmp_path, inputs=inputs, split="test")["images"] == 2
  arrays = sapr.evaluate(MODEL, VARIABLES, (np.stack(images), labels), inputs=inputs)
  assert got == {**arrays, "loss": pytest.approx(arrays["loss"], rel=1e-5)}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"data": None}, r"data must be \(images, labels\), or the path of a folder test/<class>/\*, got None"),
    ({"data": (IMAGES, LABELS[:2])}, r"labels must be integers of at least 0, of shape \(5,\)"),
    ({"data": (IMAGES, LABELS / 2)}, r"labels must be integers"),
    ({"data": (IMAGES, LABELS + 1)}, r"labels must be numbers of the 2 outputs of the model, got 3 classes"),
    ({"data": (IMAGES[:, :2], LABELS)}, r"images must have the shape \('n', 4, 4, 1\), got \(5, 2, 4, 1\)"),
    ({"data": (IMAGES[:0], LABELS[:0])}, r"images must have the shape \(n, \.\.\.\), and not be empty"),
    ({"data": (IMAGES / 255, LABELS), "split": "val"}, r"split must be unset unless data is a folder, got 'val'"),
    ({"data": "nowhere"}, r"there is no folder 'nowhere'; expected test/<class>/\* or val/<class>/\*"),
    ({"data": "nowhere", "split": "all"}, r"split must be one of train, test, val, got 'all'"),
    ({"data": "nowhere", "inputs": None}, r"inputs must say how images of bytes"),
    ({"inputs": 3}, r"inputs must be a Inputs, got 3"),
    ({"batch_size": 0}, r"batch_size must be an integer of at least 1"),
    ({"apply_kwargs": {"mode": 1}}, r"do not fit together: .*mode"),
    ({"apply_kwargs": 3}, r"apply_kwargs must map names to values"),
    ({"model": nn.Conv(2, (1, 1)), "variables": {"params": {}}}, r"do not fit together"),
    ({"model": Three(), "variables": None}, r"variables must map collections to arrays"),
    ({"model": "somewhere"}, r"variables must be unset where model is the path of a saved one"),
  ],
)
def test_misuse_is_refused_in_one_line(change, message):
  right = {"model": MODEL, "variables": VARIABLES, "data": (IMAGES, LABELS), "inputs": INPUTS}
  with pytest.raises(sapr.InputError, match=message) as info:
    sapr.evaluate(**right | change)
  assert "\n" not in str(info.value)


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (lambda d: (d / "test" / "dark").rename(d / "test" / "cat"), r"must be classes of the model, .*got 'cat'"),
    (lambda d: (d / "test").rename(d / "other"), r"has no 'test' or 'val' folder; .*found 'other'"),
    (lambda d: (d / "test" / "dark" / "0.png").write_bytes(b"x"), r"image '.*0\.png' is broken"),
    (
      lambda d: Image.new("L", (5, 4)).save(d / "test" / "dark" / "0.png"),
      r"0\.png' must have 4x4 pixels \(height x width\), as the model takes them, got 4x5",
    ),
    (
      lambda d: Image.new("RGB", (4, 4)).save(d / "test" / "dark" / "0.png"),
      r"0\.png' must be stored as grayscale, as the model takes one channel",
    ),
  ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, spoil, message):
  spoil(write_files(tmp_path))
  with pytest.raises(sapr.InputError, match=message):
    sapr.evaluate(MODEL, VARIABLES, tmp_path, inputs=INPUTS)


def test_without_names_all_outputs_need_a_folder(tmp_path):
  write_files(tmp_path)
  unnamed = dataclasses.replace(INPUTS, class_names=None)
  with pytest.raises(sapr.InputError, match=r"the 3 outputs of the model, got 2 classes; name the outputs in inputs"):
    sapr.evaluate(Three(), {}, tmp_path, inputs=unnamed)
