"""Checkpoints of a run, by Orbax: asynchronous, atomic, checked when they are read."""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from sapr_jax.artifacts.files import free_name
from sapr_jax.errors import InputError

Tree = TypeVar("Tree")

_ITEM = "state"
_WHOLE, _DAMAGED, _REFUSED = range(3)


class Checkpointer:
  """Saves and restores one stage of a run: its state of arrays, and its position as JSON.

  A checkpoint holds a checksum, because disks, copies and file systems do lose bits. Damage is what the checksum says,
  nothing else: a checkpoint that cannot be read now, or is of another network, stays where it is.
  """

  def __init__(self, directory: pathlib.Path, keep: int = 2, keep_period: int | None = None):
    """Takes `directory`, which is made if it does not exist, for the checkpoints, a directory each.

    The newest `keep` are kept, and those whose step is a multiple of `keep_period`.

    Raises:
      OSError: If it cannot be made or read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    self._directory, self._keep = directory, (keep, keep_period)
    logging.getLogger("absl").addFilter(_is_not_of_orbax)

  @functools.cached_property
  def _manager(self) -> Any:
    """Orbax's manager; it is imported when it is needed, as that takes a while."""
    from sapr_jax.artifacts.checkpoint_files import open_manager

    return open_manager(self._directory, _ITEM, *self._keep)

  def restore(self, like: Tree) -> tuple[Tree, dict[str, Any] | None]:
    """Returns the newest undamaged state and its position, or `like` and None if there is none.

    The structure, dtypes and placement are those of `like`. Damaged checkpoints are moved to `damaged/`, beside the
    directories of the stages, and named on standard error.

    Raises:
      InputError: If a checkpoint is whole, and its arrays are not those of `like`.
      OSError: If a file cannot be read.
    """
    if jax.process_count() == 1 and not any(self._directory.iterdir()):
      return like, None
    from sapr_jax.artifacts.checkpoint_files import DamagedError, read

    while (step := self._manager.latest_step()) is not None:
      folder = self._directory / str(step)
      status, problem = _REFUSED, "another process cannot read it"
      try:
        arrays, position = read(folder / _ITEM)
        state = _as(like, arrays, folder)
        status = _WHOLE
      except DamagedError as error:
        status, problem = _DAMAGED, str(error)
      finally:
        worst = _worst_of_processes(status)  # all must ask, also one that an error ends
      if worst == _WHOLE:
        return state, position
      if worst == _REFUSED:
        raise InputError(f"The checkpoint {folder} must be usable on every process; another one says why it is not.")
      self._move_aside(folder, problem)
    return like, None

  def _move_aside(self, source: pathlib.Path, problem: str) -> None:
    if jax.process_index() == 0:
      folder = self._directory.parent / "damaged"
      folder.mkdir(exist_ok=True)
      destination = free_name(folder / f"{self._directory.name}_{source.name}", first=0)
      os.rename(source, destination)
      print(f"warning: the checkpoint {source} is damaged ({problem}); moved to {destination}", file=sys.stderr)
    _worst_of_processes(_WHOLE)  # waits, so that no process finds it again
    self._manager.reload()

  def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
    """Starts saving, and returns once the state, a pytree of arrays, is copied from the devices.

    `step` must rise; an existing checkpoint of this number is kept as it is. `position` must fit into JSON.

    Raises:
      OSError: If this checkpoint or the one before cannot be written; older ones are whole.
    """
    if step in self._manager.all_steps():
      return
    from sapr_jax.artifacts.checkpoint_files import contents

    named = _by_name(state)
    # Arrays are replicated, so the first device's copy serves; on a CPU a view of memory that the next step takes.
    leaves = [leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf for leaf in named.values()]
    arrays = dict(zip(named, map(np.array, jax.device_get(leaves)), strict=True))
    args = contents(_ITEM, arrays, dict(position))
    self._manager.save(step, args=args, force=True)  # otherwise Orbax looks for preemption, as the loop does

  def close(self) -> None:
    """Waits until every checkpoint is written.

    Raises:
      OSError: If the last one cannot be written.
    """
    if "_manager" not in vars(self):
      return
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  """Keeps Orbax's own output from the user: what it has to say also comes as an exception."""
  return f"{os.sep}orbax{os.sep}" not in record.pathname


def _worst_of_processes(status: int) -> int:
  """Waits for all processes, and returns the greatest status."""
  if jax.process_count() == 1:
    return status
  from jax.experimental import multihost_utils

  return int(np.max(multihost_utils.process_allgather(np.asarray(status))))


def _by_name(tree: Any) -> dict[str, Any]:
  """Returns the leaves under their paths, in order."""
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _as(like: Tree, arrays: Mapping[str, np.ndarray], source: pathlib.Path) -> Tree:
  """Returns the arrays in the structure and on the devices of `like`.

  Raises:
    InputError: If names, shapes or dtypes differ.
  """
  wanted = _by_name(like)
  expected = {name: _describe(leaf) for name, leaf in wanted.items()}
  found = {name: _describe(array) for name, array in arrays.items()}
  for name in sorted(expected.keys() | found.keys()):
    if expected.get(name) != found.get(name):
      raise InputError(
        f"The checkpoint {source} must be of the network and images that the run has now: {name} is"
        f" {found.get(name, 'missing')} in it and must be {expected.get(name, 'missing')}; give the same as when it was"
        " made, or a new --workdir to start again."
      )
  leaves = [_place(arrays[name], leaf) for name, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _describe(leaf: Any) -> str:
  return f"{np.dtype(leaf.dtype).name}{list(np.shape(leaf))}"


def _place(array: np.ndarray, like: Any) -> Any:
  if not isinstance(like, jax.Array):
    return array
  return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])
