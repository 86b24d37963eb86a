"""Runs one experiment: `python -m sapr_jax.main --config=resnet56_cifar10 --workdir DIR`.

`--config` takes the name of an experiment that comes with the package, or a file such as configs/resnet56_cifar10.py.

Every field of the configuration can be given on the command line, `--config.train.epochs=10`. Running the same command
again resumes an unfinished run. Exit status:

    0    finished
    75   stopped by SIGTERM or Ctrl-C with all work saved: the same command goes on
    2    bad input; one line on standard error says what must change
    3    training diverged; one line says where
    130  stopped at once by a second Ctrl-C: the same command goes on at the last checkpoint

A signal is heard from the first instant on. Output that cannot be written, as its reader has gone or the disk is full,
does not end a run.

Several machines work as one if the same command runs on each of them with `--distributed`: on TPU pods, under SLURM and
Open MPI they find each other; elsewhere give `--coordinator=HOST:PORT --num_processes=N --process_id=I`, where HOST is
the machine of process 0. The work directory must be one that all of them see. Where one of the processes ends early,
the others end too, with a status that is not zero.
"""

from __future__ import annotations

from sapr_jax.runtime.interruption import STOPPED_AT_ONCE, ProgramInterruption
from sapr_jax.runtime.output import survive_lost_output

_interruption: ProgramInterruption | None = None  # where this file is the program
if __name__ == "__main__":  # before the other imports, which take a while
  survive_lost_output()
  _interruption = ProgramInterruption()

import contextlib
import functools
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from sapr_jax import configs
from sapr_jax.errors import DivergedError, InputError, InterruptedRunError, one_line
from sapr_jax.runtime.garbage import without_collection

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment: a name such as digits, or a file with get_config()."
)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes of a run.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where they do not find each other.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, with --coordinator.")
_CONNECT_SECONDS = flags.DEFINE_integer("connect_seconds", 300, "How long to wait for the other processes.", 1)
_COMPILATION_CACHE = flags.DEFINE_bool(
  "compilation_cache", True, "Keep compiled programs in the user's cache folder, for later runs."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for checkpoints, records and the pruned model.")


def start(argv: Sequence[str], interruption: ProgramInterruption | None) -> NoReturn:
  """Runs the program with these arguments, of which the first is its name; ends this process with the exit status."""
  global _interruption
  _interruption = interruption
  sys.argv = list(argv)  # where the fields of the configuration are looked for
  app.run(main, argv=sys.argv, flags_parser=_parse_flags)
  raise AssertionError("app.run ends the process")


def main(argv: Sequence[str]) -> int:
  """Runs the experiment that the flags describe; returns the exit status."""
  if len(argv) > 1:
    return _refuse(f"unexpected argument {argv[1]!r}; options are written --config.name=value.")
  try:
    config, workdir = _CONFIG.value, _WORKDIR.value
    if hasattr(config, "lock"):
      config.lock()
  except OSError as error:  # a file that cannot be read shows when the configuration is first used
    return _refuse(f"the configuration cannot be read: {one_line(error.__cause__ or error)}")
  if not _CONFIG.present or not workdir:
    return _refuse(f"--{'workdir' if _CONFIG.present else 'config'} is missing; see python -m sapr_jax.main --help.")
  if not isinstance(config, ConfigDict):
    found = type(config).__name__
    return _refuse(f"get_config() must return the ConfigDict of configs/default.py with other values, got a {found}.")
  for name in ("absl", "jax"):  # Orbax reports every file it writes, JAX every device that it does not find
    logging.getLogger(name).setLevel(logging.WARNING)
  by_hand = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if not _DISTRIBUTED.value and by_hand == (None, None, None):
    return _run(config, workdir, interruption=_interruption)
  from sapr_jax.runtime import processes

  try:
    process = processes.initialize(*by_hand, timeout=_CONNECT_SECONDS.value)
  except InputError as error:
    return processes.leave(_fail(str(error)))
  if _interruption is not None:
    _interruption.close()  # from now on all processes must stop at one step
  try:
    return processes.leave(_run(config, workdir, process))
  except Exception as error:
    if (lost := processes.lost_process(error)) is None:
      traceback.print_exc()
    else:
      _fail(lost)
    return processes.leave(1)


def _run(config: Any, workdir: str, process: int = 0, interruption: ProgramInterruption | None = None) -> int:
  """Runs the experiment; returns the exit status."""
  try:
    with without_collection():
      from sapr_jax import runtime, training  # start slowly; bad flags fail before
      from sapr_jax.runtime.devices import start_jax

    if config.get("fast_cpu"):
      runtime.keep_memory()  # the process is ours; JAX has not started yet
    start_jax()
    if interruption is not None:
      interruption.listen()  # the runtime of a TPU takes SIGTERM
    training.run(config, workdir, interruption=interruption, compilation_cache=_COMPILATION_CACHE.value)
    if interruption is not None:
      interruption.finish()
  except DivergedError as error:
    return _fail(str(error), 3)
  except InputError as error:
    return _fail(str(error))
  except InterruptedRunError as error:
    if not process:
      print(error, file=sys.stderr)
    return 75
  except KeyboardInterrupt:
    print(STOPPED_AT_ONCE, file=sys.stderr)
    return 130
  return 0


def _fail(message: str, status: int = 2) -> int:
  in_one_line = message.replace("\n", "\\n").replace("\r", "\\r")  # the name of a file may have them
  print(f"error: {in_one_line}", file=sys.stderr)
  return status


def _refuse(message: str) -> int:
  """Fails before this process has connected to the others of the run, and ends those too."""
  status = _fail(message)
  coordinator, number, process = (flags.FLAGS[flag.name].value for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID))
  if None not in (coordinator, number, process):
    from sapr_jax.runtime import processes

    with contextlib.suppress(InputError):
      processes.initialize(coordinator, number, process, timeout=20, problem=message)
    return processes.leave(status)
  return status


