"""Makes a page with figures of one or several runs: `python -m sapr_jax.report WORKDIR [WORKDIR ...] --out DIR`."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from sapr_jax.errors import InputError, os_errors_in_one_line
from sapr_jax.report.page import write_page
from sapr_jax.report.run_history import read_histories


def make_page(workdirs: Sequence[pathlib.Path], out: pathlib.Path | None = None) -> pathlib.Path:
  """Writes the page of these runs, by default beside them; returns its path.

  Raises:
    InputError: If a folder is not that of a run, or the page cannot be written.
  """
  with os_errors_in_one_line(workdirs[0]):
    unset = workdirs[0] / ("comparison" if len(workdirs) > 1 else "")
    return write_page(read_histories(workdirs), out or unset)


def main() -> int:
  """Runs the command; returns the exit status: 0, or 2 with one line on standard error."""
  parser = argparse.ArgumentParser(
    prog="python -m sapr_jax.report", description="Makes a page with figures of one or several runs, finished or not."
  )
  parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR", help="work directory of a run")
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    help="where to write report.html and figures/; unset: WORKDIR, and of several runs comparison/ in the first",
  )
  args = parser.parse_args()
  try:
    page = make_page(args.workdirs, args.out)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"{page} is written; the figures are in {page.parent / 'figures'} too.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
