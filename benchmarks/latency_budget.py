"""A budget in latency beside one in MACs: what it keeps in the same time, and how well the time was predicted.

    taskset -c 0 python -m benchmarks.latency_budget [--quick] [ROW ...]

On one core of a CPU, where processor time counts, or on an accelerator. The dense network's time is that which was
measured with the table, the others' by their ratio to it within a round, so that it does not matter how busy it
is. Random scores are projected onto half of the network's MACs, with widths that are multiples of 1 and 8, and onto a
latency that is predicted for these two. Some ten minutes for each row on a CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.measuring import goal, measure_rows, median_ratio, shown, table, time_in_turns
from benchmarks.training_pieces import forward, random_scores, random_variables
from sapr_jax import (
  latency_cost,
  macs_budget,
  make_budget,
  measure_latency,
  models,
  project_to_budget,
  prune,
  trace_channels,
)
from sapr_jax.models import with_fast_layers
from sapr_jax.runtime import keep_memory
from sapr_jax.training.latency import clock

SHAPE = (1, 32, 32, 3)
SHARE = 0.5
GOAL = 0.1
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Row:
  name: str
  title: str
  batch: int


_TITLES = {"resnet56": "ResNet-56 (CIFAR)", "mobilenetv2_cifar": "MobileNet-V2 (CIFAR)"}
ON_CPU, ON_ACCELERATORS = (1, 32), (32, 1024)
"""Batch sizes."""
ROWS = {
  f"{name}_{batch}": Row(name, _TITLES[name], batch)
  for name, batch in itertools.product(_TITLES, sorted({*ON_CPU, *ON_ACCELERATORS}))
}


def main() -> None:
  keep_memory()
  batches = ON_CPU if jax.devices()[0].platform == "cpu" else ON_ACCELERATORS
  default = [name for name, row in ROWS.items() if row.batch in batches]
  measured = measure_rows(__doc__, "latency_budget", "rows", ROWS, measure, default)
  print("\n\n".join(_table(row) for row in measured.values()))


# Measuring.


def measure(row: Row, quick: bool) -> dict[str, Any]:
  if quick:
    row = dataclasses.replace(row, name="resnet8", batch=2)
  multiples = (1,) if quick else (1, 8)
  model = models.create(row.name, width_multiplier=0.125 if quick else 1.0)
  variables = random_variables(model, SHAPE)
  graph = trace_channels(model, variables, SHAPE)
  start = time.monotonic()
  # On a CPU the program is served with the layers that are fast there.
  transform = with_fast_layers if jax.devices()[0].platform == "cpu" else None
  times = measure_latency(model, variables, graph, batch_size=row.batch, transform=transform)
  took = time.monotonic() - start
  cost = latency_cost(graph, times)
  scores = random_scores(graph)
  masks: dict[str, Any] = {DENSE: graph.full_masks()}
  for round_to in multiples:
    budget = macs_budget(graph, SHARE, of="network")
    by_macs = masks[f"half the MACs, round_to {round_to}"] = project_to_budget(graph, scores, budget, round_to=round_to)
    # Where uneven widths are predicted to be slower than all channels, these are what the budget allows.
    amount = min(cost.time(graph.kept(by_macs)), cost(graph.kept()))
    by_time = project_to_budget(graph, scores, make_budget(graph, cost, amount=amount))
    masks[f"the latency of round_to {round_to}"] = by_time
  shape = (row.batch, *SHAPE[1:])
  calls = {name: forward(*prune(model, variables, graph, kept), shape) for name, kept in masks.items()}
  rounds, repeats = (3, 1) if quick else (41, max(1, 32 // row.batch // 4))
  seconds = time_in_turns(calls, rounds=rounds, repeats=repeats, clock=clock)
  ratios = {name: median_ratio(each, seconds[DENSE]) for name, each in seconds.items()}
  return {
    "title": row.title,
    "batch": row.batch,
    "table": {
      "seconds": round(took, 1),
      "widths": int(sum(layer.milliseconds.size for layer in times.layers)),
      "networks": [{k: np.round(v, 3).tolist() for k, v in known.items()} for known in times.networks],
    },
    "forms": {
      name: {
        "milliseconds": round(ratios[name] * times.networks[0]["milliseconds"], 4),
        "predicted": round(cost.time(graph.kept(kept)), 4),
        "macs": graph.macs(kept),
        "channels": int(graph.kept(kept).sum()),
        "widths": graph.kept(kept).tolist(),
      }
      for name, kept in masks.items()
    },
  }


# What the page shows.


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  found = []
  for row in report["rows"].values():
    found += [f"{row['title']}, batch {row['batch']}:", _table(row)]
  return [*found, "\n".join(_verdict(row) for row in report["rows"].values())]


def _table(row: Mapping[str, Any]) -> str:
  dense, rows = row["forms"][DENSE], []
  for name, form in row["forms"].items():
    speed_up = dense["milliseconds"] / form["milliseconds"]
    kept = [f"{form[what] / dense[what]:.1%}" for what in ("macs", "channels")]
    times = [
      shown(form["milliseconds"]),
      shown(form["predicted"]),
      f"{form['predicted'] / form['milliseconds'] - 1:+.1%}",
    ]
    rows.append([name, *kept, *times, shown(speed_up), shown(speed_up * form["macs"] / dense["macs"], 2)])
  header = ["network", "MACs", "channels", "ms", "predicted, ms", "error", "speed-up", "share of the promised one"]
  return table(header, rows)


def _verdict(row: Mapping[str, Any]) -> str:
  errors = [abs(form["predicted"] / form["milliseconds"] - 1) for form in row["forms"].values()]
  text = (
    f"{row['title']}, batch {row['batch']}: predicted within {max(errors):.1%}, asked for {GOAL:.0%}; the table of"
    f" {row['table']['widths']} widths took {row['table']['seconds']:.0f} s."
  )
  return goal(max(errors) <= GOAL, text)


if __name__ == "__main__":
  main()
