"""One run: train with partial regularization, prune, fine-tune, report. The same call resumes it where it was."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from sapr_jax import artifacts, report
from sapr_jax.artifacts.files import write_atomically, write_json
from sapr_jax.channels import count_macs, mask_params, prune
from sapr_jax.training import epochs, steps
from sapr_jax.training import workdir as layout
from sapr_jax.training.checks import check_config
from sapr_jax.training.devices import MappedSteps, replicate
from sapr_jax.training.progress import Progress
from sapr_jax.training.setup import FINETUNE, TRAIN, Setup, build
from sapr_jax.training.state import NetworkState, network_state


def run(config: Any, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Runs the experiment of `config` in `workdir`, from its beginning or from where an earlier call was stopped.

  Leaves there `records.jsonl` and `tensorboard/` (every epoch), `dense/` and `pruned/` (models, for `sapr_jax.load`),
  `summary.json` and `report.txt`.

  Args:
    config: A configuration with the fields of `configs/default.py`.
    workdir: Work directory, made if it is not there.

  Returns:
    The summary: accuracy, MACs, parameters and latency of the dense network, the sub-network before fine-tuning and the
    pruned network after it.

  Raises:
    InputError: If the configuration, the data or the work directory cannot be used.
  """
  check_config(config)
  path = layout.open_workdir(pathlib.Path(workdir), config)
  if (path / layout.SUMMARY).is_file():
    summary = json.loads((path / layout.SUMMARY).read_text())
    print(f"{path} holds a finished run.\n\n{report.format_summary(summary)}")
    return summary
  started = time.monotonic()
  setup = build(config)
  print(_describe(setup), flush=True)

  keep = config.checkpoint.keep
  train_checkpoints = artifacts.Checkpointer(path / "checkpoints" / "train", keep)
  finetune_checkpoints = artifacts.Checkpointer(path / "checkpoints" / "finetune", keep)
  done = (train_checkpoints.latest_epoch or 0) + (finetune_checkpoints.latest_epoch or 0)
  recorder = artifacts.Recorder(path, keep=done)
  try:
    network, masks = _train(setup, train_checkpoints, recorder)
    variables = jax.device_get(network.variables)
    masks = jax.device_get(masks)
    small_model, small_variables = prune(setup.model, variables, setup.graph, masks)
    summary = _measure(setup, variables, masks, small_model, small_variables)
    tuned = _finetune(setup, small_model, small_variables, finetune_checkpoints, recorder)
  finally:
    train_checkpoints.close()
    finetune_checkpoints.close()
    recorder.close()

  tuned_variables = jax.device_get(tuned.variables)
  artifacts.save(path / layout.DENSE, setup.model, variables)
  artifacts.save(path / layout.PRUNED, small_model, tuned_variables)
  evaluation = setup.mapped(steps.evaluation_step(small_model, setup.preprocessing))
  summary["pruned"] = {
    **summary["subnetwork"],
    **epochs.evaluate(setup, evaluation, replicate(tuned_variables, setup.mesh)),
  }
  _add_latency(setup, summary, variables, small_model, tuned_variables)
  summary["run"] = {
    "config": str(path / layout.CONFIG),
    "seed": config.seed,
    "widths": {name: int(mask.sum()) for name, mask in masks.items()},
    "seconds": round(time.monotonic() - started, 1),
    "versions": report.versions(),
    "device": jax.devices()[0].device_kind,
  }
  text = report.format_summary(summary)
  write_atomically(path / "report.txt", text + "\n")
  write_json(path / layout.SUMMARY, summary)
  print(f"\n{text}\n\nThe pruned model is in {path / layout.PRUNED}; sapr_jax.load reads it.")
  return summary


