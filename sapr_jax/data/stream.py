"""Batches of images that are read, decoded and cropped while the device computes.

What an example looks like is a function of (seed, stream, epoch, its place in the order) alone: not of how many
processes or threads work on it, nor of whether the run was interrupted.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import parent_process
from typing import Any

import numpy as np
from absl import flags

from sapr_jax.data.encoded import EncodedSource, EncodedSplit
from sapr_jax.data.recipe import Recipe
from sapr_jax.errors import InputError

# Images are handed over in pieces smaller than a batch: memory stays bounded however large the batch is, all workers
# share the last batch of an epoch, and the first batch does not wait for one worker to make all of it.
_PIECE = 32
_BATCHES_AHEAD = 2
_SEED_LIMIT = 2**32


def stream_batches(
  split: EncodedSplit,
  order: np.ndarray,
  *,
  recipe: Recipe,
  seed: int,
  stream: int,
  epoch: int,
  first: int = 0,
  workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Reads the batches of one epoch, a few ahead of the consumer.

  Args:
    split: Images to read.
    order: int32 `[n, B]`, which image is where in which batch, from `epoch_batches` or `evaluation_batches`.
    recipe: What makes an example of an image file.
    seed: Seed of the run, in [0, 2**32).
    stream: Number that keeps apart the random crops of different uses, in [0, 2**32).
    epoch: Which epoch, in [0, 2**32).
    first: How many batches to skip, between 0 and n: the batches of a resumed epoch are those that remained.
    workers: How many processes to read with. 0 takes threads of this process, one a core, which is enough where few
      cores are there: most of the time the decoders run outside the interpreter lock.
    process_index: Which of the processes of a distributed run this is.
    process_count: How many there are; `B` must be a multiple of it.

  Returns:
    Iterator of n - first dicts with "images", uint8 `[B / process_count, size, size, 3]`, and "labels", int32
    `[B / process_count]`: this process's slice of each batch. Nothing runs before the first `next`. Closing the
    iterator, or dropping it, ends its threads and worker processes.

  Raises:
    InputError: If an argument is out of range or a package is missing; from `next`, if an image cannot be read or a
      worker process died.
  """
  _check_packages()
  _check_arguments(split, order, first, workers, process_index, process_count)
  for name, value in (("seed", seed), ("stream", stream), ("epoch", epoch)):
    if not 0 <= value < _SEED_LIMIT:
      raise InputError(f"{name} is {value}, but must be at least 0 and below 2**32")
  batch_size = order.shape[1]
  local_size = batch_size // process_count
  offset = process_index * local_size
  pieces = _Pieces(
    source=split.source,
    recipe=recipe,
    indices=order[first:, offset : offset + local_size],
    key=(seed, stream, epoch),
    first_position=first * batch_size + offset,
    batch_stride=batch_size,
  )
  return _assemble(pieces, workers)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Pieces:
  """The work of an epoch as a sequence of small pieces; everything about it can be pickled."""

  source: EncodedSource
  recipe: Recipe
  indices: np.ndarray  # int32 [batches, images of this process]
  key: tuple[int, int, int]
  first_position: int  # Flat index in the order of indices[0, 0]
  batch_stride: int  # ... and from there to indices[1, 0]

  @property
  def per_batch(self) -> int:
    return -(-self.indices.shape[1] // _PIECE)

  def __len__(self) -> int:
    return len(self.indices) * self.per_batch

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    batch, piece = divmod(number, self.per_batch)
    start = piece * _PIECE
    indices = self.indices[batch, start : start + _PIECE].tolist()
    first_position = self.first_position + batch * self.batch_stride + start
    images = np.empty((len(indices), self.recipe.size, self.recipe.size, 3), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for place, index in enumerate(indices):
      encoded, labels[place], name = self.source[index]
      # One more than the position: NumPy pads with zeros, so 0 would give the bits that shuffle the epoch.
      bits = np.random.PCG64(np.random.SeedSequence([*self.key, first_position + place + 1]))
      images[place] = self.recipe(encoded, name, bits)
    return {"images": images, "labels": labels}


def _assemble(pieces: _Pieces, workers: int) -> Iterator[dict[str, np.ndarray]]:
  """Puts the pieces of each batch together."""
  if len(pieces) == 0:
    return
  readers = _start_workers(pieces, workers) if workers else _start_threads(pieces)
  # At exit, a generator is ended only when the modules that its readers need are gone.
  close_at_exit = functools.partial(_close, readers, at_exit=True)
  atexit.register(close_at_exit)
  try:
    for start in range(0, len(pieces), pieces.per_batch):
      yield _join([next(readers[number % len(readers)]) for number in range(start, start + pieces.per_batch)])
  except RuntimeError as error:
    if "terminated unexpectedly" not in str(error):
      raise
    raise InputError(
      "a worker process that reads images was killed, most likely for want of memory; expected room for "
      f"{workers} workers in memory and in /dev/shm, so use fewer workers, or give a container more (--shm-size)"
    ) from error
  finally:
    atexit.unregister(close_at_exit)
    _close(readers)


def _start_threads(pieces: _Pieces) -> list[Any]:
  """Returns one Grain iterator over the pieces, which reads them in threads of this process."""
  import grain

  num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  ahead = max(_BATCHES_AHEAD * pieces.per_batch, 2 * num_threads)
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
  return [iter(grain.MapDataset.source(pieces).to_iter_dataset(options))]


def _start_workers(pieces: _Pieces, workers: int) -> list[Any]:
  """Returns Grain iterators over every n-th piece each, with one worker process behind each of the n.

  One `mp_prefetch` of n workers would do the same, but ends them one after the other, half a second each.
  """
  import grain

  _settle_flags()
  # Grain buffers twice: in the worker and again in a thread that takes from it.
  buffer_size = -(-_BATCHES_AHEAD * pieces.per_batch // (2 * workers))
  options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=buffer_size)
  readers = []
  for worker in range(workers):
    every_nth = grain.MapDataset.source(pieces)[worker::workers]
    in_turn = every_nth.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    in_process = in_turn.mp_prefetch(options, worker_init_fn=_prepare_worker)
    readers.append(iter(grain.experimental.ThreadPrefetchIterDataset(in_process, prefetch_buffer_size=1)))
  for reader in readers:
    reader.start_prefetch()
  return readers


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Copies pieces into one batch, out of the memory shared with the workers, so that it can be given back."""
  return {name: np.concatenate([part[name] for part in parts]) for name in ("images", "labels")}


def _close(readers: list[Any], *, at_exit: bool = False) -> None:
  """Closes and deletes readers, each of which waits for its worker process to end."""
  if not readers:
    return  # A generator that is still there after the interpreter's exit comes here a second time.
  if at_exit:  # No thread can be started any more.
    for reader in readers:
      reader.close()
  else:
    threads = [threading.Thread(target=reader.close) for reader in readers]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  readers.clear()
  gc.collect()  # Grain's iterators are in cycles, and hold memory shared with the workers.


def _settle_flags() -> None:
  """Lets Grain read its command line flags in programs that parse no flags; they have their defaults there."""
  if not flags.FLAGS.is_parsed():
    for name in flags.FLAGS:
      if name.startswith("grain_"):
        flags.FLAGS[name].present = True


def _prepare_worker(worker: int, num_workers: int) -> None:
  """Makes a new worker process a quiet servant: no device, no threads of its own, no life after its parent."""
  del worker, num_workers
  import cv2

  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  cv2.setNumThreads(0)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the iterator.
  parent = parent_process()
  assert parent is not None

  def exit_with_parent() -> None:
    parent.join()
    os._exit(0)

  threading.Thread(target=exit_with_parent, daemon=True).start()


def _check_packages() -> None:
  try:
    import cv2  # noqa: F401
    import grain  # noqa: F401
    import simplejpeg  # noqa: F401
  except ImportError as error:
    raise InputError(
      "streaming images needs grain, simplejpeg and OpenCV, which are not installed; run: "
      "pip install 'sapr_jax[imagenet]'"
    ) from error


def _check_arguments(
  split: EncodedSplit, order: np.ndarray, first: int, workers: int, process_index: int, process_count: int
) -> None:
  """Checks what `stream_batches` is called with."""
  if order.ndim != 2 or order.size == 0 or not np.issubdtype(order.dtype, np.integer):
    raise InputError(f"order has shape {order.shape} and dtype {order.dtype}; expected integers [batches, batch size]")
  if order.min() < 0 or order.max() >= len(split):
    raise InputError(
      f"order has indices from {order.min()} to {order.max()}, but there are {len(split)} images; "
      "make it for the same split"
    )
  if not 0 <= first <= len(order):
    raise InputError(f"first is {first}, but must be from 0 to the number of batches, {len(order)}")
  if workers < 0:
    raise InputError(f"workers is {workers}, but must be at least 0")
  if not 0 <= process_index < process_count:
    raise InputError(f"process_index is {process_index}, but must be from 0 to process_count - 1, {process_count - 1}")
  if order.shape[1] % process_count:
    raise InputError(
      f"batch size {order.shape[1]} cannot be divided among {process_count} processes; make it a multiple of them"
    )
