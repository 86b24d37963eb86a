"""Histories of runs, read from their work directories: the input of figures and pages."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from sapr_jax.artifacts import read_records
from sapr_jax.artifacts.files import read_json
from sapr_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RunHistory:
  """History of one run, finished or not.

  Attributes:
    config: Its configuration, flat: names as in `configs/default.py`, with dots.
    records: One mapping for each epoch, in order.
    network: Size of each channel group and MACs of the dense network; None if an older run did not note them.
    summary: Measurements of a finished run; None for others.
    label: Text that distinguishes it from the other runs.
  """

  path: pathlib.Path
  config: dict[str, Any]
  records: list[dict[str, Any]]
  network: dict[str, Any] | None
  summary: dict[str, Any] | None
  label: str

  def series(self, name: str) -> tuple[list[int], list[float]]:
    """Returns (epochs of all stages so far, values) of the records that have `name`."""
    points = [(record["step"], record[name]) for record in self.records if name in record]
    return [step for step, _ in points], [value for _, value in points]

  def last(self, name: str) -> Any:
    """Returns the newest value of `name`, None if no record has it."""
    return next((record[name] for record in reversed(self.records) if name in record), None)


def read_histories(paths: Sequence[pathlib.Path]) -> list[RunHistory]:
  """Reads work directories, each with a record at least; the runs come in the order of gamma and seed."""
  configs = [_read_config(path) for path in paths]
  histories = []
  for path, config, label in zip(paths, configs, _labels(paths, configs), strict=True):
    records = read_records(path)
    if not records:
      if (path / "summary.json").exists():
        raise InputError(f"{path} is a run that trained for no epoch, so there is nothing to draw; see its report.txt.")
      raise InputError(f"{path} has no records yet; wait for the first epoch of the run.")
    network, summary = read_json(path / "network.json"), read_json(path / "summary.json")
    histories.append(RunHistory(path, config, records, network, summary, label))
  return sorted(histories, key=lambda run: (run.config["prune.gamma"], run.config["seed"]))


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  config = read_json(path / "config.json")
  if config is None or "prune.gamma" not in config:
    raise InputError(f"{path} is not the work directory of a run: it has no readable config.json; name one that has.")
  return config


def _labels(paths: Sequence[pathlib.Path], configs: Sequence[dict[str, Any]]) -> list[str]:
  """Names each run by the fields in which the runs differ, gamma first; else by the last parts of its path."""
  names = sorted(set().union(*configs), key=lambda name: (name != "prune.gamma", name == "seed", name))
  names = [name for name in names if name != "data.path" and not name.startswith(("checkpoint.", "report."))]
  differing = [n for n in names if len({json.dumps(c.get(n)) for c in configs}) > 1]
  labels = [", ".join(f"{n.rsplit('.', 1)[-1]} {_short(c.get(n))}" for n in differing[:3]) for c in configs]
  if len(configs) > 1 and len(set(labels)) == len(labels):
    return labels
  parts = [path.resolve().parts for path in paths]
  enough = (n for n in range(1, max(map(len, parts))) if len({part[-n:] for part in parts}) == len(set(parts)))
  depth = next(enough, 1)
  return ["/".join(part[-depth:]) for part in parts]


def _short(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)
