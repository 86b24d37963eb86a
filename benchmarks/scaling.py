"""Expectations for 1 to 256 chips: computed from published speeds, and measured where that is possible on a CPU.

    python -m benchmarks.scaling [--tables] [--step-time CHIP/NETWORK=MS ...]

It counts parameters, MACs and checkpoint bytes of each network, measures the step on 1, 2, 4 and 8 virtual CPU devices
and a checkpoint on this disk, takes the rate of the input pipeline from `results/input_pipeline.json`, writes all of it
with the assumptions to `results/scaling.json`, and renews the tables of `docs/scaling.md` from that file. Some ten
minutes on two CPU cores. `--tables` only renews the tables; `--step-time tpu_v5e/resnet50=0.3` puts a measured time
(milliseconds of one training step for each image on one chip) in the place of the assumed one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import virtual_devices
from benchmarks.measuring import renew_tables, table
from sapr_jax import models, report, trace_channels
from sapr_jax.artifacts import Checkpointer
from sapr_jax.artifacts.files import write_json
from sapr_jax.channels import ChannelGraph
from sapr_jax.method import ArchitectureGenerator, GeneratorState
from sapr_jax.training import optimizers
from sapr_jax.training.state import TrainState

RESULTS = pathlib.Path("results/scaling.json")
PAGE = pathlib.Path("docs/scaling.md")
Results = Mapping[str, Any]

# As published by the makers; docs/scaling.md says where. `ring_gbytes`: what a chip sends in one direction of one ring
# of chips, GB/s (TPU: the bidirectional figure of a chip, halved, divided by the axes of the torus; NVLink: halved).
# `node_gbytes`: the same for a node of `chips_per_host` GPUs on the network. `host_cores`: physical ones, or vCPUs / 2.
_A100 = {"peak_tflops": 312, "ring_gbytes": 300, "chips_per_host": 8, "host_cores": 128}
_H100 = {"peak_tflops": 989, "ring_gbytes": 450, "chips_per_host": 8, "host_cores": 112}
CHIPS: dict[str, dict[str, Any]] = {
  "tpu_v4": {"name": "TPU v4", "peak_tflops": 275, "ring_gbytes": 100, "chips_per_host": 4, "host_cores": 120},
  "tpu_v5e": {"name": "TPU v5e", "peak_tflops": 197, "ring_gbytes": 100, "chips_per_host": 8, "host_cores": 112},
  "tpu_v5p": {"name": "TPU v5p", "peak_tflops": 459, "ring_gbytes": 200, "chips_per_host": 4, "host_cores": 104},
  "tpu_v6e": {"name": "TPU v6e", "peak_tflops": 918, "ring_gbytes": 200, "chips_per_host": 8, "host_cores": 90},
  "a100_ib": {"name": "A100, 200 Gb/s a node", **_A100, "node_gbytes": 25},
  "h100_ib": {"name": "H100, 400 Gb/s a node", **_H100, "node_gbytes": 50},
  "h100_ethernet": {"name": "H100, 100 GbE a node", **_H100, "node_gbytes": 12.5},
}
# `share_of_peak` is an assumption; `kept` the share of the MACs that fine-tuning has left, from README.md.
NETWORKS: dict[str, dict[str, Any]] = {
  "resnet34": {"name": "ResNet-34", "config": "resnet34_imagenet", "share_of_peak": 0.4, "kept": 0.557},
  "resnet50": {"name": "ResNet-50", "config": "resnet50_imagenet", "share_of_peak": 0.4, "kept": 0.444},
  "resnet101": {"name": "ResNet-101", "config": "resnet101_imagenet", "share_of_peak": 0.4, "kept": 0.446},
  "mobilenetv2": {"name": "MobileNet-V2", "config": "mobilenetv2_imagenet", "share_of_peak": 0.1, "kept": 0.699},
  "resnet56": {"name": "ResNet-56 (CIFAR)", "config": "resnet56_cifar10", "share_of_peak": 0.05, "kept": 0.482},
}
IMAGES = {"imagenet": (1_281_167, 50_000), "cifar10": (50_000, 10_000)}
ASSUMPTIONS = {"images_per_chip": 64, "disk_mbytes": 100}
COUNTS = (1, 8, 16, 64, 256)
FIXED_BATCH = 256
ROUNDS = 3


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tables", action="store_true", help="measure nothing, only renew the tables")
  parser.add_argument("--step-time", nargs="+", default=[], metavar="CHIP/NETWORK=MS", help="measured, for one image")
  args = parser.parse_args()
  results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
  if not args.tables:
    results = measure() | {"milliseconds_per_image": results.get("milliseconds_per_image", {})}
  results |= {"chips": CHIPS, "assumptions": ASSUMPTIONS}
  for network, about in results["networks"].items():
    about |= NETWORKS[network]
  for text in args.step_time:
    name, _, value = text.partition("=")
    chip, _, network = name.partition("/")
    if chip not in CHIPS or network not in NETWORKS:
      sys.exit(f"error: {name} must be one of {', '.join(CHIPS)} / {', '.join(NETWORKS)}")
    results["milliseconds_per_image"][name] = float(value)
  write_json(RESULTS, results)
  PAGE.write_text(renew(PAGE.read_text(), results))


# The arithmetic.


def step_seconds(macs: float, images: float, peak_tflops: float, share_of_peak: float) -> float:
  """Forward and backward pass: three times the forward pass, two operations a MAC."""
  return 3 * 2 * macs * images / (share_of_peak * peak_tflops * 1e12)


def all_reduce_seconds(num_bytes: float, chips: int, gbytes: float) -> float:
  """Ring all-reduce: each chip sends 2 (n - 1) / n of the bytes."""
  return 2 * (chips - 1) / chips * num_bytes / (gbytes * 1e9)


def bandwidth(chip: Mapping[str, Any], chips: int) -> float:
  """GB/s of the slowest link of a ring through all chips."""
  beyond_a_node = chips > chip["chips_per_host"] and "node_gbytes" in chip
  return min(chip["ring_gbytes"], chip["node_gbytes"]) if beyond_a_node else chip["ring_gbytes"]


def image_seconds(results: Results, chip: str, network: str) -> float:
  """One image's share of a training step on one chip: measured if it is known, else assumed."""
  measured = results["milliseconds_per_image"].get(f"{chip}/{network}")
  if measured is not None:
    return measured / 1000
  about = results["networks"][network]
  return step_seconds(about["macs"], 1, results["chips"][chip]["peak_tflops"], about["share_of_peak"])


