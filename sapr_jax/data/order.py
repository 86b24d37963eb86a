"""In which order images are read: shuffled epochs for training, padded batches for evaluation.

Every order is a function of (seed, purpose, epoch) alone. A run that resumes at epoch e therefore reads the same
batches as one that was never interrupted, and nothing has to be saved for it.
"""

import zlib

import numpy as np

from sapr_jax.errors import InputError

_SEED_LIMIT = 2**32


def epoch_order(num_images: int, *, seed: int, epoch: int, purpose: str | int) -> np.ndarray:
  """Draws the permutation in which one epoch visits the images.

  Args:
    num_images: How many images there are, at least 1.
    seed: Seed of the run, in [0, 2**32).
    epoch: Which epoch, from 0; each one has its own permutation.
    purpose: Name or number that keeps apart the random numbers of different uses in one run, such as weight training
      and generator training.

  Returns:
    int32 `[num_images]`, a permutation of 0 .. num_images - 1. It is the same on every platform.

  Raises:
    InputError: If `num_images` is below 1, or `seed`, `epoch` or a numeric `purpose` is outside [0, 2**32).

  Example:
    >>> from sapr_jax.data import epoch_order
    >>> epoch_order(4, seed=0, epoch=0, purpose="weights").tolist()
    [2, 1, 3, 0]
  """
  _check_at_least_one("num_images", num_images)
  bits = random_bits(seed, purpose, epoch)
  # Not Generator.permutation: across its versions, NumPy keeps the raw bits, but not the methods of Generator.
  return np.argsort(bits.random_raw(num_images), kind="stable").astype(np.int32)


def random_bits(seed: int, purpose: str | int, epoch: int, *place: int) -> np.random.BitGenerator:
  """Returns the random bits of one epoch, or of one place in it; arguments as for `epoch_order`."""
  # crc32, unlike hash(), does not change from one Python process to the next.
  number = zlib.crc32(purpose.encode()) if isinstance(purpose, str) else purpose
  for name, value in (("seed", seed), ("epoch", epoch), ("purpose", number)):
    if not 0 <= value < _SEED_LIMIT:
      raise InputError(f"{name} must be in [0, 2**32), got {value}")
  return np.random.PCG64(np.random.SeedSequence([seed, number, epoch, *place]))


def epoch_batches(num_images: int, batch_size: int, *, seed: int, epoch: int, purpose: str | int) -> np.ndarray:
  """Cuts the order of one epoch into full batches.

  The last `num_images % batch_size` images of the order are left out, so that every step has the same shape and
  compiles once. The next epoch leaves out others.

  Args:
    num_images: See `epoch_order`.
    batch_size: Images a batch, between 1 and `num_images`.
    seed, epoch, purpose: See `epoch_order`.

  Returns:
    int32 `[num_images // batch_size, batch_size]`; no image occurs twice.

  Raises:
    InputError: If `batch_size` is below 1 or above `num_images`, or for what `epoch_order` refuses.

  Example:
    >>> from sapr_jax.data import epoch_batches
    >>> epoch_batches(5, 2, seed=0, epoch=0, purpose="weights").shape
    (2, 2)
  """
  _check_at_least_one("num_images", num_images)
  _check_at_least_one("batch_size", batch_size)
  if batch_size > num_images:
    raise InputError(f"batch_size must be at most the number of training images, {num_images}, got {batch_size}")
  order = epoch_order(num_images, seed=seed, epoch=epoch, purpose=purpose)
  num_batches = num_images // batch_size
  return order[: num_batches * batch_size].reshape(num_batches, batch_size)


def evaluation_batches(num_images: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Cuts the images, in order, into batches of one shape that count each image exactly once.

  Args:
    num_images: How many images there are, at least 1.
    batch_size: Images a batch, at least 1; may exceed `num_images`.

  Returns:
    A pair of arrays `[ceil(num_images / batch_size), batch_size]`: int32 indices, and float32 weights that are 1 for an
    image and 0 for the padding (index 0) at the end of the last batch.

  Raises:
    InputError: If `num_images` or `batch_size` is below 1.

  Example:
    >>> from sapr_jax.data import evaluation_batches
    >>> indices, weights = evaluation_batches(3, 2)
    >>> indices.tolist(), weights.tolist()
    ([[0, 1], [2, 0]], [[1.0, 1.0], [1.0, 0.0]])
  """
  _check_at_least_one("num_images", num_images)
  _check_at_least_one("batch_size", batch_size)
  num_batches = -(-num_images // batch_size)
  indices = np.zeros(num_batches * batch_size, np.int32)
  weights = np.zeros(num_batches * batch_size, np.float32)
  indices[:num_images] = np.arange(num_images)
  weights[:num_images] = 1.0
  return indices.reshape(num_batches, batch_size), weights.reshape(num_batches, batch_size)


def _check_at_least_one(name: str, value: int) -> None:
  if value < 1:
    raise InputError(f"{name} must be at least 1, got {value}")
