"""Ways to serve a network on a CPU: JAX with the weights as arguments or as constants, and ONNX Runtime.

    taskset -c 0 python -m benchmarks.serving [--quick] [ROW ...]

On one core, where processor time counts, whatever else the machine does. Random scores are projected onto half of the
network's MACs, with widths that are multiples of 1, 8 and 16, and with residual streams that are cut too. Some minutes
for each row. Needs onnx and onnxruntime.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import goal, measure_rows, median_ratio, needed, shown, table, time_in_turns
from benchmarks.training_pieces import forward, random_scores, random_variables
from sapr_jax import InputError, export, macs_budget, models, project_to_budget, prune, trace_channels
from sapr_jax.channels import ChannelGraph
from sapr_jax.models import with_fast_layers
from sapr_jax.runtime import keep_memory
from sapr_jax.training.latency import clock

ARGUMENTS, CONSTANTS, ONNX = "JAX", "JAX, constants", "ONNX Runtime"
DENSE, ROUNDED, EVERYWHERE = "dense", "round_to 8", "round_to 8, residual streams too"
SHARE = 0.5
GOAL = 0.9


@dataclasses.dataclass(frozen=True)
class Row:
  name: str
  title: str
  image_size: int
  classes: int
  batch: int


ROWS = {
  "resnet56_1": Row("resnet56", "ResNet-56 (CIFAR)", 32, 10, 1),
  "resnet56_32": Row("resnet56", "ResNet-56 (CIFAR)", 32, 10, 32),
  "mobilenetv2_cifar_32": Row("mobilenetv2_cifar", "MobileNet-V2 (CIFAR)", 32, 10, 32),
  "resnet50_1": Row("resnet50", "ResNet-50, 112 pixels", 112, 1000, 1),
  "resnet50_8": Row("resnet50", "ResNet-50, 112 pixels", 112, 1000, 8),
}
OF_THE_GOAL = "resnet50_8"


def main() -> None:
  keep_memory()
  if jax.default_backend() != "cpu":
    print("nothing to measure: this is about CPUs")
    return
  runtime = needed("onnxruntime", "bench")
  measured = measure_rows(__doc__, "serving", "rows", ROWS, lambda row, quick: measure(row, quick, runtime))
  print("\n\n".join(_table(row) for row in measured.values()))


# Measuring.


def measure(row: Row, quick: bool, runtime: Any) -> dict[str, Any]:
  size = 32 if quick else row.image_size
  images = np.random.default_rng(0).normal(size=(row.batch, size, size, 3)).astype(np.float32)
  forms, macs = _forms("resnet8" if quick else row.name, row.classes, (1, size, size, 3))
  calls: dict[str, Callable[[], Any]] = {}
  for form, (model, variables) in forms.items():
    for way, call in _ways(model, variables, images, runtime).items():
      calls[f"{form}: {way}"] = call
  trial = time_in_turns(calls, rounds=1, warm_up=2, clock=clock)
  repeats = max(1, round(0.01 / min(seconds[0] for seconds in trial.values())))
  seconds = time_in_turns(calls, rounds=2 if quick else 9, warm_up=0, repeats=repeats, clock=clock)
  found: dict[str, Any] = {}
  for form in forms:
    dense, own = ({way: seconds[f"{f}: {way}"] for way in (ARGUMENTS, CONSTANTS, ONNX)} for f in (DENSE, form))
    found[form] = {
      "macs": macs[form],
      "milliseconds": {way: round(1e3 * statistics.median(each), 4) for way, each in own.items()},
      "jax_over_it": {way: round(median_ratio(own[ARGUMENTS], each), 4) for way, each in own.items()},
      "speed_up": {way: round(median_ratio(dense[way], each), 4) for way, each in own.items()},
    }
  return {"title": row.title, "batch": row.batch, "forms": found}


def _forms(name: str, classes: int, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, int]]:
  """Returns name -> (model, variables), and name -> MACs; forms whose widths cannot meet the budget are left out."""
  model = models.create(name, num_classes=classes)
  variables = random_variables(model, shape)
  graph, whole = (trace_channels(model, variables, shape, select=select) for select in ("blocks", "exact"))
  forms, macs = {DENSE: (model, variables)}, {DENSE: graph.macs()}

  def add(form: str, graph: ChannelGraph, round_to: int) -> None:
    budget = macs_budget(graph, SHARE, of="network")
    masks = project_to_budget(graph, random_scores(graph), budget, round_to=round_to)
    forms[form], macs[form] = prune(model, variables, graph, masks), graph.macs(masks)

  for form, found, round_to in (
    ("round_to 1", graph, 1),
    (ROUNDED, graph, 8),
    ("round_to 16", graph, 16),
    (EVERYWHERE, whole, 8),
  ):
    with contextlib.suppress(InputError):
      add(form, found, round_to)
  return forms, macs


def _ways(model: Any, variables: Any, images: np.ndarray, runtime: Any) -> dict[str, Callable[[], Any]]:
  """Returns way -> call that computes the logits of the images and waits for them."""
  weights, x = jax.device_put(variables), jnp.asarray(images)
  closed_program = jax.jit(with_fast_layers(lambda x: model.apply(weights, x, train=False))).lower(x).compile()
  options = runtime.SessionOptions()
  options.intra_op_num_threads = len(os.sched_getaffinity(0))
  with tempfile.TemporaryDirectory() as directory:
    file = pathlib.Path(directory) / "net.onnx"
    export(file, model, variables, (1, *images.shape[1:]))
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
  return {
    ARGUMENTS: forward(model, variables, images.shape),
    CONSTANTS: lambda: jax.block_until_ready(closed_program(x)),
    ONNX: lambda: session.run(["logits"], {"images": images}),
  }


# What the page shows.


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  del platform
  found = []
  for row in report["rows"].values():
    found += [f"{row['title']}, batch {row['batch']}:", _table(row)]
  if OF_THE_GOAL in report["rows"]:
    row = report["rows"][OF_THE_GOAL]
    reached = _share(row, ROUNDED, ONNX)
    text = f"{shown(reached, 2)} of the speed-up that its MACs promise in {ONNX}, asked for at least {GOAL:g}."
    found.append(goal(reached >= GOAL, f"{row['title']}, batch {row['batch']}, {ROUNDED}: {text}"))
  return found


def _share(row: Mapping[str, Any], form: str, way: str) -> float:
  """Returns the speed-up over the ratio of the MACs."""
  return row["forms"][form]["speed_up"][way] * row["forms"][form]["macs"] / row["forms"][DENSE]["macs"]


def _table(row: Mapping[str, Any]) -> str:
  rows = []
  for form, found in row["forms"].items():
    times = [shown(found["milliseconds"][way]) for way in (ARGUMENTS, CONSTANTS, ONNX)]
    faster = [shown(found["jax_over_it"][way]) for way in (CONSTANTS, ONNX)]
    shares = [shown(_share(row, form, way), 2) for way in (ARGUMENTS, CONSTANTS, ONNX)]
    rows.append([form, f"{found['macs'] / row['forms'][DENSE]['macs']:.1%}", *times, *faster, *shares])
  ways = (ARGUMENTS, CONSTANTS, ONNX)
  header = ["network", "MACs", *(f"{way}, ms" for way in ways), *(f"{ARGUMENTS} over {way}" for way in ways[1:])]
  return table([*header, *(f"share, {way}" for way in ways)], rows)


if __name__ == "__main__":
  main()
