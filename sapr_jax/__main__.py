"""The command `sapr`, also `python -m sapr_jax`: finds the subcommand, runs it, prints its answer.

Exit status: 0, or 2 with one line on standard error for bad input. Training has those of `python -m sapr_jax.main`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Sequence

from sapr_jax.commands import build_parser
from sapr_jax.errors import DivergedError, InputError, InterruptedRunError
from sapr_jax.runtime.interruption import ProgramInterruption
from sapr_jax.runtime.output import survive_lost_output


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status.

  Args:
    argv: Arguments without the name of the program. None: this is the program, which takes its own arguments, goes on
      when nobody reads its output, and in training hears signals from now on.
  """
  interruption = None
  if argv is None:  # before anything that takes a while is imported
    argv = sys.argv[1:]
    survive_lost_output()
    if argv[:1] == ["train"]:
      interruption = ProgramInterruption()
  try:
    parser = build_parser()
    if argv[:1] == ["train"]:
      args, more = parser.parse_known_args(argv)
      args.run(args, more, interruption)  # which ends the program
    args = parser.parse_args(argv)
    for name in ("absl", "jax"):  # they report every file that is written, and every device that is not found
      logging.getLogger(name).setLevel(logging.WARNING)
    # What the library says meanwhile would be in the way of a script that reads JSON.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
      answer = args.run(args)
    print(json.dumps(answer.facts) if args.json else answer.text)
    return 0
  except InputError as error:
    return _fail(error, 2)
  except DivergedError as error:
    return _fail(error, 3)
  except InterruptedRunError as error:
    print(error, file=sys.stderr)
    return 75
  except KeyboardInterrupt:
    return _fail("stopped by Ctrl-C", 130)


def _fail(error: object, status: int) -> int:
  print(f"error: {error}", file=sys.stderr)
  return status


if __name__ == "__main__":
  sys.exit(main())
