"""Importances: by hand on two channels, then their laws on whole networks."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.method import IMPORTANCES, make_comparable


@pytest.fixture(scope="module")
def pair():
  """(graph, params) of two channels: filters (3, -4) and (1, 0), read by (12, 0) and (0, -2)."""
  model = nn.Sequential([nn.Dense(2), nn.relu, nn.Dense(2)])
  params = {
    "layers_0": {"kernel": jnp.array([[3.0, 1.0], [-4.0, 0.0]]), "bias": jnp.array([50.0, 60.0])},
    "layers_2": {"kernel": jnp.array([[12.0, 0.0], [0.0, -2.0]]), "bias": jnp.zeros(2)},
  }
  return sapr.trace_channels(model, {"params": params}, (1, 2), select="unjoined"), params


@pytest.fixture(scope="module")
def grads(tiny):
  rng = np.random.default_rng(5)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tiny.params)


def score(name, network, grads):
  extra = {"taylor": (grads,), "random": (jax.random.key(0),)}.get(name, ())
  return IMPORTANCES[name](network.params, network.graph, *extra)


def test_norms_of_two_channels_by_hand(pair):
  graph, params = pair
  np.testing.assert_array_equal(sapr.l1_norm(params, graph)["layers_0"], [7.0, 1.0])
  np.testing.assert_allclose(sapr.l2_norm(params, graph)["layers_0"], [13.0, 5**0.5], rtol=1e-6)


def test_taylor_of_two_channels_by_hand(pair):
  graph, params = pair
  grads = jax.tree.map(jnp.ones_like, params)
  grads["layers_2"]["kernel"] = jnp.array([[0.5, 7.0], [7.0, 2.0]])
  np.testing.assert_array_equal(sapr.taylor(params, graph, grads)["layers_0"], [6.0, 4.0])


@pytest.mark.parametrize("within_groups", [True, False])
def test_l1_norm_is_the_criterion_of_the_study(tiny, within_groups):
  # Written out, as the recorded results of the study had it.
  want = {}
  for group in tiny.graph.groups:
    filters = next(member for member in group.members if member.role == "out")
    kernel = np.asarray(filters.get(tiny.params))
    norms = np.abs(np.moveaxis(kernel, filters.axis, 0)).reshape(group.size, -1).sum(axis=1)
    ranks = np.argsort(np.argsort(norms, kind="stable"), kind="stable")
    want[group.name] = (ranks + 1) / group.size if within_groups else norms / norms.mean()
  adjust = sapr.rank_within_groups if within_groups else sapr.relative_to_group_mean
  got = adjust(sapr.l1_norm(tiny.params, tiny.graph))
  for p in (0.4, 0.5, 0.75):
    budget = sapr.macs_budget(tiny.graph, p)
    masks = [sapr.project_to_budget(tiny.graph, scores, budget) for scores in (got, want)]
    jax.tree.map(np.testing.assert_array_equal, *masks)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_ranks_and_relative_scores_by_hand():
  scores = {"conv": np.array([4.0, 1.0, 3.0, 8.0])}
  np.testing.assert_array_equal(sapr.rank_within_groups(scores)["conv"], [0.75, 0.25, 0.5, 1.0])
  np.testing.assert_array_equal(sapr.relative_to_group_mean(scores)["conv"], [1.0, 0.25, 0.75, 2.0])


def test_equal_ranks_keep_equal_shares(tiny):
  ranks = sapr.rank_within_groups(sapr.l1_norm(tiny.params, tiny.graph))
  masks = sapr.project_to_budget(tiny.graph, ranks, sapr.macs_budget(tiny.graph, 0.5))
  assert {float(mask.mean()) for mask in masks.values()} == {0.5}


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_shares_are_divided_by_the_price_whatever_the_budget(tiny, exponent):
  first, *others = (group.name for group in tiny.graph.groups)
  params = jax.grad(tiny.graph.costs["params"])(jnp.asarray(tiny.graph.kept(), jnp.float32))
  slopes = params * jnp.array([4.0] + [1.0] * len(others))  # what a parameter costs
  scores = {group.name: np.arange(64.0) + 1 for group in tiny.graph.groups}
  how = {"compare": "equal_shares", "cost_exponent": exponent}
  got = make_comparable(scores, tiny.graph, lambda kept: kept @ slopes, **how)
  assert all((np.diff(values) > 0).all() for values in got.values())
  for threshold in (0.1, 0.5, 0.8):
    shares = {name: float(np.mean(np.asarray(values) > threshold)) for name, values in got.items()}
    assert all(shares[name] == pytest.approx(1 - threshold, abs=1 / 64) for name in others)
    assert shares[first] == pytest.approx((1 - threshold) / 4**exponent, abs=1 / 64)
  mean = make_comparable(scores, tiny.graph, lambda kept: kept @ slopes, **{**how, "compare": "group_mean"})
  np.testing.assert_allclose(mean[others[0]], scores[first] / 32.5, rtol=1e-6)
  np.testing.assert_allclose(mean[first], mean[others[0]] / 4**exponent, rtol=1e-6)


def test_a_group_of_zeros_stays_one_and_a_nan_is_not_hidden():
  np.testing.assert_array_equal(sapr.relative_to_group_mean({"dead": jnp.zeros(2)})["dead"], [0.0, 0.0])
  ranks = sapr.rank_within_groups({"broken": jnp.array([1.0, jnp.nan, 2.0])})["broken"]
  np.testing.assert_array_equal(np.isnan(ranks), [False, True, False])


def test_taylor_is_the_gradient_to_the_mask(bottleneck):
  # The middle kernel has groups on both axes, and the head reads a flattened one.
  x = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))

  def loss(params, masks):
    gated = sapr.mask_params(params, bottleneck.graph, masks)
    return jnp.square(bottleneck.model.apply({"params": gated}, x)).sum()

  masks = jax.tree.map(jnp.asarray, bottleneck.graph.full_masks())
  params_slope, masks_slope = jax.grad(loss, argnums=(0, 1))(bottleneck.params, masks)
  scores = sapr.taylor(bottleneck.params, bottleneck.graph, params_slope)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, abs(b), rtol=1e-4), scores, masks_slope)


def test_the_l2_norm_of_a_flattened_axis_counts_all_rows_of_a_channel(bottleneck):
  filters = np.asarray(bottleneck.params["expand"]["kernel"]).reshape(-1, 2)
  rows = np.asarray(bottleneck.params["head"]["kernel"]).reshape(16, 2, 5)
  want = np.sqrt((filters**2).sum(axis=0) + (rows**2).sum(axis=(0, 2)))
  np.testing.assert_allclose(sapr.l2_norm(bottleneck.params, bottleneck.graph)["expand"], want, rtol=1e-5)


def test_a_depthwise_kernel_counts_as_a_producer():
  model = nn.Sequential([nn.Dense(2), nn.Conv(2, (1, 1), feature_group_count=2), nn.Dense(1)])
  params = {
    "layers_0": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)},
    "layers_1": {"kernel": jnp.array([[[[10.0, 20.0]]]]), "bias": jnp.zeros(2)},
    "layers_2": {"kernel": jnp.array([[100.0], [200.0]]), "bias": jnp.zeros(1)},
  }
  graph = sapr.trace_channels(model, {"params": params}, (1, 2, 2, 1), select="exact")
  np.testing.assert_array_equal(sapr.l1_norm(params, graph)["layers_0"], [11.0, 22.0])


class Flattened(nn.Module):
  """A normalization of a flattened axis, behind one of the channels themselves."""

  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=True, name="first")(nn.Conv(2, (1, 1), name="conv")(x))
    x = nn.BatchNorm(use_running_average=True, name="second")(x.reshape((x.shape[0], -1)))
    return nn.Dense(1, name="head")(x)


def test_batch_norm_scale_is_the_mean_over_all_scales_of_a_channel():
  variables = Flattened().init(jax.random.key(0), jnp.zeros((1, 1, 2, 1)))
  graph = sapr.trace_channels(Flattened(), variables, (1, 1, 2, 1), select="unjoined")
  params = {
    **variables["params"],
    "first": {"scale": jnp.array([3.0, -6.0]), "bias": jnp.zeros(2)},
    "second": {"scale": jnp.array([1.0, 2.0, -2.0, 4.0]), "bias": jnp.zeros(4)},  # two places, channels alternate
  }
  np.testing.assert_allclose(sapr.batch_norm_scale(params, graph)["conv"], [(3 + 1 + 2) / 3, (6 + 2 + 4) / 3])


def test_a_group_without_a_normalization_is_refused(bottleneck):
  with pytest.raises(sapr.InputError, match=r"batch_norm_scale needs .* got none along 'reduce'; use l1_norm"):
    sapr.batch_norm_scale(bottleneck.params, bottleneck.graph)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_scores_have_the_shape_of_their_group_and_are_not_negative(tiny, grads, name):
  scores = score(name, tiny, grads)
  assert list(scores) == [group.name for group in tiny.graph.groups]
  for group in tiny.graph.groups:
    assert scores[group.name].shape == (group.size,)
    assert (scores[group.name] >= 0).all() and np.ptp(scores[group.name]) > 0


@pytest.mark.parametrize("name", [name for name in IMPORTANCES if name != "random"])
def test_scores_follow_their_channels(tiny, grads, name):
  rng = np.random.default_rng(1)
  orders = {group.name: rng.permutation(group.size) for group in tiny.graph.groups}
  members = tiny.graph.members_by_variable("params")

  def permute(place, leaf):
    for group, member in members.get(tuple(entry.key for entry in place), []):
      leaf = jnp.take(leaf, orders[group], axis=member.axis)
    return leaf

  params, slope = (jax.tree_util.tree_map_with_path(permute, tree) for tree in (tiny.params, grads))
  extra = (slope,) if name == "taylor" else ()
  for group, scores in IMPORTANCES[name](params, tiny.graph, *extra).items():
    np.testing.assert_allclose(scores, score(name, tiny, grads)[group][orders[group]], rtol=1e-4)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_compiled_scores_are_the_same(tiny, grads, name):
  def scores(params):
    extra = {"taylor": (grads,), "random": (jax.random.key(0),)}.get(name, ())
    raw = IMPORTANCES[name](params, tiny.graph, *extra)
    return raw, sapr.rank_within_groups(raw), sapr.relative_to_group_mean(raw)

  eager, compiled = scores(tiny.params), jax.jit(scores)(tiny.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), eager, compiled)


def test_our_own_models_need_no_loop_over_paths(tiny):
  scores = sapr.relative_to_group_mean(sapr.l1_norm(tiny.params, tiny.graph))
  masks = sapr.project_to_budget(tiny.graph, scores, sapr.macs_budget(tiny.graph, 0.5))
  assert 0.45 < tiny.graph.prunable_macs(masks) / tiny.graph.prunable_macs() <= 0.5


def test_trees_that_do_not_fit_are_refused(tiny, grads):
  broken = {name: leaf for name, leaf in tiny.params.items() if name != "stage2_block1"}
  for name in ("l1_norm", "l2_norm", "batch_norm_scale"):
    with pytest.raises(sapr.InputError, match="params lacks stage2_block1/"):
      IMPORTANCES[name](broken, tiny.graph)
  with pytest.raises(sapr.InputError, match=r"grads must be the gradient .* lacks stage2_block1/"):
    sapr.taylor(tiny.params, tiny.graph, broken)


def test_random_scores_depend_on_the_key_alone(tiny):
  first, again, other = (sapr.random_scores(tiny.params, tiny.graph, jax.random.key(seed)) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert all((first[name] != other[name]).any() for name in first)
