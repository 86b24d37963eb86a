"""Writes `docs/results.md` from what the CIFAR-10 study recorded in `results/`: python -m study.page."""

from __future__ import annotations

import collections
import pathlib
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.measuring import table
from sapr_jax.artifacts.files import read_json, write_atomically
from sapr_jax.report import figures
from sapr_jax.report.run_history import RunHistory
from study.claims import CLAIMS, Claim, later_claims, open_choices, pretrained_claims, selection
from study.records import CURVES, file_name
from study.results import Results, mean_and_deviation
from study.rows import gamma_name
from study.sizes import LONGER, SIZES

RESULTS, PAGE = pathlib.Path("results"), pathlib.Path("docs/results.md")
SMALL = ("reduced", "quarter", "decayed", "fifth")
"""Sizes of which the page has no more than a table."""
CHOICES = ("pretrained_choice", "pretrained_short_choice")
"""The sizes by which settings were chosen: nothing is claimed of them."""
_TEXTS = pathlib.Path(__file__).parent / "texts"

_FIGURES = {
  "subnetwork": (figures.accuracy_of_subnetwork, "Accuracy of the sub-network during training"),
  "full_model": (figures.accuracy_of_full_model, "Accuracy of the full model, then of the pruned one"),
  "hamming": (figures.hamming_distance, "Hamming distance between the architectures of consecutive epochs"),
}
"""Curve that must be there -> (figure, what it shows)."""


def renew(results: pathlib.Path, page: pathlib.Path) -> None:
  """Writes the page, and its figures into `images/` beside it.

  Args:
    results: Folder of the results files.
    page: The page.
  """
  reports = {size: read_json(results / file_name(size)) for size in SIZES}
  found = {size: report for size, report in reports.items() if report is not None and report["rows"]}
  small = {size: networks[0] for size in SMALL if size in found and (networks := _networks(found[size]))}
  shown = [size for size in found if size not in SMALL]
  parts = [_text("head"), "## Summary", _summary(found, small)]
  for size in shown:
    parts += _size(found[size], page)
  if small:
    parts += [
      "## Appendix: small networks, trained from scratch",
      _text("small"),
      _verdicts_of_small(small),
      _table_of_small(small),
    ]
    parts += [_where_run([found[size] for size in small])]
  write_atomically(page, "\n".join(part.strip() + "\n" for part in [*parts, _text("published")]))


def _networks(report: Mapping[str, Any]) -> list[Results]:
  """Returns the results of each network of a size that has any."""
  found = [
    Results([row for row in report["rows"] if row["network"] == network], fields["main_gamma"], fields["gammas"])
    for network, fields in report["networks"].items()
  ]
  return [results for results in found if results.entries]


def _summary(found: Mapping[str, Any], small: Mapping[str, Results]) -> str:
  """Returns a line for each claim that was tested, and one for the small networks."""
  lines, untested = [], 0
  for size in (size for size in found if size not in (*SMALL, *CHOICES)):
    for results in _networks(found[size]):
      judged = collections.defaultdict[str, list[str]](list)
      for budget, claim in _claims_at_budgets(results, size) if _is_pretrained(size) else _claims(results):
        if claim.in_summary and claim.was_tested:
          numbers = claim.short and f" ({claim.short.rstrip('.')})"
          judged[claim.title].append(f"{budget and f'at {budget} '}**{claim.verdict}**{numbers}")
        untested += claim.in_summary and not claim.was_tested
      lines += [f"- {size}: {title}: {', '.join(of_it)}." for title, of_it in judged.items()]
  if untested:
    lines.append(f"- {untested} further claims have not been tested; how our own forms compare is in the sections.")
  if small:
    verdicts = collections.Counter(judge(results).verdict for results in small.values() for judge in CLAIMS)
    counts = ", ".join(f"{count} **{verdict}**" for verdict, count in verdicts.most_common())
    lines.append(f"- Small networks (appendix), the paper's claims at {', '.join(small)}: {counts}.")
  return "\n".join(lines)


