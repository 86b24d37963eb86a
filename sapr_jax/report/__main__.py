"""Makes a page with figures of one or several runs: `python -m sapr_jax.report WORKDIR [WORKDIR ...] --out DIR`."""

from __future__ import annotations

import argparse
import pathlib
import sys

from sapr_jax.errors import InputError, os_errors_in_one_line
from sapr_jax.report.page import write_page
from sapr_jax.report.run_history import read_histories


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
    with os_errors_in_one_line(args.workdirs[0]):
      unset = args.workdirs[0] / ("comparison" if len(args.workdirs) > 1 else "")
      page = write_page(read_histories(args.workdirs), args.out or unset)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"{page} is written; the figures are in {page.parent / 'figures'} too.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
