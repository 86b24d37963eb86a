"""`sapr report`: a page with figures."""

from __future__ import annotations

import argparse
import pathlib

from sapr_jax.commands.answer import Answer

SUMMARY = "make a page with figures of one or several runs, finished or not"
EXAMPLES = """\
examples:
  sapr report runs/digits
  sapr report runs/half runs/third --out comparison

It needs pip install 'sapr_jax[report]'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR", help="work directory of a run")
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    metavar="DIR",
    help="where to write report.html and figures/; unset: WORKDIR, and of several runs comparison/ in the first",
  )


def run(args: argparse.Namespace) -> Answer:
  from sapr_jax.report.__main__ import make_page

  page = make_page(args.workdirs, args.out)
  figures = page.parent / "figures"
  return Answer({"page": str(page), "figures": str(figures)}, f"{page} is written; the figures are in {figures} too.")
