"""How cost grows: the training step against batch, width, depth and number of devices, and compilation against depth.

    python -m benchmarks.growth

CIFAR ResNets with the method's proximal step, float32. Writes a plot, `docs/images/growth.png` (`growth_gpu.png` on a
GPU). Some three minutes on two CPU cores. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import scaling
from benchmarks.mapped_call import mapped_call
from benchmarks.measuring import record, shown, table, time_in_turns
from benchmarks.performance_page import provenance
from benchmarks.training_pieces import pieces, weight_tx
from sapr_jax.channels import ChannelGraph
from sapr_jax.method import ArchitectureGenerator, budget_penalty, macs_budget, sample_masks, split_by_group
from sapr_jax.training import cpu, state, steps

IMAGES = pathlib.Path("docs/images")
COMPILE_GOAL = 1.2


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is varied, and what the rest is held at."""

  batches: tuple[int, ...] = (16, 32, 64, 128, 256)
  widths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
  depths: tuple[int, ...] = (8, 20, 32, 56)
  generator_depths: tuple[int, ...] = (20, 56, 110)
  devices: tuple[int, ...] = scaling.VIRTUAL_DEVICES
  network: str = "resnet8"  # where batch and width are varied
  batch: int = 64  # where width and depth are varied
  steps_per_call: int = 1
  rounds: int = 4
  compilations: int = 3


SIZES = {
  "cpu": Sizes(),
  # Many steps a call, as in a run there, and larger networks; virtual devices are a CPU's.
  "gpu": Sizes(
    (64, 128, 256, 512, 1024), (0.5, 1.0, 2.0, 4.0), devices=(), network="resnet20", batch=256, steps_per_call=20
  ),
}
QUICK = Sizes((4, 8), (0.25, 0.5), (8, 14), (8, 14), (), batch=4, rounds=2, compilations=1)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="the smallest sizes, few rounds; records nothing")
  parser.add_argument("--plot", type=pathlib.Path, help="where to write the plot")
  args = parser.parse_args()
  try:
    import matplotlib  # noqa: F401
  except ModuleNotFoundError:
    sys.exit("error: matplotlib is missing; pip install -e '.[report]'")
  cpu.keep_memory()
  jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
  platform = jax.devices()[0].platform
  sizes = QUICK if args.quick else SIZES.get(platform, SIZES["gpu"])
  body = measure(sizes)
  if not args.quick:
    record("growth", body)
  path = args.plot or (None if args.quick else IMAGES / plot_name(platform))
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(body, platform).savefig(path, dpi=150)
  print(_tables(body))


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
  devices = [
    {"value": count, "seconds": statistics.median(scaling.measure_in_process(count)) / 1e3} for count in sizes.devices
  ]
  return {
    "network": sizes.network,
    "batch_size": sizes.batch,
    "steps_per_call": sizes.steps_per_call,
    **series,
    "devices": devices,
    "devices_batch": scaling.VIRTUAL_BATCH,
    "generator": measure_generators(sizes.generator_depths, sizes.compilations),
  }


def measure_steps(points: Mapping[float, tuple[str, int, float]], sizes: Sizes) -> list[dict[str, Any]]:
  """Times training steps of (network, batch, width multiplier), and what is compiled on the first call."""
  calls, first, macs = {}, {}, {}
  for value, (network, batch, width) in points.items():
    made = pieces(network, width_multiplier=width, images=max(batch, 256))
    macs[value] = made.graph.macs()
    tx = weight_tx(made.graph)
    step = steps.weight_step(made.model, tx, made.preprocessing)
    carry = state.network_state(made.variables, tx)
    call = mapped_call(made, step, carry, batch, steps_per_call=sizes.steps_per_call)
    start = time.perf_counter()
    call()
    first[value], calls[str(value)] = time.perf_counter() - start, call
  seconds = time_in_turns(calls, rounds=sizes.rounds, warm_up=1)
  rows = []
  for value, (_, batch, _) in points.items():
    called = statistics.median(seconds[str(value)])
    rows.append(
      {
        "value": value,
        "batch": batch,
        "macs": macs[value],
        "seconds": called / sizes.steps_per_call,
        "compile_seconds": first[value] - called,
      }
    )
  return rows


