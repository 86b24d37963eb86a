"""A whole training step beside PyTorch's: forward, backward, SGD with momentum and weight decay, batch statistics.

    python -m benchmarks.training_step [--quick] [ROW ...]

Ours is the step of a run (`training.steps.weight_step` under `MappedStep`). On both sides random uint8 images lie on
the device, a batch is gathered and normalized in the step, and there is no augmentation. Needs torch and torch-pruning.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks import training_pieces
from benchmarks.measuring import goal, measure_rows, median_ratio, needed, shown, table, time_in_turns
from sapr_jax.runtime import keep_memory

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
  peer = needed("benchmarks.torch_peer", "bench")
  device = jax.devices()[0]
  if device.platform == "gpu" and peer.DEVICE != "cuda":
    sys.exit("error: JAX has a GPU and PyTorch has none; install a PyTorch for CUDA")
  rows = {f"{row.network}-{row.dtype}": row for row in (CPU_ROWS if device.platform == "cpu" else GPU_ROWS)}

  def measure_row(row: Row, quick: bool) -> dict[str, Any]:
    if quick:
      row = dataclasses.replace(row, batch=8, image_size=min(row.image_size, 64), steps_per_call=1)
    return measure(row, 2 if quick else 7, peer)

  measured = measure_rows(__doc__, "training_step", "rows", rows, measure_row)
  print(step_table(measured, device.device_kind))


# Measuring.


def measure(row: Row, rounds: int, peer: Any) -> dict[str, Any]:
  """Times a step of ours and of PyTorch; `peer` is `benchmarks.torch_peer`."""
  how: dict[str, Any] = {"dtype": row.dtype, "image_size": row.image_size}
  made = training_pieces.pieces(row.network, images=max(row.batch, 256), **how)
  made = dataclasses.replace(made, preprocessing=dataclasses.replace(made.preprocessing, crop_padding=0, flip=False))
  tx = training_pieces.weight_tx()

  def ours(fast_cpu: bool) -> Callable[[], Any]:
    step, state = made.weight_step(tx), made.state(tx)
    return made.call(step, state, row.batch, steps_per_call=row.steps_per_call, fast_cpu=fast_cpu)

  variants: dict[str, dict[str, Any]] = {EAGER[0]: {}, EAGER[1]: {"channels_last": True}}
  on_cpu = jax.devices()[0].platform == "cpu"
  if not on_cpu:
    variants[COMPILED[0]] = {"channels_last": True, "compile_mode": "default"}
    variants[COMPILED[1]] = {"channels_last": True, "compile_mode": "reduce-overhead"}
  how["steps_per_call"] = row.steps_per_call
  calls = {OURS: ours(True)}
  calls |= {name: peer.weight_step(row.network, row.batch, **how, **also) for name, also in variants.items()}
  seconds = time_in_turns(calls, rounds=rounds)
  if on_cpu:  # it may take ten times as long, and no goal is about it
    seconds |= time_in_turns({OURS_PLAIN: ours(False)}, rounds=2, warm_up=1)
  calls.clear()
  peer.release()
  return {
    **{field: getattr(row, field) for field in ("title", "batch", "dtype", "image_size", "steps_per_call", "goal")},
    "peer": [name for name in row.peer if name in seconds],
    "macs": made.graph.macs(),
    "seconds_per_step": {name: [s / row.steps_per_call for s in values] for name, values in seconds.items()},
  }


# What the page shows.


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  del platform
  lines = []
  for row in report["rows"].values():
    what = f"{row['title']}, batch {row['batch']}, {row['dtype']}: {ratio(row):.2f} times as fast as"
    lines.append(goal(ratio(row) >= row["goal"], f"{what} {fastest_peer(row)}, asked for at least {row['goal']:g}."))
  return [step_table(report["rows"], report["machine"]["device"]), "\n".join(lines)]


def step_table(rows: Mapping[str, Any], device: str) -> str:
  """Returns milliseconds of a step of each variant, the ratio, and the share of the chip's peak where that is known."""
  variants = list(dict.fromkeys(name for row in rows.values() for name in row["seconds_per_step"]))
  chips = [name for name in PEAK_TFLOPS if device.startswith(name)]
  peak = PEAK_TFLOPS[max(chips, key=len)] if chips else None
  lines = []
  for row in rows.values():
    seconds = {name: statistics.median(values) for name, values in row["seconds_per_step"].items()}
    cells = [shown(1e3 * seconds[name]) if name in seconds else "" for name in variants]
    # The backward pass takes twice the forward's, and a MAC is two operations.
    tflops = 3 * 2 * row["macs"] * row["batch"] / seconds[OURS] / 1e12
    share = [f"{tflops / peak[row['dtype']]:.1%}"] if peak else []
    lines.append([f"{row['title']}, batch {row['batch']}, {row['dtype']}", *cells, f"{ratio(row):.2f}", *share])
  header = ["training step", *(f"{name}, ms" for name in variants), "ratio", *(["of peak"] if peak else [])]
  return table(header, lines)


def fastest_peer(row: Mapping[str, Any]) -> str:
  return min(row["peer"], key=lambda name: statistics.median(row["seconds_per_step"][name]))


def ratio(row: Mapping[str, Any]) -> float:
  """Returns the time of the peer's fastest variant over ours."""
  times = row["seconds_per_step"]
  return median_ratio(times[fastest_peer(row)], times[OURS])


if __name__ == "__main__":
  main()
