"""A generator that starts from knowledge, and how far a search has come."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.method import (
  learned_share,
  outputs_of_prior,
  overlap,
  project_to_budget,
  reorder,
  sample_masks,
  split_by_group,
  start_from,
)


@pytest.fixture
def scores(tiny):
  return sapr.relative_to_group_mean(jax.device_get(sapr.l2_norm(tiny.params, tiny.graph)))


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.3, 0.7])
def test_the_first_samples_cost_what_they_may_and_rank_as_the_importance(tiny, scores, p):
  budget, generator = sapr.macs_budget(tiny.graph, p), sapr.ArchitectureGenerator.for_graph(tiny.graph)
  outputs = outputs_of_prior(tiny.graph, scores, budget, strength=4.0, bias=3.0)
  want = project_to_budget(tiny.graph, scores, budget)
  jax.tree.map(np.testing.assert_array_equal, project_to_budget(tiny.graph, outputs, budget), want)

  variables = start_from(generator.init(jax.random.key(0)), tiny.graph, outputs)
  got = generator.apply(variables)
  for name, row in split_by_group(got, tiny.graph).items():
    np.testing.assert_allclose(row, outputs[name], atol=0.3)  # the heads' kernel is small, not zero
  keys = jax.random.split(jax.random.key(1), 400)
  masks = jax.vmap(lambda key: sample_masks(key, got, bias=3.0))(keys)
  costs = [budget.cost(tiny.graph.kept(split_by_group(mask, tiny.graph))) / budget.full for mask in masks]
  assert np.mean(costs) == pytest.approx(p, abs=0.04)


def test_a_prior_that_tells_no_channels_apart_is_refused(tiny):
  same = {group.name: np.ones(group.size) for group in tiny.graph.groups}
  with pytest.raises(sapr.InputError, match="must differ between channels"):
    outputs_of_prior(tiny.graph, same, sapr.macs_budget(tiny.graph, 0.5), strength=1.0, bias=3.0)


def test_reordered_scores_have_the_same_widths_and_the_channels_of_the_importance(tiny, scores):
  rng, budget = np.random.default_rng(0), sapr.macs_budget(tiny.graph, 0.5)
  learned = {group.name: rng.normal(size=group.size) for group in tiny.graph.groups}
  before, after = (project_to_budget(tiny.graph, s, budget) for s in (learned, reorder(learned, scores)))
  for name, mask in after.items():
    assert mask.sum() == before[name].sum()
    if 0 < mask.sum() < mask.size:
      assert scores[name][mask == 1].min() >= scores[name][mask == 0].max()


def test_what_was_learned_is_the_overlap_without_chance():
  untrained = {"a": np.array([1, 1, 0, 0, 0, 0, 0, 0])}  # two of eight: by chance a quarter is kept alike
  half = {"a": np.array([1, 0, 1, 0, 0, 0, 0, 0])}
  assert (overlap(half, untrained), overlap(untrained, untrained)) == (0.5, 1.0)
  assert learned_share(untrained, untrained) == 0.0
  assert learned_share(half, untrained) == pytest.approx(0.5 / 0.75)
  whole = {"a": jnp.ones(8)}
  assert learned_share(whole, whole) == 1.0
