"""What a run gives back: its numbers, its networks and its figures, read from the work directory when asked for."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import TYPE_CHECKING, Any

import flax.linen as nn

from sapr_jax import artifacts, report
from sapr_jax.errors import InputError, needs_extra, os_errors_in_one_line
from sapr_jax.training import workdir as layout

if TYPE_CHECKING:
  from matplotlib.figure import Figure
  from pandas import DataFrame


@dataclasses.dataclass(frozen=True, repr=False)
class RunResult:
  """A finished run. Printed, it is the table of its networks; in a notebook too.

      result = sapr.load_run("runs/digits")
      result.summary["pruned"]["accuracy"]
      model, variables = result.pruned
      result.frame().plot(x="step", y=["test_accuracy", "subnetwork_accuracy"])

  Attributes:
    workdir: Its work directory.
    summary: "dense", "subnetwork", "pruned" -> accuracy, MACs, parameters and latency of the dense network, the
      sub-network before fine-tuning and the pruned network after it, all at the last epoch; "run" -> facts about the
      run. The same as in `summary.json`.
  """

  workdir: pathlib.Path
  summary: dict[str, Any]

  @classmethod
  def of(cls, workdir: str | os.PathLike[str]) -> RunResult:
    """Returns the result of a run that has finished, maybe long ago.

    Raises:
      InputError: If `workdir` is not the work directory of a run, or its run has not finished.
    """
    path = layout.path_of(workdir)
    with os_errors_in_one_line(path):
      if not (path / layout.CONFIG).is_file():
        raise InputError(f"{path} is not the work directory of a run: it has no {layout.CONFIG}; name one that has.")
      if (summary := layout.read_summary(path)) is None:
        raise InputError(
          f"{path} holds a run that has not finished, or has lost its results; run it again with the configuration it"
          " began with, and it goes on."
        )
    return cls(path, summary)

  @functools.cached_property
  def records(self) -> list[dict[str, Any]]:
    """One mapping for each epoch, in order: `stage`, `epoch` (of the stage), `step` (epochs so far), measurements."""
    return artifacts.read_records(self.workdir)

  def frame(self) -> DataFrame:
    """Returns the records as a table of pandas, a row for each epoch.

    Raises:
      InputError: If pandas is not installed.
    """
    with needs_extra("A frame of the records", "notebook"):
      import pandas as pd  # an extra, and slow to import
    return pd.DataFrame(self.records)

  @functools.cached_property
  def dense(self) -> tuple[nn.Module, Any]:
    """(model, variables) of the dense network after training."""
    return artifacts.load(self.workdir / layout.DENSE)

  @functools.cached_property
  def pruned(self) -> tuple[nn.Module, Any]:
    """(model, variables) of the pruned network after fine-tuning."""
    return artifacts.load(self.workdir / layout.PRUNED)

  def figures(self) -> dict[str, Figure]:
    """Draws the figures of the report; returns name -> figure. A notebook shows all of them.

    Raises:
      InputError: If matplotlib is not installed.
    """
    return report.draw_figures(report.read_histories([self.workdir]))

  def __repr__(self) -> str:
    return f"RunResult of {self.workdir}\n\n{report.format_summary(self.summary)}"

  def _repr_html_(self) -> str:
    return report.summary_as_html(self.summary, caption=str(self.workdir))


load_run = RunResult.of
