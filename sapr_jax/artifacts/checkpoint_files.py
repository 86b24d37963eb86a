"""Files of one checkpoint, and the handler by which Orbax writes them.

NUMBER/state/checkpoint.msgpack   the state, each array under its path, and the position as JSON
NUMBER/state/checkpoint.sha256    checksum of that file, as the command sha256sum writes it
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp

from sapr_jax.artifacts.files import read_bytes, sha256, write_through

_CONTENT, _CHECKSUM = "checkpoint.msgpack", "checkpoint.sha256"


class DamagedError(Exception):
  """A checkpoint is not what was written; the message says in what."""


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns the arrays and the position in `folder`.

  Raises:
    DamagedError: If a file is missing, or its checksum is not the one that was written.
    OSError: If a file cannot be read.
  """
  try:
    checksum, data = read_bytes(folder / _CHECKSUM), read_bytes(folder / _CONTENT)
  except FileNotFoundError as error:
    if error.filename is None:  # it was there when it was opened
      raise
    missing = pathlib.Path(error.filename)
    # Unless the disk went away, and its files with it, or a cache of the file system is behind.
    if missing.name in os.listdir(folder if folder.is_dir() else folder.parent):
      raise
    raise DamagedError(f"{missing.name} is missing") from None
  if checksum != _checksum(data):
    raise DamagedError(f"the SHA-256 of {_CONTENT} is not the one in {_CHECKSUM}")
  content = flax.serialization.msgpack_restore(data)
  return content["arrays"], json.loads(content["position"])


def _write(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], position: Mapping[str, Any]) -> None:
  data = flax.serialization.msgpack_serialize({"position": json.dumps(position), "arrays": dict(arrays)})
  for name, part in ((_CONTENT, data), (_CHECKSUM, _checksum(data))):
    with open(folder / name, "wb") as file:
      write_through(file, part)


def _checksum(data: bytes) -> bytes:
  return f"{sha256(data)}  {_CONTENT}\n".encode()


class Handler(ocp.AsyncCheckpointHandler):
  """Writes a checkpoint in a thread, on process 0 alone, as all processes have the same arrays."""

  def __init__(self) -> None:
    self._executor = concurrent.futures.ThreadPoolExecutor(1)

  async def async_save(self, directory: Any, args: Content) -> list[Any]:
    """Starts writing; Orbax waits for what this returns."""
    return [self._executor.submit(self.save, directory, args)]

  def save(self, directory: Any, args: Content) -> None:
    """Writes the files."""
    if jax.process_index() == 0:
      _write(pathlib.Path(directory), args.arrays, args.position)

  def restore(self, directory: Any, args: Any = None) -> Any:
    """Reads them; `Checkpointer` does without Orbax, whose errors do not tell damage from a disk that failed."""
    return read(pathlib.Path(directory))

  def close(self) -> None:
    """Ends the thread."""
    self._executor.shutdown()


@ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Content(ocp.args.CheckpointArgs):
  """Name -> array on the host, and the position, which JSON can hold."""

  arrays: dict[str, np.ndarray]
  position: dict[str, Any]


def contents(item: str, arrays: dict[str, np.ndarray], position: dict[str, Any]) -> ocp.args.Composite:
  """Returns what Orbax's manager is to save."""
  return ocp.args.Composite(**{item: Content(arrays, position)})


def open_manager(directory: pathlib.Path, item: str, keep: int, keep_period: int | None) -> ocp.CheckpointManager:
  """Returns Orbax's manager of the checkpoints in `directory`, where nothing else may be writing some."""
  if jax.process_index() == 0:
    for unfinished in directory.glob("*.orbax-checkpoint-tmp*"):  # by a kill
      shutil.rmtree(unfinished)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    keep_period=keep_period,
    create=True,
    async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
  )
  return ocp.CheckpointManager(directory.absolute(), options=options, item_handlers={item: Handler()})
