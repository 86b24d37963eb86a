"""Runs the jobs of the study in order, beside other processes, until all are done or the time is over."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from sapr_jax.errors import DivergedError, InputError
from sapr_jax.runtime import say
from study import ours
from study.records import is_finished, write_entry
from study.rows import Job

_LONGEST = 1_000_000
"""Minutes; a timer takes no more than some decades."""


def run_all(jobs: Sequence[Job], after: Callable[[], object]) -> tuple[list[Job], list[Job]]:
  """Runs the jobs in order; those that have to wait are tried again as long as others can be run.

  A job that cannot be run is reported on standard error, and the others go on, unless two fail for the same reason.

  Args:
    jobs: What to run; finished runs are skipped.
    after: Called after each run.

  Returns:
    The jobs that other processes have, or that start from a run which is not finished; and those that cannot be run.

  Raises:
    InputError, DivergedError: If two jobs cannot be run for the same reason.
    InterruptedRunError, KeyboardInterrupt: If it was asked to stop.
  """
  failed: dict[str, Job] = {}  # by the reason
  left = _without_missing_packages([job for job in jobs if not is_finished(job.workdir)])
  progress = True
  while left and progress:
    progress, waiting = False, []
    for job in left:
      try:
        ran = _run(job)
      except (DivergedError, InputError) as error:
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


def _without_missing_packages(jobs: list[Job]) -> list[Job]:
  """Leaves out the jobs in PyTorch if it is not installed, and says so."""
  missing = [package for package in ("torch", "torch_pruning") if importlib.util.find_spec(package) is None]
  kept = [job for job in jobs if not missing or not job.row.kind.startswith("torch")]
  if len(kept) < len(jobs):
    names = " and ".join(missing)
    print(f"{len(jobs) - len(kept)} runs left out: {names} missing; pip install -e '.[bench]'", file=sys.stderr)
  return kept


def _run(job: Job) -> bool:
  """Runs a job, unless it is finished, has to wait, or another process has it; says whether it ran."""
  if job.source is not None and not is_finished(job.source):
    return False
  with lock(job.workdir) as mine:
    if not mine or is_finished(job.workdir):
      return False
    say(f"\n== {job}")
    started = time.monotonic()
    _runner(job.row.kind)(job)
    write_entry(job)
    say(f"== {job}: done in {time.monotonic() - started:.0f} s")
  return True


def _runner(kind: str) -> Callable[[Job], None]:
  if kind == "torch":
    from study import torch_runs  # imports an extra

    return torch_runs.run_pruner
  if kind == "torch_choice":
    from study import torch_choice

    return torch_choice.run_choice
  return ours.KINDS[kind]


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[bool]:
  """Keeps other processes from a run until the end of the block; yields whether no other has it.

  The file lies beside the work directory, which must be empty before a run.
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
def stoppable(minutes: float | None) -> Iterator[None]:
  """Makes SIGTERM, and the end of the time, stop the block as Ctrl-C does. A run handles SIGTERM itself, and saves.

  When the time is over, the process gets a SIGTERM every few seconds: a run that is about to end may not see the first.

  Args:
    minutes: The time; None for no limit.

  Raises:
    InputError: If `minutes` is out of range.
  """
  if minutes is not None and not 0 < minutes < _LONGEST:
    raise InputError(f"--minutes {minutes:g} is out of range; expected a number above 0, below {_LONGEST:,}.")
  handlers = {
    signal.SIGTERM: signal.signal(signal.SIGTERM, signal.default_int_handler),
    signal.SIGALRM: signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGTERM)),
  }
  signal.setitimer(signal.ITIMER_REAL, 60 * (minutes or 0), 5)  # 0 starts no timer
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
      signal.signal(number, handler)
