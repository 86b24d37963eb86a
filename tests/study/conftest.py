"""Results of a study that one can judge by hand."""

import pytest
from entries import entry

from study.results import Results


@pytest.fixture
def results():
  """Ours is 2 points better than a narrow network after fine-tuning, and as good as one-shot pruning."""
  entries = []
  for seed in (0, 1, 2):
    entries += [
      entry("gamma=0.02", seed, dense=60.0 + seed, subnetwork=55.0 + seed, pruned=61.0 + seed),
      entry("gamma=0", seed, dense=61.0 + seed, subnetwork=30.0 + seed, pruned=60.0),
      entry("uniform_width", seed, pruned=59.0 + seed),
      entry("one_shot_l1=uniform", seed, dense=61.0 + seed, subnetwork=20.0, pruned=60.0 + 2 * seed),
    ]
  return Results(entries, 0.02, [0.0, 0.02])