def _train(setup: Setup, checkpoints: artifacts.Checkpointer, recorder: artifacts.Recorder) -> tuple[NetworkState, Any]:
  """Trains the dense network; from E_start on, the generator renews the masks before each epoch of the weights."""
  config, graph = setup.config, setup.graph
  phase = config.train
  weight_steps = setup.mapped(
    steps.weight_step(
      setup.model,
      setup.train_tx,
      setup.preprocessing,
      graph=graph,
      penalty=config.prune.gamma if config.prune.form == "penalty" else 0.0,
      weighting=config.prune.weighting,
    )
  )
  generator_steps = _generator_steps(setup)
  schedule = setup.weight_schedule(phase)

  state = {
    "network": setup.initial_network(),
    "generator": setup.initial_generator(),
    "masks": replicate(graph.full_masks(), setup.mesh),
  }
  state, first = checkpoints.restore_latest(state)
  network, generator, masks = state["network"], state["generator"], state["masks"]
  steps_per_epoch = setup.num_train // phase.batch_size
  progress = Progress("train", phase.epochs, steps_per_epoch, first)

  for epoch in range(first, phase.epochs):
    record: dict[str, Any] = {"stage": "train", "epoch": epoch + 1, "step": epoch + 1}
    record["learning_rate"] = float(schedule(epoch * steps_per_epoch))

    if epoch >= config.prune.start_epoch:
      clock = time.monotonic()
      generator, metrics = epochs.train_generator(setup, generator_steps, generator, network.variables, epoch=epoch)
      renewed = epochs.masks_in_force(setup, generator)
      record["generator_seconds"] = time.monotonic() - clock
      record |= {f"generator_{name}": value for name, value in metrics.items()}
      if epoch > config.prune.start_epoch:
        record["hamming_distance"] = epochs.hamming_distance(jax.device_get(masks), renewed)
      masks = replicate(renewed, setup.mesh)

    clock = time.monotonic()
    network, metrics = epochs.train_weights(
      setup, weight_steps, network, phase=phase, stream=TRAIN, epoch=epoch, masks=masks, advance=progress.advance
    )
    record["weight_seconds"] = time.monotonic() - clock
    record |= {f"train_{name}": value for name, value in metrics.items()}

    clock = time.monotonic()
    full = epochs.evaluate(setup, setup.evaluation, network.variables)
    record |= {"test_accuracy": full["accuracy"], "test_loss": full["loss"]}
    if epoch >= config.prune.start_epoch:
      sub = epochs.evaluate(setup, setup.evaluation, _masked(setup, network, masks))
      host_masks = jax.device_get(masks)
      record |= {
        "subnetwork_accuracy": sub["accuracy"],
        "subnetwork_loss": sub["loss"],
        "macs_share": graph.prunable_macs(host_masks) / graph.prunable_macs(),
        "macs_share_of_network": graph.macs(host_masks) / graph.macs(),
        **epochs.norm_summary(setup, network.params, host_masks),
        "widths": {name: int(mask.sum()) for name, mask in host_masks.items()},
      }
    record["evaluation_seconds"] = time.monotonic() - clock

    recorder.write(record)
    progress.line(report.format_epoch(record, phase.epochs))
    if (epoch + 1) % config.checkpoint.every_epochs == 0 or epoch + 1 == phase.epochs:
      checkpoints.save(epoch + 1, {"network": network, "generator": generator, "masks": masks})
  progress.close()
  return network, masks


def _generator_steps(setup: Setup) -> MappedSteps:
  generator = setup.config.generator
  return setup.mapped(
    steps.generator_step(
      setup.model,
      setup.generator,
      setup.graph,
      setup.generator_tx,
      setup.preprocessing,
      p=setup.config.prune.p,
      macs_weight=generator.macs_weight,
      bias=generator.bias,
      temperature=generator.temperature,
    )
  )


def _masked(setup: Setup, network: NetworkState, masks: Any) -> dict[str, Any]:
  return {**network.variables, "params": mask_params(network.params, setup.graph, masks)}


