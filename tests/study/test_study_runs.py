"""What the study runs in this package beside the method."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.configs import digits
from sapr_jax.method import l1_norm, macs_budget, split_by_group
from sapr_jax.training import build, make_proposer
from study import ours
from study.rows import config_of, grid
from study.sizes import SIZES
from study.variants import Variant


def test_channels_are_chosen_within_layers_or_among_all(tiny):
  norms, budget = l1_norm(tiny.params, tiny.graph), macs_budget(tiny.graph, 0.5)
  masks = {
    name: sapr.project_to_budget(tiny.graph, criterion(norms), budget) for name, criterion in ours.CRITERIA.items()
  }
  assert {mask.mean() for mask in masks["uniform"].values()} == {0.5}
  assert len({mask.mean() for mask in masks["global"].values()}) > 1


def test_the_schedule_from_scratch_has_all_epochs():
  phase = ours.scratch_phase(config_of(grid(SIZES["full"])[0], 0, None, {}))
  assert (phase.epochs, phase.decay_epochs, phase.learning_rate) == (360, (180, 270), 0.1)


@pytest.mark.slow
def test_a_generator_chooses_by_what_it_has_learned():
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  config = digits.get_config()
  config.update_from_flattened_dict(
    {"model.width_multiplier": 0.25, "data.train_images": 320, "eval_batch_size": 64, "prune.round_to": 1}
    | {"prune.start_epoch": 28, "generator.learning_rate": 0.1}
  )
  run = build(config)
  scores = ours.generator_scores(run, run.variables, Variant())
  proposer = make_proposer(run)
  untrained = split_by_group(jax.device_get(proposer.generator.apply(proposer.init().variables)), run.graph)
  orders = [{name: np.argsort(score).tolist() for name, score in s.items()} for s in (scores, untrained)]
  assert {name: len(score) for name, score in scores.items()} == {g.name: g.size for g in run.graph.groups}
  assert orders[0] != orders[1]
