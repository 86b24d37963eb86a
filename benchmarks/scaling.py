"""What to expect on 1 to 256 chips: computed from published speeds, and measured where that is possible on a CPU.

    python -m benchmarks.scaling

It counts parameters, MACs and checkpoint bytes of each network, measures the step on 1, 2, 4 and 8 virtual CPU devices
and a checkpoint on this disk, takes the rate of the input pipeline from `results/input_pipeline.json`, writes all of it
with the assumptions to `results/scaling.json`, and renews the tables of `docs/scaling.md` from that file. Some ten
minutes on two CPU cores. `--tables` only renews the tables; `--step-time tpu_v5e/resnet50=0.3` puts a measured time
(milliseconds of one training step for each image on one chip) in the place of the assumed one.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.measuring import positive

RESULTS = pathlib.Path("results/scaling.json")
PAGE = pathlib.Path("docs/scaling.md")

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
VIRTUAL_DEVICES = (1, 2, 4, 8)
VIRTUAL_BATCH = 64


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tables", action="store_true", help="measure nothing, only renew the tables")
  parser.add_argument("--step-time", nargs="+", default=[], metavar="CHIP/NETWORK=MS", help="measured, for one image")
  parser.add_argument("--rounds", type=positive, default=3, help="measurements for each number of virtual devices")
  parser.add_argument("--virtual-devices", type=int, help=argparse.SUPPRESS)  # one measurement, in a process of its own
  args = parser.parse_args()
  if args.virtual_devices:
    print(json.dumps(measure_steps(args.virtual_devices)))
    return
  report = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
  if not args.tables:
    report = measure(args.rounds) | {"milliseconds_per_image": report.get("milliseconds_per_image", {})}
  report |= {"chips": CHIPS, "assumptions": ASSUMPTIONS}
  for network, about in report["networks"].items():
    about |= NETWORKS[network]
  for text in args.step_time:
    name, _, value = text.partition("=")
    chip, _, network = name.partition("/")
    if chip not in CHIPS or network not in NETWORKS:
      sys.exit(f"error: {name} is none of {', '.join(CHIPS)} / {', '.join(NETWORKS)}")
    report["milliseconds_per_image"][name] = float(value)
  from sapr_jax.artifacts.files import write_json

  write_json(RESULTS, report)
  PAGE.write_text(renew(PAGE.read_text(), json.loads(RESULTS.read_text())))


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


def image_seconds(report: Mapping[str, Any], chip: str, network: str) -> float:
  """One image's share of a training step on one chip: measured if it is known, else assumed."""
  measured = report["milliseconds_per_image"].get(f"{chip}/{network}")
  if measured is not None:
    return measured / 1000
  about = report["networks"][network]
  return step_seconds(about["macs"], 1, report["chips"][chip]["peak_tflops"], about["share_of_peak"])


def times(report: Mapping[str, Any], chip: str, network: str, chips: int, images: float) -> tuple[float, float]:
  """Seconds of (computation, all-reduce) of a step with `images` a chip; nothing overlaps."""
  about = report["networks"][network]
  speed = bandwidth(report["chips"][chip], chips)
  return images * image_seconds(report, chip, network), all_reduce_seconds(about["all_reduce_bytes"], chips, speed)


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


def hours(report: Mapping[str, Any], chip: str, network: str, chips: int, images: float) -> float:
  """Hours of a whole run, if nothing but the step takes time."""
  total = sum(run_images(report["networks"][network]).values())
  return total / (images * chips) * sum(times(report, chip, network, chips, images)) / 3600


# The tables of the page.