def _verdicts_of_small(small: Mapping[str, Results]) -> str:
  """Returns the table of the paper's claims in the small sizes."""
  rows = []
  for judge in CLAIMS:
    claims = [judge(results) for results in small.values()]
    rows.append([claims[0].title.split(" (")[0], *(claim.verdict for claim in claims)])
  return table(["claim", *small], rows)


def _table_of_small(small: Mapping[str, Results]) -> str:
  """Returns the one table of all rows of the small sizes."""
  names: dict[str, dict[str, str]] = {}
  for size, results in small.items():
    for name in results.names():
      label = "**main row**" if name == results.main else name
      names.setdefault(label, {})[size] = name

  def cell(size: str, name: str | None) -> str:
    if name is None:
      return ""
    subnetwork, pruned = (mean_and_deviation(small[size].accuracy(name, n)) for n in ("subnetwork", "pruned"))
    return pruned if subnetwork == "-" else f"{pruned} ({subnetwork})"

  order = sorted(names, key=lambda label: (not label.startswith("**"), -len(names[label]), label))
  rows = [[label, *(cell(size, names[label].get(size)) for size in small)] for label in order]
  header = ["row", *(f"{size}, {results.macs(results.main)} % of the MACs" for size, results in small.items())]
  return table(header, rows)


def _text(name: str) -> str:
  return (_TEXTS / f"{name}.md").read_text()


def paragraph(name: str) -> str:
  """Returns a text in one line, such as what is to be said of a size."""
  return " ".join(_text(name).split())


def _where_run(reports: Sequence[Mapping[str, Any]]) -> str:
  """Says by which command, on which images and machines, and in what time something was run."""
  commands = [
    f"`python -m study --size {r['size']} --data DIR --runs DIR"
    + "".join(f" --set {name}={value!r}" for name, value in r["set"].items())
    + " --page`"
    for r in reports
  ]
  rows = [row for report in reports for row in report["rows"]]
  seconds = sum(row["seconds"]["total"] for row in rows)
  duration = f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.0f} minutes"
  versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows)
  images = " and ".join(sorted({report["data"] for report in reports}))
  machines = "; ".join(sorted({row["machine"] for row in rows}))
  return (
    f"Run by {', '.join(commands)}. Images: {images}. {len(rows)} runs, {duration} in all (the sum over their epochs),"
    f" on {machines}. Versions: {'; '.join(versions)}."
  )


def _size(report: Mapping[str, Any], page: pathlib.Path) -> list[str]:
  """Returns the sections of one size."""
  size = report["size"]
  parts = [f"## Size: {size}", paragraph(size), _where_run([report])]
  for results in _networks(report):
    network = results.entries[0]["network"]
    overrides = "; ".join(f"`{name}={value}`" for name, value in report["networks"][network]["overrides"].items())
    parts += [
      f"### {network}",
      *([f"Fields that differ from those of its configuration: {overrides}."] if overrides else []),
      *(_compared(results, size) if _is_pretrained(size) else _sections(results)),
      *_figures(results, page.parent / "images", f"study_{size}_{network}"),
    ]
  return parts


def _sections(results: Results) -> list[str]:
  """Returns the tables and claims of one network."""
  parts = [
    f"The row that is compared with all others is `{results.main}`; it was chosen before any of these runs had ended.",
    _all_rows(results),
  ]
  for claim in (judge(results) for judge in CLAIMS):
    verdict = f"Verdict: **{claim.verdict}**. {claim.remark}"
    parts += [f"#### {claim.title}", claim.table, f"Rule: {claim.rule}", verdict]
  parts += [
    "#### What the supplement leaves open",
    "One choice is changed against the row named; given is the change in accuracy.",
    open_choices(results),
  ]
  if found := selection(results):
    parts += ["#### How good is the choice of channels?", paragraph("selection").format(dense=gamma_name(0)), found]
  return parts


def _is_pretrained(size: str) -> bool:
  """Says whether a size prunes a pretrained network, at several budgets."""
  return any(experiment.budgets for experiment in SIZES[size])


def _claims(results: Results) -> list[tuple[str, Claim]]:
  return [("", judge(results)) for judge in CLAIMS]


