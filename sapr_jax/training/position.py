"""Position of a run in a stage: the part of a checkpoint that is not an array."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sapr_jax.errors import InputError


@dataclasses.dataclass
class Position:
  """A place in a stage. With the seed, it determines all data that is still to come.

  Attributes:
    steps_per_epoch: Weight steps in an epoch.
    epoch: Finished epochs.
    step: Weight steps started in the epoch under way.
    record: The record of that epoch so far; empty before it begins.
    totals: Sums of the metrics of its steps, as far as they were fetched.
  """

  steps_per_epoch: int
  epoch: int = 0
  step: int = 0
  record: dict[str, Any] = dataclasses.field(default_factory=dict)
  totals: dict[str, float] = dataclasses.field(default_factory=dict)

  @classmethod
  def of_checkpoint(cls, saved: Mapping[str, Any] | None, steps_per_epoch: int) -> Position:
    """Returns the position that a checkpoint holds, or the beginning for None.

    Raises:
      InputError: If it was made with another number of images, or by another version.
    """
    if saved is None:
      return cls(steps_per_epoch)
    try:
      position = cls(**saved)
    except TypeError as error:
      raise InputError(
        f"The checkpoint is of another version of this package ({error}); resume the run with that, or give a new"
        " --workdir to start again."
      ) from error
    if position.steps_per_epoch != steps_per_epoch:
      raise InputError(
        f"The data has changed since the run began: an epoch had {position.steps_per_epoch} steps and now has"
        f" {steps_per_epoch}; give the same images to resume it, or a new --workdir to start again."
      )
    return position

  @property
  def steps_done(self) -> int:
    """Weight steps since the beginning of the stage."""
    return self.epoch * self.steps_per_epoch + self.step

  @property
  def number(self) -> int:
    """Number of a checkpoint made here: it grows by one with every step and with the end of every epoch."""
    return self.steps_done + self.epoch

  def passed_multiple(self, every: int | None, steps: int) -> bool:
    """Returns whether the last `steps` steps reached a multiple of `every`, and the epoch goes on."""
    if every is None or self.step == self.steps_per_epoch:
      return False
    return self.steps_done // every > (self.steps_done - steps) // every

  def add(self, calls: Sequence[Mapping[str, Any]]) -> None:
    """Adds the metrics of calls, `[n]` for n steps each."""
    for metrics in calls:
      for name, values in metrics.items():
        # One after the other, so that the sum does not depend on how many steps a call has.
        for value in values:
          self.totals[name] = self.totals.get(name, 0.0) + float(value)

  def means(self) -> dict[str, float]:
    """Returns the means of the metrics over the steps of the epoch, all of them fetched."""
    return {f"train_{name}": total / self.step for name, total in self.totals.items()}

  def diverged(self) -> str | None:
    """Names the first metric of this epoch that is not finite, and its value; None if all are."""
    loss = self.record.get("generator_loss", 0.0)
    metrics = {f"train_{name}": total for name, total in self.totals.items()} | {"generator_loss": loss}
    return next((f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)), None)
