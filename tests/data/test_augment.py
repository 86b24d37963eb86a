"""Crops, flips and normalization against plain NumPy, eager and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapr_jax.data import augment, normalize, random_crop, random_flip


def make_images(num_images: int, shape: tuple[int, int, int] = (4, 3, 2)) -> np.ndarray:
  """Images without zeros and without symmetry, so that every crop can be told from the others."""
  pixels = np.arange(1, np.prod(shape) + 1, dtype=np.uint8).reshape(shape)
  return np.tile(pixels, (num_images, 1, 1, 1))


def crops_of(image: np.ndarray, padding: int) -> dict[tuple[int, int], np.ndarray]:
  """Every crop of a zero-padded image, by its offset down and across."""
  height, width, _ = image.shape
  padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  places = range(2 * padding + 1)
  return {(y, x): padded[y : y + height, x : x + width] for y in places for x in places}


def test_crop_takes_every_offset_of_the_padded_image_equally_often():
  images = make_images(900)
  cropped = np.asarray(random_crop(jax.random.key(0), images, 1))
  assert (cropped.dtype, cropped.shape) == (np.uint8, images.shape)
  counts = {offset: int((cropped == crop).all(axis=(1, 2, 3)).sum()) for offset, crop in crops_of(images[0], 1).items()}
  assert sum(counts.values()) == 900
  assert min(counts.values()) > 60 and max(counts.values()) < 140


def test_crop_moves_each_image_as_a_whole_with_padding_4():
  images = np.random.default_rng(0).integers(1, 256, (16, 8, 8, 3), dtype=np.uint8)
  cropped = np.asarray(random_crop(jax.random.key(1), images, 4))
  for image, result in zip(images, cropped, strict=True):
    assert any(np.array_equal(result, crop) for crop in crops_of(image, 4).values())


def test_crop_without_padding_is_the_identity():
  images = make_images(3)
  assert np.array_equal(random_crop(jax.random.key(0), images, 0), images)


def test_flip_mirrors_half_of_the_images_left_to_right():
  images = make_images(1000)
  flipped = np.asarray(random_flip(jax.random.key(0), images))
  is_mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
  is_kept = (flipped == images).all(axis=(1, 2, 3))
  assert np.array_equal(is_mirrored, ~is_kept)
  assert 430 < is_mirrored.sum() < 570


def test_normalize_by_hand():
  images = np.array([0, 51, 255, 102], np.uint8).reshape(1, 1, 2, 2)
  normalized = normalize(images, np.array([0.0, 0.2]), np.array([0.5, 0.1]))
  assert normalized.dtype == jnp.float32
  np.testing.assert_allclose(np.ravel(normalized), [0.0, 0.0, 2.0, 2.0], atol=1e-6)


def test_normalize_to_bfloat16_rounds_the_float32_result():
  images = make_images(2)
  mean, std = np.array([0.1, 0.3]), np.array([0.2, 0.25])
  wide = normalize(images, mean, std)
  narrow = normalize(images, mean, std, jnp.bfloat16)
  assert narrow.dtype == jnp.bfloat16
  assert np.array_equal(narrow, wide.astype(jnp.bfloat16))


def test_augment_crops_and_then_flips_and_each_can_be_left_out():
  images, key = make_images(64), jax.random.key(5)
  crop_key, flip_key = jax.random.split(key)
  cropped = random_crop(crop_key, images, 1)
  both = augment(key, images, padding=1, flip=True)
  assert both.dtype == jnp.uint8
  assert np.array_equal(both, random_flip(flip_key, cropped))
  assert np.array_equal(augment(key, images, padding=1, flip=False), cropped)
  only_flipped = augment(key, images, padding=0, flip=True)
  assert np.array_equal(only_flipped, random_flip(flip_key, images))
  assert np.array_equal(augment(key, images, padding=0, flip=False), images)
  assert not np.array_equal(both, augment(jax.random.key(6), images, padding=1, flip=True))


def test_eager_jit_vmap_and_scan_agree():
  images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 5, 4, 4, 3), dtype=np.uint8))
  keys = jax.random.split(jax.random.key(0), 2)
  run = functools.partial(augment, padding=2, flip=True)
  eager = np.stack([run(key, batch) for key, batch in zip(keys, images, strict=True)])
  assert np.array_equal(jax.jit(jax.vmap(run))(keys, images), eager)
  _, scanned = jax.lax.scan(lambda carry, xs: (carry, run(*xs)), None, (keys, images))
  assert np.array_equal(scanned, eager)


def test_normalize_is_the_same_under_jit_up_to_rounding():
  images, mean, std = make_images(2), np.array([0.1, 0.3]), np.array([0.2, 0.25])
  np.testing.assert_allclose(jax.jit(normalize)(images, mean, std), normalize(images, mean, std), rtol=1e-5, atol=1e-6)


def test_no_implicit_promotion_of_dtype_or_rank():
  images = jnp.asarray(make_images(2))
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    augmented = augment(jax.random.key(0), images, padding=1, flip=True)
    normalized = normalize(augmented, np.zeros(2, np.float32), np.ones(2, np.float32))
  assert normalized.shape == images.shape


@pytest.mark.parametrize("padding", [0, 4])
def test_one_shape_compiles_once(padding):
  run = jax.jit(functools.partial(augment, padding=padding, flip=True))
  for seed in range(3):
    run(jax.random.key(seed), make_images(4))
  assert run._cache_size() == 1
