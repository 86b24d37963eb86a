"""A self-contained HTML page about runs, and the figures as PNG files beside it."""

from __future__ import annotations

import base64
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from sapr_jax.artifacts.files import write_atomically
from sapr_jax.errors import InputError
from sapr_jax.report.figures import FIGURES
from sapr_jax.report.run_history import RunHistory
from sapr_jax.report.text import summary_header, summary_rows

PAGE = "report.html"
_TEMPLATE = "page.html"
_RESOLUTION = 150  # dots per inch


def write_page(runs: Sequence[RunHistory], directory: pathlib.Path) -> pathlib.Path:
  """Writes `report.html` and a PNG file for each figure to `directory`; returns the path of the page.

  Raises `InputError` if matplotlib or Jinja2 is not installed, or the directory cannot be written.
  """
  try:
    import jinja2
    import matplotlib  # noqa: F401
  except ImportError as error:
    raise InputError(
      f"The report needs {error.name}, which is not installed; run: pip install 'sapr_jax[report]'"
    ) from None
  template = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__, "."), autoescape=True, undefined=jinja2.StrictUndefined
  ).get_template(_TEMPLATE)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    page = template.render(
      networks=sorted({run.config["model.name"] for run in runs}),
      unfinished=[run.label for run in runs if run.summary is None],
      results=_results(runs),
      figures=_draw_figures(runs, directory),
      configurations=[(run.label, _details(run)) for run in runs],
    )
    write_atomically(directory / PAGE, page)
  except OSError as error:
    raise InputError(f"{directory} cannot be written ({error.strerror}); name another --out.") from error
  return directory / PAGE


def _draw_figures(runs: Sequence[RunHistory], directory: pathlib.Path) -> list[tuple[str, str]]:
  """Writes the figures as files; returns (caption, PNG as base64) of each."""
  drawn = []
  for name, (needed, draw) in FIGURES.items():
    if any(run.last(needed) is not None for run in runs):
      buffer = io.BytesIO()
      draw(runs).savefig(buffer, format="png", dpi=_RESOLUTION)
      write_atomically(directory / f"{name}.png", buffer.getvalue())
      drawn.append((draw.__doc__ or name, base64.b64encode(buffer.getvalue()).decode()))
  return drawn


def _results(runs: Sequence[RunHistory]) -> dict[str, Any] | None:
  """Returns header and rows of the table of finished runs, None if there is none."""
  finished = [(run, run.summary) for run in runs if run.summary is not None]
  if not finished:
    return None
  batches = list(dict.fromkeys(batch for _, summary in finished for batch in summary["dense"].get("latency_ms", ())))
  rows = [[run.label, *row] for run, summary in finished for row in summary_rows(summary, batches)]
  return {"header": ["run", *summary_header(batches)], "rows": rows}


def _details(run: RunHistory) -> list[tuple[str, str]]:
  """Returns the rows about a run: where it ran, its versions, its configuration."""
  details = [("work directory", run.path.resolve().name)]
  if run.summary is not None:
    versions = ", ".join(f"{name} {version}" for name, version in run.summary["run"]["versions"].items())
    details += [("device", run.summary["run"]["device"]), ("versions", versions)]
  return details + [(name, "unset" if value is None else str(value)) for name, value in sorted(run.config.items())]
