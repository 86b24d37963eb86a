"""A whole training step beside PyTorch's: forward, backward, SGD with momentum and weight decay, batch statistics.

    python -m benchmarks.training_step [--rows ROW ...]

Ours is the step of a run (`training.steps.weight_step` under `MappedSteps`). On both sides random uint8 images lie on
the device, a batch is gathered and normalized in the step, and there is no augmentation. `--rows` measures some rows
only and keeps what was recorded of the others on the same machine. Needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from sapr_jax.training.devices import is_cpu

from benchmarks import training_pieces
from benchmarks.mapped_call import mapped_call
from benchmarks.measuring import median_ratio, positive, record_some, shown, table, time_in_turns
from benchmarks.performance_page import provenance
from sapr_jax.training import keep_memory, state, steps

OURS, OURS_PLAIN = "ours", "ours, fast_cpu off"
EAGER = ("PyTorch", "PyTorch, channels-last")
COMPILED = ("PyTorch compiled", "PyTorch compiled, CUDA graphs")


@dataclasses.dataclass(frozen=True)
class Row:
  """A network, and how it is trained.

  Attributes:
    network: A name in `sapr_jax.models.MODELS`.
    title: What the table calls it.
    batch: Images of a step.
    dtype: float32 or bfloat16.
    image_size: Height and width.
    steps_per_call: Steps that one timing covers; ours run them in one compiled program.
    peer: The kind of PyTorch's times that the goal is about, of which the fastest counts.
    goal: What PyTorch's time over ours should be at least.
  """

  network: str
  title: str
  batch: int = 128
  dtype: str = "float32"
  image_size: int = 32
  steps_per_call: int = 1
  peer: tuple[str, ...] = EAGER
  goal: float = 1.0

  @property
  def name(self) -> str:
    return f"{self.network}-{self.dtype}"

  def shrunk(self) -> Row:
    """Returns what `--quick` measures."""
    return dataclasses.replace(self, batch=8, image_size=min(self.image_size, 64), steps_per_call=1)


CPU_ROWS = (
  Row("resnet20", "ResNet-20"),
  Row("resnet56", "ResNet-56"),
  Row("mobilenetv2_cifar", "MobileNet-V2 (CIFAR)"),
)
GPU_ROWS = (
  Row("resnet56", "ResNet-56", steps_per_call=50, goal=3.0),
  Row("resnet56", "ResNet-56", dtype="bfloat16", steps_per_call=50, goal=3.0),
  Row("resnet50", "ResNet-50", 256, "bfloat16", image_size=224, steps_per_call=10, peer=COMPILED),
)

PEAK_TFLOPS = {
  "NVIDIA A100": {"float32": 156.0, "bfloat16": 312.0},
  "NVIDIA H100 PCIe": {"float32": 378.0, "bfloat16": 756.0},
  "NVIDIA H100": {"float32": 494.5, "bfloat16": 989.0},
  "NVIDIA H200": {"float32": 494.5, "bfloat16": 989.0},
}
"""Device kind, or its beginning -> published dense peak; float32 is TF32 there. The longest name that fits counts."""


def main() -> None:
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory of the same GPU
  keep_memory()  # as a run does on CPUs; PyTorch is in the same process, and gains too
  platform = jax.devices()[0].platform
  rows = {row.name: row for row in (CPU_ROWS if platform == "cpu" else GPU_ROWS)}
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows))
  parser.add_argument("--rounds", type=positive, default=7, help="timings of each")
  parser.add_argument("--quick", action="store_true", help="small batches and images, few rounds; records nothing")
  args = parser.parse_args()
  try:
    from benchmarks import torch_training
  except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is missing; pip install -e '.[bench]'")
  if platform == "gpu" and torch_training.DEVICE != "cuda":
    sys.exit("error: JAX has a GPU and PyTorch has none; install a PyTorch for CUDA")
  measured = {}
  for name in args.rows:
    row = rows[name].shrunk() if args.quick else rows[name]
    measured[name] = measure(row, 2 if args.quick else args.rounds, torch_training)
    print(f"{row.title}, {row.dtype}: measured", file=sys.stderr, flush=True)
    if not args.quick:
      record_some("training_step", "rows", measured, rows)
  print(step_table(measured, jax.devices()[0].device_kind))


# Measuring.


def measure(row: Row, rounds: int, peer: Any) -> dict[str, Any]:
  """Times a step of ours and of PyTorch; `peer` is `benchmarks.torch_training`."""
  calls, macs = our_calls(row)
  slow = {name: calls.pop(name) for name in (OURS_PLAIN,) if name in calls}
  calls |= torch_calls(row, peer)
  seconds = time_in_turns(calls, rounds=rounds)
  seconds |= time_in_turns(slow, rounds=2, warm_up=1)  # it may take ten times as long, and no goal is about it
  calls.clear()
  peer.release()
  return {
    **{field: getattr(row, field) for field in ("title", "batch", "dtype", "image_size", "steps_per_call", "goal")},
    "peer": [name for name in row.peer if name in seconds],
    "macs": macs,
    "seconds_per_step": {name: [s / row.steps_per_call for s in values] for name, values in seconds.items()},
  }


def our_calls(row: Row) -> tuple[dict[str, Callable[[], Any]], int]:
  """Returns name -> call of each of our variants, and the MACs of an image."""
  made = training_pieces.pieces(row.network, dtype=row.dtype, image_size=row.image_size, images=max(row.batch, 256))
  preprocessing = dataclasses.replace(made.preprocessing, crop_padding=0, flip=False)
  tx = training_pieces.weight_tx(None)

  def call(fast_cpu: bool) -> Callable[[], Any]:
    step = steps.weight_step(made.model, tx, preprocessing)
    carry = state.network_state(made.variables, tx)
    return mapped_call(made, step, carry, row.batch, steps_per_call=row.steps_per_call, fast_cpu=fast_cpu)

  calls = {OURS: call(True)}
  if is_cpu(made.mesh):
    calls[OURS_PLAIN] = call(False)
  return calls, made.graph.macs()


def torch_calls(row: Row, peer: Any) -> dict[str, Callable[[], Any]]:
  """Returns name -> call of PyTorch's variants: both memory formats, and on a GPU what `torch.compile` makes."""
  variants: dict[str, dict[str, Any]] = {EAGER[0]: {}, EAGER[1]: {"channels_last": True}}
  if jax.devices()[0].platform == "gpu":
    variants[COMPILED[0]] = {"channels_last": True, "compile_mode": "default"}
    variants[COMPILED[1]] = {"channels_last": True, "compile_mode": "reduce-overhead"}
  how = {"dtype": row.dtype, "image_size": row.image_size, "steps_per_call": row.steps_per_call}
  return {name: peer.weight_step(row.network, row.batch, **how, **options) for name, options in variants.items()}


