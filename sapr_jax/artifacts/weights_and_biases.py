"""Records of a run on Weights & Biases, beside those on the disk."""

from __future__ import annotations

import contextlib
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from sapr_jax.artifacts.files import read_json, write_json
from sapr_jax.artifacts.records import Callback, scalars
from sapr_jax.errors import InputError, needs_extra, one_line

FILE = "wandb.json"


@contextlib.contextmanager
def weights_and_biases(workdir: pathlib.Path, project: str, config: Mapping[str, Any]) -> Iterator[Callback]:
  """Sends records to Weights & Biases for as long as the block lasts.

  Its run has the name of the work directory, which keeps its id: a run that is resumed goes on with the same curves. It
  is marked as failed where the block ends with an error.

  Args:
    workdir: Work directory of the run.
    project: Where the run is to be found at Weights & Biases.
    config: Fields of the configuration, under flat names.

  Yields:
    The function to call with each record.

  Raises:
    InputError: If the package is not installed, or there is no login and `WANDB_MODE` is not "offline".
  """
  with needs_extra("report.wandb_project", "wandb"):
    import wandb  # an extra, and slow to import
  known = read_json(workdir / FILE)
  number = known["id"] if isinstance(known, dict) and isinstance(known.get("id"), str) else secrets.token_hex(8)
  try:
    run = wandb.init(
      project=project, name=workdir.resolve().name, id=number, resume="allow", config=dict(config), dir=str(workdir)
    )
  except wandb.Error as error:
    raise InputError(
      f"Weights & Biases cannot start ({one_line(error, 200)}); run wandb login, set WANDB_MODE=offline, or leave"
      " report.wandb_project unset."
    ) from error
  write_json(workdir / FILE, {"id": number})
  with run:
    yield lambda record: run.log(scalars(record), step=record["step"])
