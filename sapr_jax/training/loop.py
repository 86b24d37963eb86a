"""The one training loop. Pruning and fine-tuning are two stages of it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import flax.linen as nn
import jax
import optax

from sapr_jax import artifacts, report
from sapr_jax.channels import mask_params
from sapr_jax.training import epochs, steps
from sapr_jax.training.devices import MappedSteps, replicate
from sapr_jax.training.position import Position
from sapr_jax.training.progress import Progress
from sapr_jax.training.setup import FINETUNE, TRAIN, Setup
from sapr_jax.training.state import NetworkState, network_state

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
  """Trains the dense network with partial regularization; from E_start on, the generator renews the masks."""
  config = setup.config
  weight_step = steps.weight_step(
    setup.model,
    setup.train_tx,
    setup.feed.preprocessing,
    graph=setup.graph,
    penalty=config.prune.gamma if config.prune.form == "penalty" else 0.0,
    weighting=config.prune.weighting,
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
  return Stage(
    name="finetune",
    phase=setup.config.finetune,
    stream=FINETUNE,
    epochs_before=setup.config.train.epochs,
    state={"network": replicate(network_state(variables, tx), setup.mesh)},
    weight_steps=setup.mapped(steps.weight_step(model, tx, setup.feed.preprocessing)),
    evaluation=setup.mapped(steps.evaluation_step(model, setup.feed.preprocessing)),
  )


def train(setup: Setup, stage: Stage, checkpointer: artifacts.Checkpointer, recorder: artifacts.Recorder) -> State:
  """Runs what no checkpoint of a stage holds yet; returns its last state."""
  phase = stage.phase
  position = Position.read(checkpointer, setup.steps_per_epoch(phase))
  state = checkpointer.restore(stage.state)
  progress = Progress(stage.name, phase.epochs, position.steps_per_epoch, position.steps_done)
  if position.steps_done:
    in_epoch = f", step {position.step} of the next" if position.step else ""
    progress.line(f"{stage.name}: going on after epoch {position.epoch}/{phase.epochs}{in_epoch}")
  while position.epoch < phase.epochs:
    searching = stage.generator_steps is not None and position.epoch >= setup.config.prune.start_epoch
    if position.step == 0:
      position.record = _first_of_record(setup, stage, position)
      if searching:
        position.record |= _renew_masks(setup, stage, state, position.epoch)
    _train_weights(setup, stage, state, position, checkpointer, progress)
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
      checkpointer.save(position.steps_done, state, dataclasses.asdict(position))
  progress.close()
  return state


def _first_of_record(setup: Setup, stage: Stage, position: Position) -> dict[str, Any]:
  return {
    "stage": stage.name,
    "epoch": position.epoch + 1,
    "step": stage.epochs_before + position.epoch + 1,
    "learning_rate": float(setup.weight_schedule(stage.phase)(position.steps_done)),
    "weight_seconds": 0.0,
  }


def _train_weights(
  setup: Setup,
  stage: Stage,
  state: State,
  position: Position,
  checkpointer: artifacts.Checkpointer,
  progress: Progress,
) -> None:
  """Trains the weights to the end of the epoch, with a checkpoint every `checkpoint.every_steps` steps if asked for."""
  clock, before = time.monotonic(), position.record["weight_seconds"]
  every = setup.config.checkpoint.every_steps

  def after_call(network: NetworkState, steps_done: int) -> None:
    progress.advance(steps_done)
    position.record["weight_seconds"] = before + time.monotonic() - clock
    position.check_finite(stage.name)
    now = position.steps_done
    if every and now // every > (now - steps_done) // every and position.step < position.steps_per_epoch:
      checkpointer.save(now, state | {"network": network}, dataclasses.asdict(position))

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


def _renew_masks(setup: Setup, stage: Stage, state: State, epoch: int) -> dict[str, Any]:
  """Trains the generator with the weights fixed and puts the masks it now proposes in force."""
  assert stage.generator_steps is not None
  clock = time.monotonic()
  state["generator"], metrics = epochs.train_generator(
    setup, stage.generator_steps, state["generator"], state["network"].variables, epoch=epoch
  )
  before, renewed = jax.device_get(state["masks"]), epochs.masks_in_force(setup, state["generator"])
  state["masks"] = replicate(renewed, setup.mesh)
  record = {"generator_seconds": time.monotonic() - clock, **_prefixed("generator", metrics)}
  if epoch > setup.config.prune.start_epoch:  # the first masks have no predecessor
    record["hamming_distance"] = epochs.hamming_distance(before, renewed)
  return record


def _measure_subnetwork(setup: Setup, stage: Stage, state: State) -> dict[str, Any]:
  """Evaluates the network with the dropped channels masked; says what it costs and how well it is aligned."""
  graph, network, masks = setup.graph, state["network"], jax.device_get(state["masks"])
  masked = {**network.variables, "params": mask_params(network.params, graph, state["masks"])}
  return {
    **_prefixed("subnetwork", epochs.evaluate(setup, stage.evaluation, masked)),
    "macs_share": graph.prunable_macs(masks) / graph.prunable_macs(),
    "macs_share_of_network": graph.macs(masks) / graph.macs(),
    **epochs.norm_summary(setup, network.params, masks),
    "widths": {name: int(mask.sum()) for name, mask in masks.items()},
  }


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
  return {f"{prefix}_{name}": value for name, value in metrics.items()}
