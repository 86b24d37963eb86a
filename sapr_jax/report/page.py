"""A self-contained HTML page about runs, and the figures as PNG files beside it."""

from __future__ import annotations

import base64
import html
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
_RESOLUTION = 150  # dots per inch

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } th { font-weight: 600; }
img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; } figcaption { color: #555; }
code { font-size: .9em; } details table td { text-align: left; white-space: normal; }
"""


def write_page(runs: Sequence[RunHistory], directory: pathlib.Path) -> pathlib.Path:
  """Writes `report.html` and a PNG file for each figure.

  Args:
    runs: What to report on, in the order of the legends.
    directory: Where to write; made if need be.

  Returns:
    Path of the page.

  Raises:
    InputError: If matplotlib is not installed, or the directory cannot be written.
  """
  try:
    import matplotlib  # noqa: F401
  except ImportError as error:
    raise InputError("figures need matplotlib, which is not installed; run: pip install 'sapr_jax[report]'") from error
  parts = [_header(runs), _results(runs)]
  try:
    for name, (needed, draw) in FIGURES.items():
      if any(run.last(needed) is not None for run in runs):
        buffer = io.BytesIO()
        figure = draw(runs)
        figure.savefig(buffer, format="png", dpi=_RESOLUTION)
        write_atomically(directory / f"{name}.png", buffer.getvalue())
        parts.append(_embedded(buffer.getvalue(), draw.__doc__ or name))
    parts.append(_configurations(runs))
    write_atomically(directory / PAGE, _document("Pruning report", "\n".join(parts)))
  except OSError as error:
    raise InputError(f"{directory} cannot be written ({error.strerror}); name another --out.") from error
  return directory / PAGE


def _document(title: str, body: str) -> str:
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
  )


def _header(runs: Sequence[RunHistory]) -> str:
  names = sorted({run.config["model.name"] for run in runs})
  unfinished = [run.label for run in runs if run.summary is None]
  note = f"<p>Not finished yet: {html.escape('; '.join(unfinished))}.</p>" if unfinished else ""
  return f"<h1>Pruning of {html.escape(', '.join(names))}</h1>\n{note}"


def _results(runs: Sequence[RunHistory]) -> str:
  """Returns the table of what finished runs measured."""
  finished = [(run, run.summary) for run in runs if run.summary is not None]
  if not finished:
    return ""
  batches = list(dict.fromkeys(batch for _, summary in finished for batch in summary["dense"].get("latency_ms", ())))
  header = ["run", *summary_header(batches)]
  rows = [[run.label, *row] for run, summary in finished for row in summary_rows(summary, batches)]
  caption = "<p>Last epoch, all test images; the compact model where the network was cut.</p>"
  return f'<h2>Results</h2>\n<div class="wide">{_table(header, rows)}</div>\n{caption}'


def _configurations(runs: Sequence[RunHistory]) -> str:
  """Returns the versions and the configuration of each run, folded."""
  parts = ["<h2>Configurations</h2>"]
  for run in runs:
    details = [["work directory", run.path.resolve().name]]
    if run.summary is not None:
      versions = ", ".join(f"{name} {version}" for name, version in run.summary["run"]["versions"].items())
      details += [["device", run.summary["run"]["device"]], ["versions", versions]]
    details += [[name, _value(value)] for name, value in sorted(run.config.items())]
    parts.append(f"<details><summary>{html.escape(run.label)}</summary>{_table(['field', 'value'], details)}</details>")
  return "\n".join(parts)


def _value(value: Any) -> str:
  return "unset" if value is None else str(value)


def _embedded(png: bytes, caption: str) -> str:
  data = base64.b64encode(png).decode()
  text = html.escape(caption.strip().rstrip("."))
  return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}.</figcaption></figure>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
  body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
  return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
