"""Tools that all benchmarks share: command line, timing in turns, the machine, recorded results, tables."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sapr_jax.artifacts.files import read_json, write_json
from sapr_jax.errors import one_line

RESULTS = pathlib.Path("results")
Row = TypeVar("Row")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "torch-pruning")


def time_in_turns(
  calls: Mapping[str, Callable[[], Any]],
  *,
  rounds: int = 9,
  warm_up: int = 2,
  repeats: int = 1,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Times calls that take turns, so that what else the machine does hits all of them alike.

  Args:
    calls: Name -> call; it returns when its work is done (`jax.block_until_ready`, `torch.cuda.synchronize`).
    rounds: Timings of each.
    warm_up: Calls of each beforehand, which do not count: they compile and fill caches.
    repeats: Calls in one timing, for short ones.
    clock: Returns seconds.

  Returns:
    Name -> seconds of one call in each round.
  """
  for call in calls.values():
    for _ in range(warm_up):
      call()
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      seconds[name].append(seconds_of(call, repeats, clock))
  return seconds


def seconds_of(call: Callable[[], Any], repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
  """Returns the seconds that a call takes."""
  start = clock()
  for _ in range(repeats):
    call()
  return (clock() - start) / repeats


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


def kind(about: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of `machine()` that must be equal where measurements stand side by side.

  What is measured on an accelerator does not depend on the processor beside it.
  """
  fields = ["platform", "device", "versions"] + (["cpu", "cores", "python"] if about["platform"] == "cpu" else [])
  return {field: about[field] for field in fields}


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
  """Returns the versions of those packages that are installed."""
  found = {}
  for package in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
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


def parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
  """Returns a parser for a benchmark with this docstring, with the option `--quick`."""
  made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  made.add_argument("--quick", action="store_true", help=f"{quick}; records nothing in results/")
  return made


def needed(module: str, extra: str) -> Any:
  """Imports a module; ends the program with what to install if a package is missing."""
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is missing; pip install -e '.[{extra}]'")


def note(text: str) -> None:
  """Says on standard error, in a line that begins with `NOTE`, what a measurement lacks."""
  print(f"{NOTE}{text}", file=sys.stderr, flush=True)


def torch_peer() -> Any | None:
  """Returns `benchmarks.torch_peer`; None, with a note, where PyTorch is missing, broken or not on JAX's device.

  It leaves memory of the GPU to PyTorch, so it must be called before JAX starts.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  try:
    peer = importlib.import_module("benchmarks.torch_peer")
  except (ImportError, OSError) as error:  # OSError: of one whose libraries do not fit
    note(f"without PyTorch, which cannot be imported: {one_line(error, 200)}; pip install -e '.[bench]'")
    return None
  import jax

  platform = jax.devices()[0].platform
  if {"cuda": "gpu"}.get(peer.DEVICE, peer.DEVICE) != platform:
    note(f"without PyTorch, which has no {platform} here")
    return None
  return peer


def attempt(name: str, make: Callable[[], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
  """Makes a call of a peer's and runs it once; returns it under its name, or nothing and a note if that fails."""
  try:
    call = make()
    call()
  except Exception as error:  # of whatever kind: what is ours is measured all the same
    note(f"without {name}, which failed: {one_line(error, 200)}")
    return {}
  return {name: call}


def measure_rows(
  doc: str | None,
  name: str,
  key: str,
  rows: Mapping[str, Row],
  measure: Callable[[Row, bool], dict[str, Any]],
  default: Iterable[str] | None = None,
) -> dict[str, Any]:
  """Measures the rows that the command line names, and records each as soon as it is there; returns them.

  What was recorded of other rows on a machine of this kind is kept.

  Args:
    doc: Docstring of the benchmark.
    name: Its name.
    key: Where the rows are in its record.
    rows: Name -> row, in the order of the record.
    measure: (row, quick) -> what is recorded of it.
    default: Rows to measure if none is named; None for all.
  """
  made = parser(doc, "small networks, images and batches, few rounds")
  made.add_argument("rows", nargs="*", metavar="ROW", help=f"some of {', '.join(rows)}")
  made.add_argument("--results", type=pathlib.Path, help=f"folder to record in, with --quick too (default: {RESULTS})")
  args = made.parse_args()
  if unknown := set(args.rows) - set(rows):
    made.error(f"ROW must be one of {', '.join(rows)}, got {', '.join(sorted(unknown))}")
  folder, measured = args.results or (None if args.quick else RESULTS), {}
  if folder is not None:
    recorded(name, machine()["platform"], folder)  # what is damaged is said before all the work
  for row in args.rows or default or rows:
    measured[row] = measure(rows[row], args.quick)
    print(f"{row}: measured", file=sys.stderr, flush=True)
    if folder is not None:
      about = machine()
      earlier = recorded(name, about["platform"], folder)
      known = {**(earlier[key] if earlier and kind(earlier["machine"]) == kind(about) else {}), **measured}
      record(name, {key: {row: known[row] for row in rows if row in known}}, folder)
  return measured


def record(name: str, body: Mapping[str, Any], folder: pathlib.Path = RESULTS) -> dict[str, Any]:
  """Writes `<folder>/<name>_<platform>.json`: the body, the command and the machine. Returns what it wrote."""
  about = machine()
  report = {"command": f"python -m benchmarks.{name}", "machine": about, **body}
  write_json(folder / f"{name}_{about['platform']}.json", report)
  return report


def recorded(name: str, platform_name: str, folder: pathlib.Path = RESULTS) -> dict[str, Any] | None:
  """Returns what `record` wrote, None if the file is missing; ends the program if it is damaged or something else."""
  file = folder / f"{name}_{platform_name}.json"
  if not os.path.lexists(file):
    return None
  if (found := read_json(file)) is None or not isinstance(found.get("machine"), dict):
    sys.exit(f"error: {file} is damaged or of something else; move it away")
  return found


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


MISSED = "- Goal missed: "
"""What a line about a goal that is missed begins with."""
NOTE = "note: "
"""What a line about something that could not be measured begins with."""


def goal(reached: bool, text: str) -> str:
  """Formats a line that says whether a goal was reached."""
  return f"{'- Goal reached: ' if reached else MISSED}{text}"


def renew_tables(page: str, tables: Mapping[str, str]) -> str:
  """Returns a page with its tables renewed, each between `<!-- table: name -->` and `<!-- end -->`."""

  def replace(match: re.Match) -> str:
    return f"<!-- table: {match[1]} -->\n{tables[match[1]]}\n<!-- end -->"

  return re.sub(r"<!-- table: ([\w ]+) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)
