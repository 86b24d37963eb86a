"""One run: train with partial regularization, prune, fine-tune, report. The same call resumes it where it was."""

from __future__ import annotations

import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

from sapr_jax import artifacts, report
from sapr_jax.artifacts.files import write_atomically, write_json
from sapr_jax.channels import count_macs, prune
from sapr_jax.training import epochs, loop, steps
from sapr_jax.training import workdir as layout
from sapr_jax.training.checks import check_config
from sapr_jax.training.devices import replicate
from sapr_jax.training.position import Position
from sapr_jax.training.setup import Setup, build


def run(config: Any, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Runs the experiment of `config` in `workdir`, from its beginning or from where an earlier call was stopped.

  Leaves there `records.jsonl` and `tensorboard/` (every epoch), `dense/` and `pruned/` (models, for `sapr_jax.load`),
  `summary.json` and `report.txt`.

  Args:
    config: A configuration with the fields of `configs/default.py`.
    workdir: Work directory, made if it is not there.

  Returns:
    The summary: accuracy, MACs, parameters and latency of the dense network, the sub-network before fine-tuning and the
    pruned network after it, all at the last epoch.

  Raises:
    InputError: If the configuration, the data or the work directory cannot be used.
  """
  check_config(config)
  path = pathlib.Path(workdir)
  layout.check_workdir(path, config)
  if (finished := layout.read_summary(path)) is not None:
    print(f"{path} holds a finished run.\n\n{report.format_summary(finished)}")
    return finished
  started = time.monotonic()
  setup = build(config)  # what is wrong with the data shows before anything is written
  layout.make_workdir(path, config)
  print(_describe(setup), flush=True)
  train_checkpoints = artifacts.Checkpointer(path / "checkpoints" / "train", config.checkpoint.keep)
  epochs_done = Position.read(train_checkpoints, setup.steps_per_epoch(config.train)).epoch
  if epochs_done < config.train.epochs:
    # Fine-tuning of a network that is not there yet: its training was lost.
    shutil.rmtree(path / "checkpoints" / "finetune", ignore_errors=True)
  finetune_checkpoints = artifacts.Checkpointer(path / "checkpoints" / "finetune", config.checkpoint.keep)
  epochs_done += Position.read(finetune_checkpoints, setup.steps_per_epoch(config.finetune)).epoch
  recorder = artifacts.Recorder(path, keep=epochs_done)
  try:
    state = loop.train(setup, loop.pruning_stage(setup), train_checkpoints, recorder)
    variables, masks = jax.device_get((state["network"].variables, state["masks"]))
    small_model, small_variables = prune(setup.model, variables, setup.graph, masks)
    stage = loop.finetuning_stage(setup, small_model, small_variables)
    tuned = loop.train(setup, stage, finetune_checkpoints, recorder)["network"]
  finally:
    train_checkpoints.close()
    finetune_checkpoints.close()
    recorder.close()

  tuned_variables = jax.device_get(tuned.variables)
  artifacts.save(path / layout.DENSE, setup.model, variables)
  artifacts.save(path / layout.PRUNED, small_model, tuned_variables)
  summary = _summarize(setup, masks, variables, small_model, small_variables, tuned_variables)
  summary["run"] = {
    "model": config.model.name,
    "seed": config.seed,
    "gamma": config.prune.gamma,
    "widths": {name: int(mask.sum()) for name, mask in masks.items()},
    "seconds": round(time.monotonic() - started, 1),  # since the run was last resumed
    "versions": report.versions(),
    "device": jax.devices()[0].device_kind,
  }
  text = report.format_summary(summary)
  write_atomically(path / layout.REPORT, text + "\n")
  write_json(path / layout.SUMMARY, summary)
  print(f"\n{text}\n\nThe pruned model is in {path / layout.PRUNED}; sapr_jax.load reads it.")
  return summary


def _summarize(
  setup: Setup, masks: Any, variables: Any, small_model: Any, small_variables: Any, tuned_variables: Any
) -> dict[str, Any]:
  """Measures the dense network, and the compact model that the sub-network has become, before and after fine-tuning."""
  small_macs = count_macs(small_model, small_variables, setup.input_shape)
  if small_macs != setup.graph.macs(masks):  # an invariant of the graph, cheap to check on every run
    raise RuntimeError(f"The pruned network has {small_macs} MACs; its masks predict {setup.graph.macs(masks)}.")
  settings = setup.config.report
  latency = report.measure_latency(
    {"dense": (setup.model, variables), "pruned": (small_model, tuned_variables)},
    setup.input_shape,
    settings.latency_batch_sizes,
    repeats=settings.latency_repeats,
  )
  evaluation = setup.mapped(steps.evaluation_step(small_model, setup.feed.preprocessing))
  compact = {
    "macs": small_macs,
    "params": artifacts.count_params(small_variables),
    "prunable_macs_share": setup.graph.prunable_macs(masks) / setup.graph.prunable_macs(),
    "latency_ms": latency["pruned"],
  }
  return {
    "dense": {
      "macs": setup.graph.macs(),
      "params": artifacts.count_params(variables),
      "latency_ms": latency["dense"],
      **epochs.evaluate(setup, setup.evaluation, replicate(variables, setup.mesh)),
    },
    "subnetwork": compact | epochs.evaluate(setup, evaluation, replicate(small_variables, setup.mesh)),
    "pruned": compact | epochs.evaluate(setup, evaluation, replicate(tuned_variables, setup.mesh)),
  }


def _describe(setup: Setup) -> str:
  """Says what is trained, what may be cut, and how strong the regularization is over the whole run."""
  config, graph = setup.config, setup.graph
  per_epoch = setup.steps_per_epoch(config.train)
  regularized = range(config.prune.start_epoch * per_epoch, config.train.epochs * per_epoch)
  rate = float(np.sum(jax.vmap(setup.weight_schedule(config.train))(np.asarray(regularized))))
  mean_weight = 1.0 if config.prune.weighting == "relative" else 1.0 / len(graph.groups)
  shrinkage = rate / (1.0 - config.train.momentum) * config.prune.gamma * mean_weight
  images = f"{setup.feed.num_train} training and {setup.feed.num_test} test images"
  return (
    f"{config.model.name} on {images}, {setup.mesh.devices.size} device(s): {jax.devices()[0].device_kind}\n"
    f"{len(graph.groups)} channel groups, {graph.macs():,} MACs, {graph.prunable_macs():,} of them in layers that touch"
    f" a group; {config.prune.p:.0%} of these are kept\n"
    f"the regularization can take up to {shrinkage:.3g} (mean over groups) off the norm of a dropped channel"
  )
