"""Tools that all benchmarks share: timing in turns, a description of the machine, recorded results, tables."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sapr_jax.artifacts.files import read_json, write_json

RESULTS = pathlib.Path("results")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "torch-pruning")


def time_in_turns(
  calls: Mapping[str, Callable[[], Any]], *, rounds: int = 9, warm_up: int = 2, repeats: int = 1
) -> dict[str, list[float]]:
  """Times calls that take turns, so that what else the machine does hits all of them alike.

  Args:
    calls: Name -> call; it returns when its work is done (`jax.block_until_ready`, `torch.cuda.synchronize`).
    rounds: Timings of each.
    warm_up: Calls of each beforehand, which do not count: they compile and fill caches.
    repeats: Calls in one timing, for short ones.

  Returns:
    Name -> seconds of one call in each round.
  """
  for call in calls.values():
    for _ in range(warm_up):
      call()
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      start = time.perf_counter()
      for _ in range(repeats):
        call()
      seconds[name].append((time.perf_counter() - start) / repeats)
  return seconds


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
  """Median over the rounds of the ratio within a round: what slows a whole round down cancels."""
  return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def machine() -> dict[str, Any]:
  """Describes where a benchmark ran: processor, accelerator, versions."""
  import jax

  device = jax.devices()[0]
  return {
    "cpu": cpu_name(),
    "cores": len(os.sched_getaffinity(0)),
    "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    "platform": device.platform,
    "device": device.device_kind,
    "python": platform.python_version(),
    "versions": versions(),
  }


def versions() -> dict[str, str]:
  """Returns the versions of those packages that are installed."""
  found = {}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def cpu_name() -> str:
  """Returns the processor's name, with "AVX-512" where it has that, as the name may not tell."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
  name = fields.get("model name", platform.processor())
  return f"{name} (AVX-512)" if "avx512f" in fields.get("flags", "").split() else name


def load_average() -> float:
  """Returns the number of processes that wanted to run in the last minute: what else the machine did."""
  return round(os.getloadavg()[0], 2)


def positive(text: str) -> int:
  """Parses an integer of at least 1, for argparse."""
  if (number := int(text)) < 1:
    raise ValueError
  return number


def record(name: str, body: Mapping[str, Any]) -> dict[str, Any]:
  """Writes `results/<name>_<platform>.json`: the body, the command and the machine. Returns what it wrote."""
  about = machine()
  module = pathlib.Path(sys.argv[0]).stem
  report = {"command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]), "machine": about, **body}
  RESULTS.mkdir(exist_ok=True)
  write_json(RESULTS / f"{name}_{about['platform']}.json", report)
  return report


def record_some(name: str, key: str, measured: Mapping[str, Any], order: Iterable[str]) -> None:
  """Records what was measured under `key`, with what was measured before on this machine, with these versions."""
  about = machine()
  earlier = recorded(name, about["platform"]) or {}
  rows = {**(earlier[key] if earlier.get("machine") == about else {}), **measured}
  record(name, {"command": f"python -m benchmarks.{name}", key: {row: rows[row] for row in order if row in rows}})


def recorded(name: str, platform_name: str) -> dict[str, Any] | None:
  """Returns what `record` wrote, or None."""
  return read_json(RESULTS / f"{name}_{platform_name}.json")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Formats a Markdown table; the first column is text, the others are set to the right."""
  lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
  return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def shown(value: float, digits: int = 3) -> str:
  """Formats a number with so many significant digits, without an exponent."""
  if value == 0:
    return "0"
  text = f"{value:.{digits}g}"
  return f"{float(text):.0f}" if "e" in text else text
