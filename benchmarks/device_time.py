"""What the device does while a run trains: is it ever idle, what share of its peak it reaches, and where its time goes.

    python -m benchmarks.device_time [--quick] [ROW ...]

The loop of a run, with its batches and its queue of metrics, takes turns with the same steps on a batch that stays on
the device. Then a part of the loop is traced. Files are written to a temporary folder: random images of CIFAR-10's
size, which lie on the device in a run, and JPEG files of ImageNet's, which are streamed. They stay in the cache of the
system, so disks are not measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import training_pieces
from benchmarks.measuring import goal, measure_rows, note, shown, table
from sapr_jax import configs, models
from sapr_jax.channels import count_macs
from sapr_jax.errors import one_line
from sapr_jax.runtime import data_mesh, keep_memory, replicate
from sapr_jax.training.feed import open_feed
from sapr_jax.training.passes import Passes, Purpose, WeightPass
from sapr_jax.training.state import TrainState

ALONE, LOOP, FEED = "step alone", "loop of a run", "batches alone"
GOAL = 0.02


@dataclasses.dataclass(frozen=True)
class Row:
  """A network, trained as its configuration says.

  Attributes:
    network: A name in `sapr_jax.models.MODELS`.
    title: What the table calls it.
    config: The configuration.
    dtype: float32 or bfloat16.
    batch: Images of a step.
    image_size: Height and width.
    files: Distinct image files.
    shape: Height and width of the files.
    copies: How often an epoch has each file.
    epochs: Epochs of a turn. The first fifth of its calls is not timed.
  """

  network: str
  title: str
  config: str
  dtype: str
  batch: int
  image_size: int
  files: int
  shape: tuple[int, int]
  copies: int
  epochs: int


_CIFAR = ("resnet56_cifar10", "float32", 128, 32, 128, (32, 32), 200, 5)
_IMAGENET = ("resnet50_imagenet", "bfloat16", 256, 224, 512, (375, 500), 50, 1)
ROWS = {
  "resnet56": Row("resnet56", "ResNet-56, images on the device", *_CIFAR),
  "resnet50": Row("resnet50", "ResNet-50, images streamed", *_IMAGENET),
}


def main() -> None:
  keep_memory()  # as a run does on CPUs
  print(idle_table(measure_rows(__doc__, "device_time", "rows", ROWS, measure)))


# Measuring.


def measure(row: Row, quick: bool) -> dict[str, Any]:
  """Times the loop beside the step alone, and traces it."""
  if quick:
    small: Any = {"batch": 4, "image_size": 16, "files": 8, "copies": 5, "epochs": 1}
    row = dataclasses.replace(row, network="resnet8", **small, shape=(row.shape[0] // 4, row.shape[1] // 4))
  with tempfile.TemporaryDirectory() as folder:
    images = pathlib.Path(folder, "images")
    training_pieces.write_images(images, row.files, row.shape, copies=row.copies)
    weights, state, macs = start(row, images)
    turns = Turns(weights, state, row.epochs)
    timed = {ALONE: turns.step, LOOP: turns.loop, FEED: turns.batches}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(1 if quick else 3):
      for name, turn in timed.items():
        seconds[name].append(turn())
    traced = None
    try:
      traced = turns.trace(pathlib.Path(folder, "trace"))
    except Exception as error:  # of whatever kind: a profiler may be refused, and the times say much alone
      note(f"without a trace, which failed: {one_line(error, 200)}")
    else:
      if traced is None:
        note("without a trace, which shows no accelerator")
  return {
    "title": f"{row.title}, batch {row.batch}, {row.dtype}",
    "batch": row.batch,
    "macs": macs,
    "matmul_rate": training_pieces.matmul_rate(row.dtype),
    "seconds_per_step": seconds,
    "trace": traced,
  }


def start(row: Row, images: pathlib.Path) -> tuple[WeightPass, TrainState, int]:
  """Returns the weight steps of a run on these images, its first state, and the MACs of an image."""
  config = configs.get(row.config)
  config.data.source, config.data.path, config.train.batch_size = "folder", str(images), row.batch
  if config.data.stream:
    config.data.image_size = row.image_size
  mesh = data_mesh()
  feed = open_feed(config, mesh)
  model = models.create(row.network, num_classes=1000 if row.image_size == 224 else 10, dtype=jnp.dtype(row.dtype))
  shape, tx = (1, row.image_size, row.image_size, 3), training_pieces.weight_tx()
  variables = training_pieces.random_variables(model, shape)
  passes = Passes(mesh, feed, config.seed, variables["params"], config.fast_cpu)
  weights = WeightPass(passes, model, tx, config.train, Purpose.TRAIN)
  return weights, replicate(TrainState.create(variables, tx), mesh), count_macs(model, variables, shape)


class Turns:
  """Turns of a run's loop, and of its parts; each returns the seconds of a step."""

  def __init__(self, weights: WeightPass, state: TrainState, epochs: int):
    self._weights, self._state, self._epochs = weights, state, epochs
    with contextlib.closing(self._calls()) as calls:
      self._batches = next(calls)
    self._per_call = len(jax.tree.leaves(self._batches)[0])
    self._warm_up = max(1, epochs * weights.steps_per_epoch // self._per_call // 5)

  def step(self) -> float:
    """Takes the steps of the loop on one call's batches."""
    calls = self._epochs * self._weights.steps_per_epoch // self._per_call
    return self._time(itertools.repeat(self._batches, calls))

  def loop(self) -> float:
    """Takes the steps as a run does."""
    with contextlib.closing(self._calls()) as calls:
      return self._time(calls)

  def batches(self) -> float:
    """Makes the batches, and sends them to the device."""
    with contextlib.closing(self._calls()) as calls:
      for _ in itertools.islice(calls, self._warm_up):
        pass
      start, count = time.perf_counter(), 0
      for count, batches in enumerate(calls, 1):  # noqa: B007
        jax.block_until_ready(batches)
      return (time.perf_counter() - start) / (count * self._per_call)

  def trace(self, folder: pathlib.Path) -> dict[str, Any] | None:
    """Traces a part of the loop; returns what `device_activity` finds in it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with contextlib.closing(self._calls()) as calls:
      self._run(itertools.islice(calls, self._warm_up))
      with jax.profiler.trace(str(folder), profiler_options=options):
        self._run(itertools.islice(calls, 2 * self._warm_up))
    (file,) = folder.rglob("*.xplane.pb")
    return device_activity(jax.profiler.ProfileData.from_file(str(file)))

  def _calls(self) -> Generator[Any]:
    for epoch in range(self._epochs):
      yield from self._weights.batches(epoch)

  def _time(self, calls: Iterable[Any]) -> float:
    calls = iter(calls)
    self._run(itertools.islice(calls, self._warm_up))
    start = time.perf_counter()
    count = self._run(calls)
    return (time.perf_counter() - start) / (count * self._per_call)

  def _run(self, calls: Iterable[Any]) -> int:
    """Runs calls as `training.loop` does, and waits for them; returns how many there were."""
    queue, count = self._weights.metrics_queue(), 0
    for batches in calls:
      self._state, metrics = self._weights.step(self._state, batches)
      queue.add(metrics)
      count += 1
    queue.fetch()
    jax.block_until_ready(self._state)
    return count


_LINES = {"/device:GPU:": "Stream", "/device:TPU:": "XLA Ops"}
"""How names of devices in a trace begin -> those of their lines with what the device itself did."""
_TRANSFERS = re.compile("Memcpy(H2D|D2H)")


def device_activity(profile: Any) -> dict[str, Any] | None:
  """Returns how long the first accelerator of a trace was idle between its first and last operation, and what it did.

  Transfers from and to the host, beside which a device computes, count as nothing.

  Args:
    profile: A `jax.profiler.ProfileData`.

  Returns:
    "idle", a share of the time, and "operations": kind of operation -> its share of the time of all; None if the trace
    shows no accelerator.
  """
  for plane in profile.planes:
    for device, line_name in _LINES.items():
      lines = [line for line in plane.lines if line.name.startswith(line_name)] if plane.name.startswith(device) else []
      events = sorted(
        (event.start_ns, event.end_ns, event.name)
        for line in lines
        for event in line.events
        if event.duration_ns and not _TRANSFERS.match(event.name)
      )
      if events:
        return _activity(events)
  return None


def _activity(events: list[tuple[float, float, str]]) -> dict[str, Any]:
  busy, until, kinds = 0.0, events[0][0], dict[str, float]()
  for start, end, name in events:
    busy += max(0.0, end - max(start, until))
    until = max(until, end)
    kind = re.sub(r"[._]\d+", "", name.removeprefix("%").split(" ")[0])
    kinds[kind] = kinds.get(kind, 0.0) + end - start
  total, greatest = sum(kinds.values()), sorted(kinds, key=kinds.__getitem__, reverse=True)
  return {
    "idle": 1 - busy / (until - events[0][0]),
    "operations": {kind: round(kinds[kind] / total, 4) for kind in greatest[:8]},
  }


# What the page shows.


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  del platform
  rows = report["rows"].values()
  lines = [
    goal(idle(row) <= GOAL, f"{row['title']}: idle for {idle(row):.1%}, asked for at most {GOAL:.0%}.") for row in rows
  ]
  return [idle_table(report["rows"]), "\n".join(lines)]


def idle(row: Mapping[str, Any]) -> float:
  """Returns the share of the time in which the device is idle: in the trace, else by the time of the step alone."""
  return row["trace"]["idle"] if row["trace"] else _idle_by_times(row)


def _idle_by_times(row: Mapping[str, Any]) -> float:
  seconds = {name: statistics.median(values) for name, values in row["seconds_per_step"].items()}
  return max(0.0, 1 - seconds[ALONE] / seconds[LOOP])


def idle_table(rows: Mapping[str, Any]) -> str:
  """Returns the times of a step, the images a second that the feed could give, idle shares, and where time goes."""
  lines = []
  for row in rows.values():
    seconds = {name: statistics.median(values) for name, values in row["seconds_per_step"].items()}
    operations = row["trace"]["operations"] if row["trace"] else {}
    lines.append(
      [
        row["title"],
        *(shown(1e3 * seconds[name]) for name in (ALONE, LOOP)),
        *(shown(row["batch"] / seconds[name]) for name in (LOOP, FEED)),
        f"{_idle_by_times(row):.1%}",
        f"{row['trace']['idle']:.1%}" if row["trace"] else "",
        training_pieces.share_of_peak(row, seconds[LOOP]),
        ", ".join(f"`{name}` {share:.0%}" for name, share in list(operations.items())[:4]),
      ]
    )
  header = [
    f"{ALONE}, ms",
    f"{LOOP}, ms",
    "images/s",
    "batches alone, images/s",
    "idle by the times",
    "idle in a trace",
  ]
  return table(["training", *header, "of peak", "most time goes to"], lines)


if __name__ == "__main__":
  main()
