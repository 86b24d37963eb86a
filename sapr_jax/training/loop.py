"""The one training loop. Pruning and fine-tuning are two stages of it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import flax.linen as nn
import jax
import optax

from sapr_jax import artifacts, report
from sapr_jax.errors import InputError
from sapr_jax.training import epochs, steps
from sapr_jax.training.devices import MappedSteps, loops_are_slow, replicate
from sapr_jax.training.interruption import Interruption
from sapr_jax.training.position import Position
from sapr_jax.training.progress import Progress
from sapr_jax.training.setup import FINETUNE, TRAIN, Setup
from sapr_jax.training.state import NetworkState, first_not_finite, network_state

State = dict[str, Any]
"""What a checkpoint holds: "network", and while pruning "generator" and "masks"."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """What distinguishes one pass through the loop from another.

  Attributes:
    name: For records and the log.
    phase: `config.train` or `config.finetune`.
    stream: Its stream of orders and random numbers.
    epochs_before: Epochs of the stages before it.
    state: Its first state.
    weight_steps: The mapped weight step.
    evaluation: The mapped evaluation of its network.
    generator_steps: The mapped generator step; None if the stage does not search for a sub-network.
  """

  name: str
  phase: Any
  stream: int
  epochs_before: int
  state: State
  weight_steps: MappedSteps
  evaluation: MappedSteps
  generator_steps: MappedSteps | None = None


def pruning_stage(setup: Setup) -> Stage:
  """Trains the dense network with partial regularization; from E_start on, the generator renews the masks.

  After `prune.hold_epoch` epochs it does not any more.
  """
  config = setup.config
  weight_step = steps.weight_step(
    setup.model,
    setup.train_tx,
    setup.feed.preprocessing,
    accumulate=config.train.accumulate,
    unroll=loops_are_slow(setup.mesh),
  )
  generator_step = steps.generator_step(
    setup.model,
    setup.generator,
    setup.graph,
    setup.generator_tx,
    setup.feed.preprocessing,
    p=config.prune.p,
    macs_weight=config.generator.macs_weight,
    bias=config.generator.bias,
    temperature=config.generator.temperature,
    batch_statistics=config.generator.statistics == "batch",
  )
  return Stage(
    name="train",
    phase=config.train,
    stream=TRAIN,
    epochs_before=0,
    state={
      "network": setup.initial_network(),
      "generator": setup.initial_generator(),
      # Until E_start all channels are kept, and the regularization does nothing.
      "masks": replicate(setup.graph.full_masks(), setup.mesh),
    },
    weight_steps=setup.mapped(weight_step),
    evaluation=setup.evaluation,
    generator_steps=setup.mapped(generator_step),
  )


def finetuning_stage(setup: Setup, model: nn.Module, variables: Any) -> Stage:
  """Trains the pruned network as an ordinary one."""
  tx: optax.GradientTransformation = setup.finetune_tx
  weight_step = steps.weight_step(
    model,
    tx,
    setup.feed.preprocessing,
    accumulate=setup.config.finetune.accumulate,
    unroll=loops_are_slow(setup.mesh),
  )
  return Stage(
    name="finetune",
    phase=setup.config.finetune,
    stream=FINETUNE,
    epochs_before=setup.config.train.epochs,
    state={"network": replicate(network_state(variables, tx), setup.mesh)},
    weight_steps=setup.mapped(weight_step),
    evaluation=setup.mapped(steps.evaluation_step(model, setup.feed.preprocessing)),
  )


def restore(setup: Setup, stage: Stage, checkpointer: artifacts.Checkpointer) -> tuple[State, Position]:
  """Returns state and position of the newest whole checkpoint of a stage, or its first ones."""
  state, saved = checkpointer.restore(stage.state)
  return state, Position.of_checkpoint(saved, setup.steps_per_epoch(stage.phase))


def train(
  setup: Setup,
  stage: Stage,
  state: State,
  position: Position,
  checkpointer: artifacts.Checkpointer,
  recorder: artifacts.Recorder,
  interruption: Interruption,
) -> State:
  """Runs a stage from `position` to its end; returns its last state.

  Raises:
    InputError: If training diverges, or the disk cannot be written.
    InterruptedRunError: If the run was asked to stop; its work is saved.
  """
  phase, keep = stage.phase, _Keeper(setup, stage, checkpointer, interruption)
  if position.epoch == phase.epochs:
    return state
  recorder.rewind(stage.epochs_before + position.epoch)
  progress = Progress(stage.name, phase.epochs, position.steps_per_epoch, position.steps_done)
  if position.steps_done:
    in_epoch = f", step {position.step} of the next" if position.step else ""
    progress.line(f"{stage.name}: going on after epoch {position.epoch}/{phase.epochs}{in_epoch}")
  while position.epoch < phase.epochs:
    searching = stage.generator_steps is not None and position.epoch >= setup.config.prune.start_epoch
    if not position.record:
      keep.if_interrupted(state, position)
      position.record = _first_of_record(setup, stage, position)
      if searching and position.epoch < setup.hold_epoch:
        position.record |= _renew_masks(setup, stage, state, position.epoch)
    _train_weights(setup, stage, state, position, keep, progress)
    keep.if_interrupted(state, position)
    record = position.record | _prefixed("train", position.means())

    clock = time.monotonic()
    record |= _prefixed("test", epochs.evaluate(setup, stage.evaluation, state["network"].variables))
    if searching:
      record |= _measure_subnetwork(setup, stage, state)
    record["evaluation_seconds"] = time.monotonic() - clock

    recorder.write(record)
    progress.line(report.format_epoch(record, phase.epochs))
    position = Position(position.steps_per_epoch, position.epoch + 1)
    if position.epoch % setup.config.checkpoint.every_epochs == 0 or position.epoch == phase.epochs:
      keep.now(state, position)
  progress.close()
  return state


@dataclasses.dataclass(frozen=True)
class _Keeper:
  """Makes the checkpoints of a stage, when they are due and when the run is asked to stop."""

  setup: Setup
  stage: Stage
  checkpointer: artifacts.Checkpointer
  interruption: Interruption

  def now(self, state: State, position: Position) -> None:
    self.checkpointer.save(position.number, state, dataclasses.asdict(position))

  def if_due(self, state: State, position: Position, steps_done: int) -> None:
    """Called after `steps_done` more weight steps."""
    every, now = self.setup.config.checkpoint.every_steps, position.steps_done
    if every and now // every > (now - steps_done) // every and position.step < position.steps_per_epoch:
      self.now(state, position)

  def if_interrupted(self, state: State, position: Position) -> None:
    if self.interruption.requested():
      self.now(state, position)
      self.interruption.stop()


def _first_of_record(setup: Setup, stage: Stage, position: Position) -> dict[str, Any]:
  return {
    "stage": stage.name,
    "epoch": position.epoch + 1,
    "step": stage.epochs_before + position.epoch + 1,
    "learning_rate": float(setup.weight_schedule(stage.phase)(position.steps_done)),
    "weight_seconds": 0.0,
  }


def _train_weights(
  setup: Setup, stage: Stage, state: State, position: Position, keep: _Keeper, progress: Progress
) -> None:
  """Trains the weights to the end of the epoch."""
  clock, before = time.monotonic(), position.record["weight_seconds"]

  def after_call(network: NetworkState, steps_done: int) -> None:
    progress.advance(steps_done)
    position.record["weight_seconds"] = before + time.monotonic() - clock
    _check_finite(stage, network, position)
    state["network"] = network
    keep.if_due(state, position, steps_done)
    keep.if_interrupted(state, position)

  state["network"] = epochs.train_weights(
    setup,
    stage.weight_steps,
    state["network"],
    position,
    phase=stage.phase,
    stream=stage.stream,
    masks=state.get("masks"),
    after_call=after_call,
  )


def _check_finite(stage: Stage, network: NetworkState, position: Position) -> None:
  if (diverged := position.diverged()) is None:
    return
  parts = ("params", "batch_stats", "opt_state")
  first = next((f"{part}/{name}" for part in parts if (name := first_not_finite(getattr(network, part)))), None)
  tensor = f"; the first tensor that is not finite is {first}" if first else ""
  raise InputError(
    f"{diverged} in epoch {position.epoch + 1} of {stage.name}, step {position.step} of {position.steps_per_epoch}, at"
    f" learning rate {position.record['learning_rate']:g}: training diverged{tensor}. The last checkpoint before it is"
    " kept; start anew with a lower learning rate."
  )


def _renew_masks(setup: Setup, stage: Stage, state: State, epoch: int) -> dict[str, Any]:
  """Trains the generator with the weights fixed and puts the masks it now proposes in force."""
  assert stage.generator_steps is not None
  clock = time.monotonic()
  state["generator"], metrics = epochs.train_generator(
    setup, stage.generator_steps, state["generator"], state["network"].variables, epoch=epoch
  )
  before, renewed = jax.device_get(state["masks"]), epochs.masks_in_force(setup, state["generator"], epoch=epoch)
  state["masks"] = replicate(renewed, setup.mesh)
  record = {"generator_seconds": time.monotonic() - clock, **_prefixed("generator", metrics)}
  if epoch > setup.config.prune.start_epoch:  # the first masks have no predecessor
    record["hamming_distance"] = epochs.hamming_distance(before, renewed)
  return record


def _measure_subnetwork(setup: Setup, stage: Stage, state: State) -> dict[str, Any]:
  """Evaluates the network with the dropped channels masked; says what it costs and how well it is aligned."""
  graph, network, masks = setup.graph, state["network"], jax.device_get(state["masks"])
  masked = {**network.variables, "params": setup.masked(network.params, state["masks"])}
  return {
    **_prefixed("subnetwork", epochs.evaluate(setup, stage.evaluation, masked)),
    "cost": "prunable_macs",
    "cost_share": graph.prunable_macs(masks) / graph.prunable_macs(),
    "macs_share_of_network": graph.macs(masks) / graph.macs(),
    **epochs.norm_summary(setup, network.params, masks),
    "widths": {name: int(mask.sum()) for name, mask in masks.items()},
  }


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
  return {f"{prefix}_{name}": value for name, value in metrics.items()}
