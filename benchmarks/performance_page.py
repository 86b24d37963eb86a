"""Renews the tables of `docs/performance.md` from what the benchmarks recorded in `results/`.

python -m benchmarks.performance_page
"""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

from benchmarks.measuring import MISSED, recorded, renew_tables, table

PAGE = pathlib.Path("docs/performance.md")
SECTIONS = {
  "training_step": "Training step",
  "method_cost": "What the method costs",
  "pruned_speed": "What pruning gives",
  "serving": "Serving on a CPU",
  "latency_budget": "A budget in latency",
  "start_up": "Start-up and memory",
  "growth": "How cost grows",
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


def section(name: str) -> str:
  """Returns what a benchmark recorded on each platform, with command, machine and versions."""
  parts, benchmark = [], importlib.import_module(f"benchmarks.{name}")
  for platform in ("cpu", "gpu", "tpu"):
    if (report := recorded(name, platform)) is not None:
      about: dict[str, Any] = report["machine"]
      device = "" if platform == "cpu" else f"{about['device']}, "
      found = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
      where = f"{device}{about['cores']} cores of {about['cpu']}; Python {about['python']}, {found}"
      parts += [f"### {platform.upper()}", f"`{report['command']}` on {where}.", *benchmark.parts(platform, report)]
  return "\n\n".join(parts)


if __name__ == "__main__":
  PAGE.write_text(text())
