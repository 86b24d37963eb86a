"""Random crops and flips, and normalization, of image batches on the device.

All functions are pure and can be used under `jit`, `vmap` and `scan`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike


def augment(key: jax.Array, images: jax.Array, *, padding: int, flip: bool) -> jax.Array:
  """Applies `random_crop` and then, if `flip`, `random_flip` to images `[N, H, W, C]` of any dtype.

  Both have keys of their own, so that turning one off does not change the other.
  """
  crop_key, flip_key = jax.random.split(key)
  images = random_crop(crop_key, images, padding)
  return random_flip(flip_key, images) if flip else images


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
  """Pads with `padding` zeros on all sides and cuts the original size out, at a random place in each image.

  Offsets are uniform on 0 .. 2 * padding, independently down and across.
  """
  if padding == 0:
    return images
  num_images, height, width, _ = images.shape
  offsets = jax.random.randint(key, (2, num_images, 1), 0, 2 * padding + 1)
  rows = offsets[0] + jnp.arange(height)[None, :]
  columns = offsets[1] + jnp.arange(width)[None, :]
  padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  # Two gathers fuse into one kernel; on CPU they take two thirds of the time of a vmapped dynamic_slice, and an eighth
  # of that of a product with one-hot matrices.
  cropped_rows = jnp.take_along_axis(padded, rows[:, :, None, None], axis=1)
  return jnp.take_along_axis(cropped_rows, columns[:, None, :, None], axis=2)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image `[N, H, W, C]`, of any dtype, left to right with probability one half."""
  is_flipped = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
  return jnp.where(is_flipped, images[:, :, ::-1, :], images)


def normalize(images: jax.Array, mean: ArrayLike, std: ArrayLike, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """Scales bytes to [0, 1], then shifts and scales each channel.

      normalized = (images / 255 - mean) / std

  Args:
    images: uint8 `[N, H, W, C]`.
    mean: `[C]`, mean of each channel on the [0, 1] scale.
    std: `[C]`, standard deviation of each channel on the [0, 1] scale, positive.
    dtype: Of the result. The arithmetic is done in float32 whatever it is.
  """
  mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
  scaled = images.astype(jnp.float32) / 255.0
  return ((scaled - mean[None, None, None, :]) / std[None, None, None, :]).astype(dtype)
