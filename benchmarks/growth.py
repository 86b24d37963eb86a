"""Growth of cost: the training step against batch, width, depth and number of devices, and compilation against depth.

    python -m benchmarks.growth [--quick]

CIFAR ResNets with the method's proximal step, float32. Writes a plot, `docs/images/growth.png` (`growth_gpu.png` on a
GPU). Some three minutes on two CPU cores. Needs matplotlib.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import virtual_devices
from benchmarks.measuring import goal, needed, parser, record, seconds_of, shown, table, time_in_turns
from benchmarks.training_pieces import compile_seconds, pieces, weight_tx
from sapr_jax.channels import ChannelGraph
from sapr_jax.method import ArchitectureGenerator, budget_penalty, macs_budget, sample_masks, split_by_group
from sapr_jax.runtime import keep_memory

IMAGES = pathlib.Path("docs/images")
COMPILE_GOAL = 1.2


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Values of each quantity that is varied, and of those that are not."""

  batches: tuple[int, ...] = (16, 32, 64, 128, 256)
  widths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
  depths: tuple[int, ...] = (8, 20, 32, 56)
  generator_depths: tuple[int, ...] = (20, 56, 110)
  devices: tuple[int, ...] = (1, 2, 4, 8)
  network: str = "resnet8"  # where batch and width are varied
  batch: int = 64  # where width and depth are varied
  steps_per_call: int = 1
  rounds: int = 4
  compilations: int = 3


CPU = Sizes()
# Many steps a call, as in a run there, and larger networks; virtual devices are a CPU's.
GPU = Sizes(
  (64, 128, 256, 512, 1024), (0.5, 1.0, 2.0, 4.0), devices=(), network="resnet20", batch=256, steps_per_call=20
)
QUICK = Sizes((4, 8), (0.25, 0.5), (8, 14), (8, 14), (), batch=4, rounds=2, compilations=1)


def main() -> None:
  quick = parser(__doc__, "the smallest sizes, few rounds").parse_args().quick
  needed("matplotlib", "report")
  keep_memory()
  jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
  platform = jax.devices()[0].platform
  report = measure(QUICK if quick else CPU if platform == "cpu" else GPU)
  figure = plot(report, platform)
  if not quick:
    record("growth", report)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / plot_name(platform), dpi=150)
  print("\n\n".join(tables(report)))


def plot_name(platform: str) -> str:
  return "growth.png" if platform == "cpu" else f"growth_{platform}.png"


# Measuring.


def measure(sizes: Sizes) -> dict[str, Any]:
  """Measures everything; times in seconds, each a median."""
  varied: dict[str, dict[float, tuple[str, int, float]]] = {
    "batch": {n: (sizes.network, n, 1.0) for n in sizes.batches},
    "width": {w: (sizes.network, sizes.batch, w) for w in sizes.widths},
    "depth": {d: (f"resnet{d}", sizes.batch, 1.0) for d in sizes.depths},
  }
  series = {}
  for name, points in varied.items():
    series[name] = measure_steps(points, sizes)
    print(f"{name}: measured", file=sys.stderr, flush=True)
  devices = {count: statistics.median(virtual_devices.measure_in_process(count)) / 1e3 for count in sizes.devices}
  return {
    "network": sizes.network,
    "batch_size": sizes.batch,
    "steps_per_call": sizes.steps_per_call,
    **series,
    "devices": [{"value": count, "seconds": seconds} for count, seconds in devices.items()],
    "devices_batch": virtual_devices.BATCH,
    "generator": measure_generators(sizes.generator_depths, sizes.compilations),
  }


