"""Budgets, the penalty, and the projection."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.method import budget_penalty, check_budget, macs_budget, make_budget, params_budget


def random_scores(graph, seed):
  rng = np.random.default_rng(seed)
  return {group.name: rng.normal(size=group.size) for group in graph.groups}


@pytest.fixture(scope="module")
def resnet20():
  model = sapr.models.create("resnet20")
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return sapr.trace_channels(model, variables, (1, 32, 32, 3))


def test_the_penalty_is_zero_within_the_budget_and_logarithmic_above_it(tiny):
  quarter = macs_budget(tiny.graph, 0.25)
  masks = jax.tree.map(jnp.asarray, tiny.graph.full_masks())
  assert budget_penalty(tiny.graph, masks, macs_budget(tiny.graph, 1.0)) == 0.0
  np.testing.assert_allclose(budget_penalty(tiny.graph, masks, quarter), np.log(4.0), rtol=1e-6)
  halved = {name: mask.at[::2].set(0.0) for name, mask in masks.items()}
  np.testing.assert_allclose(budget_penalty(tiny.graph, halved, quarter), np.log(2.0), rtol=1e-6)
  assert budget_penalty(tiny.graph, halved, macs_budget(tiny.graph, 0.5)) == 0.0


def test_the_gradient_of_the_penalty_is_the_share_of_each_channel(tiny):
  graph = tiny.graph
  masks = jax.tree.map(jnp.asarray, graph.full_masks())
  gradient = jax.grad(lambda m: budget_penalty(graph, m, macs_budget(graph, 0.5)))(masks)
  for group in graph.groups:
    without = graph.full_masks()
    without[group.name][0] = 0
    saved = graph.prunable_macs() - graph.prunable_macs(without)
    np.testing.assert_allclose(gradient[group.name], saved / graph.prunable_macs(), rtol=1e-5)
  within = jax.grad(lambda m: budget_penalty(graph, m, macs_budget(graph, 1.0)))(jax.tree.map(lambda m: 0.5 * m, masks))
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
  masks = sapr.project_to_budget(graph, scores, macs_budget(graph, 864 / 2112))
  np.testing.assert_array_equal(masks["reduce"], [0, 1, 1, 0])
  np.testing.assert_array_equal(masks["middle"], [1, 0, 1])
  np.testing.assert_array_equal(masks["expand"], [1, 1])
  # One MAC less and the last, expand 1, goes; 768 - no smaller step fits in what is left.
  masks = sapr.project_to_budget(graph, scores, macs_budget(graph, amount=863))
  np.testing.assert_array_equal(masks["expand"], [1, 0])
  np.testing.assert_array_equal(masks["reduce"], [0, 1, 1, 0])


@pytest.mark.parametrize("p", [0.2, 0.48, 0.75, 0.99])
def test_the_budget_is_met_within_half_a_percent(resnet20, p):
  for seed in range(3):
    masks = sapr.project_to_budget(resnet20, random_scores(resnet20, seed), macs_budget(resnet20, p))
    share = resnet20.prunable_macs(masks) / resnet20.prunable_macs()
    assert p - 0.005 <= share <= p


def test_within_a_group_the_highest_scores_are_kept(resnet20):
  scores = random_scores(resnet20, 7)
  masks = sapr.project_to_budget(resnet20, scores, macs_budget(resnet20, 0.4))
  for name, mask in masks.items():
    assert scores[name][mask == 1].min() > scores[name][mask == 0].max(initial=-np.inf)


def test_a_share_of_one_keeps_everything(resnet20):
  masks = sapr.project_to_budget(resnet20, random_scores(resnet20, 0), macs_budget(resnet20, 1.0))
  assert all(mask.all() for mask in masks.values())


def test_least_widths_and_multiples_are_kept(resnet20):
  scores = random_scores(resnet20, 1)
  scores[resnet20.groups[0].name] -= 100.0  # the last of all
  half = macs_budget(resnet20, 0.5)
  plain = sapr.project_to_budget(resnet20, scores, half)
  assert plain[resnet20.groups[0].name].sum() == 1
  masks = sapr.project_to_budget(resnet20, scores, half, min_width=5, round_to=4)
  widths = {name: int(mask.sum()) for name, mask in masks.items()}
  assert all(width % 4 == 0 and width >= 8 for width in widths.values())
  assert widths[resnet20.groups[0].name] == 8
  assert resnet20.prunable_macs(masks) <= 0.5 * resnet20.prunable_macs()


@pytest.mark.parametrize("cost", ["prunable_macs", "macs", "params"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_every_cost_is_met_and_no_group_could_take_one_more_channel(resnet20, cost, share):
  budget = make_budget(resnet20, cost, share=share)
  for seed in range(2):
    masks = sapr.project_to_budget(resnet20, random_scores(resnet20, seed), budget)
    kept = resnet20.kept(masks)
    assert budget.cost(kept) <= budget.limit
    for k, group in enumerate(resnet20.groups):
      if kept[k] < group.size:
        assert budget.cost(kept + np.eye(len(kept), dtype=np.int64)[k]) > budget.limit


def test_half_of_the_whole_network_is_half_of_all_macs(resnet20):
  budget = macs_budget(resnet20, 0.5, of="network")
  assert (budget.full, budget.limit, budget.share) == (resnet20.macs(), resnet20.macs() / 2, 0.5)
  kept = resnet20.kept(sapr.project_to_budget(resnet20, random_scores(resnet20, 0), budget))
  steps = np.eye(len(kept), dtype=np.int64) * (kept < resnet20.kept())
  smallest_step = min(budget.cost(kept + step) - budget.cost(kept) for step in steps if step.any())
  assert 0.5 * resnet20.macs() - smallest_step < budget.cost(kept) <= 0.5 * resnet20.macs()


def test_an_amount_is_the_limit_itself(resnet20):
  budget = macs_budget(resnet20, amount=20e6, of="network")
  assert (budget.limit, budget.share) == (20e6, 20e6 / resnet20.macs())
  assert params_budget(resnet20, amount=100_000).limit == 100_000.0
  assert macs_budget(resnet20, amount=20e6).full == resnet20.prunable_macs()


def test_half_of_the_parameters_is_half_of_what_the_pruned_tree_holds(tiny):
  masks = sapr.project_to_budget(tiny.graph, random_scores(tiny.graph, 0), params_budget(tiny.graph, 0.5))
  count = lambda params: sum(leaf.size for leaf in jax.tree.leaves(params))  # noqa: E731
  pruned = count(sapr.prune_tree(tiny.params, tiny.graph, masks))
  assert tiny.graph.num_params(masks) == pruned <= 0.5 * count(tiny.params)


class Latency:
  """A table of measured times, one row a group, not quite rising: what the next width costs is looked up."""

  name = "latency_ms"

  def __init__(self, graph):
    rng = np.random.default_rng(3)
    self.rows = [np.cumsum(rng.normal(0.5, 0.6, group.size + 1)) + 10.0 for group in graph.groups]

  def __call__(self, kept):
    if isinstance(kept, np.ndarray) and kept.dtype == np.int64:
      return float(sum(row[width] for row, width in zip(self.rows, kept, strict=True)))
    return sum(jnp.interp(kept[k], jnp.arange(float(row.size)), jnp.asarray(row)) for k, row in enumerate(self.rows))


def test_a_table_of_latencies_is_a_cost_too(resnet20):
  budget = make_budget(resnet20, Latency(resnet20), share=0.7)
  masks = sapr.project_to_budget(resnet20, random_scores(resnet20, 0), budget)
  kept = resnet20.kept(masks)
  assert budget.cost(kept) <= budget.limit
  assert all(budget.cost(kept + step) > budget.limit for step in np.eye(len(kept), dtype=np.int64)[kept < kept.max()])
  full = jax.tree.map(jnp.asarray, resnet20.full_masks())
  value, gradient = jax.value_and_grad(lambda m: budget_penalty(resnet20, m, budget))(full)
  np.testing.assert_allclose(value, -np.log(0.7), rtol=1e-5)
  assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_budget_below_the_smallest_latency_says_so_in_its_own_unit(tiny):
  with pytest.raises(sapr.InputError, match=r"at least \d+\.\d+ latency_ms .*got 0\.25 \("):
    make_budget(tiny.graph, Latency(tiny.graph), amount=0.25)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, float("nan"), "0.5", np.array([0.5, 0.6])])
def test_a_share_outside_0_to_1_is_refused(tiny, p):
  with pytest.raises(sapr.InputError, match=r"^p must be a number in \(0, 1\], got .*; it is the share"):
    macs_budget(tiny.graph, p)
  with pytest.raises(sapr.InputError, match=r"^share must be a number in \(0, 1\], got .*; it is the share"):
    make_budget(tiny.graph, "macs", share=p)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({}, "must be given as a share or as an amount, got neither; write macs_budget"),
    ({"p": 0.5, "amount": 1e5}, "got both"),
    ({"amount": 0}, r"amount must be above 0 and at most [\d,]+ prunable_macs, all there are, got 0"),
    ({"amount": 1e12}, "amount must be above 0 and at most"),
    ({"amount": "30M"}, "amount must be above 0 .*got '30M'"),
    ({"amount": 10}, r"The budget must be at least [\d,]+ prunable_macs .*min_width=1, round_to=1\), got 10"),
    ({"p": 1e-3, "of": "network"}, r"The budget must be at least [\d,]+ macs \(0\.\d+ of all\)"),
    ({"p": 0.5, "of": "all"}, "of must be one of 'prunable', 'network', got 'all'"),
  ],
)
def test_budgets_that_cannot_be_are_refused(tiny, arguments, message):
  with pytest.raises(sapr.InputError, match=message):
    macs_budget(tiny.graph, **arguments)


def test_an_unknown_cost_is_refused_with_the_known_ones(tiny):
  with pytest.raises(sapr.InputError, match=r"cost must be one of prunable_macs, macs, params, .*got 'flops'"):
    make_budget(tiny.graph, "flops", share=0.5)


def test_a_bare_number_is_no_budget(tiny):
  with pytest.raises(sapr.InputError, match=r"budget must be a Budget, got 0\.5; macs_budget\(graph, 0\.5\) makes one"):
    sapr.project_to_budget(tiny.graph, random_scores(tiny.graph, 0), 0.5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda scores, name: scores.pop(name), "got none for 'stage1_block1/conv1'"),
    (lambda scores, name: scores.update({name: np.ones(15)}), r"must have shape \(16,\), got \(15,\)"),
    (lambda scores, name: scores.update({name: np.full(16, np.nan)}), "got a NaN"),
  ],
)
def test_scores_that_do_not_fit_are_refused(resnet20, change, message):
  scores = random_scores(resnet20, 0)
  change(scores, resnet20.groups[0].name)
  with pytest.raises(sapr.InputError, match=message):
    sapr.project_to_budget(resnet20, scores, macs_budget(resnet20, 0.5))


@pytest.mark.parametrize("option", ["min_width", "round_to"])
def test_widths_below_one_are_refused(tiny, option):
  with pytest.raises(sapr.InputError, match=f"{option} must be an integer of at least 1, got 0"):
    check_budget(tiny.graph, macs_budget(tiny.graph, 0.5), **{option: 0})


def test_a_budget_below_the_smallest_widths_is_refused(resnet20):
  with pytest.raises(sapr.InputError, match=r"round_to=16\), got .* \(0\.3000\); raise it, or lower min_width"):
    check_budget(resnet20, macs_budget(resnet20, 0.3), round_to=16)


def test_costs_above_int32_are_exact_and_can_be_penalized(tiny):
  graph = dataclasses.replace(
    tiny.graph,
    costs={name: dataclasses.replace(c, coefficients=c.coefficients * 10**6) for name, c in tiny.graph.costs.items()},
  )
  sizes = [group.size for group in graph.groups]
  want = tiny.graph.macs() * 10**6
  assert want > 2**31
  for kept in (np.array(sizes), np.array(sizes, np.int32), sizes, jnp.array(sizes)):
    assert graph.costs["macs"](kept) == want
  penalty = budget_penalty(graph, graph.full_masks(), macs_budget(graph, 0.5, of="network"))
  np.testing.assert_allclose(penalty, np.log(2), rtol=1e-5)


@pytest.mark.parametrize("cost", [None, lambda kept: 1.0])
def test_a_cost_must_be_a_function_with_a_name(tiny, cost):
  with pytest.raises(sapr.InputError, match="or a function with a `name`"):
    make_budget(tiny.graph, cost, 0.5)
