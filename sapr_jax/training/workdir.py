"""The work directory of a run: its files, and whether it belongs to this configuration."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import reprlib
import socket
import sys
from collections.abc import Iterator
from typing import Any

import jax
from flax import traverse_util

from sapr_jax import report
from sapr_jax.artifacts.files import read_json, remove_temporaries, write_json
from sapr_jax.artifacts.records import FILE as RECORDS
from sapr_jax.artifacts.saved_model import DEFINITION, is_whole
from sapr_jax.errors import InputError
from sapr_jax.runtime import processes, say

CONFIG = "config.json"
NETWORK = "network.json"
SUMMARY = "summary.json"
DENSE = "dense"
PRUNED = "pruned"
REPORT = "report.txt"
SKIPPED = "skipped_images.jsonl"
LATENCY = "latency.json"
LOCK = ".lock"

# Fields that change how a run goes about its work but not its results; they may differ when it resumes.
_FREE_FIELDS = (
  "steps_per_call",
  "data.path",
  "data.workers",
  "data.skip_broken",
  "data.changed_ok",
  "prune.latency_table",  # it is kept in the work directory
  "checkpoint.",
  "report.",
  "eval_batch_size",
)


def path_of(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path of a work directory; raises `InputError` if it is none."""
  try:
    return pathlib.Path(workdir)
  except TypeError:
    raise InputError(f"workdir must be the path of a work directory, got {reprlib.repr(workdir)[:200]}.") from None


def check_workdir(path: pathlib.Path, config: Any) -> None:
  """Checks that `path` is new or belongs to a run of the same configuration; writes nothing.

  Raises:
    InputError: If it belongs to another configuration (the message names the fields that differ), holds something
      else, or a file in it is damaged.
  """
  _check_place(path)
  file = path / CONFIG
  if not file.exists():
    # A hidden file may be our own, left by a kill.
    if path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
      raise InputError(f"{path} holds other files and no run; name a new or empty --workdir.")
    return
  for name in (CONFIG, NETWORK, RECORDS, SUMMARY, REPORT, LATENCY, LOCK):
    if (path / name).is_dir():
      raise InputError(f"{path / name} is a directory, but must be a file; remove it, or name a new --workdir.")
  earlier = read_json(file)
  if earlier is None:
    raise InputError(
      f"{file} is damaged; put a copy back, which the same command writes in a new --workdir, and the run goes on: its"
      " checkpoints are not touched."
    )
  if read_json(path / NETWORK) is None:
    if (path / NETWORK).exists():
      raise InputError(
        f"{path / NETWORK} is damaged; remove it, and the run goes on without what it says of the images."
      )
    if (path / "checkpoints").exists():
      print(f"warning: {path / NETWORK} is missing, so that nothing tells if the images are the same", file=sys.stderr)
  for name in (DENSE, PRUNED):
    if (path / name).exists() and not (path / name / DEFINITION).is_file():
      raise InputError(f"{path / name} holds no whole model; remove that directory, and the run goes on.")
  _compare(path, earlier, flat_fields(config))


def _compare(path: pathlib.Path, earlier: dict[str, Any], fields: dict[str, Any]) -> None:
  """Checks that the fields with which a run began are those that it shall go on with."""
  names = sorted(fields.keys() | earlier.keys())
  differing = [n for n in names if fields.get(n) != earlier.get(n) and not n.startswith(_FREE_FIELDS)]
  if unknown := [n for n in differing if n not in earlier or n not in fields]:
    raise InputError(
      f"{path} belongs to a run of another version of this package: {', '.join(unknown[:5])} is only in one of the two"
      " configurations; name a new --workdir to start again."
    )
  if differing:
    shown = ", ".join(f"{n} was {earlier[n]!r} and is now {fields[n]!r}" for n in differing[:5])
    more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise InputError(
      f"{path} belongs to a run of another configuration: {shown}{more}; give the same values to resume it, or a new"
      " --workdir to start again."
    )


