"""Checkpoints of a run, by Orbax: asynchronous, atomic, checked when they are read."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pathlib
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from sapr_jax.errors import InputError, one_line

Tree = TypeVar("Tree")

# Words of TensorStore and Orbax about a disk that cannot be written; their exceptions are of many kinds.
_DISK_TROUBLE = ("No space left", "RESOURCE_EXHAUSTED", "Read-only", "Permission denied", "PERMISSION_DENIED", "quota")


class Checkpointer:
  """Saves and restores one stage of a run: its state of arrays, and its position as JSON.

  A checkpoint holds a checksum of each array, because disks, copies and file systems do lose bits.
  Everything that writes raises `InputError` if the disk cannot be written; older checkpoints are complete then.
  """

  def __init__(self, directory: pathlib.Path, keep: int = 2, keep_period: int | None = None):
    """Opens `directory`, which is made if it does not exist, for the checkpoints, a directory each.

    The newest `keep` are kept, and those whose step is a multiple of `keep_period`.
    """
    import orbax.checkpoint as ocp  # imports slowly

    self._args, self._directory = ocp.args, directory
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_period, create=True)
    with self._writing():
      self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_names=("state", "position"))

  def restore(self, like: Tree) -> tuple[Tree, dict[str, Any] | None]:
    """Returns the newest undamaged state and its position, or `like` and None if there is none.

    The structure, dtypes and placement are those of `like`. Damaged checkpoints are named on standard error and moved
    to `damaged/`, beside the directories of the stages.
    """
    target = jax.tree.map(_abstract, like)
    while (step := self._manager.latest_step()) is not None:
      try:
        items = self._args.Composite(state=self._args.StandardRestore(target), position=self._args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        problem = _problem(restored["state"], restored["position"])
      except Exception as error:  # Orbax and TensorStore raise many kinds
        problem = f"{type(error).__name__}: {one_line(error, 120)}"
      if _all_processes(problem is None):
        return restored["state"], restored["position"]["position"]
      _forget_unfinished_reads()
      self._move_aside(step, problem or "another process cannot read it")
    return like, None

  def _move_aside(self, step: int, problem: str) -> None:
    source, folder = self._directory / str(step), self._directory.parent / "damaged"
    if jax.process_index() == 0:
      number = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
      destination = folder / f"{self._directory.name}_{step}_{number}"
      print(f"warning: the checkpoint {source} is damaged ({problem}); moved to {destination}", file=sys.stderr)
      with self._writing():
        folder.mkdir(exist_ok=True)
        os.rename(source, destination)
    _all_processes(True)  # waits, so that no process finds it again
    self._manager.reload()

  def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
    """Starts saving, and returns once the state, a pytree of arrays, is copied from the devices.

    `step` must rise; an existing checkpoint of this number is kept as it is. `position` must fit into JSON. An error
    may be about the checkpoint before.
    """
    if step in self._manager.all_steps():
      return
    content: dict[str, Any] = {"position": dict(position), "arrays": _checksums(state)}
    content |= {"checksum": _json_checksum(content)}
    items = self._args.Composite(state=self._args.StandardSave(state), position=self._args.JsonSave(content))
    with self._writing():
      self._manager.save(step, args=items, force=True)  # otherwise Orbax looks for preemption, as the loop does

  def close(self) -> None:
    """Waits until every checkpoint is written."""
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      trouble = next((text for text in _DISK_TROUBLE if text in str(error)), None)
      # Orbax's TimeoutError, which is an OSError, is about processes and not about the disk.
      if trouble is None and (isinstance(error, TimeoutError) or not isinstance(error, OSError)):
        raise
      reason = getattr(error, "strerror", None) or trouble or error
      raise InputError(
        f"No checkpoint can be written to {self._directory} ({reason}); older ones are complete: make room or fix the"
        " directory, and the same command resumes the run."
      ) from error


def _forget_unfinished_reads() -> None:
  """Collects the unfinished reads that Orbax leaves behind, without the complaint that Python prints about each."""
  hook = sys.unraisablehook
  sys.unraisablehook = lambda unraisable: None
  try:
    gc.collect()
  finally:
    sys.unraisablehook = hook


def _all_processes(mine: bool) -> bool:
  """Waits for all processes, and returns whether the answer is yes on every one."""
  if jax.process_count() == 1:
    return mine
  from jax.experimental import multihost_utils

  return bool(np.all(multihost_utils.process_allgather(np.asarray(mine))))


def _problem(state: Any, content: Mapping[str, Any]) -> str | None:
  """Returns what is wrong with a checkpoint, None if nothing is."""
  if content.get("checksum") != _json_checksum({key: content.get(key) for key in ("position", "arrays")}):
    return "its position has changed on disk"
  found = _checksums(state)
  changed = [name for name, checksum in content["arrays"].items() if found.get(name) != checksum]
  return f"{changed[0]} has changed on disk" if changed else None


def _checksums(state: Any) -> dict[str, int]:
  """Returns name -> CRC-32 of each array. Arrays are replicated, so the first device's copy serves."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  local = jax.device_get([x.addressable_data(0) if isinstance(x, jax.Array) else x for _, x in leaves])
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): zlib.crc32(np.asarray(leaf).tobytes())
    for (path, _), leaf in zip(leaves, local, strict=True)
  }


def _json_checksum(content: Any) -> int:
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _abstract(leaf: Any) -> Any:
  if isinstance(leaf, jax.Array):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  return leaf