class _ConfigFileError(Exception):
  """The user's configuration file raised an error, which is the cause of this one."""


def _config_file(value: str) -> str:
  """Returns the file that `--config` means: one of the package by its name, or by its path in the repository."""
  name = value.removeprefix("configs/").removesuffix(".py")
  packaged = configs.file_of(name)
  if packaged and (value == name or not os.path.exists(value)):
    return str(packaged)
  if name.isidentifier() and not os.path.exists(value):
    raise InputError(f"must be a file or one of {', '.join(configs.names())}")
  return value


def _load_config_file(load: Callable[[str], Any], path: str) -> Any:
  value, colon, argument = path.partition(":")  # what follows is for get_config()
  file = _config_file(value)
  path = f"{file}{colon}{argument}"
  if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
    raise InputError(f"{file} must be a file, and is a pipe or a device")  # reading it might never end
  try:
    return load(path)
  except Exception as error:
    raise _ConfigFileError(path) from error


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the flags, which runs the configuration file.

  A wrong flag ends in one line; an error in the file shows its traceback.
  """
  global __doc__
  if any(argument.lstrip("-").startswith("help") for argument in argv[1:]):
    __doc__ = f"{__doc__}\nThe experiments:\n\n{textwrap.indent(configs.table(), '    ')}\n"
  logging.getLogger("absl").setLevel(logging.ERROR)  # it would warn of what is an error here
  parser: Any = flags.FLAGS["config"].parser
  parser.parse = functools.partial(_load_config_file, parser.parse)
  connection = flags.FlagValues()  # which is needed where the others are wrong
  connection.set_gnu_getopt()
  for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID):
    connection[flag.name] = flags.FLAGS[flag.name]
  try:
    connection(argv, known_only=True)
    return flags.FLAGS(argv)
  except _ConfigFileError as error:
    traceback.print_exception(error.__cause__)
    problem = f"{error} raised the error above; fix that file."
  except (AttributeError, KeyError) as error:
    problem = f"the configuration has no such field: {one_line(error)}"
  except Exception as error:
    problem = one_line(error)
  sys.exit(_refuse(problem))


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
