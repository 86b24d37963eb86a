"""Records of the CIFAR-10 study: a small entry for each finished run, and one JSON file for all runs of a size."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.measuring import cpu_name
from sapr_jax.artifacts import read_records
from sapr_jax.artifacts.files import read_json, write_atomically, write_json
from sapr_jax.errors import InputError
from sapr_jax.training import workdir as layout
from study.rows import Job
from study.sizes import Experiment

ENTRY = "study.json"
"""File with the entry of a finished run, in its work directory."""

_HEAD = "study_head.json"
"""File with what all runs of a size have in common, in the folder of the size."""

CURVES = {
  "full_model": ("test_accuracy", 100, 2),
  "subnetwork": ("subnetwork_accuracy", 100, 2),
  "hamming": ("hamming_distance", 1, 4),
  "kept_norm": ("kept_norm_mean", 1, 3),
  "dropped_norm": ("dropped_norm_mean", 1, 4),
}
"""Curve -> (name in the records of a run, factor, decimals)."""


def is_finished(workdir: pathlib.Path) -> bool:
  """Says whether the run in `workdir` is done and has its entry."""
  return _read_entry(workdir / ENTRY) is not None


def _read_entry(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns an entry; None if there is none, or it is damaged."""
  entry = read_json(path)
  return entry if isinstance(entry, dict) and {"network", "row", "seed"} <= entry.keys() else None


def write_entry(job: Job) -> None:
  """Writes the entry of a run that has just ended."""
  summary = read_json(job.workdir / layout.SUMMARY)
  if summary is None:
    raise RuntimeError(f"{job.workdir} has no summary, although its run ended")
  write_json(job.workdir / ENTRY, entry_of(job, summary, read_records(job.workdir)))


def entry_of(job: Job, summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the entry of a run.

  Args:
    job: The run.
    summary: What it measured at its end.
    records: What it measured in every epoch.

  Returns:
    Row, seed, accuracies in percent at the last epoch (of the compact model, where there is one), its share of the
    dense network's MACs, curves over epochs, seconds, and where it ran.
  """
  measured = {name: summary[name] for name in ("dense", "subnetwork", "pruned") if "accuracy" in summary.get(name, {})}
  compact = measured.get("pruned") or measured["subnetwork"]
  return {
    "network": job.row.experiment.network,
    "row": job.row.name,
    "seed": job.seed,
    "accuracy": {name: round(100 * entry["accuracy"], 3) for name, entry in measured.items()},
    "macs_share": round(compact["macs"] / summary["dense"]["macs"], 5),
    "start_epoch": job.config.prune.start_epoch,
    "train_epochs": job.config.train.epochs,
    "p": job.config.prune.p,
    "curves": {name: curve for name, fields in CURVES.items() if (curve := _curve(records, *fields)) is not None},
    "seconds": _seconds(summary, records),
    "machine": _machine(summary["run"]["device"]),
    "versions": summary["run"]["versions"],
  }


def _curve(records: Sequence[Mapping[str, Any]], name: str, factor: float, decimals: int) -> dict[str, Any] | None:
  """Returns the values over epochs, and the first epoch that has one."""
  points = [(record["step"], round(factor * record[name], decimals)) for record in records if name in record]
  return {"first": points[0][0], "values": [value for _, value in points]} if points else None


def _seconds(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the seconds of the whole run, and the medians of an epoch while the generator learns."""
  parts = ("weight_seconds", "generator_seconds", "evaluation_seconds")
  total = sum(record.get(part, 0.0) for record in records for part in parts)
  found = {"total": round(total or summary["run"]["seconds"], 1)}
  searching = [record for record in records if "generator_seconds" in record]
  for name in ("weight", "generator"):
    if searching:
      found[f"{name}_epoch"] = round(statistics.median(record[f"{name}_seconds"] for record in searching), 3)
  return found


def _machine(device: str) -> str:
  cores = len(os.sched_getaffinity(0))
  cpu = f"{cores} core{'s' if cores > 1 else ''} of {cpu_name()}"
  return cpu if device == "cpu" else f"{device}, {cpu}"


def describe_data(folder: str | None) -> str:
  """Says which images were used.

  Raises:
    InputError: If there are none.
  """
  if folder is None:
    return "CIFAR-10 from tensorflow-datasets"
  files = (file for file in (pathlib.Path(folder) / "train").glob("*/*") if not file.name.startswith("."))
  kind = next((file.suffix.lower() for file in files), None)
  if kind is None:
    raise InputError(f"--data {folder} holds no train/<class>/* files; give the folder above train and test.")
  return "JPEG copy of CIFAR-10" if kind in (".jpg", ".jpeg") else f"{kind.lstrip('.').upper()} copy of CIFAR-10"


def head_of(size: str, experiments: Iterable[Experiment], settings: Mapping[str, Any], data: str) -> dict[str, Any]:
  """Returns what all entries of a results file have in common; entries under another head are not mixed with them."""
  networks = {
    e.network: {"main_gamma": e.main_gamma, "gammas": sorted({0.0, e.main_gamma, *e.gammas}), "overrides": e.overrides}
    for e in experiments
  }
  head = {"size": size, "data": data, "networks": networks, "set": settings}
  return dict(json.loads(json.dumps(head)))  # as JSON has it, with lists for tuples


def check_folder(folder: pathlib.Path, head: Mapping[str, Any]) -> None:
  """Keeps runs of other settings or other images apart: a folder belongs to the head that it was first used with.

  Raises:
    InputError: If it holds runs with another one; the message names what differs.
  """
  if any(folder.glob("*/*/seed_*/config.json")):
    _check_head(read_json(folder / _HEAD) or {}, head, f"{folder} holds runs", "name another folder by --runs")
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / _HEAD, dict(head))