def times(results: Results, chip: str, network: str, chips: int, images: float) -> tuple[float, float]:
  """Seconds of (computation, all-reduce) of a step with `images` a chip; nothing overlaps."""
  about = results["networks"][network]
  speed = bandwidth(results["chips"][chip], chips)
  return images * image_seconds(results, chip, network), all_reduce_seconds(about["all_reduce_bytes"], chips, speed)


def run_images(about: Mapping[str, Any]) -> dict[str, float]:
  """Work of a whole run, in training images of the dense network."""
  searching = about["epochs"] - about["start_epoch"]
  train, test = about["train_images"], about["test_images"]
  return {
    "training": about["epochs"] * train,
    "generator": searching * about["generator_share"] * train,
    "evaluation": (about["epochs"] + searching + about["kept"] * about["finetune_epochs"]) * test / 3,
    "fine-tuning": about["kept"] * about["finetune_epochs"] * train,
  }


def hours(results: Results, chip: str, network: str, chips: int, images: float) -> float:
  """Hours of a whole run, if nothing but the step takes time."""
  total = sum(run_images(results["networks"][network]).values())
  return total / (images * chips) * sum(times(results, chip, network, chips, images)) / 3600


# The tables of the page.


def renew(page: str, results: Results) -> str:
  """Returns the page with the tables that `results` gives."""
  return renew_tables(page, {name: make(results) for name, make in TABLES.items()})


def chips_table(results: Results) -> str:
  head = ["chip", "peak bfloat16, TFLOP/s", "ring, GB/s", "ring across nodes, GB/s", "chips a host", "cores a host"]
  rows = []
  for chip in results["chips"].values():
    across = chip.get("node_gbytes", chip["ring_gbytes"])
    rows.append(
      [chip["name"], chip["peak_tflops"], chip["ring_gbytes"], across, chip["chips_per_host"], chip["host_cores"]]
    )
  return table(head, rows)


