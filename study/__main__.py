"""Does the method do what the paper says, and is it better than the alternatives? The CIFAR-10 study.

    python -m study --size full --data DIR --runs DIR --page      the paper's schedules, for a GPU
    python -m study --size reduced --data DIR --runs DIR --page   ResNet-20, few images: for a CPU
    python -m study --size quarter --data DIR --runs DIR --page   that, down to a quarter of the MACs
    python -m study --size decayed --data DIR --runs DIR --page   quarter, with more weight decay
    python -m study --size fifth --data DIR --runs DIR --page     a quarter, a fifth of all epochs

`DIR` of `--data` holds images as `train/<class>/*` and `test/<class>/*`; without `--data` the original CIFAR-10 comes
from tensorflow-datasets. Every row of the grid (`--list`) and every seed is a run with a work directory of its own
under `--runs`, the most informative first. The same command goes on where it was stopped: finished runs are skipped,
and one that was stopped or killed goes on at its last checkpoint. `--minutes N` stops after so long, which fits a
lease. Several processes may work on the same `--runs` at once: each takes what no other has. On a CPU, one process a
core (`taskset -c 0 python -m ...`, `taskset -c 1 ...`) does more than one process on all.

What is finished is in `results/cifar10_study_<size>.json`; `--page` makes `docs/results.md` of it. `--results DIR`
takes another folder for both: runs on other images are not mixed with those that are there. PyTorch and Torch-Pruning
(`pip install -e '.[bench]'`) run two of the alternatives; without them those rows are left out.

`--set name=value ...` changes fields of all configurations, to try things out, save those in which a row differs from
the others; the results then go to `--runs`, unless `--results` says where. Exit status: 0, all that was asked for is
done; 75, the time is over or a signal came: the same command goes on; 3, other processes have what is left; 2, bad
input, or a run that cannot be done: the others are done first.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import importlib
import importlib.util
import logging
import pathlib
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sapr_jax import training
from sapr_jax.errors import InputError, InterruptedRunError, one_line
from sapr_jax.training.checks import check_config
from sapr_jax.training.interruption import Interruption
from sapr_jax.training.progress import say
from study import page as study_page
from study.records import (
  check_folder,
  describe_data,
  head_of,
  is_finished,
  key_of,
  recorded,
  update,
  write_entry,
)
from study.rows import SIZES, Job, Row, chosen, grid, job_of, workdir_of

_LONGEST = 1_000_000
"""Minutes; a timer takes no more than some decades."""
_BENCH_PACKAGES = ("torch", "torch_pruning")


def main() -> int:
  """Runs the command; returns the exit status."""
  args = _parser().parse_args()
  logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it writes
  try:
    return _study(args)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except InterruptedRunError as error:
    print(error, file=sys.stderr)
    return 75


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", choices=SIZES, required=True, help="which networks and schedules")
  parser.add_argument("--data", help="folder of images; unset: CIFAR-10 from tensorflow-datasets")
  parser.add_argument("--runs", type=pathlib.Path, help="folder for the work directories")
  parser.add_argument("--results", type=pathlib.Path, help="folder for the results file; unset: results/")
  parser.add_argument("--rows", nargs="+", default=[], metavar="GLOB", help="only rows of such names; see --list")
  parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
  parser.add_argument("--minutes", type=float, help="stop after so many minutes")
  parser.add_argument("--skip-recorded", action="store_true", help="leave out what the results file has, wherever run")
  parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change fields of all configurations")
  parser.add_argument("--list", action="store_true", help="show the runs and which are finished, and do nothing")
  parser.add_argument("--page", action="store_true", help="write docs/results.md at the end")
  return parser


def _study(args: argparse.Namespace) -> int:
  """Does what the arguments say."""
  experiments, settings = SIZES[args.size], parse_settings(args.set)
  work = chosen(grid(experiments), args.rows, args.seeds)
  if args.list:
    _show(work, args.runs and args.runs / args.size)
    return 0
  if args.runs is None:
    raise InputError("--runs is missing; name a folder for the work directories.")
  _make_folder(args.runs)
  jobs = [job_of(row, seed, args.runs / args.size, args.data, settings) for row, seed in work]
  results = args.results or (args.runs if settings else study_page.RESULTS)
  file = results / f"cifar10_study_{args.size}.json"
  head = head_of(args.size, experiments, settings, describe_data(args.data))
  if args.page and importlib.util.find_spec("matplotlib") is None:
    raise InputError("--page draws figures, and matplotlib is missing; pip install -e '.[report]'.")
  for job in jobs:
    check_config(job.config)
  known = {key_of(entry) for entry in recorded(file, head)}
  check_folder(args.runs / args.size, head)
  if args.skip_recorded:
    jobs = without_recorded(jobs, known)
  training.keep_memory()
  training.use_compilation_cache()
  try:
    with Interruption() as interruption, _time_limit(args.minutes):
      left, failed = run_all(jobs, interruption, lambda: update(file, head, args.runs / args.size))
  finally:
    update(file, head, args.runs / args.size)
    if args.page:
      page = study_page.PAGE if results == study_page.RESULTS else results / "results.md"
      study_page.renew(results, page)
      say(f"{page} is written from {file}.")
  for job in left:
    if waits_for_nobody(job):
      failed.append(job)
      why = f"it starts from {job.row.source}, which is not finished and no process works on; run that row too"
    else:
      why = "another process has it, or what it starts from"
    print(f"not done: {job}: {why}", file=sys.stderr)
  return 2 if failed else 3 if left else 0


def waits_for_nobody(job: Job) -> bool:
  """Says whether a run starts from one that is not finished and that no process works on."""
  if job.source is None or is_finished(job.source):
    return False
  with _lock(job.source) as free:
    return free


def without_recorded(jobs: Sequence[Job], known: Collection[tuple[str, str, int]]) -> list[Job]:
  """Leaves out the runs that are recorded, but for those that one of the others starts from.

  Args:
    jobs: What was asked for.
    known: What `study_records.key_of` returns of each recorded run.
  """
  unknown = [job for job in jobs if (job.row.experiment.network, job.row.name, job.seed) not in known]
  needed = {job.workdir for job in unknown} | {job.source for job in unknown}
  return [job for job in jobs if job.workdir in needed]


def _make_folder(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"--runs {folder}: {one_line(error)}; name a folder that can be written.") from error


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
  """Parses `name=value`; values are Python literals, anything else is text.

  Raises:
    InputError: If a text has no "=".

  Example:
    >>> parse_settings(["train.epochs=3", "train.decay_epochs=(2,)", "model.name=resnet8"])
    {'train.epochs': 3, 'train.decay_epochs': (2,), 'model.name': 'resnet8'}
  """
  settings = {}
  for text in texts:
    name, equals, value = text.partition("=")
    if not equals:
      raise InputError(f"--set {text!r} is no NAME=VALUE, such as train.epochs=3.")
    try:
      settings[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      settings[name] = value
  return settings


def _show(work: Sequence[tuple[Row, int]], folder: pathlib.Path | None) -> None:
  for row, seed in work:
    done = folder is not None and is_finished(workdir_of(row, seed, folder))
    print(f"{'finished' if done else 'to do':9} {row.path}, seed {seed}")


def run_all(jobs: Sequence[Job], interruption: Interruption, after: Any) -> tuple[list[Job], list[Job]]:
  """Runs the jobs in order, passing over finished ones, and those that have to wait as long as others can be run.

  One that cannot be run is reported on standard error, and the others go on, unless two cannot for the same reason.

  Args:
    jobs: What to run.
    interruption: Asked between two runs; a run asks by itself.
    after: Called after each run.

  Returns:
    The jobs that other processes have, or that start from a run which is not finished; and those that cannot be run.

  Raises:
    InputError: If two jobs cannot be run for the same reason.
    InterruptedRunError: If it was asked to stop.
  """
  failed: dict[str, Job] = {}  # by the reason
  left = _without_missing_packages([job for job in jobs if not is_finished(job.workdir)])
  progress = True
  while left and progress:
    progress, waiting = False, []
    for job in left:
      if interruption.requested():
        interruption.stop()
      try:
        ran = _run(job)
      except InputError as error:
        if str(error) in failed:
          raise
        print(f"error: {job}: {error}", file=sys.stderr)
        failed[str(error)] = job
        continue
      if ran:
        progress = True
        after()
      elif not is_finished(job.workdir):
        waiting.append(job)
    left = waiting
  return left, list(failed.values())


def _without_missing_packages(jobs: Sequence[Job]) -> list[Job]:
  """Leaves out the jobs in PyTorch if it is not installed, and says so."""
  missing = [package for package in _BENCH_PACKAGES if importlib.util.find_spec(package) is None]
  ours = [job for job in jobs if job.row.kind != "torch"]
  if missing and len(ours) < len(jobs):
    print(
      f"{len(jobs) - len(ours)} runs left out: {' and '.join(missing)} missing; pip install -e '.[bench]'",
      file=sys.stderr,
    )
    return ours
  return list(jobs)


def _run(job: Job) -> bool:
  """Runs a job, unless it is finished, has to wait, or another process has it; says whether it ran."""
  if job.source is not None and not is_finished(job.source):
    return False
  with _lock(job.workdir) as mine:
    if not mine or is_finished(job.workdir):
      return False
    say(f"\n== {job}")
    started = time.monotonic()
    if job.row.kind == "torch":
      importlib.import_module("study.torch_runs").run_pruner(job)  # imports an extra
    else:
      importlib.import_module("study.ours").KINDS[job.row.kind](job)  # imports slowly
    write_entry(job)
    say(f"== {job}: done in {time.monotonic() - started:.0f} s")
  return True


@contextlib.contextmanager
def _lock(workdir: pathlib.Path) -> Iterator[bool]:
  """Keeps other processes from a run until the end of the block; yields whether no other has it.

  The file lies beside the work directory, which a run wants empty.
  """
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with (workdir.parent / f".{workdir.name}.lock").open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      yield False
    else:
      yield True


@contextlib.contextmanager
def _time_limit(minutes: float | None) -> Iterator[None]:
  """After so many minutes the process gets SIGTERM, at which a run saves and stops.

  It gets one every few seconds from then on: a run that is just being built does not see the first.
  """
  if minutes is None:
    yield
    return
  if not 0 < minutes < _LONGEST:
    raise InputError(f"--minutes {minutes:g} is out of range; expected a number above 0, below {_LONGEST:,}.")
  previous = signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGTERM))
  signal.setitimer(signal.ITIMER_REAL, 60 * minutes, 5)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


if __name__ == "__main__":
  sys.exit(main())
