"""Renews the tables of `docs/performance.md` from what the benchmarks recorded in `results/`.

python -m benchmarks.performance_page
"""

from __future__ import annotations

import functools
import importlib
import pathlib
from typing import Any

from benchmarks.measuring import recorded, renew_tables

PAGE = pathlib.Path("docs/performance.md")
SECTIONS = ("training_step", "method_cost", "pruned_speed", "latency_budget", "start_up", "growth")
"""Benchmarks; the function `parts` of each makes tables of what it recorded on a platform."""


def text() -> str:
  """Returns the page."""
  return renew_tables(PAGE.read_text(), {name: functools.partial(section, name) for name in SECTIONS})


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
