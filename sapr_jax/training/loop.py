"""The one training loop. Training with the method and fine-tuning are two stages of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from sapr_jax import report
from sapr_jax.artifacts import Checkpointer, Recorder
from sapr_jax.errors import DivergedError
from sapr_jax.runtime import Interruption, Progress
from sapr_jax.training.passes import WeightPass
from sapr_jax.training.position import Position
from sapr_jax.training.state import TrainState, first_not_finite

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One use of the loop.

  Attributes:
    name: For records and the log.
    epochs: How many there are.
    epochs_before: Epochs of the stages before it.
    learning_rate: Number of a weight step -> its learning rate.
    first_state: State before the first step, on the devices.
    weights: The weight steps and their batches.
    evaluate: (state, epoch) -> measurements after an epoch.
    renew_masks: Called before an epoch: (state, epoch) -> (state with the masks now in force, measurements); None if
      the stage has no masks.
    phase: Epoch -> what is done in it, in words; said where it differs from what was done before.
  """

  name: str
  epochs: int
  epochs_before: int
  learning_rate: Callable[[int], Any]
  first_state: TrainState
  weights: WeightPass
  evaluate: Callable[[TrainState, int], Record]
  renew_masks: Callable[[TrainState, int], tuple[TrainState, Record]] | None = None
  phase: Callable[[int], str] = lambda epoch: ""


def train(
  stage: Stage,
  state: TrainState,
  position: Position,
  checkpointer: Checkpointer,
  recorder: Recorder,
  interruption: Interruption,
  *,
  every_epochs: int,
  every_steps: int | None,
) -> TrainState:
  """Runs a stage from `position`, where it has `state` (donated), to its end; returns its last state.

  Checkpoints are made after every `every_epochs` epochs, at the end, and after every `every_steps` steps of an epoch.

  Raises:
    DivergedError: If a loss or a part of the state is not finite; the last checkpoint before is kept.
    OSError: If the disk cannot be written.
    InterruptedRunError: If the run was asked to stop; its work is saved.
  """
  recorder.name_lost(stage.epochs_before + 1, stage.epochs_before + position.epoch)
  if position.epoch == stage.epochs:
    return state

  def save() -> None:
    checkpointer.save(position.number, state, dataclasses.asdict(position))

  recorder.rewind(stage.epochs_before + position.epoch)
  progress = Progress(stage.name, stage.epochs, position.steps_per_epoch, position.steps_done)
  if position.steps_done:
    in_epoch = f", step {position.step} of the next" if position.step else ""
    progress.say(f"{stage.name}: going on after epoch {position.epoch}/{stage.epochs}{in_epoch}")
  said = ""
  while position.epoch < stage.epochs:
    if (phase := stage.phase(position.epoch)) != said:
      progress.say(said := phase)
    if not position.record:  # the epoch begins
      if interruption.requested():
        save()
        interruption.stop()
      position.record = _first_of_record(stage, position)
      if stage.renew_masks is not None:
        state, found = stage.renew_masks(state, position.epoch)
        position.record |= found

    queue, clock, seconds_before = stage.weights.metrics_queue(), time.monotonic(), position.record["weight_seconds"]
    for batches in stage.weights.batches(position.epoch, position.step):
      state, metrics = stage.weights.step(state, batches)
      interruption.note_unsaved()
      position.add(queue.add(metrics))
      steps = len(jax.tree.leaves(metrics)[0])
      position.step += steps
      progress.advance(steps)
      stopping = interruption.requested()
      if stopping or position.diverged() or position.passed_multiple(every_steps, steps):
        position.add(queue.fetch())
        position.record["weight_seconds"] = seconds_before + time.monotonic() - clock
        _check_finite(stage, state, position)
        save()
      if stopping:
        interruption.stop()
    position.add(queue.fetch())
    position.record["weight_seconds"] = seconds_before + time.monotonic() - clock
    _check_finite(stage, state, position)

    clock = time.monotonic()
    record = position.record | position.means() | stage.evaluate(state, position.epoch)
    record["evaluation_seconds"] = time.monotonic() - clock
    recorder.write(record)
    progress.line(report.format_epoch(record, stage.epochs))
    position = Position(position.steps_per_epoch, position.epoch + 1)
    try:
      recorder.publish(record)
    finally:  # an error of a callback costs no epoch
      if position.epoch % every_epochs == 0 or position.epoch == stage.epochs:
        save()
  progress.close()
  return state


def _first_of_record(stage: Stage, position: Position) -> Record:
  return {
    "stage": stage.name,
    "epoch": position.epoch + 1,
    "step": stage.epochs_before + position.epoch + 1,
    "learning_rate": float(jax.jit(stage.learning_rate)(position.steps_done)),
    "weight_seconds": 0.0,
  }


def _check_finite(stage: Stage, state: TrainState, position: Position) -> None:
  """Checks the metrics and what the last steps left behind, as a loss does not show what its own step did."""
  diverged = position.diverged()
  parts = ("params", "batch_stats", "opt_state", "proposer")
  first = next((f"{part}/{name}" for part in parts if (name := first_not_finite(getattr(state, part)))), None)
  if diverged is None and first is None:
    return
  tensor = f"; the first tensor that is not finite is {first}" if first else ""
  raise DivergedError(
    f"{diverged or 'the state is not finite'} in epoch {position.epoch + 1} of {stage.name}, step {position.step} of"
    f" {position.steps_per_epoch}, at learning rate {position.record['learning_rate']:g}: training diverged{tensor}."
    " The last checkpoint before it is kept; start again with a lower learning rate."
  )
