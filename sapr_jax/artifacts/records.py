"""Records of a run: one JSON object a line in `records.jsonl`, and the same numbers for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from sapr_jax.artifacts.files import read_bytes, write_atomically, write_through

FILE = "records.jsonl"

Callback = Callable[[Mapping[str, Any]], object]
"""Called with each record."""


class Recorder:
  """Appends records to a work directory.

  A record is a flat mapping with at least `stage`, `epoch` (of the stage, from 1) and `step` (epochs of all stages so
  far, the x-axis of TensorBoard). Numbers go to TensorBoard under `stage/name`; everything else only to the file. Of
  several processes only the first writes, and calls the callbacks.
  """

  def __init__(self, workdir: pathlib.Path, callbacks: Sequence[Callback] = ()):
    self._workdir, self._file, self._callbacks = workdir, workdir / FILE, callbacks
    self._events: _TensorBoard | None = None
    self._writes = jax.process_index() == 0
    self._records = read_records(workdir) if self._writes else []

  def name_lost(self, first: int, last: int) -> None:
    """Names on standard error the records from `first` to `last`, which a checkpoint implies, that the file lacks."""
    lost = sorted(set(range(first, last + 1)) - {record["step"] for record in self._records})
    if lost and self._writes:
      epochs = f"epoch {lost[0]}" if len(lost) == 1 else f"{len(lost)} epochs from {lost[0]} to {lost[-1]}"
      print(f"warning: {self._file} has lost the records of {epochs}; the run goes on without", file=sys.stderr)

  def rewind(self, step: int) -> None:
    """Drops the records after `step`. No checkpoint holds their epochs, and the run goes on from `step`."""
    if not self._writes:
      return
    kept = [record for record in self._records if record["step"] <= step]
    if self._events is not None and kept == self._records:
      return  # the stage before has just ended
    if (dropped := len(self._records) - len(kept)) > 1:  # one is usual after a kill
      print(f"warning: {dropped} recorded epochs are done again, as no checkpoint holds them", file=sys.stderr)
    write_atomically(self._file, "".join(map(_line, kept)))
    self._records = kept
    self.close()
    self._events = _TensorBoard(self._workdir / "tensorboard", first_step=step + 1)

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends `record`."""
    if not self._writes:
      return
    with self._file.open("ab") as file:
      write_through(file, _line(record))  # before a checkpoint says that this epoch is done
    self._records.append(dict(record))
    if self._events is None:
      return
    self._events.add(scalars(record), record["step"])

  def publish(self, record: Mapping[str, Any]) -> None:
    """Calls the callbacks with a record that was written, and that the checkpoints hold."""
    if self._writes:
      for callback in self._callbacks:
        callback(types.MappingProxyType(dict(record)))

  def close(self) -> None:
    """Closes the files of TensorBoard."""
    if self._events is not None:
      events, self._events = self._events, None
      events.close()


class _TensorBoard:
  """An event file of TensorBoard, written without the threads of `tensorboardX.SummaryWriter`, which hide errors."""

  def __init__(self, folder: pathlib.Path, first_step: int):
    """Starts a file; TensorBoard then shows nothing from `first_step` on that older files hold."""
    with _without_torch():
      from tensorboardX.event_file_writer import EventsWriter  # imports slowly
    from tensorboardX.proto.event_pb2 import SessionLog

    folder.mkdir(exist_ok=True)
    self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
    self._write(first_step, session_log=SessionLog(status=SessionLog.START))

  def add(self, scalars: Mapping[str, float], step: int) -> None:
    from tensorboardX.summary import scalar

    for name, value in scalars.items():
      self._write(step, summary=scalar(name, value))
    self._file.flush()

  def _write(self, step: int, **content: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    self._file.write_event(Event(wall_time=time.time(), step=step, **content))

  def close(self) -> None:
    self._file.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """For the import of tensorboardX, which imports PyTorch too where it finds it: seconds, for one annotation."""
  modules: dict[str, Any] = sys.modules
  if hide := "torch" not in modules:
    modules["torch"] = None
  try:
    yield
  finally:
    if hide:
      del modules["torch"]


def read_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the records of a work directory, in order.

  Damaged lines are left out, and named on standard error but for the last one, which a kill cut off.

  Raises:
    OSError: If the file is there and cannot be read.
  """
  file = workdir / FILE
  try:
    *lines, last = read_bytes(file).split(b"\n")
  except FileNotFoundError:
    return []
  records = [_parse(line) for line in lines]
  if damaged := [str(number) for number, record in enumerate(records, 1) if record is None]:
    print(f"warning: {file} is damaged in line {', '.join(damaged)}, left out", file=sys.stderr)
  return [record for record in [*records, _parse(last)] if record is not None]


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numbers of a record as dashboards name them: "stage/name" -> number."""
  numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("epoch", "step")}
  return {f"{record['stage']}/{name}": value for name, value in numbers.items()}


def _line(record: Mapping[str, Any]) -> str:
  return json.dumps(record, allow_nan=False) + "\n"


def _parse(line: bytes) -> dict[str, Any] | None:
  """Returns the record in a line, None if there is none."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return record if isinstance(record, dict) and type(record.get("step")) is int else None
