"""One run: train with partial regularization, prune, fine-tune, report. The same call resumes it where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import pathlib
import shutil
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from sapr_jax import artifacts, report
from sapr_jax.artifacts.files import read_json, write_atomically, write_json
from sapr_jax.channels import count_macs, prune
from sapr_jax.errors import InputError
from sapr_jax.training import epochs, loop, processes, steps
from sapr_jax.training import workdir as layout
from sapr_jax.training.checks import check_config
from sapr_jax.training.devices import is_main_process, replicate
from sapr_jax.training.interruption import Interruption
from sapr_jax.training.position import Position
from sapr_jax.training.progress import say
from sapr_jax.training.setup import Setup, build

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


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
    InputError: If the configuration, the data or the work directory cannot be used, or training diverges.
    InterruptedRunError: If SIGTERM or SIGINT asked it to stop; its work is saved.
  """
  path = pathlib.Path(workdir)
  processes.together(lambda: check_config(config))
  processes.check_equal(**_settings(config, path))
  if (finished := processes.decided_by_main(lambda: _finished(path, config))) is not None:
    say(f"{path} holds a finished run.\n\n{report.format_summary(finished)}")
    return finished
  started = time.monotonic()
  # What is wrong with the data shows before anything is written.
  setup = processes.together(lambda: build(config))
  processes.check_equal(**setup.fingerprint())
  try:
    with contextlib.ExitStack() as stack:
      processes.together(lambda: stack.enter_context(layout.locked(path, config)))
      setup = _with_first_rounding(setup, path)
      interruption = stack.enter_context(Interruption())
      if is_main_process():
        groups = {group.name: group.size for group in setup.graph.groups}
        network = {"groups": groups, "macs": setup.graph.macs(), "round_to": setup.round_to}
        write_json(path / layout.NETWORK, network)
      say(_describe(setup))
      masks, variables, small_model, small_variables, tuned_variables = _train_and_prune(setup, path, interruption)
      summary = _summarize(setup, masks, variables, small_model, small_variables, tuned_variables)
      summary["run"] |= {"seconds": round(time.monotonic() - started, 1)}  # since the run was last resumed

      def write() -> None:
        if is_main_process():
          artifacts.save(path / layout.DENSE, setup.model, variables)
          artifacts.save(path / layout.PRUNED, small_model, tuned_variables)
          write_atomically(path / layout.REPORT, report.format_summary(summary) + "\n")
          write_json(path / layout.SUMMARY, summary)

      processes.together(write)
  except OSError as error:
    if error.errno not in _DISK_ERRORS:
      raise
    raise InputError(
      f"{error.filename or path} cannot be written ({error.strerror}); the checkpoints are whole: make room or mend the"
      " directory, and the same command resumes the run."
    ) from error
  say(f"\n{report.format_summary(summary)}\n")
  if (warning := report.chance_warning(summary, setup.feed.num_classes)) is not None:
    say(warning)
  say(f"The pruned model is in {path / layout.PRUNED}; sapr_jax.load reads it.")
  return summary


def _finished(path: pathlib.Path, config: Any) -> dict[str, Any] | None:
  """Checks the work directory; returns the summary of the finished run in it, if there is one."""
  layout.check_workdir(path, config)
  return layout.read_summary(path)


def _with_first_rounding(setup: Setup, path: pathlib.Path) -> Setup:
  """Lets a run that goes on keep what its widths are multiples of, where another machine would choose otherwise."""
  earlier = processes.decided_by_main(lambda: (read_json(path / layout.NETWORK) or {}).get("round_to"))
  return setup if earlier is None else dataclasses.replace(setup, round_to=earlier)


def _settings(config: Any, path: pathlib.Path) -> dict[str, Any]:
  """Returns what all processes must have been given alike; where the images lie may differ from machine to machine."""
  fields = layout.flat_fields(config)
  return {"workdir": str(path), **{k: v for k, v in fields.items() if k not in ("data.path", "data.workers")}}


