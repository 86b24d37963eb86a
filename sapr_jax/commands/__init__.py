"""Subcommands of `sapr`: one file each, which takes arguments, calls the library, and returns an answer to print.

A file has `SUMMARY`, `EXAMPLES`, `add_arguments(parser)` and `run(args)`. It imports what is slow when it runs, so that
`sapr --help` answers at once.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from sapr_jax.commands import benchmark, evaluate, export, inspect, latency, prune, report, train
from sapr_jax.errors import InputError
from sapr_jax.version import __version__

COMMANDS = {
  "train": train,
  "evaluate": evaluate,
  "inspect": inspect,
  "prune": prune,
  "export": export,
  "benchmark": benchmark,
  "latency": latency,
  "report": report,
}
"""Name -> module."""


class _Parser(argparse.ArgumentParser):
  """Raises `InputError` for bad arguments, which is one line."""

  def error(self, message: str) -> NoReturn:
    raise InputError(f"{message.replace(chr(10), ' ')}; see {self.prog} --help.")


class _Form(argparse.RawDescriptionHelpFormatter):
  """Leaves the examples as they are written, and little space before what options mean."""

  def __init__(self, prog: str) -> None:
    super().__init__(prog, max_help_position=28, width=96)
    self._action_max_length = 13  # it forgets that names of commands are indented


def build_parser() -> argparse.ArgumentParser:
  """Returns the parser of all commands; what it parses has `run`, the function of the command that was asked for."""
  parser = _Parser(
    prog="sapr",
    description="Structured pruning for JAX and Flax: convolutional networks made truly smaller and faster.",
    epilog="sapr COMMAND --help has examples. Bad input: one line on standard error, and exit status 2.",
    formatter_class=_Form,
    allow_abbrev=False,
  )
  parser.add_argument("--version", action="version", version=f"sapr {__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
  for name, module in COMMANDS.items():
    # `prog`, as the program may have been started as python -m sapr_jax.
    command = commands.add_parser(
      name,
      prog=f"sapr {name}",
      help=module.SUMMARY,
      description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
      epilog=module.EXAMPLES,
      formatter_class=_Form,
      allow_abbrev=False,
    )
    module.add_arguments(command)
    if module is not train:
      command.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, for scripts")
    command.set_defaults(run=module.run)
  return parser