def networks_table(results: Results) -> str:
  head = ["network", "parameters", "all-reduce a step, MB", "MACs an image", "share of peak, assumed"]
  rows = []
  for about in results["networks"].values():
    counts = [f"{about['params']:,}", f"{about['all_reduce_bytes'] / 1e6:.1f}", f"{about['macs'] / 1e6:,.1f} M"]
    rows.append([about["name"], *counts, f"{about['share_of_peak']:.0%}"])
  return table(head, rows)


def step_table(results: Results, images: Callable[[int], float]) -> str:
  """ResNet-50: milliseconds of computation + all-reduce, and the share of the time that computes."""
  rows = []
  for key, chip in results["chips"].items():
    parts = [times(results, key, "resnet50", count, images(count)) for count in COUNTS]
    cells = [f"{1e3 * step:.2f} + {1e3 * reduce:.2f} ({step / (step + reduce):.0%})" for step, reduce in parts]
    rows.append([chip["name"], *cells])
  return table(["chip", *(f"n = {count}, {images(count):g} each" for count in COUNTS)], rows)


def efficiency_table(results: Results) -> str:
  images, rows = results["assumptions"]["images_per_chip"], []
  for key, chip in results["chips"].items():
    parts = [times(results, key, network, COUNTS[-1], images) for network in results["networks"]]
    rows.append([chip["name"], *(f"{step / (step + reduce):.0%}" for step, reduce in parts)])
  return table(["chip", *(about["name"] for about in results["networks"].values())], rows)


def input_table(results: Results) -> str:
  rate, rows = results["images_per_second_per_core"], []
  streamed = [network for network, about in results["networks"].items() if about["streamed"]]
  hosts = {chip["name"].split(",")[0]: key for key, chip in reversed(results["chips"].items())}  # whatever the network
  for host, key in reversed(hosts.items()):
    chip, cells = results["chips"][key], []
    for network in streamed:
      wanted = 1 / image_seconds(results, key, network)
      fed = chip["host_cores"] * rate / wanted
      cells.append(f"{wanted:,.0f}: {wanted / rate:.0f} cores a chip, feeds {fed:.1f} of {chip['chips_per_host']}")
    rows.append([host, *cells])
  return table(["host", *(results["networks"][network]["name"] for network in streamed)], rows)


def run_table(results: Results) -> str:
  extras, chips, rows = ("generator", "evaluation", "fine-tuning"), ("tpu_v5e", "a100_ib", "h100_ib"), []
  for network, about in results["networks"].items():
    parts, batch = run_images(about), about["batch_size"] / 8
    shares = [f"{parts[part] / parts['training']:.1%}" for part in extras]
    rows.append([about["name"], *shares, *(f"{hours(results, chip, network, 8, batch):.2f}" for chip in chips)])
  return table(["network", *extras, "hours, 8 TPU v5e", "hours, 8 A100", "hours, 8 H100"], rows)


def checkpoint_table(results: Results) -> str:
  speed = results["assumptions"]["disk_mbytes"]
  sizes = {about["name"]: about["checkpoint_bytes"] / 1e6 for about in results["networks"].values()}
  rows = [[name, f"{size:.1f}", f"{size / speed:.1f}"] for name, size in sizes.items()]
  return table(["network", "checkpoint, MB", f"seconds at {speed} MB/s"], rows)


def disk_table(results: Results) -> str:
  cells = [f"{results['checkpoint_seconds'][name]:.2f}" for name in ("blocked", "written", "restored")]
  return table(["network", "the run waits, s", "until written, s", "restored, s"], [["ResNet-50", *cells]])


