"""Batches of images that are read, decoded and cropped while the device computes.

An example is a function of (seed, purpose, epoch, its place in the order) alone: not of how many processes or threads
work on it, nor of whether the run was interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import signal
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from multiprocessing import parent_process, resource_tracker, util  # noqa: F401  (util: see _close_at_exit)
from typing import Any

import numpy as np
from absl import flags

from sapr_jax.data.dataset import EncodedSource
from sapr_jax.data.decoding import BrokenImageError, too_many_broken
from sapr_jax.data.order import random_bits
from sapr_jax.data.recipe import Recipe
from sapr_jax.errors import InputError

# Images are handed over in pieces smaller than a batch: memory stays bounded however large the batch is, all workers
# share the last batch of an epoch, and the first batch does not wait for one worker to make all of it.
_PIECE = 32
_BATCHES_AHEAD = 2
_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()


def stream_batches(
  source: EncodedSource,
  order: np.ndarray,
  *,
  recipe: Recipe,
  seed: int,
  purpose: str | int,
  epoch: int,
  first: int = 0,
  workers: int = 0,
  skip_broken: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, Any]]:
  """Reads the batches of one epoch, a few ahead of the consumer.

  Args:
    source: Images to read.
    order: int32 `[n, B]`, which image is where in which batch, from `epoch_batches` or `evaluation_batches`.
    recipe: Makes an example of an image file.
    seed, purpose, epoch: See `epoch_order`; the purpose keeps the random crops of different uses apart.
    first: How many batches to skip, from 0 to n: a resumed epoch has the batches that remained.
    workers: How many processes to read with. 0 takes threads of this process, one a core, which is enough where there
      are few cores: most of the time the decoders run outside the interpreter lock.
    skip_broken: How many broken images may follow each other: in the place of one comes the next whole one of the
      source, which depends on the files alone. The caller counts them over the batches.
    process_index, process_count: Place of this process in the run; `B` is a multiple of their number.

  Returns:
    Iterator of n - first dicts with this process's slice of each batch, of b = B / process_count: "images", uint8
    `[b, size, size, 3]`, "labels", int32 `[b]`, and "weights", float32 `[b]`, 0 for an image in the place of a broken
    one; and with "broken", index in the source -> what is wrong with it. Nothing runs before the first `next`.
    Closing the iterator, or dropping it, ends its threads and worker processes.

  Raises:
    InputError: If a package is missing; from `next`, if an image cannot be read or a worker process died.
  """
  _check_packages()
  assert 0 <= first <= len(order) and order.shape[1] % process_count == 0
  size = order.shape[1] // process_count
  columns = range(process_index * size, (process_index + 1) * size)
  batches = _batches(_Pieces(source, recipe, order, first, columns, (seed, purpose, epoch), skip_broken), workers)
  _OPEN.add(batches)
  return batches


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Pieces:
  """The work of an epoch as a sequence of small pieces; everything about it can be pickled."""

  source: EncodedSource
  recipe: Recipe
  order: np.ndarray
  first: int
  columns: range  # of the order, that this process reads
  key: tuple[int, str | int, int]
  skip_broken: int

  @property
  def per_batch(self) -> int:
    return -(-len(self.columns) // _PIECE)

  def __len__(self) -> int:
    return (len(self.order) - self.first) * self.per_batch

  def __getitem__(self, number: int) -> dict[str, Any]:
    batch, piece = divmod(number, self.per_batch)
    row, columns = self.first + batch, self.columns[piece * _PIECE : (piece + 1) * _PIECE]
    images = np.empty((len(columns), self.recipe.size, self.recipe.size, 3), np.uint8)
    labels, weights = np.empty(len(columns), np.int32), np.ones(len(columns), np.float32)
    broken: dict[int, str] = {}
    for place, column in enumerate(columns):
      index = int(self.order[row, column])
      images[place], labels[place], found = self._example(index, row * self.order.shape[1] + column)
      weights[place] = not found
      broken |= found
    return {"images": images, "labels": labels, "weights": weights, "broken": broken}

  def _example(self, index: int, position: int) -> tuple[np.ndarray, int, dict[int, str]]:
    """Returns the first whole example from `index` on, its label, and the broken ones before it."""
    broken: dict[int, str] = {}
    while True:
      encoded, label, name = self.source[index]
      # One more than the position: NumPy pads with zeros, so 0 would give the bits that shuffle the epoch.
      bits = random_bits(*self.key, position + 1)
      try:
        return self.recipe(encoded, name, bits), label, broken
      except BrokenImageError as error:
        if not self.skip_broken:
          raise
        broken[index] = str(error)
        index = (index + 1) % len(self.source)
        if len(broken) > self.skip_broken or index in broken:
          raise too_many_broken(broken.values(), self.skip_broken) from error


def _batches(pieces: _Pieces, workers: int) -> Generator[dict[str, Any]]:
  """Puts the pieces of each batch together."""
  if len(pieces) == 0:
    return
  reader = _read(pieces, min(workers, len(pieces)))
  try:
    for _ in range(0, len(pieces), pieces.per_batch):
      parts = [next(reader) for _ in range(pieces.per_batch)]
      # Copies them out of the memory that is shared with the workers, so that it can be given back.
      batch: dict[str, Any] = {
        name: np.concatenate([part[name] for part in parts]) for name in ("images", "labels", "weights")
      }
      yield batch | {"broken": {index: problem for part in parts for index, problem in part["broken"].items()}}
  except RuntimeError as error:
    if "terminated unexpectedly" not in str(error):
      raise
    raise InputError(
      "a worker process that reads images was killed, most likely for want of memory; expected room for "
      f"{workers} workers in memory and in /dev/shm, so use fewer workers, or give a container more (--shm-size)"
    ) from error
  finally:
    reader.close()


@atexit.register
def _close_at_exit() -> None:
  """Closes batches that are still open.

  Grain would close its iterators when the modules they need for it are gone: tracebacks and leaked shared memory. This
  runs before the handler of `multiprocessing.util`, which ends the thread that frees that memory, as handlers run in
  the reverse order of their registration and that module registers its own when it is imported.
  """
  if left_open := list(_OPEN):
    for batches in left_open:
      batches.close()
    # Grain frees the memory in a thread that cannot be waited for: without this, 2 of 3 programs warned of leaks.
    time.sleep(0.5)


def _read(pieces: _Pieces, workers: int) -> Any:
  """Returns a Grain iterator over the pieces, read ahead by worker processes or, without any, by threads."""
  import grain

  ahead, source = _BATCHES_AHEAD * pieces.per_batch, grain.MapDataset.source(pieces)
  if workers == 0:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return iter(source.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=max(ahead, 2 * threads))))
  in_turn = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  if not flags.FLAGS.is_parsed():  # Grain up to 0.2.18 then fails to read its flags (google/grain#1355).
    for name in flags.FLAGS:
      flags.FLAGS[name].present |= name.startswith("grain_")
  # Grain buffers twice: in each worker, and in a thread that takes from it.
  options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=-(-ahead // (2 * workers)))
  return _start_workers(in_turn.mp_prefetch(options, worker_init_fn=_prepare_worker))


def _start_workers(pieces: Any) -> Generator[dict[str, np.ndarray]]:
  """Yields the elements of a Grain dataset, whose workers start before the first.

  Ctrl-C in a terminal and SIGTERM from a scheduler reach the whole process group. They are for the parent, which then
  closes the iterator, so the workers inherit from this thread that they are blocked, from their first instant on.
  """
  resource_tracker.ensure_running()  # otherwise it starts among them, and unblocks the signals
  with contextlib.closing(iter(pieces)) as iterator:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
      first = next(iterator)
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    yield first
    yield from iterator


def _prepare_worker(worker: int, num_workers: int) -> None:
  """Makes a new worker process end at the right time, and fast."""
  # Leaves out the clean-up of the interpreter: 0.4 s in a worker, and Grain ends one worker after the other. The status
  # is that of a failure, so that Grain waits for no worker that ended unasked.
  atexit.register(os._exit, 1)

  def exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # Grain's own loop would go on for ever when the parent was killed.

  threading.Thread(target=exit_with_parent, daemon=True).start()


def _check_packages() -> None:
  try:
    import cv2  # noqa: F401
    import grain  # noqa: F401
  except ImportError as error:
    raise InputError(
      "streaming images needs grain and OpenCV, which are not installed; run: pip install 'sapr_jax[imagenet]'"
    ) from error
