"""Renews the tables of `docs/performance.md` from what the benchmarks recorded in `results/`.

python -m benchmarks.performance_page
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Iterable
from typing import Any

from benchmarks.measuring import MISSED, RESULTS, recorded, renew_tables, table

PLATFORMS = ("cpu", "gpu", "tpu")
PAGE = pathlib.Path("docs/performance.md")
SECTIONS = {
  "training_step": "Training step",
  "device_time": "Idle time of the device",
  "method_cost": "What the method costs",
  "pruned_speed": "What pruning gives",
  "serving": "Serving on a CPU",
  "latency_budget": "A budget in latency",
  "start_up": "Start-up and memory",
  "growth": "How cost grows",
  "agreement": "Agreement with a CPU",
}
"""Benchmarks -> their headings; the function `parts` of each makes tables of what it recorded on a platform."""


def text() -> str:
  """Returns the page: goals that are missed are named at its beginning, and not again in their sections."""
  rows, tables = [], {}
  for name, title in SECTIONS.items():
    kept, platform = [], ""
    for line in section(name).split("\n"):
      if line.startswith("### "):
        platform = line.removeprefix("### ")
      if line.startswith(MISSED):
        rows.append([f"[{title}](#{title.lower().replace(' ', '-')})", platform, line.removeprefix(MISSED)])
      else:
        kept.append(line)
    tables[name] = "\n".join(kept).rstrip()
  tables["missed_goals"] = table(["section", "platform", "missed goal"], rows)
  return renew_tables(PAGE.read_text(), tables)


def section(name: str, folder: pathlib.Path = RESULTS, platforms: Iterable[str] = PLATFORMS) -> str:
  """Returns what a benchmark recorded in a folder on each platform, with command, machine and versions."""
  parts, benchmark = [], importlib.import_module(f"benchmarks.{name}")
  for platform in platforms:
    if (report := recorded(name, platform, folder)) is not None:
      about: dict[str, Any] = report["machine"]
      device = "" if platform == "cpu" else f"{about['device']}, "
      found = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
      where = f"{device}{about['cores']} cores of {about['cpu']}; Python {about['python']}, {found}"
      parts += [f"### {platform.upper()}", f"`{report['command']}` on {where}.", *benchmark.parts(platform, report)]
  return "\n\n".join(parts) or f"Nothing is recorded yet: `python -m benchmarks.{name}`."


if __name__ == "__main__":
  PAGE.write_text(text())