def virtual_table(results: Results) -> str:
  rows = []
  for count, steps in results["virtual_devices"].items():
    cells = [f"{f(steps):.0f}" for f in (min, statistics.median, max)]
    rows.append([count, results["virtual_batch"] // int(count), *cells])
  return table(["virtual devices", "images each", "ms a step, lowest", "median", "highest"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
  "chips": chips_table,
  "networks": networks_table,
  "fixed batch": lambda results: step_table(results, lambda chips: FIXED_BATCH / chips),
  "batch per chip": lambda results: step_table(results, lambda _: results["assumptions"]["images_per_chip"]),
  "efficiency": efficiency_table,
  "input": input_table,
  "run": run_table,
  "checkpoint": checkpoint_table,
  "disk": disk_table,
  "virtual devices": virtual_table,
}


# What is counted and measured.


def measure() -> dict[str, Any]:
  pipeline = json.loads(pathlib.Path("results/input_pipeline.json").read_text())
  states = {network: abstract_state(network) for network in NETWORKS}
  steps: dict[str, list[float]] = {str(count): [] for count in (1, 2, 4, 8)}
  for _ in range(ROUNDS):  # in turns, as the load of the machine changes
    for count, found in steps.items():
      found += virtual_devices.measure_in_process(int(count))
  return {
    "networks": {network: count_network(network, *states[network]) for network in NETWORKS},
    "images_per_second_per_core": pipeline["images_per_second_with_one_worker"]["training, ours"]["median"],
    "virtual_devices": steps,
    "virtual_batch": virtual_devices.BATCH,
    "checkpoint_seconds": measure_checkpoint(states["resnet50"][1]),
    "cores": os.cpu_count(),
    "versions": report.versions(),
  }


def abstract_state(network: str) -> tuple[ChannelGraph, TrainState]:
  """Returns the channel graph of a network, and what a checkpoint of its training holds, as shapes."""
  config = read_config(network)
  size, classes = (224, 1000) if config.data.stream else (32, 10)
  model = models.create(config.model.name, num_classes=classes)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  graph = trace_channels(model, variables, (1, size, size, 3))
  tx = optimizers.regularized_optimizer(
    config.train, optax.constant_schedule(0.1), graph, optimizers.regularization(config, 1)
  )
  generator = ArchitectureGenerator.for_graph(graph)

  def create(variables: Any, key: jax.Array) -> TrainState:
    proposer = GeneratorState.create(generator.init(key), optax.adamw(1e-3))
    return TrainState.create(variables, tx, masks=graph.full_masks(), proposer=proposer)

  return graph, jax.eval_shape(create, variables, jax.random.key(0))


def count_network(network: str, graph: ChannelGraph, state: TrainState) -> dict[str, Any]:
  """Counts parameters and bytes, and copies from the configuration what the length of a run depends on."""

  def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

  config = read_config(network)
  train_images, test_images = IMAGES["imagenet" if config.data.stream else "cifar10"]
  return {
    "macs": graph.macs(),
    "params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    "all_reduce_bytes": num_bytes((state.params, state.batch_stats)),
    "checkpoint_bytes": num_bytes(state),
    "batch_size": config.train.batch_size,
    "epochs": config.train.epochs,
    "start_epoch": config.prune.start_epoch,
    "finetune_epochs": config.finetune.epochs,
    "generator_share": config.generator.data_share,
    "streamed": config.data.stream,
    "train_images": train_images,
    "test_images": test_images,
  }


def read_config(network: str) -> Any:
  return importlib.import_module(f"sapr_jax.configs.{NETWORKS[network]['config']}").get_config()


def measure_checkpoint(state: TrainState) -> dict[str, float]:
  """Seconds to save and restore a state of this shape in the folder for temporary files: medians of three."""
  arrays = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state)
  rows = []
  for _ in range(3):
    with tempfile.TemporaryDirectory() as folder:
      checkpointer = Checkpointer(pathlib.Path(folder))
      opened = time.perf_counter()
      checkpointer.save(1, arrays, {})
      blocked = time.perf_counter()
      checkpointer.close()
      written = time.perf_counter()
      reader = Checkpointer(pathlib.Path(folder))
      _, position = reader.restore(arrays)
      restored = time.perf_counter()
      reader.close()
      assert position is not None
      rows.append({"blocked": blocked - opened, "written": written - opened, "restored": restored - written})
  return {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}


if __name__ == "__main__":
  main()
