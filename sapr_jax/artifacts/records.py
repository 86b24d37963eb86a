"""Records of a run: one JSON object a line in `records.jsonl`, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from sapr_jax.artifacts.files import write_atomically

FILE = "records.jsonl"


class Recorder:
  """Appends records to a work directory.

  A record is a flat mapping with at least `stage`, `epoch` (of the stage, from 1) and `step` (epochs of all stages so
  far, the x-axis of TensorBoard). Numbers go to TensorBoard under `stage/name`; everything else only to the file. Of
  several processes only the first writes.
  """

  def __init__(self, workdir: pathlib.Path):
    self._workdir, self._file = workdir, workdir / FILE
    self._writer: Any = None
    self._writes = jax.process_index() == 0

  def rewind(self, step: int) -> None:
    """Drops the records after `step`. No checkpoint holds their epochs, and the run goes on from `step`."""
    if not self._writes:
      return
    from tensorboardX import SummaryWriter  # imports slowly

    kept = [record for record in read_records(self._workdir) if record["step"] <= step]
    if self._writer is not None and len(kept) == step:
      return  # the stage before has just ended
    write_atomically(self._file, "".join(json.dumps(record) + "\n" for record in kept))
    self.close()
    self._writer = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=step + 1)

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends `record`."""
    if not self._writes:
      return
    with self._file.open("a") as file:
      file.write(json.dumps(record) + "\n")
      file.flush()
      os.fsync(file.fileno())  # before a checkpoint says that this epoch is done
    if self._writer is None:
      return
    for name, value in record.items():
      if isinstance(value, int | float) and name not in ("epoch", "step"):
        self._writer.add_scalar(f"{record['stage']}/{name}", value, record["step"])
    self._writer.flush()

  def close(self) -> None:
    """Closes the files of TensorBoard."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None


def read_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the records of a work directory, in order, up to the first damaged line."""
  file = workdir / FILE
  if not file.is_file():
    return []
  records = []
  for line in file.read_text(errors="replace").splitlines():
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      break
    if not isinstance(record, dict) or type(record.get("step")) is not int:
      break
    records.append(record)
  return records
