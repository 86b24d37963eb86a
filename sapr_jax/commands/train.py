"""`sapr train`: the same as `python -m sapr_jax.main`, in fewer letters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from sapr_jax.errors import InputError
from sapr_jax.runtime.interruption import ProgramInterruption

SUMMARY = "run an experiment, or go on with it: train, prune, fine-tune"
EXAMPLES = """\
examples:
  sapr train digits runs/digits
  sapr train resnet56_cifar10 runs/half --set prune.p=0.5 seed=1
  sapr train my_experiment.py runs/mine --distributed

Other options are those of python -m sapr_jax.main, whose --help lists the experiments.

exit status:
  0    finished
  75   stopped by SIGTERM or Ctrl-C with all work saved: the same command goes on
  2    bad input; one line on standard error says what must change
  3    training diverged; one line says where
  130  stopped at once by a second Ctrl-C: the same command goes on at the last checkpoint
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("config", metavar="CONFIG", help="an experiment by its name, or a file with get_config()")
  parser.add_argument("workdir", metavar="WORKDIR", help="folder for checkpoints, records and the pruned model")
  parser.add_argument(
    "--set",
    action="extend",
    nargs="+",
    default=[],
    metavar="NAME=VALUE",
    help="other values for fields of the configuration, such as train.epochs=10 seed=1",
  )


def run(args: argparse.Namespace, more: Sequence[str], interruption: ProgramInterruption | None) -> NoReturn:
  """Runs the experiment, and ends the program with its exit status; `more` are other options of it."""
  for setting in args.set:
    name, equals, _ = setting.partition("=")
    if not name or not equals:
      raise InputError(f"--set must be NAME=VALUE, such as --set train.epochs=10, got {setting!r}.")
  if wrong := next((argument for argument in more if not argument.startswith("--")), None):
    raise InputError(f"unexpected argument {wrong!r}; write --set NAME=VALUE, and other options as --NAME=VALUE.")
  fields = [f"--config.{setting.removeprefix('config.')}" for setting in args.set]
  from sapr_jax import main

  main.start([sys.argv[0], f"--config={args.config}", f"--workdir={args.workdir}", *fields, *more], interruption)
