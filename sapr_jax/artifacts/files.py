"""Reads and writes files such that a reader, or the next run, never sees half of one."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Mapping
from typing import Any

_TEMPORARY = ".tmp-"


def write_atomically(path: pathlib.Path, data: str | bytes) -> None:
  """Writes `path` so that at any instant it holds either its old content or all of `data`.

  A kill may leave a hidden file beside it; see `remove_temporaries`.
  """
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path))
  try:
    with os.fdopen(handle, "wb") as file:
      write_through(file, data)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def write_through(file: Any, data: str | bytes) -> None:
  """Writes to a binary file and waits until the disk has it."""
  file.write(data.encode() if isinstance(data, str) else data)
  file.flush()
  os.fsync(file.fileno())


def temporary_prefix(path: pathlib.Path) -> str:
  """Returns how the name of what is to become `path` begins until it is whole."""
  return f".{path.name}{_TEMPORARY}"


def remove_temporaries(folder: pathlib.Path) -> None:
  """Removes what a killed program had begun to write in `folder` and had not yet put in its place."""
  for leftover in folder.glob(f".*{_TEMPORARY}*"):
    if leftover.is_dir():
      shutil.rmtree(leftover)
    else:
      leftover.unlink()


def free_name(path: pathlib.Path, first: int) -> pathlib.Path:
  """Returns `path` with the lowest number from `first` on at its end that nothing has yet."""
  names = (path.with_name(f"{path.name}_{number}") for number in itertools.count(first))
  return next(name for name in names if not name.exists())


def read_bytes(path: pathlib.Path) -> bytes:
  """Returns the content of a regular file.

  Raises:
    OSError: If it cannot be read, or is something else, such as a pipe, which would have to be waited for.
  """
  with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    try:
      return file.read()
    except MemoryError:
      raise OSError(errno.ENOMEM, "it is larger than the memory", str(path)) from None


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the object in a JSON file; None if the file is missing or damaged.

  Raises:
    OSError: If it is there and cannot be read.
  """
  try:
    value = json.loads(read_bytes(path))
  except (FileNotFoundError, ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` as indented JSON, atomically; raises `ValueError` for a number that JSON does not have."""
  write_atomically(path, json_text(value))


def json_text(value: Any) -> str:
  """Returns `value` as indented JSON; raises `ValueError` for a number that JSON does not have."""
  return json.dumps(value, indent=2, allow_nan=False) + "\n"


def sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def sha256_of_entries(document: Mapping[str, Any]) -> str:
  """Returns the checksum of a JSON object but for its entry "sha256"."""
  entries = {name: entry for name, entry in document.items() if name != "sha256"}
  return sha256(json.dumps(entries, sort_keys=True).encode())