def _train_and_prune(
  setup: Setup, path: pathlib.Path, interruption: Interruption
) -> tuple[dict[str, np.ndarray], Any, nn.Module, Any, Any]:
  """Runs the stages; returns masks, dense variables, small model, its variables before and after fine-tuning."""
  recorder = artifacts.Recorder(path)
  with contextlib.ExitStack() as stack:
    stack.callback(recorder.close)

    def run_stage(stage: loop.Stage, folder: str) -> loop.State:
      checkpointer = _checkpointer(setup, stage, path / "checkpoints" / folder)
      stack.push(lambda kind, error, traceback: _close(checkpointer, error))
      state, position = loop.restore(setup, stage, checkpointer)
      if folder == "train" and position.epoch < stage.phase.epochs:
        # Fine-tuning of a network that is not there yet: its training was lost.
        processes.decided_by_main(lambda: shutil.rmtree(path / "checkpoints" / "finetune", ignore_errors=True))
      return loop.train(setup, stage, state, position, checkpointer, recorder, interruption)

    state = run_stage(loop.pruning_stage(setup), "train")
    variables, masks = jax.device_get((state["network"].variables, state["masks"]))
    small_model, small_variables = prune(setup.model, variables, setup.graph, masks)
    small_variables = _with_new_statistics(setup, small_model, small_variables, interruption)
    tuned = run_stage(loop.finetuning_stage(setup, small_model, small_variables), "finetune")["network"]
  return masks, variables, small_model, small_variables, jax.device_get(tuned.variables)


def _with_new_statistics(setup: Setup, model: nn.Module, variables: Any, interruption: Interruption) -> Any:
  """Measures the running statistics of the compact network, if it has any and the configuration wants it."""
  batches = setup.config.prune.statistics_batches
  if not batches or "batch_stats" not in variables:
    return variables

  def stop_if_asked() -> None:
    if interruption.requested():
      interruption.stop()  # the last checkpoint of training is where the run goes on

  return epochs.renew_statistics(setup, model, variables, batches=batches, between_calls=stop_if_asked)


def _close(checkpointer: artifacts.Checkpointer, error: BaseException | None) -> None:
  """Waits until all checkpoints are written, unless a process that would have to write its part has gone."""
  if error is None or processes.lost_process(error) is None:
    checkpointer.close()


def _checkpointer(setup: Setup, stage: loop.Stage, directory: pathlib.Path) -> artifacts.Checkpointer:
  settings, period = setup.config.checkpoint, None
  if settings.keep_every_epochs is not None:
    period = Position(setup.steps_per_epoch(stage.phase), settings.keep_every_epochs).number
  return artifacts.Checkpointer(directory, settings.keep, period)


def _summarize(
  setup: Setup, masks: Any, variables: Any, small_model: Any, small_variables: Any, tuned_variables: Any
) -> dict[str, Any]:
  """Measures the dense network, and the compact model that the sub-network has become, before and after fine-tuning."""
  small_macs = count_macs(small_model, small_variables, setup.input_shape)
  if small_macs != setup.graph.macs(masks):  # an invariant of the graph, cheap to check on every run
    raise RuntimeError(f"The pruned network has {small_macs} MACs; its masks predict {setup.graph.macs(masks)}.")
  settings = setup.config.report
  latency = processes.decided_by_main(
    lambda: report.measure_latency(
      {"dense": (setup.model, variables), "pruned": (small_model, tuned_variables)},
      setup.input_shape,
      settings.latency_batch_sizes,
      repeats=settings.latency_repeats,
    )
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
    "run": {
      "model": setup.config.model.name,
      "seed": setup.config.seed,
      "gamma": setup.config.prune.gamma,
      "round_to": setup.round_to,
      "statistics_batches": setup.config.prune.statistics_batches,
      "widths": {name: int(mask.sum()) for name, mask in masks.items()},
      "versions": report.versions(),
      "device": jax.devices()[0].device_kind,
    },
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
    f" a group; {config.prune.p:.0%} of these are kept (widths: multiples of {setup.round_to})\n"
    f"the regularization can take up to {shrinkage:.3g} (mean over groups) off the norm of a dropped channel"
  )
