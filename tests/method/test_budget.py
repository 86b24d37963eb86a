"""The MACs penalty and the projection onto the budget."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.method import macs_penalty


def random_scores(graph, seed):
  rng = np.random.default_rng(seed)
  return {group.name: rng.normal(size=group.size) for group in graph.groups}


@pytest.fixture(scope="module")
def resnet20():
  model = sapr.models.create("resnet20")
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return sapr.trace_channels(model, variables, (1, 32, 32, 3))


def test_the_penalty_is_zero_within_the_budget_and_logarithmic_above_it(tiny):
  masks = tiny.graph.full_masks()
  masks = jax.tree.map(jnp.asarray, masks)
  assert macs_penalty(tiny.graph, masks, 1.0) == 0.0
  np.testing.assert_allclose(macs_penalty(tiny.graph, masks, 0.25), np.log(4.0), rtol=1e-6)
  halved = {name: mask.at[::2].set(0.0) for name, mask in masks.items()}
  np.testing.assert_allclose(macs_penalty(tiny.graph, halved, 0.25), np.log(2.0), rtol=1e-6)
  assert macs_penalty(tiny.graph, halved, 0.5) == 0.0


def test_the_gradient_of_the_penalty_is_the_share_of_each_channel(tiny):
  graph = tiny.graph
  masks = jax.tree.map(jnp.asarray, graph.full_masks())
  gradient = jax.grad(lambda m: macs_penalty(graph, m, 0.5))(masks)
  for group in graph.groups:
    without = graph.full_masks()
    without[group.name][0] = 0
    saved = graph.prunable_macs() - graph.prunable_macs(without)
    np.testing.assert_allclose(gradient[group.name], saved / graph.prunable_macs(), rtol=1e-5)
  within = jax.grad(lambda m: macs_penalty(graph, m, 1.0))(jax.tree.map(lambda m: 0.5 * m, masks))
  assert all((np.asarray(g) == 0).all() for g in within.values())


def test_projection_by_hand(bottleneck):
  # 4x4 images: a group `reduce` of 4, `middle` of 3, `expand` of 2 channels. MACs that touch a group:
  # 16 * (2 r + 9 r m + m e) + 16 * e * 5.
  graph = bottleneck.graph
  assert [(group.name, group.size) for group in graph.groups] == [("reduce", 4), ("middle", 3), ("expand", 2)]
  assert graph.prunable_macs() == 16 * (2 * 4 + 9 * 12 + 6) + 16 * 2 * 5
  scores = {
    "reduce": np.array([0.1, 0.9, 0.8, 0.2]),
    "middle": np.array([0.7, 0.3, 0.6]),
    "expand": np.array([0.5, 0.4]),
  }
  # All above 0.3 costs 16 (4 + 36 + 4) + 160 = 864 of 2112; the next in rank, middle 1, makes it 1184.
  masks = sapr.project_to_budget(graph, scores, 864 / 2112)
  np.testing.assert_array_equal(masks["reduce"], [0, 1, 1, 0])
  np.testing.assert_array_equal(masks["middle"], [1, 0, 1])
  np.testing.assert_array_equal(masks["expand"], [1, 1])
  # One MAC less and the last, expand 1, goes; 768 - no smaller step fits in what is left.
  masks = sapr.project_to_budget(graph, scores, 863 / 2112)
  np.testing.assert_array_equal(masks["expand"], [1, 0])
  np.testing.assert_array_equal(masks["reduce"], [0, 1, 1, 0])


@pytest.mark.parametrize("p", [0.2, 0.48, 0.75, 0.99])
def test_the_budget_is_met_within_half_a_percent(resnet20, p):
  for seed in range(3):
    masks = sapr.project_to_budget(resnet20, random_scores(resnet20, seed), p)
    share = resnet20.prunable_macs(masks) / resnet20.prunable_macs()
    assert p - 0.005 <= share <= p


def test_within_a_group_the_highest_scores_are_kept(resnet20):
  scores = random_scores(resnet20, 7)
  masks = sapr.project_to_budget(resnet20, scores, 0.4)
  for name, mask in masks.items():
    assert scores[name][mask == 1].min() > scores[name][mask == 0].max(initial=-np.inf)


def test_a_share_of_one_keeps_everything(resnet20):
  masks = sapr.project_to_budget(resnet20, random_scores(resnet20, 0), 1.0)
  assert all(mask.all() for mask in masks.values())


def test_least_widths_and_multiples_are_kept(resnet20):
  scores = random_scores(resnet20, 1)
  scores[resnet20.groups[0].name] -= 100.0  # the last of all
  plain = sapr.project_to_budget(resnet20, scores, 0.5)
  assert plain[resnet20.groups[0].name].sum() == 1
  masks = sapr.project_to_budget(resnet20, scores, 0.5, min_width=5, round_to=4)
  widths = {name: int(mask.sum()) for name, mask in masks.items()}
  assert all(width % 4 == 0 and width >= 8 for width in widths.values())
  assert widths[resnet20.groups[0].name] == 8
  assert resnet20.prunable_macs(masks) <= 0.5 * resnet20.prunable_macs()


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(resnet20, p):
  with pytest.raises(sapr.InputError, match=r"^p=.* expected 0 < p <= 1\.$"):
    sapr.project_to_budget(resnet20, random_scores(resnet20, 0), p)
  with pytest.raises(sapr.InputError, match=r"^p=.* expected 0 < p <= 1\.$"):
    macs_penalty(resnet20, resnet20.full_masks(), p)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda scores, name: scores.pop(name), "scores misses the group 'stage1_block1/conv1'"),
    (lambda scores, name: scores.update({name: np.ones(15)}), r"have shape \(15,\); expected \(16,\)"),
    (lambda scores, name: scores.update({name: np.full(16, np.nan)}), "hold a NaN"),
  ],
)
def test_scores_that_do_not_fit_are_refused(resnet20, change, message):
  scores = random_scores(resnet20, 0)
  change(scores, resnet20.groups[0].name)
  with pytest.raises(sapr.InputError, match=message):
    sapr.project_to_budget(resnet20, scores, 0.5)


@pytest.mark.parametrize("option", ["min_width", "round_to"])
def test_widths_below_one_are_refused(resnet20, option):
  with pytest.raises(sapr.InputError, match=f"{option}=0 is out of range"):
    sapr.project_to_budget(resnet20, random_scores(resnet20, 0), 0.5, **{option: 0})


def test_a_budget_below_the_least_widths_is_refused(resnet20):
  with pytest.raises(sapr.InputError, match=r"p=0\.3 cannot be met.*round_to=16.*raise p"):
    sapr.project_to_budget(resnet20, random_scores(resnet20, 0), 0.3, round_to=16)