def measure_generators(depths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
  """Times the compilation of the generator's gradient, alone and with masks and the penalty on their MACs."""
  functions, groups = {}, {}
  for depth in depths:
    graph = pieces(f"resnet{depth}", images=1).graph
    groups[depth], functions[depth] = len(graph.groups), generator_functions(graph)
  seconds: dict[int, dict[str, list[float]]] = {depth: {name: [] for name in functions[depth]} for depth in depths}
  for _ in range(rounds + 1):
    for depth in depths:
      for name, (function, argument) in functions[depth].items():
        seconds[depth][name].append(compile_seconds(function, argument))
  return [
    {"value": depth, "groups": groups[depth]}
    | {name: statistics.median(each[1:]) for name, each in seconds[depth].items()}  # without the first round
    for depth in depths
  ]


def generator_functions(graph: ChannelGraph) -> dict[str, tuple[Callable[[Any], jax.Array], Any]]:
  """Returns name -> (scalar function of the generator's parameters, these parameters)."""
  generator = ArchitectureGenerator.for_graph(graph)
  variables = generator.init(jax.random.key(0))

  def outputs(params: Any) -> jax.Array:
    made: Any = generator.apply({**variables, "params": params})
    return made

  def penalty(params: Any) -> jax.Array:
    masks = split_by_group(sample_masks(jax.random.key(1), outputs(params)), graph)
    return budget_penalty(graph, masks, macs_budget(graph, 0.5))

  params = variables["params"]
  return {"generator": (lambda p: outputs(p).sum(), params), "generator_and_masks": (penalty, params)}


def compile_seconds(function: Callable[[Any], jax.Array], argument: Any) -> float:
  """Returns the time to trace and compile the gradient of a function."""
  jax.clear_caches()
  start = time.perf_counter()
  jax.jit(jax.grad(function)).lower(argument).compile()
  return time.perf_counter() - start


# The plot and the page.

_BLUE, _VERMILION, _GRAY = "#0072B2", "#D55E00", "#777777"  # of Okabe and Ito, for the colour-blind


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
  """Returns a figure with a panel for each thing that was varied."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8.4, 6.4), layout="constrained")
  panels = figure.subplots(2, 2).flat
  network, batch = title(report["network"]), report["batch_size"]
  _panel(panels[0], report["batch"], f"Batch ({network})", "images in a step", logarithmic=True)
  _linear_fit_line(panels[0], report["batch"], "image")
  _panel(panels[1], report["width"], f"Width ({network}, batch {batch})", "width multiplier", logarithmic=True)
  _power_fit_line(panels[1], report["width"])
  _panel(panels[2], report["depth"], f"Depth (batch {batch})", "layers")
  _linear_fit_line(panels[2], report["depth"], "layer")
  if report["devices"]:
    _panel(
      panels[3], report["devices"], f"Devices (ResNet-20, batch {report['devices_batch']} in all)", "virtual devices"
    )
    one = report["devices"][0]["seconds"]
    panels[3].axhline(1e3 * one, color=_GRAY, linestyle="--", linewidth=1.2, label="one device")
    panels[3].set_ylim(0, 1.15e3 * max(row["seconds"] for row in report["devices"]))
  else:
    _compile_panel(panels[3], report)
  for axes in panels:
    axes.legend(frameon=False, fontsize=9, loc="best")
  figure.suptitle(f"Time of a training step on a {platform.upper()}")
  return figure


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], name: str, x: str, *, logarithmic: bool = False) -> None:
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  values = [row["value"] for row in rows]
  axes.plot(values, [1e3 * row["seconds"] for row in rows], "o-", color=_BLUE, markersize=5, label="measured")
  axes.set(title=name, xlabel=x, ylabel="ms per step")
  if logarithmic:
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
  _style(axes, values)


def _style(axes: Any, values: Sequence[float]) -> None:
  axes.title.set_fontsize(11)
  axes.grid(color="#E5E5E5", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.set_xticks(values, [f"{value:g}" for value in values])
  axes.minorticks_off()


def _linear_fit_line(axes: Any, rows: Sequence[Mapping[str, Any]], unit: str) -> None:
  fixed, each = linear_fit(rows)
  x = np.linspace(rows[0]["value"], rows[-1]["value"], 100)
  label = f"{1e3 * fixed:.3g} ms + {1e3 * each:.3g} ms per {unit}"
  axes.plot(x, 1e3 * (fixed + each * x), "--", color=_VERMILION, linewidth=1.2, label=label)


def _power_fit_line(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
  power, factor = power_fit(rows)
  fitted = [1e3 * factor * row["macs"] ** power for row in rows]
  label = f"time ~ MACs$^{{{power:.2f}}}$"
  axes.plot([row["value"] for row in rows], fitted, "--", color=_VERMILION, linewidth=1.2, label=label)


def _compile_panel(axes: Any, report: Mapping[str, Any]) -> None:
  rows = report["depth"]
  axes.plot([r["value"] for r in rows], [r["compile_seconds"] for r in rows], "o-", color=_BLUE, label="weight step")
  rows = report["generator"]
  axes.plot(
    [r["value"] for r in rows], [r["generator"] for r in rows], "s--", color=_VERMILION, label="generator alone"
  )
  axes.set(title="Compilation", xlabel="layers", ylabel="seconds", ylim=(0, None))
  _style(axes, sorted({r["value"] for r in (*report["depth"], *report["generator"])}))


def title(network: str) -> str:
  return network.replace("resnet", "ResNet-")


def section(reports: Mapping[str, Any]) -> str:
  """Returns the section of docs/performance.md, from the report of each platform."""
  parts = [_HEAD]
  for platform, report in reports.items():
    parts += [f"### On a {platform.upper()}", provenance(report)]
    parts += [f"![Time of a training step]({IMAGES.name}/{plot_name(platform)})", _tables(report)]
  return "\n\n".join(parts)


_HEAD = """## How cost grows

Time of a training step of CIFAR ResNets, float32, with augmentation and the proximal step of the method, on random
images that lie on the device; median of rounds in which all sizes take turns. Virtual devices share the same cores:
they show the overhead of dividing a step, not a speed-up, and less than 1.00 says that one of them leaves cores idle.
Their steps are those without `fast_cpu`, slower than in the other tables. Compilation is the first call less a later
one, without a cache."""


def _tables(report: Mapping[str, Any]) -> str:
  network, batch = title(report["network"]), report["batch_size"]
  fixed, each = linear_fit(report["batch"])
  fixed_depth, each_depth = linear_fit(report["depth"])
  parts = [
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
    parts += [
      f"Virtual devices, ResNet-20, batch {report['devices_batch']} in all:",
      table(["devices", "ms per step", "over one device"], rows),
    ]
  return "\n\n".join([*parts, *_compilation(report)])


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
  verdict = "reached" if growth <= COMPILE_GOAL else "missed"
  each = (last["generator_and_masks"] - first["generator_and_masks"]) / (last["groups"] - first["groups"])
  return [
    "Seconds to compile:",
    table(["layers", "weight step", "groups", "generator", "with masks and MACs penalty"], rows),
    f"Goal: the generator's compilation does not grow with the number of layers (at most {COMPILE_GOAL} times from"
    f" {first['groups']} to {last['groups']} groups). {growth:.2f} times: {verdict}."
    f" With a mask for each group and the penalty it takes {_ms(each)} more for each further group.",
  ]


if __name__ == "__main__":
  main()
