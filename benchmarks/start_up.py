"""Start-up and memory: what passes before the first step, and how much memory and disk training takes.

    python -m benchmarks.start_up [--quick]

Starts runs in processes of their own, with an empty compilation cache and with what the one before left in it, on
random images that it writes to a temporary folder.
"""

from __future__ import annotations

import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from benchmarks import training_pieces
from benchmarks.measuring import goal, parser, record, shown, table, time_in_turns
from sapr_jax import prune, trace_channels
from sapr_jax.artifacts import Checkpointer, read_records
from sapr_jax.method import ArchitectureGenerator, GeneratorState, sample_masks
from sapr_jax.runtime.devices import AXIS
from sapr_jax.training.state import TrainState

GOAL_TRACE, GOAL_PRUNE = 1.5, 1.0
GOAL_GROWTH = 1.25  # of compile time, from the fewest groups to the most: room for the noise
GROUPS = (8, 32, 128)
STATEMENTS = ("pass", "import jax", "import sapr_jax", "from sapr_jax import training")


def main() -> None:
  quick = parser(__doc__, "small networks, once").parse_args().quick
  rounds = 1 if quick else 2
  sizes = {"resnet20": (8, 32)} if quick else {"resnet56": (128, 32), "resnet50": (256, 224)}
  imports = {
    statement: functools.partial(subprocess.run, [sys.executable, "-c", statement], check=True)
    for statement in STATEMENTS
  }
  # In their own processes first: on a GPU, they need the memory that this one has not taken yet.
  measured: dict[str, Any] = {
    "start": measure_starts("resnet20" if quick else "resnet56", rounds),
    "imports": time_in_turns(imports, rounds=rounds + 1, warm_up=0),
    "surgery": measure_surgery("resnet18" if quick else "resnet101", 0.41, rounds + 3),
    "generator_compile": {str(groups): [generator_compile(groups) for _ in range(rounds)] for groups in GROUPS},
    "networks": {name: measure_network(name, *size) for name, size in sizes.items()},
  }
  report = measured if quick else record("start_up", measured)
  print("\n\n".join(tables(report)))


# Runs in processes of their own.


def measure_starts(network: str, rounds: int) -> dict[str, Any]:
  """Starts runs cold and warm in turns; returns the seconds to the first step, and the peak memory of each."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    training_pieces.write_images(folder / "images", 128, (32, 32))
    cold, warm = [], []
    for number in range(rounds):
      caches = folder / f"caches{number}"
      cold.append(start_run(network, folder / "images", caches, folder / f"cold{number}"))
      warm.append(start_run(network, folder / "images", caches, folder / f"warm{number}"))
  return {"network": network, "cold": cold, "warm": warm}


def start_run(network: str, images: pathlib.Path, caches: pathlib.Path, workdir: pathlib.Path) -> dict[str, float]:
  """Runs the command until it has reported its first epoch, of one step of 128 images; ends it by SIGTERM."""
  command = [
    *(sys.executable, "-m", "sapr_jax.main", "--config=configs/resnet56_cifar10.py", f"--workdir={workdir}"),
    *(f"--config.model.name={network}", "--config.data.source=folder", f"--config.data.path={images}"),
    "--config.generator.data_share=1.0",
  ]
  environment = os.environ | {"XDG_CACHE_HOME": str(caches), "PYTHONUNBUFFERED": "1"}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  with tempfile.TemporaryFile("w+") as errors:
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    reported = 0.0
    for line in process.stdout or ():
      if line.startswith("train 1/"):
        reported = time.perf_counter() - started
        process.terminate()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if not reported:
      errors.seek(0)
      last = (errors.read().splitlines() or ["it said nothing"])[-1]
      sys.exit(f"error: the run ended before its first epoch did: {last}")
  (first, *_) = read_records(workdir)
  in_bytes = 1 if sys.platform == "darwin" else 1024
  return {"first_step_seconds": reported - first["evaluation_seconds"], "peak_host_bytes": usage.ru_maxrss * in_bytes}


# In this process.


def measure_surgery(network: str, p: float, rounds: int) -> dict[str, Any]:
  """Times `trace_channels` and `prune` of a network for ImageNet, all weights at hand."""
  made = training_pieces.pieces(network, image_size=224, images=1)
  masks = training_pieces.random_masks(made.graph, p)
  calls = {
    "trace_channels": lambda: trace_channels(made.model, made.variables, (1, 224, 224, 3)),
    "prune": lambda: prune(made.model, made.variables, made.graph, masks),
  }
  return {"network": network, **time_in_turns(calls, rounds=rounds, warm_up=0)}


def generator_compile(groups: int) -> float:
  """Seconds to trace and compile the gradient of the generator's sampled masks for so many groups of 64 channels."""
  generator = ArchitectureGenerator(sizes=(64,) * groups)
  variables = generator.init(jax.random.key(0))

  def kept(params: Any) -> jax.Array:
    outputs: Any = generator.apply({**variables, "params": params})
    return jnp.sum(sample_masks(jax.random.key(1), outputs))

  return training_pieces.compile_seconds(kept, variables["params"])


