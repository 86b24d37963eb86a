"""Entries of runs, as a results file of the study has them."""


def entry(row, seed, **accuracy):
  return {
    "network": "resnet20",
    "row": row,
    "seed": seed,
    "accuracy": accuracy,
    "macs_share": 0.5,
    "start_epoch": 2,
    "train_epochs": 4,
    "p": 0.48,
    "curves": {"full_model": {"first": 1, "values": [10.0, 20.0, 30.0, 40.0]}},
    "seconds": {"total": 60.0},
    "machine": "one",
    "versions": {"jax": "0"},
  }
