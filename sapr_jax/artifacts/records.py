"""What a run records: one JSON object a line in `records.jsonl`, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sapr_jax.artifacts.files import write_atomically

FILE = "records.jsonl"


class Recorder:
  """Appends records to a work directory.

  A record is a flat mapping with at least `stage`, `epoch` (of the stage, from 1) and `step` (epochs of all stages so
  far, the x-axis of TensorBoard). Numbers go to TensorBoard under `stage/name`; lists and mappings only to the file.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 0):
    """Opens the records of `workdir`.

    Args:
      workdir: Work directory.
      keep: The run resumes after this `step`: later records, of epochs that no checkpoint holds, are dropped.
    """
    from tensorboardX import SummaryWriter  # imports slowly

    self._file = workdir / FILE
    kept = [record for record in read_records(workdir) if record["step"] <= keep]
    write_atomically(self._file, "".join(json.dumps(record) + "\n" for record in kept))
    self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=keep + 1)

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends `record`."""
    with self._file.open("a") as file:
      file.write(json.dumps(record) + "\n")
    for name, value in record.items():
      if isinstance(value, int | float) and name not in ("epoch", "step"):
        self._writer.add_scalar(f"{record['stage']}/{name}", value, record["step"])
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def read_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the records of a work directory, in order; what follows a damaged line is left out."""
  file = workdir / FILE
  if not file.is_file():
    return []
  records = []
  for line in file.read_text(errors="replace").splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      break
    if not isinstance(record, dict) or "step" not in record:
      break
    records.append(record)
  return records
