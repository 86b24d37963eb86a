"""In which order images are read: shuffled epochs for training, padded batches for evaluation.

Every order is a function of (seed, purpose, epoch) alone. A run that resumes at epoch e therefore reads the same
batches as one that was never interrupted, and nothing has to be saved for it.
"""

import zlib

import numpy as np

from sapr_jax.errors import InputError


def epoch_order(num_images: int, *, seed: int, epoch: int, purpose: str | int) -> np.ndarray:
  """Draws the permutation in which one epoch visits the images.

  Args:
    num_images: How many images there are.
    seed: Seed of the run, in [0, 2**32).
    epoch: Which epoch, from 0; each one has its own permutation.
    purpose: Name or number that keeps apart the random numbers of different uses in one run, such as weight training
      and generator training.

  Returns:
    int32 `[num_images]`, a permutation of 0 .. num_images - 1. It is the same on every platform.

  Example:
    >>> from sapr_jax.data import epoch_order
    >>> epoch_order(4, seed=0, epoch=0, purpose="weights").tolist()
    [2, 1, 3, 0]
  """
  bits = random_bits(seed, purpose, epoch)
  # Not Generator.permutation: across its versions, NumPy keeps the raw bits, but not the methods of Generator.
  return np.argsort(bits.random_raw(num_images), kind="stable").astype(np.int32)


def random_bits(seed: int, purpose: str | int, epoch: int, *place: int) -> np.random.BitGenerator:
  """Returns the random bits of one epoch, or of one place in it; arguments as for `epoch_order`."""
  # crc32, unlike hash(), does not change from one Python process to the next.
  number = zlib.crc32(purpose.encode()) if isinstance(purpose, str) else purpose
  return np.random.PCG64(np.random.SeedSequence([seed, number, epoch, *place]))


def epoch_batches(num_images: int, batch_size: int, *, seed: int, epoch: int, purpose: str | int) -> np.ndarray:
  """Cuts the order of one epoch into full batches.

  The last `num_images % batch_size` images of the order are left out, so that every step has the same shape and
  compiles once. The next epoch leaves out others.

  The arguments are those of `epoch_order`.

  Returns:
    int32 `[num_images // batch_size, batch_size]`; no image occurs twice.

  Raises:
    InputError: If `batch_size` is above `num_images`.

  Example:
    >>> from sapr_jax.data import epoch_batches
    >>> epoch_batches(5, 2, seed=0, epoch=0, purpose="weights").shape
    (2, 2)
  """
  if batch_size > num_images:
    raise InputError(f"batch_size must be at most the number of training images, {num_images}, got {batch_size}")
  order = epoch_order(num_images, seed=seed, epoch=epoch, purpose=purpose)
  num_batches = num_images // batch_size
  return order[: num_batches * batch_size].reshape(num_batches, batch_size)


def evaluation_batches(num_images: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Cuts the images, in order, into batches of one shape that count each image exactly once.

  Returns:
    A pair of arrays `[ceil(num_images / batch_size), batch_size]`: int32 indices, and float32 weights that are 1 for an
    image and 0 for the padding (index 0) at the end of the last batch.

  Example:
    >>> from sapr_jax.data import evaluation_batches
    >>> indices, weights = evaluation_batches(3, 2)
    >>> indices.tolist(), weights.tolist()
    ([[0, 1], [2, 0]], [[1.0, 1.0], [1.0, 0.0]])
  """
  num_batches = -(-num_images // batch_size)
  indices = np.zeros(num_batches * batch_size, np.int32)
  weights = np.zeros(num_batches * batch_size, np.float32)
  indices[:num_images] = np.arange(num_images)
  weights[:num_images] = 1.0
  return indices.reshape(num_batches, batch_size), weights.reshape(num_batches, batch_size)