def renew(page: str, report: Mapping[str, Any]) -> str:
  """Puts the tables between their marks: `<!-- table: name -->` and `<!-- end -->`."""

  def replace(match: re.Match) -> str:
    return f"<!-- table: {match[1]} -->\n{TABLES[match[1]](report)}\n<!-- end -->"

  return re.sub(r"<!-- table: ([\w ]+) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)


def markdown(head: list[str], rows: list[list[str]]) -> str:
  return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def chips_table(report: Mapping[str, Any]) -> str:
  head = ["chip", "peak bfloat16, TFLOP/s", "ring, GB/s", "ring across nodes, GB/s", "chips a host", "cores a host"]
  rows = []
  for chip in report["chips"].values():
    across = f"{chip['node_gbytes']:g}" if "node_gbytes" in chip else f"{chip['ring_gbytes']:g}"
    numbers = [f"{chip['peak_tflops']}", f"{chip['ring_gbytes']}", across]
    rows.append([chip["name"], *numbers, str(chip["chips_per_host"]), str(chip["host_cores"])])
  return markdown(head, rows)


def networks_table(report: Mapping[str, Any]) -> str:
  head = ["network", "parameters", "all-reduce a step, MB", "MACs an image", "share of peak, assumed"]
  rows = []
  for about in report["networks"].values():
    counts = [f"{about['params']:,}", f"{about['all_reduce_bytes'] / 1e6:.1f}", f"{about['macs'] / 1e6:,.1f} M"]
    rows.append([about["name"], *counts, f"{about['share_of_peak']:.0%}"])
  return markdown(head, rows)


def step_table(images: Callable[[Mapping[str, Any], int], float]) -> Callable[[Mapping[str, Any]], str]:
  """ResNet-50: milliseconds of computation + all-reduce, and the share of the time that computes."""

  def table(report: Mapping[str, Any]) -> str:
    rows = []
    for key, chip in report["chips"].items():
      cells = []
      for count in COUNTS:
        compute, reduce = times(report, key, "resnet50", count, images(report, count))
        cells.append(f"{1e3 * compute:.2f} + {1e3 * reduce:.2f} ({compute / (compute + reduce):.0%})")
      rows.append([chip["name"], *cells])
    return markdown(["chip", *(f"n = {count}, {images(report, count):g} each" for count in COUNTS)], rows)

  return table


def efficiency_table(report: Mapping[str, Any]) -> str:
  images, rows = report["assumptions"]["images_per_chip"], []
  for key, chip in report["chips"].items():
    cells = []
    for network in report["networks"]:
      compute, reduce = times(report, key, network, COUNTS[-1], images)
      cells.append(f"{compute / (compute + reduce):.0%}")
    rows.append([chip["name"], *cells])
  return markdown(["chip", *(about["name"] for about in report["networks"].values())], rows)


def input_table(report: Mapping[str, Any]) -> str:
  rate, rows = report["images_per_second_per_core"], []
  streamed = [network for network, about in report["networks"].items() if about["streamed"]]
  hosts = {chip["name"].split(",")[0]: key for key, chip in reversed(report["chips"].items())}  # whatever the network
  for host, key in reversed(hosts.items()):
    chip, cells = report["chips"][key], []
    for network in streamed:
      wanted = 1 / image_seconds(report, key, network)
      fed = chip["host_cores"] * rate / wanted
      cells.append(f"{wanted:,.0f}: {wanted / rate:.0f} cores a chip, feeds {fed:.1f} of {chip['chips_per_host']}")
    rows.append([host, *cells])
  return markdown(["host", *(report["networks"][network]["name"] for network in streamed)], rows)


def run_table(report: Mapping[str, Any]) -> str:
  rows = []
  for network, about in report["networks"].items():
    parts = run_images(about)
    extra = [f"{parts[part] / parts['training']:.1%}" for part in ("generator", "evaluation", "fine-tuning")]
    batch = about["batch_size"] / 8
    estimates = [f"{hours(report, chip, network, 8, batch):.2f}" for chip in ("tpu_v5e", "a100_ib", "h100_ib")]
    rows.append([about["name"], *extra, *estimates])
  chips = ["hours, 8 TPU v5e", "hours, 8 A100", "hours, 8 H100"]
  return markdown(["network", "generator", "evaluation", "fine-tuning", *chips], rows)


def checkpoint_table(report: Mapping[str, Any]) -> str:
  speed, rows = report["assumptions"]["disk_mbytes"], []
  for about in report["networks"].values():
    size = about["checkpoint_bytes"] / 1e6
    rows.append([about["name"], f"{size:.1f}", f"{size / speed:.1f}"])
  return markdown(["network", "checkpoint, MB", f"seconds at {speed} MB/s"], rows)


def disk_table(report: Mapping[str, Any]) -> str:
  measured = report["checkpoint_seconds"]
  cells = [f"{measured[name]:.2f}" for name in ("blocked", "written", "restored")]
  return markdown(["network", "the run waits, s", "until written, s", "restored, s"], [["ResNet-50", *cells]])


def virtual_table(report: Mapping[str, Any]) -> str:
  rows = []
  for count, steps in report["virtual_devices"].items():
    images = report["virtual_batch"] // int(count)
    rows.append([count, str(images), f"{min(steps):.0f}", f"{statistics.median(steps):.0f}", f"{max(steps):.0f}"])
  return markdown(["virtual devices", "images each", "ms a step, lowest", "median", "highest"], rows)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
  "chips": chips_table,
  "networks": networks_table,
  "fixed batch": step_table(lambda _, chips: FIXED_BATCH / chips),
  "batch per chip": step_table(lambda report, _: report["assumptions"]["images_per_chip"]),
  "efficiency": efficiency_table,
  "input": input_table,
  "run": run_table,
  "checkpoint": checkpoint_table,
  "disk": disk_table,
  "virtual devices": virtual_table,
}


# What is counted and measured.


