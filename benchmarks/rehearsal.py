"""Does partial regularization help? ResNet-20 on 4,000 CIFAR-10 images, with and without it, otherwise the same.

    python -m benchmarks.rehearsal --data DIR --runs runs/rehearsal

`DIR` holds images as `train/<class>/*` and `test/<class>/*`. It runs every gamma with every seed (about ten minutes
each on two CPU cores), resumes where it was stopped, and prints a table of the sub-network's accuracy before
fine-tuning, which it also writes to `results/rehearsal.json`. Several may run at once with parts of the grid
(`--gammas`, `--seeds`); the table shows what is finished.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np

from configs import resnet56_cifar10
from sapr_jax import training
from sapr_jax.artifacts.files import write_json

OVERRIDES = {
  "model.name": "resnet20",
  "data.source": "folder",
  "data.train_images": 4000,
  "data.test_images": 2000,
  "train.epochs": 20,
  "train.batch_size": 64,
  "train.learning_rate": 0.05,
  "train.decay_epochs": (12, 17),
  "prune.start_epoch": 4,
  "generator.data_share": 0.25,
  "generator.batch_size": 64,
  "generator.learning_rate": 5e-3,
  "finetune.epochs": 4,
  "finetune.batch_size": 64,
  "finetune.learning_rate": 0.02,
  "finetune.decay_epochs": (3,),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", required=True, help="folder of images")
  parser.add_argument("--runs", type=pathlib.Path, required=True, help="folder for the work directories")
  parser.add_argument("--gammas", type=float, nargs="+", default=[0.0, 1e-2])
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("results/rehearsal.json"))
  args = parser.parse_args()
  for seed in args.seeds:
    for gamma in args.gammas:
      config = resnet56_cifar10.get_config()
      config.update_from_flattened_dict(OVERRIDES | {"data.path": args.data, "prune.gamma": gamma, "seed": seed})
      training.run(config, args.runs / f"gamma_{gamma:g}_seed_{seed}")
  rows = collect(args.runs)
  write_json(args.results, {"config": "configs/resnet56_cifar10.py", "overrides": OVERRIDES, "rows": rows})
  print(table(rows))


def collect(runs: pathlib.Path) -> list[dict]:
  """Reads the finished runs under `runs`."""
  rows = []
  for file in sorted(runs.glob("gamma_*_seed_*/summary.json")):
    summary = json.loads(file.read_text())
    _, gamma, _, seed = file.parent.name.split("_")
    rows.append(
      {
        "gamma": float(gamma),
        "seed": int(seed),
        **{f"{name}_accuracy": round(summary[name]["accuracy"], 6) for name in ("dense", "subnetwork", "pruned")},
        "macs_share": summary["pruned"]["macs"] / summary["dense"]["macs"],
        "device": summary["run"]["device"],
        "versions": summary["run"]["versions"],
      }
    )
  return sorted(rows, key=lambda row: (row["gamma"], row["seed"]))


def table(rows: list[dict]) -> str:
  """Formats mean and standard deviation over the seeds, as Markdown."""
  lines = [
    "| gamma | seeds | dense | sub-network before fine-tuning | pruned after fine-tuning | MACs |",
    "|---|---|---|---|---|---|",
  ]
  for gamma in sorted({row["gamma"] for row in rows}):
    chosen = [row for row in rows if row["gamma"] == gamma]
    cells = []
    for name in ("dense", "subnetwork", "pruned"):
      values = 100 * np.array([row[f"{name}_accuracy"] for row in chosen])
      spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
      cells.append(f"{values.mean():.2f}{spread}")
    share = np.mean([row["macs_share"] for row in chosen])
    lines.append(f"| {gamma:g} | {', '.join(str(r['seed']) for r in chosen)} | {' | '.join(cells)} | {share:.1%} |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
