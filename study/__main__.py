"""Does the method do what the paper says, and is it better than the alternatives? The CIFAR-10 study.

    python -m study --size full --data DIR --runs DIR --page      the paper's schedules, for a GPU
    python -m study --size reduced --data DIR --runs DIR --page   ResNet-20, few images: for a CPU
    python -m study --size quarter --data DIR --runs DIR --page   as reduced, down to a quarter of the MACs
    python -m study --size decayed --data DIR --runs DIR --page   as quarter, with more weight decay
    python -m study --size fifth --data DIR --runs DIR --page     a quarter of the MACs, a fifth of all epochs
    python -m study --size pretrained --weights FILE --data DIR --runs DIR --page   others' ResNet-20, pruned
    python -m study --size pretrained_short ...                   the same in a quarter of the epochs
    python -m study --size mobilenetv2_short --data DIR --runs DIR --page   a MobileNet-V2 that is trained here first
    python -m study --size pretrained_choice ...                  what of `study/chosen.py` was chosen by
    python -m study --size pretrained_short_choice ...            the same for the quarter of the epochs

`DIR` of `--data` holds images as `train/<class>/*` and `test/<class>/*`; without `--data` the original CIFAR-10 comes
from tensorflow-datasets. Every row of the grid (`--list`) and every seed is a run with a work directory of its own
under `--runs`, the most informative first; a row that starts from the run of another one brings that along. The same
command goes on where it was stopped: finished runs are skipped, and one that was stopped or killed goes on at its last
checkpoint. `--minutes N` stops after so long. Several processes may work on the same `--runs` at once: each takes what
no other has. On a CPU, one process a core (`taskset -c 0 python -m ...`, `taskset -c 1 ...`) does more than one process
on all.

`results/cifar10_study_<size>.json` has what is finished; `--page` makes `docs/results.md` of it. `--results DIR`
takes another folder for both: runs on other images are not mixed with those that are there. PyTorch and Torch-Pruning
(`pip install -e '.[bench]'`) run two of the alternatives; without them those rows are left out.

`--set name=value ...` changes fields of all configurations, except those in which a row differs from the others, to try
things out; the results then go to `--runs`, unless `--results` names a folder. Exit status: 0, all that was asked for
is done; 75, the time is over or a signal came, and the same command goes on; 3, other processes have what is left; 2,
bad input, or a run that cannot be done: the others are done first.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sapr_jax.errors import DivergedError, InputError, InterruptedRunError, os_errors_in_one_line
from sapr_jax.runtime import keep_memory, say, use_compilation_cache
from sapr_jax.training import check_config
from study import page, records, work
from study.rows import ADAPTED, Job, chosen, grid, job_of
from study.sizes import SIZES
from study.variants import older_comparisons


def main() -> int:
  """Runs the command; returns the exit status."""
  args = _parser().parse_args()
  logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it writes
  try:
    with os_errors_in_one_line(args.runs or "results"):
      return _study(args)
  except (DivergedError, InputError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except InterruptedRunError as error:
    print(error, file=sys.stderr)
    return 75
  except KeyboardInterrupt:
    print("stopped; the same command goes on", file=sys.stderr)
    return 75


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    "python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", choices=SIZES, required=True, help="which networks and schedules")
  parser.add_argument("--data", help="folder of images; unset: CIFAR-10 from tensorflow-datasets")
  parser.add_argument("--weights", help="weights of a ResNet-20 in PyTorch, for the sizes pretrained*")
  parser.add_argument("--runs", type=pathlib.Path, help="folder for the work directories")
  parser.add_argument("--results", type=pathlib.Path, help="folder for the results file; unset: results/")
  parser.add_argument("--rows", nargs="+", default=[], metavar="GLOB", help="only rows of such names; see --list")
  parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
  parser.add_argument("--minutes", type=float, help="stop after so many minutes")
  parser.add_argument("--skip-recorded", action="store_true", help="leave out what the results file has, wherever run")
  parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change fields of all configurations")
  parser.add_argument(
    "--list", action="store_true", help="show the runs, which are finished and how long they take, and do nothing"
  )
  parser.add_argument("--page", action="store_true", help="write docs/results.md at the end")
  return parser


@older_comparisons()
def _study(args: argparse.Namespace) -> int:
  """Does what the arguments say."""
  experiments, settings = SIZES[args.size], parse_settings(args.set)
  rows = grid(experiments)
  wanted = chosen(rows, args.rows, args.seeds)
  if args.list:
    folder = (args.runs or pathlib.Path()) / args.size
    jobs = [job_of(*run, folder, args.data, settings, args.weights) for run in wanted]
    results = args.results or page.RESULTS
    _list(jobs, args.runs is not None, records.seconds_of(results / records.file_name(args.size)))
    return 0
  if args.runs is None:
    raise InputError("--runs is missing; name a folder for the work directories.")
  folder = args.runs / args.size
  results = args.results or (args.runs if settings else page.RESULTS)
  file = results / records.file_name(args.size)
  head = records.head_of(args.size, experiments, settings, records.describe_data(args.data))
  if args.page and importlib.util.find_spec("matplotlib") is None:
    raise InputError("--page draws figures, and matplotlib is missing; pip install -e '.[report]'.")
  known = {records.key_of(entry) for entry in records.recorded(file, head)}
  if args.skip_recorded:
    wanted = chosen(rows, args.rows, args.seeds, known)
  if args.weights is None and any(row.name == ADAPTED for row, _ in wanted):
    raise InputError("--weights is missing; name the weights from which the networks start, such as resnet20.th.")
  jobs = [job_of(row, seed, folder, args.data, settings, args.weights) for row, seed in wanted]
  for job in jobs:
    check_config(job.config)
  records.check_folder(folder, head)
  keep_memory()
  use_compilation_cache()
  try:
    with work.stoppable(args.minutes):
      left, failed = work.run_all(jobs, lambda: records.update(file, head, folder))
  finally:
    records.update(file, head, folder)
    if args.page:
      written = page.PAGE if results == page.RESULTS else results / "results.md"
      page.renew(results, written)
      say(f"{written} is written from {file}.")
  for job in left:
    failure = job.source in [other.workdir for other in failed]
    why = "what it starts from cannot be run" if failure else "another process has it, or what it starts from"
    print(f"not done: {job}: {why}", file=sys.stderr)
  return 2 if failed else 3 if left else 0


def _list(jobs: Sequence[Job], may_be_finished: bool, seconds: Mapping[tuple[str, str], float]) -> None:
  """Prints a line for each run, and how long those that are left take by what `results/` has."""
  left = []
  for job in jobs:
    finished = may_be_finished and records.is_finished(job.workdir)
    took = seconds.get((job.row.experiment.network, job.row.name))
    if not finished:
      left.append(took)
    print(f"{'finished' if finished else 'to do':9} {'' if took is None else f'{took:,.0f} s':>8}  {job}")
  known = [took for took in left if took is not None]
  print(
    f"{len(left)} to do: {sum(known) / 3600:.1f} hours for {len(known)} of them, {len(left) - len(known)} not recorded."
  )


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
      raise InputError(f"--set must be NAME=VALUE, got {text!r}; an example is train.epochs=3.")
    try:
      settings[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      settings[name] = value
  return settings


if __name__ == "__main__":
  sys.exit(main())