def _check_head(earlier: Mapping[str, Any], head: Mapping[str, Any], holder: str, remedy: str) -> None:
  for name, value in head.items():
    if value != earlier.get(name):
      raise InputError(f"{holder} with another {name!r}: {_shown(earlier.get(name))}, now {_shown(value)}; {remedy}.")


def _shown(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 80 else f"{text[:80]} ..."


def update(file: pathlib.Path, head: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Puts the entries of all finished runs in `folder` into a results file; what it held of others stays.

  Args:
    file: The results file.
    head: What `head_of` returns.
    folder: Of the size; holds the work directories.

  Returns:
    What is in the file now.

  Raises:
    InputError: If it has the entries of another head.
  """
  entries = {key_of(entry): entry for entry in recorded(file, head)}
  for path in sorted(folder.glob(f"*/*/seed_*/{ENTRY}")):
    if (entry := _read_entry(path)) is not None:
      entries[key_of(entry)] = entry
  rows = [entries[key] for key in sorted(entries)]
  if not rows:
    return {**head, "rows": []}
  # A line for each run: indented, the curves would be a line for each number.
  lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
  text = json.dumps(dict(head), indent=2)[:-2] + ',\n  "rows": [\n' + lines + "\n]}\n"
  file.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(file, text)
  return {**head, "rows": rows}


def recorded(file: pathlib.Path, head: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the entries of a results file, none if there is no file.

  Raises:
    InputError: If they are those of other settings or other images; the message names what differs.
  """
  earlier = read_json(file) or {}
  rows = list(earlier.get("rows", ()))
  if rows:
    _check_head(earlier, head, f"{file} has {len(rows)} runs", "name another folder by --results")
  return rows


def file_name(size: str) -> str:
  """Returns the name of the results file of a size."""
  return f"cifar10_study_{size}.json"


def seconds_of(file: pathlib.Path) -> dict[tuple[str, str], float]:
  """Returns (network, row) -> the median of the seconds that its recorded runs took, on whatever machine."""
  found: dict[tuple[str, str], list[float]] = {}
  for entry in (read_json(file) or {}).get("rows", ()):
    found.setdefault((entry["network"], entry["row"]), []).append(entry["seconds"]["total"])
  return {key: statistics.median(seconds) for key, seconds in found.items()}


def key_of(entry: Mapping[str, Any]) -> tuple[str, str, int]:
  """Returns what tells an entry from all others."""
  return entry["network"], entry["row"], entry["seed"]