def _finetune(
  setup: Setup, model: Any, variables: Any, checkpoints: artifacts.Checkpointer, recorder: artifacts.Recorder
) -> NetworkState:
  """Trains the pruned network, as an ordinary one."""
  phase = setup.config.finetune
  tx = setup.finetune_tx
  weight_steps = setup.mapped(steps.weight_step(model, tx, setup.preprocessing))
  evaluation = setup.mapped(steps.evaluation_step(model, setup.preprocessing))
  schedule = setup.weight_schedule(phase)
  state = {"network": replicate(network_state(variables, tx), setup.mesh)}
  state, first = checkpoints.restore_latest(state)
  network = state["network"]
  steps_per_epoch = setup.num_train // phase.batch_size
  progress = Progress("finetune", phase.epochs, steps_per_epoch, first)
  for epoch in range(first, phase.epochs):
    record: dict[str, Any] = {"stage": "finetune", "epoch": epoch + 1, "step": setup.config.train.epochs + epoch + 1}
    record["learning_rate"] = float(schedule(epoch * steps_per_epoch))
    clock = time.monotonic()
    network, metrics = epochs.train_weights(
      setup, weight_steps, network, phase=phase, stream=FINETUNE, epoch=epoch, advance=progress.advance
    )
    record["weight_seconds"] = time.monotonic() - clock
    record |= {f"train_{name}": value for name, value in metrics.items()}
    clock = time.monotonic()
    result = epochs.evaluate(setup, evaluation, network.variables)
    record |= {"test_accuracy": result["accuracy"], "test_loss": result["loss"]}
    record["evaluation_seconds"] = time.monotonic() - clock
    recorder.write(record)
    progress.line(report.format_epoch(record, phase.epochs))
    if (epoch + 1) % setup.config.checkpoint.every_epochs == 0 or epoch + 1 == phase.epochs:
      checkpoints.save(epoch + 1, {"network": network})
  progress.close()
  return network


def _measure(setup: Setup, variables: Any, masks: Any, small_model: Any, small_variables: Any) -> dict[str, Any]:
  """Measures the dense network, and the sub-network as the compact model it has become."""
  evaluation = setup.mapped(steps.evaluation_step(small_model, setup.preprocessing))
  small_macs = count_macs(small_model, small_variables, setup.input_shape)
  if small_macs != setup.graph.macs(masks):  # an invariant of the graph, cheap to check on every run
    raise RuntimeError(f"The pruned network has {small_macs} MACs; its masks predict {setup.graph.macs(masks)}.")
  return {
    "dense": {
      "macs": setup.graph.macs(),
      "params": artifacts.count_params(variables),
      **epochs.evaluate(setup, setup.evaluation, replicate(variables, setup.mesh)),
    },
    "subnetwork": {
      "macs": small_macs,
      "params": artifacts.count_params(small_variables),
      "prunable_macs_share": setup.graph.prunable_macs(masks) / setup.graph.prunable_macs(),
      **epochs.evaluate(setup, evaluation, replicate(small_variables, setup.mesh)),
    },
  }


def _add_latency(setup: Setup, summary: dict[str, Any], variables: Any, small_model: Any, small_variables: Any) -> None:
  """Measures dense and pruned in turn; the sub-network before fine-tuning has the shapes of the pruned one."""
  settings = setup.config.report
  networks = {"dense": (setup.model, variables), "pruned": (small_model, small_variables)}
  latency = report.measure_latency(
    networks, setup.input_shape, settings.latency_batch_sizes, repeats=settings.latency_repeats
  )
  summary["dense"]["latency_ms"] = latency["dense"]
  summary["pruned"]["latency_ms"] = summary["subnetwork"]["latency_ms"] = latency["pruned"]


def _describe(setup: Setup) -> str:
  config, graph = setup.config, setup.graph
  rate = np.sum([setup.weight_schedule(config.train)(step) for step in _regularized_steps(setup)])
  mean_weight = 1.0 if config.prune.weighting == "relative" else 1.0 / len(graph.groups)
  shrinkage = rate / (1.0 - config.train.momentum) * config.prune.gamma * mean_weight
  images = f"{setup.num_train} training and {len(setup.test.labels)} test images"
  return (
    f"{config.model.name} on {images}, {setup.mesh.devices.size} device(s): {jax.devices()[0].device_kind}\n"
    f"{len(graph.groups)} channel groups, {graph.macs():,} MACs, {graph.prunable_macs():,} of them in layers that touch"
    f" a group; {config.prune.p:.0%} of these are kept\n"
    f"the regularization can take up to {shrinkage:.3g} (mean over groups) off the norm of a dropped channel"
  )


def _regularized_steps(setup: Setup) -> range:
  per_epoch = setup.num_train // setup.config.train.batch_size
  return range(setup.config.prune.start_epoch * per_epoch, setup.config.train.epochs * per_epoch)