# What the page shows.


def section(reports: Mapping[str, Any]) -> str:
  """Returns the section of `docs/performance.md`."""
  parts = [
    "## Training step",
    "A whole step of training: gathering and normalizing uint8 images that lie on the device, forward, backward, SGD"
    " with momentum and weight decay, and batch statistics; no augmentation on either side. Ours is the step of a run;"
    " PyTorch's optimizer is its fused one. The ratio is the fastest of the peer's times over ours: above 1 we are"
    " faster.",
  ]
  for platform, report in reports.items():
    parts += [f"### {platform.upper()}", step_table(report["rows"], report["machine"]["device"])]
    if platform in _REMARKS:
      parts.append(_REMARKS[platform])
    parts += [provenance(report), "\n".join(verdict(row) for row in report["rows"].values())]
  return "\n\n".join(parts)


_REMARKS = {
  "cpu": """`fast_cpu` is the flag of the config for what `sapr_jax/training/cpu.py` does. Off, it takes its layers and
compiler options away (timed twice, after the others); the third part, that the process keeps the memory it frees, holds
here for all, PyTorch too.

What was found on the way, by timing parts of the step:

- Elementwise operations (the gradients of normalization and activation) were fused into the transposition before a
  kernel's gradient, and so repeated in an order that the caches do not like. As fusions of YNNPACK they stand alone:
  most of what the ResNets gain.
- A step allocated its temporary memory anew and paid for 70,000 to 120,000 page faults, about a fifth of its processor
  time; kept memory makes them none.
- XLA's depthwise convolution takes some 40 times as long as a sum of shifted products, forward and to the input.
- The kernel's gradient of an ordinary convolution is no longer slow in these releases: for 16 channels at 32x32 it runs
  at 30 to 50 GFLOP/s, the forward pass at 65 to 90. Nine dot products instead, one contraction of patches, and both
  divided over the batch run at 7 to 20; an optimization barrier before it changes nothing, XLA drops it on CPUs.

What bounds the rest: for the ResNets the convolutions with 16 channels, and the transpositions before the kernels'
gradients, which PyTorch's library does not need; for MobileNet-V2 nine passes over each activation for the gradient of
a depthwise kernel, with the gradient of ReLU6 repeated in each.""",
  "gpu": "float32 is TF32 in matrix products and convolutions, bfloat16 is automatic mixed precision in PyTorch.",
}


def step_table(rows: Mapping[str, Any], device: str) -> str:
  """Returns milliseconds of a step of each variant, the ratio, and the share of the chip's peak where that is known."""
  variants = list(dict.fromkeys(name for row in rows.values() for name in row["seconds_per_step"]))
  lines, peak = [], peak_tflops(device)
  for row in rows.values():
    times = row["seconds_per_step"]
    cells = [shown(1e3 * statistics.median(times[name])) if name in times else "" for name in variants]
    share = [f"{our_tflops(row) / peak[row['dtype']]:.1%}"] if peak else []
    lines.append([f"{row['title']}, batch {row['batch']}, {row['dtype']}", *cells, f"{ratio(row):.2f}", *share])
  header = ["training step", *(f"{name}, ms" for name in variants), "ratio", *(["of peak"] if peak else [])]
  return table(header, lines)


def peak_tflops(device: str) -> Mapping[str, float] | None:
  """Returns dtype -> published peak of a device kind, or None if it is not known."""
  names = [name for name in PEAK_TFLOPS if device.startswith(name)]
  return PEAK_TFLOPS[max(names, key=len)] if names else None


def our_tflops(row: Mapping[str, Any]) -> float:
  """Returns what ours computes a second: the backward pass takes twice the forward's, and a MAC is two operations."""
  return 3 * 2 * row["macs"] * row["batch"] / statistics.median(row["seconds_per_step"][OURS]) / 1e12


def fastest_peer(row: Mapping[str, Any]) -> str:
  return min(row["peer"], key=lambda name: statistics.median(row["seconds_per_step"][name]))


def ratio(row: Mapping[str, Any]) -> float:
  """Returns the time of the peer's fastest variant over ours."""
  times = row["seconds_per_step"]
  return median_ratio(times[fastest_peer(row)], times[OURS])


def verdict(row: Mapping[str, Any]) -> str:
  word = "reached" if ratio(row) >= row["goal"] else "missed"
  return (
    f"- Goal {word}: {row['title']}, batch {row['batch']}, {row['dtype']}: {ratio(row):.2f} times as fast as"
    f" {fastest_peer(row)}, asked for at least {row['goal']:g}."
  )


if __name__ == "__main__":
  main()
