"""Runs every experiment of `configs/` through all its stages on a few real images, started as a user would start it.

    python -m benchmarks.rehearse_configs --cifar DIR --imagenet DIR --runs runs/configs

`--cifar` is a folder of `train/<class>/*` and `test/<class>/*`, `--imagenet` one of `train/<wnid>/*` and `val/<wnid>/*`
(or only `train/`, whose images then serve for both). Nothing is learned in so few steps; what is shown is that every
config trains, searches, regularizes, prunes, fine-tunes and reports, with overrides on the command line only. A config
that is done is not run again. Prints a table, and writes it to `results/rehearse_configs.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import time

from benchmarks.measuring import table
from sapr_jax.artifacts.files import read_json, write_json

RESULTS = pathlib.Path("results/rehearse_configs.json")

CIFAR = {
  "data.source": "folder",
  "data.train_images": 320,
  "data.test_images": 100,
  "eval_batch_size": 50,
  "train.batch_size": 32,
  "finetune.batch_size": 32,
  "generator.batch_size": 32,
}
IMAGENET = {
  "data.source": "folder",
  "data.image_size": 64,
  "data.eval_resize": 73,
  "data.test_images": 32,
  "eval_batch_size": 16,
  "train.batch_size": 16,
  "finetune.batch_size": 16,
  "generator.batch_size": 8,
  "checkpoint.every_steps": 5,
}
SHORT = {
  "train.epochs": 2,
  "train.decay_epochs": "(1,)",
  "train.learning_rate": 0.01,
  "prune.start_epoch": 1,
  "finetune.epochs": 1,
  "finetune.decay_epochs": "()",
  "finetune.learning_rate": 0.01,
  "report.latency_repeats": 3,
  "report.latency_batch_sizes": "(1,)",
}
EXPERIMENTS = {
  **dict.fromkeys(("resnet56_cifar10", "mobilenetv2_cifar10"), CIFAR),
  **{f"{name}_imagenet": IMAGENET for name in ("resnet34", "resnet50", "resnet101", "mobilenetv2")},
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cifar", type=pathlib.Path, help="folder of CIFAR-10 images; without it these are left out")
  parser.add_argument("--imagenet", type=pathlib.Path, help="folder of ImageNet images; likewise")
  parser.add_argument("--runs", type=pathlib.Path, required=True, help="folder for the work directories")
  parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="which experiments")
  parser.add_argument("--select", default="blocks", help="prune.select: which channel groups")
  args = parser.parse_args()
  rows = (read_json(RESULTS) or {"rows": []})["rows"]
  for name in args.only:
    folder = args.cifar if EXPERIMENTS[name] is CIFAR else args.imagenet
    if folder is None:
      continue
    if EXPERIMENTS[name] is IMAGENET and not (folder / "val").is_dir():
      folder = with_validation(folder, args.runs / "images")
    row = rehearse(name, folder, args.select, args.runs / f"{name}_{args.select}")
    rows = [r for r in rows if (r["config"], r["select"]) != (name, args.select)] + [row]
    write_json(RESULTS, {"rows": sorted(rows, key=lambda r: (r["select"], list(EXPERIMENTS).index(r["config"])))})
    print(table_of([row]), flush=True)
  print(f"\n{table_of(rows)}")


def rehearse(name: str, data: pathlib.Path, select: str, workdir: pathlib.Path) -> dict:
  """Runs one experiment in a process of its own; returns its row of the table."""
  overrides = EXPERIMENTS[name] | SHORT | {"data.path": data, "prune.select": select}
  command = ["-m", "sapr_jax.main", f"--config=configs/{name}.py", f"--workdir={workdir}"]
  command += [f"--config.{field}={value}" for field, value in overrides.items()]
  print(f"$ python {shlex.join(command)}", flush=True)
  start = time.monotonic()
  subprocess.run([sys.executable, *command], check=True)
  seconds = time.monotonic() - start
  summary = json.loads((workdir / "summary.json").read_text())
  dense, pruned, run = summary["dense"], summary["pruned"], summary["run"]
  return {
    "config": name,
    "select": select,
    "groups": len(run["widths"]),
    "dense_macs": dense["macs"],
    "macs_share": pruned["macs"] / dense["macs"],
    "prunable_macs_share": pruned["prunable_macs_share"],
    "params_share": pruned["params"] / dense["params"],
    "seconds": round(seconds),
    "versions": run["versions"],
    "device": run["device"],
  }


def with_validation(folder: pathlib.Path, links: pathlib.Path) -> pathlib.Path:
  """Returns a folder in which the training images stand for the validation images too."""
  links.mkdir(parents=True, exist_ok=True)
  for split in ("train", "val"):
    if not (links / split).exists():
      (links / split).symlink_to((folder / "train").resolve(), target_is_directory=True)
  return links


def table_of(rows: list[dict]) -> str:
  """Formats the rows as Markdown."""
  cells = []
  for row in rows:
    kept = [f"{row[share]:.1%}" for share in ("prunable_macs_share", "macs_share", "params_share")]
    groups, macs = f"{row['groups']} ({row['select']})", f"{row['dense_macs'] / 1e6:,.1f} M"
    cells.append([row["config"], groups, macs, *kept, row["seconds"]])
  kept = ["kept of the prunable", "kept of all", "parameters kept"]
  return table(["config", "groups offered", "MACs of the run", *kept, "seconds"], cells)


if __name__ == "__main__":
  main()
