"""Writes files such that a reader, or the next run, never sees half of one."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import stat
import tempfile
from typing import Any


def write_atomically(path: pathlib.Path, data: str | bytes) -> None:
  """Writes `path` so that at any instant it holds either its old content or all of `data`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(data.encode() if isinstance(data, str) else data)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def read_bytes(path: pathlib.Path) -> bytes:
  """Returns the content of a regular file.

  Raises:
    OSError: If it cannot be read, or is something else, such as a pipe, which would have to be waited for.
  """
  with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file.read()


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the object in a JSON file; None if the file is missing or damaged."""
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return value if isinstance(value, dict) else None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` as indented JSON, atomically."""
  write_atomically(path, json.dumps(value, indent=2) + "\n")
