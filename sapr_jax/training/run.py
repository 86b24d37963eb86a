"""One run: train with partial regularization, prune, fine-tune, report. The same call resumes it where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import reprlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sapr_jax import artifacts, report
from sapr_jax.artifacts.files import free_name, read_json, write_atomically, write_json
from sapr_jax.channels import ChannelGraph, Masks, prune
from sapr_jax.errors import DivergedError, InputError, InterruptedRunError, one_line, os_errors_in_one_line
from sapr_jax.method import Budget, LatencyTable, Weighting, amount_in_words, relative_weights
from sapr_jax.runtime import Interruption, processes, say, use_compilation_cache
from sapr_jax.runtime.devices import is_main_process
from sapr_jax.training import loop, stages, workdir as layout
from sapr_jax.training.config import check_config
from sapr_jax.training.experiment import Experiment, build, make_proposer
from sapr_jax.training.latency import write_latency_table
from sapr_jax.training.passes import fit_to_cut, recalibrate_batch_norm
from sapr_jax.training.position import Position
from sapr_jax.training.proposers import Proposer
from sapr_jax.training.result import RunResult
from sapr_jax.training.state import TrainState
from sapr_jax.training.summary import Network, describe, summarize


def run(
  config: Any,
  workdir: str | os.PathLike[str],
  *,
  proposer: Callable[[Experiment], Proposer] = make_proposer,
  weighting: Weighting = relative_weights,
  interruption: Interruption | None = None,
  callbacks: Sequence[artifacts.Callback] = (),
  compilation_cache: bool = True,
) -> RunResult:
  """Runs the experiment of `config` in `workdir`, from its beginning or from where an earlier call was stopped.

  Leaves there `records.jsonl` and `tensorboard/` (every epoch), `dense/` and `pruned/` (models, for `sapr_jax.load`),
  `summary.json`, `report.txt`, and `report.html` where there was an epoch and the packages that draw it are installed.

      from sapr_jax.configs import digits

      result = sapr.run(digits.get_config(), "runs/digits", callbacks=[print])
      model, variables = result.pruned

  It may be called in a notebook, within a running event loop, and in another thread than the main one, where signals
  do not reach it.

  Args:
    config: A configuration with the fields of `configs/default.py`.
    workdir: Work directory, made if it does not exist.
    proposer: Makes the proposer that ranks the channels; by default the one that `config.prune.proposer` names.
    weighting: Weights of the groups in the regularization.
    interruption: Asks the run to stop; by default, SIGTERM and SIGINT do for as long as it lasts.
    callbacks: Called on the main process with the record of each epoch as it is made: `stage`, `epoch`, `step`,
      measurements. An error in one ends the run, with its work saved. A run that is resumed calls them with what
      follows; an epoch that is done again has its record again.
    compilation_cache: Keep compiled programs in the user's cache folder, unless JAX was told otherwise.

  Returns:
    The result: summary, records, networks and figures of the finished run.

  Raises:
    InputError: If the configuration, the data or the work directory cannot be used.
    DivergedError: If training diverges.
    InterruptedRunError: If it was asked to stop; its work is saved. After Ctrl-C, or the interrupt of a notebook, it is
      a `KeyboardInterrupt` too.
  """
  path = layout.path_of(workdir)
  if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
    raise InputError(f"callbacks must be a list of functions that take a record, got {reprlib.repr(callbacks)[:200]}.")
  with os_errors_in_one_line(path), contextlib.ExitStack() as stack:
    processes.together(lambda: check_config(config))
    if compilation_cache:
      use_compilation_cache()
    processes.check_equal(**_settings(config, path))
    if (finished := processes.decided_by_main(lambda: _finished(path, config))) is not None:
      say(f"{path} holds a finished run.\n\n{report.format_summary(finished)}\n")
      if is_main_process() and not (path / report.PAGE).exists():
        _write_page(path, config)
      _say_where(path)
      return RunResult(path, finished)
    started = time.monotonic()
    # Bad data shows before anything is written.
    experiment = processes.together(lambda: build(config, path))
    processes.check_equal(**experiment.fingerprint())
    processes.together(lambda: stack.enter_context(layout.locked(path, config)))
    functions = [getattr(function, "__qualname__", repr(type(function))) for function in (proposer, weighting)]
    layout.check_images(path, experiment.passes.feed.fingerprint, changed_ok=config.data.changed_ok)
    experiment = _as_it_began(experiment, path, functions)
    interruption = interruption or stack.enter_context(Interruption())
    _write_network(experiment, path, functions)
    processes.together(lambda: experiment.passes.feed.skipped.keep_in(path / layout.SKIPPED))
    say(describe(experiment))
    dashboards = processes.together(lambda: _open_dashboards(path, config, stack))
    recorder = stack.enter_context(contextlib.closing(artifacts.Recorder(path, [*callbacks, *dashboards])))

    dense_stage = stages.training_stage(experiment, proposer(experiment), weighting)
    state = run_stage(dense_stage, config, path / "checkpoints" / "train", recorder, interruption)
    if config.train.epochs == 0:  # the first weights are cut as they are
      assert dense_stage.renew_masks is not None
      state, _ = dense_stage.renew_masks(state, 0)
    variables, masks, teacher = jax.device_get((state.variables, state.masks, state.teacher))
    check_masks_meet(experiment.budget, experiment.graph, masks)

    fitted = fit_to_cut(
      experiment.passes,
      experiment.model,
      experiment.graph,
      variables,
      masks,
      batches=config.prune.compensation_batches,
      batch_size=config.train.batch_size,
    )
    small_model, small_variables = prune(experiment.model, fitted, experiment.graph, masks)
    small_variables = recalibrate_batch_norm(
      experiment.passes,
      small_model,
      small_variables,
      batches=config.prune.statistics_batches,
      batch_size=config.train.batch_size,
    )

    small_stage = stages.finetuning_stage(experiment, small_model, small_variables, teacher=teacher)
    state = run_stage(small_stage, config, path / "checkpoints" / "finetune", recorder, interruption)
    tuned_variables = jax.device_get(state.variables)

    dense, pruned = (experiment.model, variables), (small_model, tuned_variables)
    summary = summarize(experiment, masks, dense, (small_model, small_variables), pruned)
    summary["run"] |= {"seconds": round(time.monotonic() - started, 1)}  # since the run was last resumed
    processes.together(lambda: _write_results(path, experiment, dense, pruned, summary))
    if is_main_process():
      _write_page(path, config)
  say(f"\n{report.format_summary(summary)}\n")
  if (warning := report.chance_warning(summary, experiment.passes.feed.num_classes)) is not None:
    say(warning)
  _say_where(path)
  return RunResult(path, summary)


def _open_dashboards(path: pathlib.Path, config: Any, stack: contextlib.ExitStack) -> list[artifacts.Callback]:
  """Returns the callbacks that the configuration asks for, which `stack` closes."""
  project = config.report.wandb_project
  if project is None or not is_main_process():
    return []
  return [stack.enter_context(artifacts.weights_and_biases(path, project, layout.flat_fields(config)))]


def _write_page(path: pathlib.Path, config: Any) -> None:
  """Writes the page of a finished run, if it can be: what was computed is saved, and counts for more."""
  if not config.report.page or config.train.epochs + config.finetune.epochs == 0:  # it would have no curve
    return
  try:
    report.write_page(report.read_histories([path]), path)
  except Exception as error:
    print(f"note: {path / report.PAGE} is not written: {one_line(error, 300)}", file=sys.stderr)


def _say_where(path: pathlib.Path) -> None:
  """Names what a user looks at first."""
  if (path / report.PAGE).exists():
    say(f"The report, with figures:  {path / report.PAGE}")
  say(f"The pruned model:          {path / layout.PRUNED}  (sapr_jax.load reads it)")


def check_masks_meet(budget: Budget, graph: ChannelGraph, masks: Masks) -> None:
  """Checks that masks keep within a budget, as a proposer that proposes nothing leaves those that keep everything.

  Raises:
    InputError: If they do not.
  """
  if (cost := budget.cost(graph.kept(masks))) > budget.limit:
    raise InputError(
      f"the masks after training must cost at most {amount_in_words(budget.limit)} {budget.cost.name}, got"
      f" {amount_in_words(cost)}; the proposer must return scores before at least one epoch."
    )


def run_stage(
  stage: loop.Stage, config: Any, folder: pathlib.Path, recorder: artifacts.Recorder, interruption: Interruption
) -> TrainState:
  """Runs a stage from its newest whole checkpoint in `folder`, or from its beginning; returns its last state."""
  fields, period = config.checkpoint, None
  if fields.keep_every_epochs is not None:
    period = Position(stage.weights.steps_per_epoch, fields.keep_every_epochs).number
  with contextlib.ExitStack() as stack:
    checkpointer = artifacts.Checkpointer(folder, fields.keep, period)
    stack.push(lambda kind, error, traceback: _close(checkpointer, error))
    state, saved = checkpointer.restore(stage.first_state)
    position = Position.of_checkpoint(saved, stage.weights.steps_per_epoch)
    if stage.renew_masks is not None and position.epoch < stage.epochs:
      # Fine-tuning of a network that does not exist yet: the checkpoints of its training were lost.
      processes.decided_by_main(lambda: _set_aside(folder.parent / "finetune"))
    every = {"every_epochs": fields.every_epochs, "every_steps": fields.every_steps}
    state = loop.train(stage, state, position, checkpointer, recorder, interruption, **every)
  interruption.note_saved()
  return state


def _set_aside(folder: pathlib.Path) -> None:
  """Gives the checkpoints of a stage another name, as nothing that a run has computed is deleted."""
  if folder.is_dir() and any(folder.iterdir()):
    os.rename(folder, other := free_name(folder.with_name(f"{folder.name}_before"), first=1))
    print(f"warning: training is not done, so {folder} is of another network; it is now {other}", file=sys.stderr)


def _close(checkpointer: artifacts.Checkpointer, error: BaseException | None) -> None:
  """Waits until all checkpoints are written, unless this process ends alone: the others would not come to that."""
  if jax.process_count() == 1 or error is None or isinstance(error, DivergedError | InterruptedRunError):
    checkpointer.close()


def _settings(config: Any, path: pathlib.Path) -> dict[str, Any]:
  """Returns the settings that all processes must share; the place of the images may differ between machines."""
  fields = layout.flat_fields(config)
  return {"workdir": str(path), **{k: v for k, v in fields.items() if k not in ("data.path", "data.workers")}}


def _finished(path: pathlib.Path, config: Any) -> dict[str, Any] | None:
  """Checks the work directory; returns the summary of the finished run in it, if there is one."""
  layout.check_workdir(path, config)
  return layout.read_summary(path)


def _as_it_began(experiment: Experiment, path: pathlib.Path, functions: list[str]) -> Experiment:
  """Lets a run that goes on keep the `round_to` it began with, where another machine would choose otherwise.

  Raises:
    InputError: If it began with another proposer or weighting.
  """
  earlier = processes.decided_by_main(lambda: read_json(path / layout.NETWORK) or {})
  if (began := earlier.get("functions", functions)) != functions:
    raise InputError(
      f"{path} belongs to a run with the proposer and weighting {began}, got {functions}; give the same to resume it,"
      " or a new --workdir to start again."
    )
  return dataclasses.replace(experiment, round_to=earlier.get("round_to", experiment.round_to))


def _write_network(experiment: Experiment, path: pathlib.Path, functions: list[str]) -> None:
  if is_main_process():
    groups = {group.name: group.size for group in experiment.graph.groups}
    network = {"groups": groups, "macs": experiment.graph.macs(), "round_to": experiment.round_to}
    table = getattr(experiment.budget.cost, "table", None)
    if isinstance(table, LatencyTable) and not (path / layout.LATENCY).exists():
      write_latency_table(path / layout.LATENCY, table)
    network |= {"functions": functions}  # of the run, as far as names tell
    network |= {"images": experiment.passes.feed.fingerprint}
    write_json(path / layout.NETWORK, network)


def _write_results(
  path: pathlib.Path, experiment: Experiment, dense: Network, pruned: Network, summary: dict[str, Any]
) -> None:
  if is_main_process():
    feed = experiment.passes.feed
    measured_by = {"images": feed.num_test, "device": summary["run"]["device"], "versions": summary["run"]["versions"]}
    known: dict[str, Any] = {"inputs": feed.inputs, "config": _shared_fields(experiment.config)}
    artifacts.save(path / layout.DENSE, *dense, metrics=summary["dense"] | measured_by, **known)
    others = {name: summary[name] for name in ("dense", "subnetwork")}
    artifacts.save(path / layout.PRUNED, *pruned, metrics=summary["pruned"] | measured_by | others, **known)
    write_atomically(path / layout.REPORT, report.format_summary(summary) + "\n")
    write_json(path / layout.SUMMARY, summary)


def _shared_fields(config: Any) -> dict[str, Any]:
  """Returns the fields of a configuration for a model that may be given away: of whole paths only the last part."""
  fields = layout.flat_fields(config)
  paths = {
    name: fields[name] for name in ("data.path", "init.weights", "prune.latency_table") if fields[name] is not None
  }
  return fields | {name: pathlib.Path(path).name for name, path in paths.items() if os.path.isabs(path)}
