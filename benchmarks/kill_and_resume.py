"""Does a run that is killed end as if it had not been? A small run on the digits, killed in 21 places by SIGKILL.

    python -m benchmarks.kill_and_resume [--quick] [--seed N] --runs runs/kill_and_resume

The experiment runs once undisturbed; then again, killed in every stage and while checkpoints and models are being
written, each time started again by the same command, and at last left to finish. Both must end with the same saved
models, masks, optimizer states and records, bit for bit; only times may differ. It prints where each kill hit, writes
that and the verdict to `results/kill_and_resume.json`, and exits with 1 if anything differs. About ten minutes on two
CPU cores.

When a kill is due is decided by looking at the run: its records, and a note in shared memory of the function that it
is in. The instant is random (`--seed`), within a window after the run has come to the place that is meant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import mmap
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

from benchmarks.measuring import parser
from sapr_jax import artifacts, report
from sapr_jax.artifacts.files import write_json

RESULTS = pathlib.Path("results/kill_and_resume.json")
CONFIG = "configs/digits.py"
OVERRIDES = {
  "model.width_multiplier": 0.5,
  "data.train_images": 768,  # 12 steps in an epoch
  "data.test_images": 300,
  "eval_batch_size": 100,
  "train.epochs": 7,
  "train.decay_epochs": (5,),
  "prune.start_epoch": 3,
  "prune.gamma": 0.1,
  "finetune.epochs": 4,
  "finetune.decay_epochs": (2,),
  "checkpoint.every_steps": 3,
  "report.latency_batch_sizes": (1,),
  "report.latency_repeats": 3,
}
PLACE_SIZE = 1024  # bytes, of the file in which a run notes where it is
TEMPORARY = ("*.orbax-checkpoint-tmp*", ".*.*")  # what is being written, below the work directory


@dataclasses.dataclass(frozen=True)
class Target:
  """A run that is to be killed.

  Attributes:
    name: For people.
    place: Regular expression: the functions that are running.
    records: So many epochs must be recorded.
    window: The kill comes at a random instant within so many seconds after both have come true.
  """

  name: str
  place: str = ""
  records: int = 0
  window: float = 0.3


WEIGHTS = r"^loop\.train > devices\."
TARGETS = (
  Target("start-up: interpreter and imports", window=4.0),
  Target("start-up: data, network and its channels", r"run\.build", window=2.0),
  Target("start-up: the first step is compiled", WEIGHTS, window=2.0),
  Target("training before E_start: a checkpoint is written", r"Checkpointer\.save", window=0.05),
  Target("training before E_start: weights", WEIGHTS, records=1, window=1.0),
  Target("training before E_start: evaluation", r"Passes\.evaluate", records=2, window=0.1),
  Target("the first epoch of the generator", r"GeneratorProposer\.propose", records=3, window=1.0),
  Target("network.json is written", r"^run\.write_json", window=0.005),
  Target("new masks", r"Experiment\.project", records=3, window=0.02),
  Target("regularized training: weights", WEIGHTS, records=3, window=0.5),
  Target("regularized training: a checkpoint is written", r"Checkpointer\.save", records=3, window=0.05),
  Target("a record is written", r"Recorder\.write", records=4, window=0.01),
  Target("a later epoch of the generator", r"GeneratorProposer\.propose", records=5, window=0.5),
  Target("a checkpoint is read", r"Checkpointer\.restore", records=5, window=0.3),
  Target("regularized training: evaluation", r"Passes\.evaluate", records=5, window=0.2),
  Target("pruning", r"run\.prune", records=7, window=0.5),
  Target("fine-tuning: a checkpoint is written", r"Checkpointer\.save", records=8, window=0.05),
  Target("fine-tuning: weights", WEIGHTS, records=8, window=0.5),
  Target("after fine-tuning: latency, accuracy", r"run\.summarize", records=11, window=2.0),
  Target("the models are saved", r"artifacts\.save", records=11, window=0.01),
  Target("report and summary are written", r"run\._write_results > run\.", records=11, window=0.002),
)

NOTED = {
  "sapr_jax.training.run": ("build", "prune", "summarize", "_write_results", "write_atomically", "write_json"),
  "sapr_jax.training.loop": ("train",),
  "sapr_jax.training.passes": ("Passes.evaluate",),
  "sapr_jax.training.experiment": ("Experiment.project",),
  "sapr_jax.training.proposers": ("GeneratorProposer.propose",),
  "sapr_jax.runtime.devices": ("MappedStep.__call__", "MetricsQueue.add"),
  "sapr_jax.artifacts": ("save", "Checkpointer.save", "Checkpointer.restore", "Recorder.write", "Recorder.rewind"),
}
"""The functions of which a run notes that it is in them, where they are called from."""


def main() -> int:
  arguments = parser(__doc__, "three kills")
  arguments.add_argument("--runs", type=pathlib.Path, required=True, help="folder for the work directories, emptied")
  arguments.add_argument("--seed", type=int, default=0, help="of the instants of the kills")
  args = arguments.parse_args()
  whole, killed = Run(args.runs / "undisturbed"), Run(args.runs / "killed")
  print(f"undisturbed: {whole.finish():.1f} s", flush=True)
  kills: list[dict[str, Any]] = []
  for target in TARGETS[3::7] if args.quick else TARGETS:
    kills.append(killed.kill(target, random.Random(f"{args.seed} {len(kills)}")))
    print(f"{len(kills):2} {describe(kills[-1])}", flush=True)
  print(f"left alone: {killed.finish():.1f} s")
  problems = [*killed.complaints(), *differences(whole.workdir, killed.workdir)]
  problems += [f"{name} is left over, half written" for name in killed.temporary_files()]
  problems += [f"kill {n} came too late: the run was finished" for n, kill in enumerate(kills, 1) if not kill["hit"]]
  results = {
    "config": CONFIG,
    "overrides": OVERRIDES,
    "seed": args.seed,
    "device": report.versions() | {"cores": os.cpu_count()},
    "kills": kills,
    "damaged_entries_of_the_compilation_cache": killed.damaged_cache_entries(),
    "problems": problems,
    "verdict": "differs" if problems else "the same, bit for bit",
  }
  if not args.quick:
    write_json(RESULTS, results)
  print("\n".join(problems) or f"killed {len(kills)} times, and the same, bit for bit")
  return 1 if problems else 0


class Run:
  """The experiment in a work directory of its own, with a compilation cache that its restarts share."""

  def __init__(self, workdir: pathlib.Path):
    self.workdir, self._cache = workdir, workdir.with_name(f"{workdir.name}_cache")
    self._place_file, self._log = workdir.with_name(f"{workdir.name}_place"), workdir.with_name(f"{workdir.name}.log")
    for folder in (workdir, self._cache):
      shutil.rmtree(folder, ignore_errors=True)
    self._cache.mkdir(parents=True)
    self._log.unlink(missing_ok=True)

  def finish(self) -> float:
    """Runs to the end; returns how many seconds it took."""
    started = time.monotonic()
    with self._process() as (process, _):
      status = process.wait()
    if status:
      sys.exit(f"{self.workdir} ended with status {status}:\n{self._log.read_text()}")
    return time.monotonic() - started

  def kill(self, target: Target, rng: random.Random) -> dict[str, Any]:
    """Starts the run, kills it at `target`, and says where that hit."""
    delay = rng.uniform(0, target.window)
    started = time.monotonic()
    with self._process() as (process, place):
      while process.poll() is None and not self._is_at(target, place()):
        time.sleep(0.0005)
      time.sleep(delay)
      process.kill()
      status, last_place = process.wait(), place()
    seconds = time.monotonic() - started
    if status not in (0, -signal.SIGKILL):
      sys.exit(f"{self.workdir} ended with status {status} by itself:\n{self._log.read_text()}")
    stages = (_checkpoints(self.workdir, stage) for stage in ("finetune", "train"))
    newest = next((found[-1] for found in stages if found), None)
    return {
      "target": target.name,
      "hit": status != 0,
      "seconds_after_start": round(seconds, 3),
      "place": last_place,
      "records": len(artifacts.read_records(self.workdir)),
      "newest_checkpoint": newest and f"{newest.parent.name}/{newest.name}",
      "being_written": self.temporary_files(),
    }

  def _is_at(self, target: Target, place: str) -> bool:
    if re.search(target.place, place) is None:
      return False
    return not target.records or len(artifacts.read_records(self.workdir)) >= target.records

  @contextlib.contextmanager
  def _process(self) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """Starts the command; yields its process and a function that returns which functions of the package it runs."""
    self._place_file.write_bytes(bytes(PLACE_SIZE))
    flags = [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    command = [sys.executable, "-m", "benchmarks.kill_and_resume", "run", str(self._place_file)]
    command += [f"--config={CONFIG}", f"--workdir={self.workdir}", *flags]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(self._cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with (
      self._place_file.open("r+b") as file,
      mmap.mmap(file.fileno(), PLACE_SIZE) as memory,
      self._log.open("a") as log,
    ):
      process = subprocess.Popen(command, env=os.environ | cache, stdout=log, stderr=log)
      try:
        yield process, lambda: memory[:].rstrip(b"\0").decode(errors="replace")
      finally:
        process.kill()
        process.wait()

  def temporary_files(self) -> list[str]:
    """Returns what lies below the work directory half written."""
    found = {p for pattern in TEMPORARY for p in self.workdir.rglob(pattern)}
    return sorted(str(p.relative_to(self.workdir)) for p in found if not found & set(p.parents))

  def damaged_cache_entries(self) -> int:
    """Counts entries of the compilation cache that were cut short; JAX passes over them."""
    damaged = 0
    for file in self._cache.rglob("*-cache"):
      try:
        zlib.decompress(file.read_bytes())
      except zlib.error:
        damaged += 1
    return damaged

  def complaints(self) -> list[str]:
    """Returns what restarts said that a kill must not lead to: a killed run has no damaged checkpoint."""
    return [line for line in self._log.read_text().splitlines() if re.search(r"Traceback|damaged|^error", line)]


def _checkpoints(workdir: pathlib.Path, stage: str) -> list[pathlib.Path]:
  """Returns the whole checkpoints of a stage, in order."""
  found = [d for d in workdir.glob(f"checkpoints/{stage}/*") if d.name.isdigit()]
  return sorted(found, key=lambda d: int(d.name))


def describe(kill: dict[str, Any]) -> str:
  """Says in a line where a kill hit."""
  if not kill["hit"]:
    return f"{kill['target']}: missed"
  place = kill["place"].rpartition(" > ")[2] or "none of the functions noted"
  written = f", being written: {', '.join(kill['being_written'])}" if kill["being_written"] else ""
  return (
    f"{kill['target']}: in {place} after {kill['seconds_after_start']:.1f} s, {kill['records']} records, newest"
    f" checkpoint {kill['newest_checkpoint']}{written}"
  )


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
  """Compares two finished runs in everything but times; returns what differs."""
  found = []
  for name, read in (
    ("dense and pruned model", _models),
    ("masks, generator and optimizer at the end of each stage", _last_checkpoints),
    ("records", _records),
    ("summary", _summary),
  ):
    mine, others = read(one), read(other)
    if len(mine) != len(others):
      found.append(f"{name}: {len(mine)} and {len(others)} entries")
    found += [f"{name}: {key} differs" for key in mine.keys() & others.keys() if mine[key] != others[key]]
  return found


def _models(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the files of the models: weights and, as the definition, the widths."""
  return {str(f.relative_to(workdir)): f.read_bytes() for d in ("dense", "pruned") for f in (workdir / d).iterdir()}


