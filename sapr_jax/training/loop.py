"""The one training loop. Pruning and fine-tuning are two stages of it."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import flax.linen as nn
import jax
import optax

from sapr_jax import artifacts, report
from sapr_jax.channels import mask_params
from sapr_jax.errors import InputError
from sapr_jax.training import epochs, steps
from sapr_jax.training.devices import MappedSteps, replicate
from sapr_jax.training.progress import Progress
from sapr_jax.training.setup import FINETUNE, TRAIN, Setup
from sapr_jax.training.state import network_state

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
    setup.preprocessing,
    graph=setup.graph,
    penalty=config.prune.gamma if config.prune.form == "penalty" else 0.0,
    weighting=config.prune.weighting,
  )
  generator_step = steps.generator_step(
    setup.model,
    setup.generator,
    setup.graph,
    setup.generator_tx,
    setup.preprocessing,
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
    weight_steps=setup.mapped(steps.weight_step(model, tx, setup.preprocessing)),
    evaluation=setup.mapped(steps.evaluation_step(model, setup.preprocessing)),
  )


def train(setup: Setup, stage: Stage, checkpointer: artifacts.Checkpointer, recorder: artifacts.Recorder) -> State:
  """Runs the epochs of a stage that no checkpoint holds yet; returns its last state."""
  phase = stage.phase
  state, first = checkpointer.restore_latest(stage.state)
  schedule = setup.weight_schedule(phase)
  steps_per_epoch = setup.num_train // phase.batch_size
  progress = Progress(stage.name, phase.epochs, steps_per_epoch, first)
  if first:
    progress.line(f"{stage.name}: going on after epoch {first}/{phase.epochs}")
  for epoch in range(first, phase.epochs):
    record: dict[str, Any] = {"stage": stage.name, "epoch": epoch + 1, "step": stage.epochs_before + epoch + 1}
    record["learning_rate"] = float(schedule(epoch * steps_per_epoch))
    searching = stage.generator_steps is not None and epoch >= setup.config.prune.start_epoch

    if searching:
      record |= _renew_masks(setup, stage, state, epoch)
    clock = time.monotonic()
    state["network"], metrics = epochs.train_weights(
      setup,
      stage.weight_steps,
      state["network"],
      phase=phase,
      stream=stage.stream,
      epoch=epoch,
      masks=state.get("masks"),
      advance=progress.advance,
    )
    record |= {"weight_seconds": time.monotonic() - clock, **_prefixed("train", metrics)}
    _check_finite(record, stage)

    clock = time.monotonic()
    record |= _prefixed("test", epochs.evaluate(setup, stage.evaluation, state["network"].variables))
    if searching:
      record |= _measure_subnetwork(setup, stage, state)
    record["evaluation_seconds"] = time.monotonic() - clock

    recorder.write(record)
    progress.line(report.format_epoch(record, phase.epochs))
    if (epoch + 1) % setup.config.checkpoint.every_epochs == 0 or epoch + 1 == phase.epochs:
      checkpointer.save(epoch + 1, state)
  progress.close()
  return state


def _check_finite(record: dict[str, Any], stage: Stage) -> None:
  for name in ("train_loss", "generator_loss"):
    if not math.isfinite(record.get(name, 0.0)):
      raise InputError(
        f"{name} is {record[name]} in epoch {record['epoch']} of {stage.name}, at learning rate"
        f" {record['learning_rate']:g}: training diverged. The checkpoint of the epoch before is kept; start anew with"
        " a lower learning rate."
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