def measure_steps(points: Mapping[float, tuple[str, int, float]], sizes: Sizes) -> list[dict[str, Any]]:
  """Times training steps of (network, batch, width multiplier), and what is compiled on the first call."""
  calls, rows = {}, []
  for value, (network, batch, width) in points.items():
    made = pieces(network, width_multiplier=width, images=max(batch, 256))
    tx = weight_tx(made.graph)
    call = made.call(made.weight_step(tx), made.state(tx), batch, steps_per_call=sizes.steps_per_call)
    first, calls[str(value)] = seconds_of(call), call
    rows.append({"value": value, "batch": batch, "macs": made.graph.macs(), "compile_seconds": first})
  seconds = time_in_turns(calls, rounds=sizes.rounds, warm_up=1)
  for row, called in zip(rows, map(statistics.median, seconds.values()), strict=True):
    row |= {"seconds": called / sizes.steps_per_call, "compile_seconds": row["compile_seconds"] - called}
  return rows


def measure_generators(depths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
  """Times the compilation of the generator's gradient, alone and with masks and the penalty on their MACs."""
  graphs = {depth: pieces(f"resnet{depth}", images=1).graph for depth in depths}
  found = [{"value": depth, "groups": len(graph.groups)} for depth, graph in graphs.items()]
  functions = [generator_functions(graph) for graph in graphs.values()]
  compile_seconds(*functions[0]["generator"])  # the first compilation takes longer
  seconds = [
    [{name: compile_seconds(*each) for name, each in made.items()} for made in functions] for _ in range(rounds)
  ]
  for row, *times in zip(found, *seconds, strict=True):
    row |= {name: statistics.median(each[name] for each in times) for name in times[0]}
  return found


def generator_functions(graph: ChannelGraph) -> dict[str, tuple[Callable[[Any], jax.Array], Any]]:
  """Returns name -> (scalar function of the generator's parameters, these parameters)."""
  generator = ArchitectureGenerator.for_graph(graph)
  variables = generator.init(jax.random.key(0))

  def outputs(params: Any) -> Any:
    return generator.apply({**variables, "params": params})

  def penalty(params: Any) -> jax.Array:
    masks = split_by_group(sample_masks(jax.random.key(1), outputs(params)), graph)
    return budget_penalty(graph, masks, macs_budget(graph, 0.5))

  params = variables["params"]
  return {"generator": (lambda p: outputs(p).sum(), params), "generator_and_masks": (penalty, params)}


# The plot.


def linear_fit(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  """Returns (a, b) of seconds = a + b value, with the least relative errors."""
  x, y = np.array([[row["value"], row["seconds"]] for row in rows]).T
  slope, intercept = np.polyfit(x, y, 1, w=1 / y)
  return float(intercept), float(slope)


def power_fit(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  """Returns (e, c) of seconds = c MACs^e."""
  slope, intercept = np.polyfit(np.log([row["macs"] for row in rows]), np.log([row["seconds"] for row in rows]), 1)
  return float(slope), float(np.exp(intercept))


def plot(report: Mapping[str, Any], platform: str) -> Any:
  """Returns a figure with a panel for each thing that was varied: what was measured, and a fit."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8.4, 6.4), layout="constrained")
  figure.suptitle(f"Time of a training step on a {platform.upper()}")
  network, batch = title(report["network"]), report["batch_size"]
  power, factor = power_fit(report["width"])
  fitted = [factor * row["macs"] ** power for row in report["width"]]
  devices = report["devices"]
  for axes, (key, name, label, fit) in zip(
    figure.subplots(2, 2).flat,
    (
      ("batch", f"Batch ({network})", "images in a step", _line(report["batch"], "image")),
      ("width", f"Width ({network}, batch {batch})", "width multiplier", (fitted, f"time ~ MACs$^{{{power:.2f}}}$")),
      ("depth", f"Depth (batch {batch})", "layers", _line(report["depth"], "layer")),
      (
        "devices",
        f"Devices (ResNet-20, batch {report['devices_batch']} in all)",
        "virtual devices",
        ([row["seconds"] for row in devices[:1]] * len(devices), "one device"),
      ),
    ),
    strict=True,
  ):
    if not (rows := report[key]):
      axes.set_visible(False)
      continue
    values = [row["value"] for row in rows]
    axes.plot(values, [1e3 * row["seconds"] for row in rows], "o-", color="#0072B2", markersize=5, label="measured")
    axes.plot(values, [1e3 * seconds for seconds in fit[0]], "--", color="#D55E00", linewidth=1.2, label=fit[1])
    axes.set(title=name, xlabel=label, ylabel="ms per step", ylim=(0, None))
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.grid(color="#E5E5E5")
    axes.legend(frameon=False, fontsize=9)
  return figure


def _line(rows: Sequence[Mapping[str, Any]], unit: str) -> tuple[list[float], str]:
  """Returns the linear fit at the values of the rows, and its label."""
  fixed, each = linear_fit(rows)
  return [fixed + each * row["value"] for row in rows], f"{_ms(fixed)} + {_ms(each)} per {unit}"


# What the page shows.


def title(network: str) -> str:
  return network.replace("resnet", "ResNet-")


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  return [f"![Time of a training step]({IMAGES.name}/{plot_name(platform)})", *tables(report)]


def tables(report: Mapping[str, Any]) -> list[str]:
  """Returns the tables, each after a line that says what it shows."""
  network, batch = title(report["network"]), report["batch_size"]
  fixed, each = linear_fit(report["batch"])
  fixed_depth, each_depth = linear_fit(report["depth"])
  found = [
    f"Batch, {network}: {_ms(fixed)} + {_ms(each)} per image.",
    _series_table("images", report["batch"], "ms per image", lambda row: row["batch"]),
    f"Width, {network}, batch {batch}: time goes with MACs to the power of {power_fit(report['width'])[0]:.2f}.",
    _series_table("width", report["width"], "ms per forward GMAC", lambda row: row["batch"] * row["macs"] / 1e9),
    f"Depth, batch {batch}: {_ms(fixed_depth)} + {_ms(each_depth)} per layer.",
    _series_table("layers", report["depth"], "ms per layer", lambda row: row["value"]),
  ]
  if report["devices"]:
    one = report["devices"][0]["seconds"]
    rows = [[r["value"], shown(1e3 * r["seconds"]), f"{r['seconds'] / one:.2f}"] for r in report["devices"]]
    found.append(f"Virtual devices, ResNet-20, batch {report['devices_batch']} in all:")
    found.append(table(["devices", "ms per step", "over one device"], rows))
  return [*found, *_compilation(report)]


def _ms(seconds: float) -> str:
  return f"{'-' if seconds < 0 else ''}{shown(1e3 * abs(seconds))} ms"


def _series_table(
  name: str, rows: Sequence[Mapping[str, Any]], per: str, work: Callable[[Mapping[str, Any]], float]
) -> str:
  cells = [
    [f"{r['value']:g}", shown(r["macs"] / 1e6), shown(1e3 * r["seconds"]), shown(1e3 * r["seconds"] / work(r))]
    for r in rows
  ]
  return table([name, "MACs an image, M", "ms per step", per], cells)


def _compilation(report: Mapping[str, Any]) -> list[str]:
  """Says what compilation takes, and whether the generator's grows with the number of layers."""
  generator = {row["value"]: row for row in report["generator"]}
  steps = {row["value"]: row["compile_seconds"] for row in report["depth"]}
  rows = []
  for depth in sorted(steps | generator):
    made = generator.get(depth, {})
    cells = [steps.get(depth), made.get("groups"), made.get("generator"), made.get("generator_and_masks")]
    rows.append([depth, *("" if cell is None else shown(cell) for cell in cells)])
  first, last = report["generator"][0], report["generator"][-1]
  growth = last["generator"] / first["generator"]
  each = (last["generator_and_masks"] - first["generator_and_masks"]) / (last["groups"] - first["groups"])
  return [
    "Seconds to compile:",
    table(["layers", "weight step", "groups", "generator", "with masks and MACs penalty"], rows),
    f"With a mask for each group and the penalty the generator takes {_ms(each)} more for each further group.",
    goal(
      growth <= COMPILE_GOAL,
      f"the generator takes {growth:.2f} times as long to compile for {last['groups']} groups as for"
      f" {first['groups']}, asked for no growth (at most {COMPILE_GOAL}).",
    ),
  ]


if __name__ == "__main__":
  main()