def _claims_at_budgets(results: Results, size: str) -> list[tuple[str, Claim]]:
  """Returns (budget, what is claimed there)."""
  budgets = dict.fromkeys(name.split(",")[0] for name in results.names("p="))
  (experiment,) = SIZES[size]
  claims = []
  for budget in budgets:
    found = pretrained_claims(results, budget, experiment.main_row) if not experiment.only else []
    for row in experiment.later_rows:
      found += later_claims(results, budget, row)
    claims += [(budget, claim) for claim in found]
  return claims


def _compared(results: Results, size: str) -> list[str]:
  """Returns the tables of one pretrained network."""
  if size in CHOICES:
    return [_all_rows(results)]
  parts = ["What each row was given was chosen on held-out training images before: `study/chosen.py`."]
  for budget, claim in _claims_at_budgets(results, size):
    if not claim.was_tested:
      continue
    verdict = f"Verdict: **{claim.verdict}**. {claim.remark}"
    parts += [f"#### At {budget}: {claim.title}", claim.table, f"Rule: {claim.rule}", verdict]
  return [*parts, "#### All rows", _all_rows(results)]


def _all_rows(results: Results) -> str:
  """Returns the table of all rows."""
  rows = []
  for name in results.names():
    seeds = sorted(results.of(name, lambda entry: 0))
    minutes = [seconds / 60 for seconds in results.of(name, lambda entry: entry["seconds"]["total"]).values()]
    cells = [mean_and_deviation(results.accuracy(name, n)) for n in ("dense", "subnetwork", "pruned")]
    rows.append([name, " ".join(map(str, seeds)), *cells, results.macs(name), f"{statistics.fmean(minutes):.1f}"])
  return table(["row", "seeds", "dense, %", "sub-network, %", "pruned, %", "MACs left, %", "minutes a run"], rows)


def _figures(results: Results, folder: pathlib.Path, name: str) -> list[str]:
  """Draws the figures over all gammas, each a mean over the same seeds; returns the Markdown that shows them."""
  labels = {gamma_name(gamma): f"gamma {gamma:g}" for gamma in results.gammas} | {LONGER: "longer schedule"}
  seeds = results.common_seeds(labels)
  found = {row: mean_history(results, row, label, seeds) for row, label in labels.items()}
  over = f"mean over the seeds {', '.join(map(str, sorted(seeds)))}, which all of them have"
  shown = []
  for curve, (draw, caption) in _FIGURES.items():
    asked = [history for row, history in found.items() if row != LONGER or curve == "hamming"]
    histories = [history for history in asked if history is not None and history.series(CURVES[curve][0])[0]]
    if not histories:
      continue
    folder.mkdir(parents=True, exist_ok=True)
    draw(histories).savefig(folder / f"{name}_{curve}.png", dpi=110)
    shown.append(f"![{caption}; {over}]({folder.name}/{name}_{curve}.png)")
  return shown


def mean_history(results: Results, row: str, label: str, seeds: Collection[int]) -> RunHistory | None:
  """Returns the mean over some seeds of a row's runs, as the figures take it; None if there are none."""
  entries = [entry for entry in results.entries if entry["row"] == row and entry["seed"] in seeds]
  if not entries:
    return None
  records: dict[int, dict[str, Any]] = {}
  for curve in _FIGURES:
    name, factor, _ = CURVES[curve]
    curves = [entry["curves"][curve] for entry in entries if curve in entry["curves"]]
    if curves:
      for step, values in enumerate(zip(*(c["values"] for c in curves), strict=True), start=curves[0]["first"]):
        records.setdefault(step, {"step": step})[name] = statistics.fmean(values) / factor
  config = {"prune.p": entries[0]["p"], "seed": 0}
  config |= {"prune.start_epoch": entries[0]["start_epoch"], "train.epochs": entries[0]["train_epochs"]}
  return RunHistory(pathlib.Path(), config, [records[step] for step in sorted(records)], None, None, label)


if __name__ == "__main__":
  renew(RESULTS, PAGE)