def _last_checkpoints(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns position and checksum of every array in the last checkpoint of each stage."""
  found: dict[str, Any] = {}
  for stage in ("train", "finetune"):
    content = json.loads((_checkpoints(workdir, stage)[-1] / "position" / "metadata").read_text())
    position = content["position"] | {"record": _without_times(content["position"]["record"])}
    found |= {f"{stage}/position": position, **{f"{stage}/{k}": v for k, v in content["arrays"].items()}}
  return found


def _records(workdir: pathlib.Path) -> dict[str, Any]:
  return {f"line {n}": _without_times(record) for n, record in enumerate(artifacts.read_records(workdir), 1)}


def _summary(workdir: pathlib.Path) -> dict[str, Any]:
  summary = json.loads((workdir / "summary.json").read_text())
  return {f"{part}/{name}": v for part, values in summary.items() for name, v in _without_times(values).items()}


def _without_times(values: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in values.items() if not k.endswith("seconds") and not k.startswith("latency")}


def run_and_note_place(place_file: str) -> None:
  """Runs `python -m sapr_jax.main` in this process, which notes on the way where it is."""
  with open(place_file, "r+b") as file:
    memory = mmap.mmap(file.fileno(), PLACE_SIZE)
  stack: list[str] = []

  def note() -> None:
    memory[:] = " > ".join(stack).encode()[:PLACE_SIZE].ljust(PLACE_SIZE, b"\0")

  def noting(name: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
      stack.append(name)
      note()
      try:
        return function(*args, **kwargs)
      finally:
        stack.pop()
        note()

    return call

  for module, names in NOTED.items():
    for name in names:
      *owner, function = name.split(".")
      where: Any = importlib.import_module(module)
      for part in owner:
        where = getattr(where, part)
      setattr(where, function, noting(f"{module.rpartition('.')[2]}.{name}", getattr(where, function)))
  sys.argv = ["sapr_jax.main", *sys.argv[3:]]
  runpy.run_module("sapr_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  if sys.argv[1:2] == ["run"]:
    run_and_note_place(sys.argv[2])
  else:
    sys.exit(main())
