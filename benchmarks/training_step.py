"""A whole training step beside PyTorch's: forward, backward, SGD with momentum and weight decay, batch statistics.

    python -m benchmarks.training_step [--quick] [ROW ...]

Ours is the step of a run (`training.steps.weight_step` under `MappedStep`). On both sides random uint8 images lie on
the device, a batch is gathered and normalized in the step, and there is no augmentation. Without PyTorch ours alone.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from benchmarks import training_pieces
from benchmarks.measuring import attempt, goal, measure_rows, median_ratio, shown, table, time_in_turns, torch_peer
from sapr_jax.runtime import keep_memory

OURS, OURS_PLAIN = "ours", "ours, fast_cpu off"
EAGER = ("PyTorch", "PyTorch, channels-last")
COMPILED = ("PyTorch compiled", "PyTorch compiled, CUDA graphs")
VARIANTS: dict[str, dict[str, Any]] = {
  EAGER[0]: {},
  EAGER[1]: {"channels_last": True},
  COMPILED[0]: {"channels_last": True, "compile_mode": "default"},
  COMPILED[1]: {"channels_last": True, "compile_mode": "reduce-overhead"},
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A network, and how it is trained.

  Attributes:
    network: A name in `sapr_jax.models.MODELS`.
    title: What the table calls it.
    batch: Images of a step.
    dtype: float32 or bfloat16.
    image_size: Height and width.
    steps_per_call: Steps that one timing covers on an accelerator; ours run them in one compiled program.
    peer: The kind of PyTorch's times that the goal is about there, of which the fastest counts.
    goal: What PyTorch's time over ours should be at least there.
  """

  network: str
  title: str
  batch: int = 128
  dtype: str = "float32"
  image_size: int = 32
  steps_per_call: int = 50
  peer: tuple[str, ...] = EAGER
  goal: float = 1.0


_IMAGENET: Any = {"batch": 256, "dtype": "bfloat16", "image_size": 224, "steps_per_call": 10, "peer": COMPILED}
_ROWS = (
  Row("resnet20", "ResNet-20"),
  Row("resnet56", "ResNet-56", goal=3.0),
  Row("mobilenetv2_cifar", "MobileNet-V2 (CIFAR)"),
  Row("resnet56", "ResNet-56", dtype="bfloat16", goal=3.0),
  Row("resnet50", "ResNet-50", **_IMAGENET),
  Row("mobilenetv2", "MobileNet-V2", **_IMAGENET),
)
ROWS = {f"{row.network}-{row.dtype}": row for row in _ROWS}
ON_CPU = ("resnet20-float32", "resnet56-float32", "mobilenetv2_cifar-float32")
ON_ACCELERATORS = ("resnet56-float32", "resnet50-bfloat16", "resnet56-bfloat16", "mobilenetv2-bfloat16")


def main() -> None:
  keep_memory()  # as a run does on CPUs; PyTorch is in the same process, and gains too
  peer = torch_peer()
  on_cpu = jax.devices()[0].platform == "cpu"

  def measure_row(row: Row, quick: bool) -> dict[str, Any]:
    variants = tuple(VARIANTS)
    if quick:
      row = dataclasses.replace(row, network="resnet8", batch=8, image_size=8, steps_per_call=1)
    elif on_cpu:
      row, variants = dataclasses.replace(row, steps_per_call=1, peer=EAGER, goal=1.0), (*EAGER, OURS_PLAIN)
    return measure(row, 2 if quick else 7, peer, variants)

  print(
    step_table(measure_rows(__doc__, "training_step", "rows", ROWS, measure_row, ON_CPU if on_cpu else ON_ACCELERATORS))
  )


# Measuring.


def measure(row: Row, rounds: int, peer: Any, variants: Sequence[str]) -> dict[str, Any]:
  """Times a step of ours and these variants; `peer` is `benchmarks.torch_peer`, or None."""
  how: dict[str, Any] = {"dtype": row.dtype, "image_size": row.image_size}
  made = training_pieces.pieces(row.network, images=max(row.batch, 256), **how)
  made = dataclasses.replace(made, preprocessing=dataclasses.replace(made.preprocessing, crop_padding=0, flip=False))
  tx = training_pieces.weight_tx()

  def ours(fast_cpu: bool) -> Callable[[], Any]:
    step, state = made.weight_step(tx), made.state(tx)
    return made.call(step, state, row.batch, steps_per_call=row.steps_per_call, fast_cpu=fast_cpu)

  how["steps_per_call"] = row.steps_per_call
  calls = {OURS: ours(True)}
  for name, also in VARIANTS.items():
    if peer and name in variants:
      calls |= attempt(name, functools.partial(peer.weight_step, row.network, row.batch, **how, **also))
  seconds = time_in_turns(calls, rounds=rounds)
  if OURS_PLAIN in variants:  # it may take ten times as long, and no goal is about it
    seconds |= time_in_turns({OURS_PLAIN: ours(False)}, rounds=2, warm_up=1)
  calls.clear()
  if peer:
    peer.release()
  return {
    **{field: getattr(row, field) for field in ("title", "batch", "dtype", "image_size", "steps_per_call", "goal")},
    "peer": [name for name in row.peer if name in seconds],
    "macs": made.graph.macs(),
    "matmul_rate": training_pieces.matmul_rate(row.dtype),
    "seconds_per_step": {name: [s / row.steps_per_call for s in values] for name, values in seconds.items()},
  }


# What the page shows.


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  del platform
  lines = []
  for row in report["rows"].values():
    if row["peer"]:
      what = f"{row['title']}, batch {row['batch']}, {row['dtype']}: {ratio(row):.2f} times as fast as"
      lines.append(goal(ratio(row) >= row["goal"], f"{what} {fastest_peer(row)}, asked for at least {row['goal']:g}."))
  return [step_table(report["rows"]), "\n".join(lines)]


def step_table(rows: Mapping[str, Any]) -> str:
  """Returns milliseconds of a step of each variant, the ratio, and the share of a matrix product's rate."""
  variants = list(dict.fromkeys(name for row in rows.values() for name in row["seconds_per_step"]))
  rated = any("matmul_rate" in row for row in rows.values())
  lines = []
  for row in rows.values():
    seconds = {name: statistics.median(values) for name, values in row["seconds_per_step"].items()}
    cells = [shown(1e3 * seconds[name]) if name in seconds else "" for name in variants]
    share = training_pieces.share_of_peak(row, seconds[OURS])
    cells += [f"{ratio(row):.2f}" if row["peer"] else "", *([share] if rated else [])]
    lines.append([f"{row['title']}, batch {row['batch']}, {row['dtype']}", *cells])
  header = ["training step", *(f"{name}, ms" for name in variants), "ratio", *(["of peak"] if rated else [])]
  return table(header, lines)


def fastest_peer(row: Mapping[str, Any]) -> str:
  return min(row["peer"], key=lambda name: statistics.median(row["seconds_per_step"][name]))


def ratio(row: Mapping[str, Any]) -> float:
  """Returns the time of the peer's fastest variant over ours."""
  times = row["seconds_per_step"]
  return median_ratio(times[fastest_peer(row)], times[OURS])


if __name__ == "__main__":
  main()
