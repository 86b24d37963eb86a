"""A self-contained HTML page about runs, and the figures as PNG files beside it."""

from __future__ import annotations

import html
import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from sapr_jax.artifacts.files import write_atomically
from sapr_jax.errors import InputError, needs_extra
from sapr_jax.report.figures import FIGURES, as_svg, draw_figures
from sapr_jax.report.run_history import RunHistory
from sapr_jax.report.text import headlines, summary_header, summary_rows

PAGE = "report.html"
_TEMPLATE = "page.html"
_RESOLUTION = 200  # dots per inch, of the PNG files
_MOST_HEADLINES = 6
"""Of more runs the table alone says more."""

# The page draws in its own colours, as it has a light and a dark form: colour of the figures -> that of the page.
_THEME = {
  "#333333": "var(--ink)",
  "#000000": "var(--ink)",
  "#777777": "var(--muted)",
  "#e5e5e5": "var(--line)",
  "#dddddd": "var(--bar)",
  "#0072b2": "var(--accent)",
}


def write_page(runs: Sequence[RunHistory], directory: pathlib.Path) -> pathlib.Path:
  """Writes `report.html`, and a PNG file for each figure in `figures/`, to `directory`; returns the path of the page.

  Raises `InputError` if matplotlib or Jinja2 is not installed, or the directory cannot be written.
  """
  with needs_extra("The report", "report"):
    import jinja2
    import matplotlib  # noqa: F401
  template = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__, "."), autoescape=True, undefined=jinja2.StrictUndefined
  ).get_template(_TEMPLATE)
  finished = [run for run in runs if run.summary is not None]
  try:
    directory.mkdir(parents=True, exist_ok=True)
    page = template.render(
      networks=sorted({run.config["model.name"] for run in runs}),
      several=len(runs) > 1,
      unfinished=[run.label for run in runs if run.summary is None],
      headlines=[(run.label, headlines(run.summary or {})) for run in finished[:_MOST_HEADLINES]]
      if len(finished) <= _MOST_HEADLINES
      else [],
      results=_results(runs),
      figures=_draw_figures(runs, directory / "figures"),
      configurations=[(run.label, _details(run)) for run in runs],
    )
    write_atomically(directory / PAGE, page)
  except OSError as error:
    raise InputError(f"{directory} cannot be written ({error.strerror}); name another --out.") from error
  return directory / PAGE


def _draw_figures(runs: Sequence[RunHistory], folder: pathlib.Path) -> list[dict[str, Any]]:
  """Writes the figures as PNG files; returns what the page shows of each."""
  folder.mkdir(exist_ok=True)
  shown = []
  for name, figure in draw_figures(runs).items():
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_RESOLUTION)
    write_atomically(folder / f"{name}.png", buffer.getvalue())
    caption, width = FIGURES[name].caption, figure.get_figwidth()
    shown.append({"svg": _in_colours_of_the_page(as_svg(figure), caption), "caption": caption, "inches": width})
  return shown


def _in_colours_of_the_page(svg: str, caption: str) -> str:
  svg = re.sub("|".join(_THEME), lambda found: _THEME[found[0]], svg)
  return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)


def _results(runs: Sequence[RunHistory]) -> dict[str, Any] | None:
  """Returns header and rows of the table of finished runs, None if there is none; of several runs with their names."""
  finished = [(run, run.summary) for run in runs if run.summary is not None]
  if not finished:
    return None
  batches = list(dict.fromkeys(batch for _, summary in finished for batch in summary["dense"].get("latency_ms", ())))
  several = len(runs) > 1
  rows = [[run.label] * several + row for run, summary in finished for row in summary_rows(summary, batches)]
  return {"header": ["run"] * several + summary_header(batches), "rows": rows, "names": 1 + several}


def _details(run: RunHistory) -> list[tuple[str, str]]:
  """Returns the rows about a run: where it ran, its versions, its configuration."""
  details = [("work directory", run.path.resolve().name)]
  if run.summary is not None:
    versions = ", ".join(f"{name} {version}" for name, version in run.summary["run"]["versions"].items())
    details += [("device", run.summary["run"]["device"]), ("versions", versions)]
  return details + [(name, "unset" if value is None else str(value)) for name, value in sorted(run.config.items())]