def measure_network(network: str, batch: int, image_size: int) -> dict[str, Any]:
  """Returns the memory that a weight step with regularization takes, and the size of a checkpoint, in bytes."""
  made = training_pieces.pieces(network, image_size=image_size, images=batch)
  generator, tx = ArchitectureGenerator.for_graph(made.graph), training_pieces.weight_tx(made.graph)
  proposer = GeneratorState.create(generator.init(jax.random.key(0)), optax.adamw(1e-3))
  return {
    "batch": batch,
    "image_size": image_size,
    "device_bytes": step_memory(made, tx),
    "checkpoint_bytes": checkpoint_bytes(TrainState.create(made.variables, tx, masks=made.masks, proposer=proposer)),
  }


def step_memory(made: training_pieces.Pieces, tx: optax.GradientTransformation) -> dict[str, int]:
  """Returns what the compiled step needs on a device, and what the device counted where it does."""
  shared, state = made.shared, made.state(tx)
  rows = np.arange(len(shared.labels), dtype=np.int32)  # type: ignore[arg-type]
  everywhere, cut = PartitionSpec(), PartitionSpec(AXIS)
  step, specs, out = made.weight_step(tx), (everywhere, everywhere, cut), (everywhere, everywhere)
  mapped = jax.shard_map(step, mesh=made.mesh, in_specs=specs, out_specs=out, check_vma=False)
  compiled = jax.jit(mapped, donate_argnums=0).lower(state, shared, rows).compile()
  plan: Any = compiled.memory_analysis()
  used = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
  device = made.mesh.devices.flat[0]
  if device.memory_stats() is None:
    return {"planned": used}
  jax.block_until_ready(compiled(jax.device_put(state, shared.images.sharding), shared, rows))  # type: ignore[union-attr]
  return {"planned": used, "peak": device.memory_stats()["peak_bytes_in_use"]}


def checkpoint_bytes(state: TrainState) -> int:
  """Returns the size on disk of what a run saves while it prunes."""
  rng = np.random.default_rng(0)

  def fill(leaf: Any) -> jax.Array:  # what a run saves is not all zeros, which would compress to nothing
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

  with tempfile.TemporaryDirectory() as folder:
    checkpointer = Checkpointer(pathlib.Path(folder))
    checkpointer.save(1, jax.tree.map(fill, state), {})
    checkpointer.close()
    return sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file())


# What the page shows.

_CACHES = {"cold": "empty cache", "warm": "filled cache"}
_KINDS = {"planned": "as compiled", "peak": "greatest so far that the device counted"}


def parts(platform: str, report: Mapping[str, Any]) -> list[str]:
  del platform
  surgery, compiling, lines = report["surgery"], report["generator_compile"], []
  for name, most in (("trace_channels", GOAL_TRACE), ("prune", GOAL_PRUNE)):
    seconds = statistics.median(surgery[name])
    found = f"`{name}` of {surgery['network']} takes {seconds:.2f} s, asked for under {most:g} s."
    lines.append(goal(seconds < most, found))
  few, many = (statistics.median(compiling[str(groups)]) for groups in (GROUPS[0], GROUPS[-1]))
  found = f"the generator for {GROUPS[-1]} groups takes {many / few:.2f} times as long to compile as for {GROUPS[0]}"
  lines.append(goal(many <= GOAL_GROWTH * few, f"{found}, asked for no growth (at most {GOAL_GROWTH:g})."))
  return [*tables(report), "\n".join(lines)]


def tables(report: Mapping[str, Any]) -> list[str]:
  """Returns the table of times and that of sizes."""
  start, surgery = report["start"], report["surgery"]
  network, times, sizes = start["network"], {}, {}
  for key, cache in _CACHES.items():
    times[f"{network}: command to first step, {cache}"] = [run["first_step_seconds"] for run in start[key]]
    peak = statistics.median(run["peak_host_bytes"] for run in start[key])
    sizes[f"{network}: peak of the host until after the first step, {cache}"] = peak
  times |= {f"`python -c '{statement}'`": seconds for statement, seconds in report["imports"].items()}
  times |= {f"{surgery['network']}: `{name}`": surgery[name] for name in ("trace_channels", "prune")}
  for groups, seconds in report["generator_compile"].items():
    times[f"compiling the generator's gradient, {groups} groups"] = seconds
  for name, about in report["networks"].items():
    where = f"{name}, {about['batch']} images of {about['image_size']} pixels, float32"
    for kind, taken in about["device_bytes"].items():
      sizes[f"{where}: memory of a weight step, {_KINDS[kind]}"] = taken
    sizes[f"{name}: checkpoint"] = about["checkpoint_bytes"]
  return [
    table(["", "seconds"], [[name, shown(statistics.median(seconds))] for name, seconds in times.items()]),
    table(["", "MB"], [[name, shown(taken / 1e6)] for name, taken in sizes.items()]),
  ]


if __name__ == "__main__":
  main()
