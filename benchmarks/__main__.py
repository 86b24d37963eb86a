"""Runs all performance benchmarks on the machine at hand, and renews `docs/performance.md`: `make bench`.

    python -m benchmarks [PART ...]

Each part is a process of its own, prints one table and writes `results/<part>_<platform>.json`; the same command
measures a GPU. The page shows what was recorded on each platform.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks import performance_page

PARTS = performance_page.SECTIONS


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; none: all")
  args = parser.parse_args()
  if unknown := set(args.parts) - set(PARTS):
    parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
  if not all(os.access(folder, os.W_OK) for folder in ("docs", "results")):
    parser.error("docs/ and results/ must be here and writable; start it in the root of the repository")
  failed = []
  for part in args.parts or PARTS:
    print(f"\n== {part}", flush=True)
    if subprocess.run([sys.executable, "-m", f"benchmarks.{part}"]).returncode:
      failed.append(part)
  performance_page.PAGE.write_text(performance_page.text())
  if failed:
    sys.exit(f"error: {', '.join(failed)} failed; the page shows what was recorded before")


if __name__ == "__main__":
  main()