def measure(rounds: int) -> dict[str, Any]:
  from sapr_jax import report

  pipeline = json.loads(pathlib.Path("results/input_pipeline.json").read_text())
  states = {network: abstract_state(network) for network in NETWORKS}
  steps: dict[str, list[float]] = {str(count): [] for count in VIRTUAL_DEVICES}
  for _ in range(rounds):  # in turns, as the load of the machine changes
    for count in VIRTUAL_DEVICES:
      steps[str(count)] += measure_in_process(count)
  return {
    "networks": {network: count_network(network, *states[network]) for network in NETWORKS},
    "images_per_second_per_core": pipeline["images_per_second_with_one_worker"]["training, ours"]["median"],
    "virtual_devices": steps,
    "virtual_batch": VIRTUAL_BATCH,
    "checkpoint_seconds": measure_checkpoint(states["resnet50"][1]),
    "cores": os.cpu_count(),
    "versions": report.versions(),
  }


def abstract_state(network: str) -> tuple[int, Any]:
  """Returns the MACs of a network, and what a checkpoint of its training holds, as shapes."""
  import jax
  import jax.numpy as jnp
  import optax

  from sapr_jax import models, trace_channels
  from sapr_jax.method import ArchitectureGenerator, regularize_by_prox
  from sapr_jax.training import schedules, state

  config = read_config(network)
  size, classes = (224, 1000) if config.data.stream else (32, 10)
  model = models.create(config.model.name, num_classes=classes)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  graph = trace_channels(model, variables, (1, size, size, 3))
  tx = optax.chain(
    schedules.sgd(config.train, optax.constant_schedule(0.1)), regularize_by_prox(graph, 0.1, 1e-3, momentum=0.9)
  )
  generator = ArchitectureGenerator.for_graph(graph)
  generator_tx = optax.adamw(1e-3)
  whole = {
    "network": jax.eval_shape(lambda v: state.network_state(v, tx), variables),
    "generator": jax.eval_shape(lambda key: state.generator_state(generator, generator_tx, key), jax.random.key(0)),
    "masks": jax.eval_shape(graph.full_masks),
  }
  return graph.macs(), whole


def count_network(network: str, macs: int, state: Any) -> dict[str, Any]:
  """Counts parameters and bytes, and copies from the configuration what the length of a run depends on."""
  import jax

  def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

  config, trained = read_config(network), state["network"]
  train_images, test_images = IMAGES["imagenet" if config.data.stream else "cifar10"]
  return {
    "macs": macs,
    "params": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
    "all_reduce_bytes": num_bytes((trained.params, trained.batch_stats)),
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
  return importlib.import_module(f"configs.{NETWORKS[network]['config']}").get_config()


def measure_in_process(count: int) -> list[float]:
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
  command = [sys.executable, "-m", "benchmarks.scaling", "--virtual-devices", str(count)]
  environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout)


def measure_steps(devices: int, steps: int = 6) -> list[float]:
  """Milliseconds of weight steps of ResNet-20 with regularization, on all devices of this process."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from sapr_jax.training.devices import MappedSteps, data_mesh, replicate

  from sapr_jax import models, trace_channels
  from sapr_jax.method import regularize_by_prox
  from sapr_jax.training import state
  from sapr_jax.training import steps as training_steps

  mesh = data_mesh()
  assert mesh.devices.size == devices
  model, shape = models.create("resnet20", num_classes=10), (1, 32, 32, 3)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape))
  graph = trace_channels(model, variables, shape)
  tx = optax.chain(optax.sgd(0.1, momentum=0.9), regularize_by_prox(graph, 0.1, 1e-3, momentum=0.9))
  preprocessing = training_steps.Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, crop_padding=4, flip=True)
  mapped = MappedSteps(training_steps.weight_step(model, tx, preprocessing), mesh)
  rng = np.random.default_rng(0)
  shared = training_steps.Shared(
    images=jnp.asarray(rng.integers(0, 256, (512, 32, 32, 3), dtype=np.uint8)),
    labels=jnp.asarray(rng.integers(0, 10, 512, dtype=np.int32)),
    key=jax.random.key(1),
    masks=graph.full_masks(),
  )
  order = rng.integers(0, 512, (steps + 2, 1, VIRTUAL_BATCH), dtype=np.int32)
  carry = replicate(state.network_state(variables, tx), mesh)
  ends = [time.perf_counter() for _ in mapped.run(carry, replicate(shared, mesh), iter(order))]
  return [round(1e3 * (b - a), 1) for a, b in itertools.pairwise(ends[1:])]


def measure_checkpoint(state: Any) -> dict[str, float]:
  """Seconds to save and restore a state of this shape in the folder for temporary files: medians of three."""
  import jax
  import jax.numpy as jnp

  from sapr_jax.artifacts import Checkpointer

  arrays = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state)
  rows = []
  for _ in range(3):
    with tempfile.TemporaryDirectory() as folder:
      start = time.perf_counter()
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
      rows.append((opened - start, blocked - opened, written - opened, restored - written))
  _, *medians = map(statistics.median, zip(*rows, strict=True))
  return {name: round(value, 3) for name, value in zip(("blocked", "written", "restored"), medians, strict=True)}


if __name__ == "__main__":
  main()
