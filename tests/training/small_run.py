"""A run on the digits that takes seconds, and what it means that two runs are the same."""

import jax
import numpy as np
import tiny_main  # noqa: F401  (registers the network)

import sapr_jax as sapr
from sapr_jax import artifacts
from sapr_jax.configs import digits

SMALL = {
  "model.name": "tiny",
  "data.train_images": 320,
  "data.test_images": 100,
  "eval_batch_size": 64,
  "train.epochs": 4,
  "train.decay_epochs": (3,),
  "prune.start_epoch": 1,
  "prune.select": "unjoined",
  "prune.form": "proximal",  # which has a state of its own that a resumed run must have too
  "prune.gamma": 0.1,  # strong, as there are only five steps in an epoch
  "prune.statistics_batches": 7,  # of two epochs
  "finetune.epochs": 2,
  "finetune.decay_epochs": (1,),
  "report.latency_batch_sizes": (1,),
  "report.latency_repeats": 1,
  "report.page": False,  # it takes longer than the run
}


def small_config(**overrides):
  config = digits.get_config()
  config.update_from_flattened_dict(SMALL | {name.replace("__", "."): value for name, value in overrides.items()})
  return config


def without_times(records):
  return [{name: value for name, value in record.items() if not name.endswith("seconds")} for record in records]


def check_same_run(workdir, other):
  """Checks that two finished runs recorded the same and ended with the same weights, bit for bit."""
  assert without_times(artifacts.read_records(workdir)) == without_times(artifacts.read_records(other))
  for name in ("dense", "pruned"):
    (_, got), (_, want) = (sapr.load(path / name) for path in (workdir, other))
    jax.tree.map(np.testing.assert_array_equal, got, want)
