"""What a network takes: the arithmetic, resizing as in evaluation, the way to JSON and back, and what is refused."""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

import sapr_jax as sapr
from sapr_jax import data

PHOTOS = sapr.Inputs((6, 6, 3), mean=(0.5, 0.25, 0.0), std=(0.25, 0.5, 1.0), resize=8)


def test_bytes_become_normalized_pixels():
  inputs = sapr.Inputs((1, 2, 1), mean=[0.2], std=np.array([0.5], np.float32))
  images = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
  got = inputs.prepare(images)
  np.testing.assert_allclose(got.ravel(), [(0 - 0.2) / 0.5, (1 - 0.2) / 0.5], rtol=1e-6)
  np.testing.assert_allclose(jax.jit(inputs.prepare)(images), got, rtol=1e-6)
  np.testing.assert_allclose(inputs.limits(), [[-0.4], [1.6]], rtol=1e-6)
  half = sapr.Inputs((1, 2, 1), dtype="bfloat16", mean=[0.2], std=[0.5]).prepare(images)
  assert half.dtype == "bfloat16"


def test_it_is_the_normalization_of_training():
  images = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), np.uint8)
  want = data.normalize(jax.numpy.asarray(images), np.array(PHOTOS.mean), np.array(PHOTOS.std))
  np.testing.assert_array_equal(PHOTOS.prepare(images), want)


def test_inputs_that_are_not_normalized_are_taken_as_they_are():
  tokens = sapr.Inputs((3,), dtype=np.int32)
  assert tokens.prepare([[1, 2, 3]]).tolist() == [[1, 2, 3]]
  assert tokens.prepare([[1, 2, 3]]).dtype == np.int32 and tokens.limits() is None and tokens.recipe is None
  assert tokens.input_shape == (1, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_another_size_are_cropped_as_in_evaluation(channels):
  images = np.random.default_rng(0).integers(0, 256, (2, 9, 14, channels), np.uint8)
  inputs = sapr.Inputs((6, 6, channels), mean=[0.5] * channels, std=[0.5] * channels, resize=8)
  got = inputs.crop(images)
  assert got.dtype == np.uint8 and got.shape == (2, 6, 6, channels)
  for image, cropped in zip(images, got, strict=True):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "png")
    want = data.EvaluationRecipe(6, 8)(file.getvalue(), "a", np.random.PCG64(0))
    np.testing.assert_array_equal(cropped, want[..., :channels])
  np.testing.assert_array_equal(inputs.prepare(images), inputs.normalize(got))
  assert inputs.crop(got) is got


@pytest.mark.parametrize(
  "inputs",
  [
    PHOTOS,
    sapr.Inputs((3,), dtype="int32"),
    sapr.Inputs((8, 8, 1), mean=[0.1 + 0.2], std=[1 / 3], class_names=["é", "\udcff", "x|y"]),
  ],
)
def test_every_field_survives_json(inputs):
  document = json.loads(json.dumps(inputs.to_json()))
  assert sapr.Inputs.from_json(document) == inputs
  assert document.get("pixels") == (None if inputs.mean is None else [0, 1])
  assert hash(sapr.Inputs.from_json(document)) == hash(inputs)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"shape": ()}, r"shape must be sizes without the batch, .* got \(\)"),
    ({"shape": (8, 8.5, 1)}, r"shape must be sizes"),
    ({"dtype": "bytes8x"}, r"dtype must be a dtype"),
    ({"mean": (0.5, 0.5, 0.5)}, r"mean must have a number for each channel of images of shape \(8, 8, 1\)"),
    ({"mean": (float("nan"),)}, r"mean must have a number"),
    ({"mean": (0.5,), "std": None}, r"mean and std must both be given"),
    ({"std": (0.0,)}, r"std must be above 0, got \(0\.0,\)"),
    ({"dtype": "int32"}, r"dtype must be a floating one"),
    ({"resize": 7}, r"resize must be unset, or at least the 8 pixels"),
    ({"resize": 10, "shape": (8, 9, 1)}, r"resize must be unset, .* of square images"),
    ({"class_names": "cat"}, r"class_names must be the names of the outputs"),
    ({"class_names": (1, 2)}, r"class_names must be the names"),
  ],
)
def test_fields_that_cannot_be_are_refused(fields, message):
  right = {"shape": (8, 8, 1), "mean": (0.5,), "std": (0.25,)}
  with pytest.raises(sapr.InputError, match=message):
    sapr.Inputs(**right | fields)


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((2, 6, 6, 3), np.float32), r"images must be bytes \(uint8\), .* got float32"),
    (np.zeros((2, 9, 9, 3), np.float32), r"images must be bytes \(uint8\) of shape \(n, height, width, 3\)"),
    (np.zeros((2, 9, 9, 1), np.uint8), r"of shape \(n, height, width, 3\), got uint8 of \(2, 9, 9, 1\)"),
    (np.zeros((6, 6, 3), np.uint8), r"got uint8 of \(6, 6, 3\)"),
    ([[1], [1, 2]], r"images must have shape of an array, got a ragged list"),
  ],
)
def test_images_that_do_not_fit_are_refused(images, message):
  with pytest.raises(sapr.InputError, match=message):
    PHOTOS.prepare(images)


def test_only_images_of_the_right_size_are_for_jit():
  with pytest.raises(sapr.InputError, match=r"of another size than \(6, 6\) must be concrete"):
    jax.eval_shape(PHOTOS.prepare, jax.ShapeDtypeStruct((2, 9, 9, 3), np.uint8))
  assert jax.eval_shape(PHOTOS.prepare, jax.ShapeDtypeStruct((2, 6, 6, 3), np.uint8)).shape == (2, 6, 6, 3)


@pytest.mark.parametrize(
  "change", [{"pixels": [0, 255]}, {"pixels": None}, {"mean": "x"}, {"more": 1}, {"resize": True}, {"shape": [True]}]
)
def test_an_edited_document_is_refused(change):
  with pytest.raises(sapr.InputError):
    sapr.Inputs.from_json(PHOTOS.to_json() | change)
  with pytest.raises(sapr.InputError, match=r"what Inputs\.to_json returned"):
    sapr.Inputs.from_json([])