def check_images(path: pathlib.Path, now: dict[str, Any], *, changed_ok: bool) -> None:
  """Checks that a run goes on with the images it began with, by their fingerprints; `changed_ok` makes it a warning.

  Raises:
    InputError: If it does not; the message says what differs.
  """
  began = processes.decided_by_main(lambda: (read_json(path / NETWORK) or {}).get("images")) or now
  names = [name for name in now | began if began.get(name) != now.get(name)]
  if not names:
    return
  changes = ", ".join(f"{name} was {began.get(name)} and is now {now.get(name)}" for name in names)
  if not changed_ok:
    raise InputError(
      f"{path} belongs to a run on other images: {changes}; give the same images to resume it, a new --workdir to start"
      " again, or --config.data.changed_ok=True to go on with these."
    )
  say(f"warning: {path} goes on with other images, as data.changed_ok allows: {changes}")


def _check_place(path: pathlib.Path) -> None:
  """Checks that `path` is a directory or can become one."""
  try:
    str(path).encode()
    if path.is_dir():
      return
    path.lstat()
  except FileNotFoundError:
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    problem = "" if os.access(nearest, os.W_OK | os.X_OK) else f"cannot be made in {nearest}, which cannot be written"
    if len(path.parts) > 1 and path.parts[0].endswith(":"):  # gs://bucket, of which pathlib drops a slash
      problem = f"must be on a mounted file system, and {path.parts[0]}// is not supported"
  except NotADirectoryError:
    problem = "lies below a file"
  except UnicodeEncodeError:  # Orbax writes it into a file
    problem = "must have a name in UTF-8"
  except (OSError, ValueError) as error:  # a name that is too long, or has a null byte
    problem = f"cannot be used ({getattr(error, 'strerror', None) or error})"
  else:
    problem = "is a file"
  if problem:
    raise InputError(f"The work directory {str(path)!r} {problem}; name another --workdir.")


_MEASURED = {"accuracy", "macs", "params", "latency_ms"}
"""Measurements of each network in the summary of a finished run."""


def read_summary(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the summary of a finished run; None if it, or a network that it speaks of, is missing or damaged."""
  if not all(is_whole(path / name) for name in (DENSE, PRUNED)):
    return None
  summary: Any = read_json(path / SUMMARY)
  try:
    whole = all(summary[name].keys() >= _MEASURED for name in ("dense", "subnetwork", "pruned"))
    report.format_summary(summary)
  except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
    return None
  return summary if whole else None


def make_workdir(path: pathlib.Path, config: Any) -> None:
  """Makes the work directory and notes the configuration in it, unless an earlier run did."""
  path.mkdir(parents=True, exist_ok=True)
  if not (path / CONFIG).exists():
    write_json(path / CONFIG, flat_fields(config))


@contextlib.contextmanager
def locked(path: pathlib.Path, config: Any) -> Iterator[None]:
  """Makes the work directory and keeps other runs out of it until the end of the block.

  The lock is the operating system's: it goes with the process, however that ends. Where the file system has no locks,
  a line on standard error says so.

  Raises:
    InputError: If another run is in it.
    OSError: If the directory cannot be written.
  """
  if jax.process_index() != 0:
    yield
    return
  make_workdir(path, config)
  with (path / LOCK).open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        file.seek(0)
        raise InputError(
          f"Another run is in {path} ({file.read().strip() or 'it does not say which'}); wait for it or stop it, or"
          " name another --workdir."
        ) from None
      if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(error.errno, error.strerror, file.name) from None
      print(f"warning: {path} is on a file system without locks; keep other runs out of it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    remove_temporaries(path)
    yield


def flat_fields(config: Any) -> dict[str, Any]:
  """Returns the fields of a configuration as JSON has them, under flat names with dots."""
  return traverse_util.flatten_dict(json.loads(config.to_json_best_effort()), sep=".")
