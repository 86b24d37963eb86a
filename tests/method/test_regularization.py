"""The partial group lasso and its proximal operator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.method import channel_norms


def kernels(params, block):
  return np.asarray(params[block]["conv1"]["kernel"]), np.asarray(params[block]["conv2"]["kernel"])


def test_the_penalty_by_hand(tiny, two):
  upper, lower = kernels(tiny.params, "stage1_block1")
  first = sum(np.linalg.norm(upper[..., c]) + np.linalg.norm(lower[:, :, c, :]) for c in (1, 3))
  upper, lower = kernels(tiny.params, "stage3_block1")
  last = sum(np.linalg.norm(upper[..., c]) + np.linalg.norm(lower[:, :, c, :]) for c in range(4))
  for weighting, (a, b) in (
    (sapr.share_weights, (2 / 6, 4 / 6)),
    (sapr.relative_weights, (1.0, 2.0)),
    (lambda dropped: jnp.ones(dropped.shape), (1.0, 1.0)),
  ):
    got = sapr.partial_group_lasso(tiny.params, tiny.graph, two, weighting=weighting)
    np.testing.assert_allclose(got, a * first + b * last, rtol=1e-6)


@pytest.mark.parametrize(("weighting", "total"), [(sapr.share_weights, 1.0), (sapr.relative_weights, 3.0)])
def test_the_weights_of_eq_2(weighting, total):
  dropped = jnp.array([2.0, 0.0, 4.0])
  np.testing.assert_allclose(weighting(dropped), total * np.array([1 / 3, 0.0, 2 / 3]), rtol=1e-7)
  assert (weighting(jnp.zeros(3)) == 0.0).all()


def test_equal_shares_have_equal_weights_compiled_or_not():
  dropped = jnp.array([29.0, 29.0, 11.0, 7.0])
  exact = np.float32(dropped) / np.float32(76.0)  # XLA would multiply by 1 / 76
  for weighting in (sapr.share_weights, jax.jit(sapr.share_weights)):
    np.testing.assert_array_equal(weighting(dropped), exact)


def test_nothing_dropped_costs_nothing(tiny):
  assert sapr.partial_group_lasso(tiny.params, tiny.graph, tiny.graph.full_masks()) == 0.0


def test_only_dropped_channels_have_a_gradient(tiny, two):
  gradient = jax.grad(lambda p: sapr.partial_group_lasso(p, tiny.graph, two, weighting=sapr.share_weights))(tiny.params)
  upper, lower = kernels(gradient, "stage1_block1")
  assert (upper[..., [0, 2]] == 0).all() and (lower[:, :, [0, 2]] == 0).all()
  weight, (dense, _) = 1 / 3, kernels(tiny.params, "stage1_block1")
  np.testing.assert_allclose(upper[..., 1], weight * dense[..., 1] / np.linalg.norm(dense[..., 1]), rtol=1e-5)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["stage2_block1"]))  # nothing is dropped there
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["fc"]))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["stage1_block1"]["bn1"]))


def test_a_zero_channel_gives_a_zero_gradient_and_no_nan(tiny, two):
  zero = jax.tree.map(jnp.zeros_like, tiny.params)
  gradient = jax.grad(lambda p: sapr.partial_group_lasso(p, tiny.graph, two))(zero)
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))
  shrunk = sapr.prox_partial_group_lasso(zero, tiny.graph, two, 0.1)
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(shrunk))


def test_the_proximal_step_by_hand(tiny, two):
  shrunk = sapr.prox_partial_group_lasso(tiny.params, tiny.graph, two, 0.6, weighting=sapr.share_weights)
  (before, _), (after, _) = kernels(tiny.params, "stage1_block1"), kernels(shrunk, "stage1_block1")
  norm = np.linalg.norm(before[..., 1])
  assert norm > 0.2
  np.testing.assert_allclose(after[..., 1], (1 - 0.6 / 3 / norm) * before[..., 1], rtol=1e-5)


def test_the_proximal_step_leaves_the_rest_bit_for_bit(tiny, two):
  shrunk = sapr.prox_partial_group_lasso(tiny.params, tiny.graph, two, 0.6, weighting=sapr.share_weights)
  for block, kept in (("stage1_block1", [0, 2]), ("stage3_block1", range(4, 16))):
    for before, after, axis in zip(kernels(tiny.params, block), kernels(shrunk, block), (3, 2), strict=True):
      np.testing.assert_array_equal(np.take(before, kept, axis), np.take(after, kept, axis))
  for name in ("conv", "bn", "fc", "stage2_block1"):
    jax.tree.map(np.testing.assert_array_equal, tiny.params[name], shrunk[name])
  jax.tree.map(np.testing.assert_array_equal, tiny.params["stage1_block1"]["bn1"], shrunk["stage1_block1"]["bn1"])


def test_a_threshold_above_the_norm_gives_exactly_zero(tiny, two):
  upper, _ = kernels(tiny.params, "stage1_block1")
  norms = np.linalg.norm(upper[..., [1, 3]].reshape(-1, 2), axis=0)
  between = float(norms.mean()) * 3  # times the weight 1/3: above one norm and below the other
  shrunk, _ = kernels(
    sapr.prox_partial_group_lasso(tiny.params, tiny.graph, two, between, weighting=sapr.share_weights), "stage1_block1"
  )
  smaller, larger = (1, 3) if norms[0] < norms[1] else (3, 1)
  assert (shrunk[..., smaller] == 0).all()
  assert (shrunk[..., larger] != 0).any()
  everything, _ = kernels(sapr.prox_partial_group_lasso(tiny.params, tiny.graph, two, 1e6), "stage1_block1")
  assert (everything[..., [1, 3]] == 0).all() and (everything[..., [0, 2]] != 0).any()


@pytest.mark.parametrize(
  ("weighting", "step_size"),
  [(sapr.share_weights, step_size) for step_size in (0.05, 0.5, 3.0)] + [(sapr.relative_weights, 0.5)],
)
def test_the_proximal_step_minimizes_its_objective(tiny, two, weighting, step_size):
  # F(w) = 1/2 ||w - v||^2 + step_size R(w) is convex, so a point that no small step improves is its minimum. R takes
  # each kernel of the blocks on one axis only, so the operators of the groups do not overlap.
  # The weights of the groups stay float32 beside kernels of float64.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    v = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tiny.params)

    @jax.jit
    def objective(w):
      distance = sum(jnp.sum(jnp.square(a - b)) for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(v), strict=True))
      return 0.5 * distance + step_size * sapr.partial_group_lasso(w, tiny.graph, two, weighting=weighting)

    w = sapr.prox_partial_group_lasso(v, tiny.graph, two, step_size, weighting=weighting)
    best = float(objective(w))
    assert best < float(objective(v))
    leaves, structure = jax.tree.flatten(w)
    rng = np.random.default_rng(0)
    for scale in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
      for _ in range(8):
        moved = [leaf + scale * rng.normal(size=leaf.shape) for leaf in leaves]
        assert float(objective(structure.unflatten(moved))) > best
      toward = [leaf + scale * (a - leaf) for leaf, a in zip(leaves, jax.tree.leaves(v), strict=True)]
      assert float(objective(structure.unflatten(toward))) >= best
      away = [leaf * (1 - scale / 10) for leaf in leaves]
      assert float(objective(structure.unflatten(away))) >= best


def test_a_kernel_with_groups_on_both_axes_gets_both_operators_in_turn(bottleneck):
  masks = bottleneck.graph.full_masks()
  masks["reduce"][0] = masks["middle"][1] = 0
  kernel = np.asarray(bottleneck.params["middle"]["kernel"])
  shrunk = sapr.prox_partial_group_lasso(bottleneck.params, bottleneck.graph, masks, 0.3, weighting=sapr.share_weights)
  expected = kernel.copy()
  expected[..., 1] *= max(0, 1 - 0.15 / np.linalg.norm(expected[..., 1]))  # output axis first
  expected[:, :, 0] *= max(0, 1 - 0.15 / np.linalg.norm(expected[:, :, 0]))
  np.testing.assert_allclose(shrunk["middle"]["kernel"], expected, rtol=1e-5)


def test_a_channel_of_a_flattened_axis_is_all_its_rows(bottleneck):
  norms = channel_norms(bottleneck.params, bottleneck.graph)["expand"]
  upper = np.asarray(bottleneck.params["expand"]["kernel"])
  rows = np.asarray(bottleneck.params["head"]["kernel"]).reshape(16, 2, 5)
  want = [np.linalg.norm(upper.reshape(-1, 2), axis=0), np.linalg.norm(rows.transpose(1, 0, 2).reshape(2, -1), axis=1)]
  got = sorted(map(np.asarray, norms), key=lambda n: n[0])
  for a, b in zip(got, sorted(want, key=lambda n: n[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  masks = bottleneck.graph.full_masks()
  masks["expand"][1] = 0
  shrunk = np.asarray(
    sapr.prox_partial_group_lasso(bottleneck.params, bottleneck.graph, masks, 1e6)["head"]["kernel"]
  ).reshape(16, 2, 5)
  assert (shrunk[:, 1] == 0).all()
  np.testing.assert_array_equal(shrunk[:, 0], rows[:, 0])


def test_eager_and_jitted_agree(tiny, two):
  arguments = tiny.params, jax.tree.map(jnp.asarray, two)
  eager = sapr.prox_partial_group_lasso(arguments[0], tiny.graph, arguments[1], 0.3)
  jitted = jax.jit(lambda p, m: sapr.prox_partial_group_lasso(p, tiny.graph, m, 0.3))(*arguments)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), eager, jitted)


def test_masks_that_do_not_fit_are_refused(tiny, two):
  name = tiny.graph.groups[0].name
  for masks, message in (
    ({k: v for k, v in two.items() if k != name}, f"misses the group '{name}'"),
    ({**two, "other": np.ones(3)}, "unknown group 'other'"),
    ({**two, name: np.ones(5)}, rf"'{name}' must have shape \(4,\), got \(5,\)"),
  ):
    with pytest.raises(sapr.InputError, match=message):
      sapr.partial_group_lasso(tiny.params, tiny.graph, masks)
    with pytest.raises(sapr.InputError, match=message):
      sapr.prox_partial_group_lasso(tiny.params, tiny.graph, masks, 0.1)


@pytest.mark.parametrize(
  ("weighting", "message"),
  [
    ("share", r"weighting must be a function, got 'share'; pass sapr_jax\.relative_weights"),
    (jnp.sum, r"weighting returns, one weight for each group, must have shape \(3,\), got \(\)"),
  ],
)
def test_weightings_that_do_not_fit_are_refused(tiny, two, weighting, message):
  with pytest.raises(sapr.InputError, match=message):
    sapr.partial_group_lasso(tiny.params, tiny.graph, two, weighting=weighting)


def test_parameters_that_do_not_fit_are_refused(tiny, two):
  other = {**tiny.params, "stage1_block1": {"conv1": {"kernel": jnp.zeros((3, 3, 4, 5))}}}
  for function in (sapr.mask_params, sapr.partial_group_lasso, lambda *a: sapr.prox_partial_group_lasso(*a, 0.1)):
    with pytest.raises(sapr.InputError, match=r"params lacks stage1_block1/.*; it must be variables\['params'\]"):
      function(tiny.variables, tiny.graph, two)
    with pytest.raises(sapr.InputError, match=r"conv1/kernel must have shape \(3, 3, 4, 4\).*, got \(3, 3, 4, 5\)"):
      function(other, tiny.graph, two)
