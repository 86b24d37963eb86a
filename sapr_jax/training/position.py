"""Where in a stage a run is: what a checkpoint holds beside the arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sapr_jax.artifacts import Checkpointer
from sapr_jax.errors import InputError


@dataclasses.dataclass
class Position:
  """A place in a stage. With the seed, it determines all data that is still to come.

  Attributes:
    steps_per_epoch: Weight steps in an epoch.
    epoch: Finished epochs.
    step: Weight steps done in the epoch under way.
    record: What is known of that epoch so far.
    totals: Sums of its metrics over the steps done.
  """

  steps_per_epoch: int
  epoch: int = 0
  step: int = 0
  record: dict[str, Any] = dataclasses.field(default_factory=dict)
  totals: dict[str, float] = dataclasses.field(default_factory=dict)

  @classmethod
  def read(cls, checkpointer: Checkpointer, steps_per_epoch: int) -> Position:
    """Returns the position of the newest checkpoint, or the beginning.

    Raises:
      InputError: If the checkpoint cannot be read, or was made with another number of images.
    """
    saved = checkpointer.position()
    if saved is None:
      return cls(steps_per_epoch)
    position = cls(**saved)
    if position.steps_per_epoch != steps_per_epoch:
      raise InputError(
        f"The data has changed since the run began: an epoch had {position.steps_per_epoch} steps and now has"
        f" {steps_per_epoch}; give the same images to resume it, or a new --workdir to start anew."
      )
    return position

  @property
  def steps_done(self) -> int:
    """Weight steps since the beginning of the stage."""
    return self.epoch * self.steps_per_epoch + self.step

  def add(self, metrics: Mapping[str, Any]) -> None:
    """Adds the metrics of some steps, `[n]` each."""
    for name, values in metrics.items():
      # One after the other, so that the sum does not depend on how many steps a call has.
      for value in values:
        self.totals[name] = self.totals.get(name, 0.0) + float(value)
    self.step += len(values)

  def means(self) -> dict[str, float]:
    """Returns the means of the metrics over the steps done."""
    return {name: total / self.step for name, total in self.totals.items()}

  def check_finite(self, stage: str) -> None:
    """Raises an `InputError` if training has diverged in this epoch."""
    for name, value in (
      *((f"train_{name}", total) for name, total in self.totals.items()),
      ("generator_loss", self.record.get("generator_loss", 0.0)),
    ):
      if not math.isfinite(value):
        raise InputError(
          f"{name} is {value} in epoch {self.epoch + 1} of {stage}, step {self.step} of {self.steps_per_epoch}, at"
          f" learning rate {self.record['learning_rate']:g}: training diverged. The last checkpoint before it is kept;"
          " start anew with a lower learning rate."
        )
