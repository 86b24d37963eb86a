"""Runs one experiment: `python -m sapr_jax.main --config configs/resnet56_cifar10.py --workdir DIR`.

Every field of the configuration can be given on the command line, `--config.train.epochs=10`. Running the same command
again resumes an unfinished run. Exit status:

    0    finished
    75   stopped by SIGTERM or Ctrl-C with all work saved: the same command goes on
    2    bad input, or training that diverged; one line on standard error says what
    130  stopped at once by a second Ctrl-C: the same command goes on at the last checkpoint

Several machines work as one if the same command runs on each of them with `--distributed`: on TPU pods, under SLURM and
Open MPI they find each other; elsewhere give `--coordinator=HOST:PORT --num_processes=N --process_id=I`, where HOST is
the machine of process 0. The work directory must be one that all of them see. Where one of the processes ends early,
the others end too, with a status that is not zero.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from sapr_jax.errors import InputError, InterruptedRunError, one_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the experiment, such as configs/digits.py.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes of a run.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where they do not find each other.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, with --coordinator.")
_CONNECT_SECONDS = flags.DEFINE_integer("connect_seconds", 300, "How long to wait for the other processes.", 1)
_COMPILATION_CACHE = flags.DEFINE_bool(
  "compilation_cache", True, "Keep compiled programs in the user's cache folder, for later runs."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for checkpoints, records and the pruned model.")


def main(argv: Sequence[str]) -> int:
  """Runs the experiment that the flags describe; returns the exit status."""
  if len(argv) > 1:
    return _fail(f"unexpected argument {argv[1]!r}; options are written --config.name=value.")
  try:
    config, workdir = _CONFIG.value, _WORKDIR.value
    if hasattr(config, "lock"):
      config.lock()
  except OSError as error:  # a file that could not be loaded shows when the configuration is first used
    return _fail(f"the configuration cannot be read: {one_line(error.__cause__ or error)}")
  if not _CONFIG.present or not workdir:
    return _fail(f"--{'workdir' if _CONFIG.present else 'config'} is missing; see python -m sapr_jax.main --help.")
  if not isinstance(config, ConfigDict):
    found = type(config).__name__
    return _fail(f"get_config() returned a {found}; expected the ConfigDict of configs/default.py with other values.")
  logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it writes
  by_hand = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if not _DISTRIBUTED.value and by_hand == (None, None, None):
    return _run(config, workdir)
  from sapr_jax.training import processes

  try:
    process = processes.initialize(*by_hand, timeout=_CONNECT_SECONDS.value)
  except InputError as error:
    return _fail(str(error))
  try:
    return processes.leave(_run(config, workdir, process))
  except Exception as error:
    if (lost := processes.lost_process(error)) is None:
      raise
    _fail(lost)
    return processes.leave(1, wait=False)


def _run(config: Any, workdir: str, process: int = 0) -> int:
  """Runs the experiment; returns the exit status."""
  try:
    from sapr_jax import training  # starts slowly; bad flags fail before

    if config.get("fast_cpu"):
      training.keep_memory()  # the process is ours; JAX has not started yet
    _start_jax()
    if _COMPILATION_CACHE.value:
      training.use_compilation_cache()
    training.run(config, workdir)
  except InputError as error:
    # What all processes know of, the first one says.
    return 2 if process and isinstance(error, training.AgreedError) else _fail(str(error))
  except InterruptedRunError as error:
    if not process:
      print(error, file=sys.stderr)
    return 75
  except KeyboardInterrupt:
    print("stopped at once; the same command resumes the run at its last checkpoint", file=sys.stderr)
    return 130
  return 0


def _start_jax() -> None:
  """Lets JAX find its devices.

  Raises:
    InputError: If it cannot use those that it is told to.
  """
  import jax

  try:
    jax.devices()
  except RuntimeError as error:
    raise InputError(
      f"JAX cannot start: {one_line(error, 200)}; set JAX_PLATFORMS to what this machine has, or leave it unset."
    ) from error


def _fail(message: str) -> int:
  in_one_line = message.replace("\n", "\\n").replace("\r", "\\r")  # a file may be called so
  print(f"error: {in_one_line}", file=sys.stderr)
  return 2


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the flags, and runs the file of the configuration; whatever is wrong with either ends in one line."""
  logging.getLogger("absl").setLevel(logging.ERROR)  # what it would warn of is an error here
  try:
    return flags.FLAGS(argv)
  except Exception as error:
    sys.exit(_fail(_explain(error)))


def _explain(error: Exception) -> str:
  """Says what is wrong with the flags or the file of the configuration."""
  chain: list[BaseException] = [error]
  while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
    chain.append(before)
  if isinstance(chain[-1], ImportError | SyntaxError):
    return f"the file of the configuration cannot be run, from this directory at least: {one_line(chain[-1])}"
  others = (f"{os.sep}absl{os.sep}", f"{os.sep}ml_collections{os.sep}", "<frozen ", __file__)
  for link in reversed(chain):
    places = [p for p in traceback.extract_tb(link.__traceback__) if not any(other in p.filename for other in others)]
    if places:
      what, where = f"{type(link).__name__}: {one_line(link)}", f"{places[-1].filename}, line {places[-1].lineno}"
      return f"the file of the configuration cannot be run: {what} ({where})"
  if "get_config" in str(error):
    return f"the file of the configuration has no function get_config() without arguments: {one_line(chain[-1])}"
  if isinstance(error, AttributeError | KeyError):
    return f"the configuration has no such field: {one_line(error)}"
  return one_line(error)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
