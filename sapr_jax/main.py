"""Runs one experiment: `python -m sapr_jax.main --config configs/resnet56_cifar10.py --workdir DIR`.

Every field of the configuration can be given on the command line, `--config.train.epochs=10`. Running the same command
again resumes an unfinished run. Exit status:

    0    finished
    75   stopped by SIGTERM or Ctrl-C with all work saved: the same command goes on
    2    bad input, or training that diverged; one line on standard error says what
    130  stopped at once by a second Ctrl-C: the same command goes on at the last checkpoint
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from sapr_jax.errors import InputError, InterruptedRunError

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the experiment, such as configs/digits.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for checkpoints, records and the pruned model.")


def main(argv: Sequence[str]) -> int:
  """Runs the experiment that the flags describe; returns the exit status."""
  if len(argv) > 1:
    return _fail(f"unexpected argument {argv[1]!r}; options are written --config.name=value.")
  try:
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is not None:
      config.lock()
  except OSError as error:  # a file that could not be loaded shows when the configuration is first used
    return _fail(f"the configuration cannot be read: {_one_line(error.__cause__ or error)}")
  if config is None or not workdir:
    return _fail(f"--{'config' if config is None else 'workdir'} is missing; see python -m sapr_jax.main --help.")
  logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it writes
  try:
    from sapr_jax import training  # starts slowly; bad flags fail before

    training.run(config, workdir)
  except InputError as error:
    return _fail(str(error))
  except InterruptedRunError as error:
    print(error, file=sys.stderr)
    return 75
  except KeyboardInterrupt:
    print("stopped at once; the same command resumes the run at its last checkpoint", file=sys.stderr)
    return 130
  return 0


def _fail(message: str) -> int:
  print(f"error: {message}", file=sys.stderr)
  return 2


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the flags; an unknown field of the configuration or a missing file ends in one line."""
  try:
    return flags.FLAGS(argv)
  except (ImportError, SyntaxError) as error:
    sys.exit(_fail(f"the file of the configuration cannot be run, from this directory at least: {_one_line(error)}"))
  except (AttributeError, KeyError) as error:
    sys.exit(_fail(f"the configuration has no such field: {_one_line(error)}"))
  except (flags.Error, OSError, TypeError, ValueError) as error:
    sys.exit(_fail(_one_line(error)))


def _one_line(error: BaseException) -> str:
  text = error.args[0] if isinstance(error, KeyError) and error.args else error
  return " ".join(str(text).split())


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
