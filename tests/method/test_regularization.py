"""The partial group lasso, its proximal operator and the optax transform."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapr_jax as sapr
from sapr_jax.method import channel_norms, group_weights

WEIGHTINGS = ("share", "relative", "uniform")


@pytest.fixture(scope="module")
def two(tiny):
  """Masks of the tiny ResNet that drop 2 of 4, none of 8 and 4 of 16 channels: weights 1/3, 0 and 2/3."""
  masks = tiny.graph.full_masks()
  names = list(masks)
  masks[names[0]][[1, 3]] = 0
  masks[names[2]][:4] = 0
  return masks


def kernels(params, block):
  return np.asarray(params[block]["conv1"]["kernel"]), np.asarray(params[block]["conv2"]["kernel"])


def test_the_penalty_by_hand(tiny, two):
  upper, lower = kernels(tiny.params, "stage1_block1")
  first = sum(np.linalg.norm(upper[..., c]) + np.linalg.norm(lower[:, :, c, :]) for c in (1, 3))
  upper, lower = kernels(tiny.params, "stage3_block1")
  last = sum(np.linalg.norm(upper[..., c]) + np.linalg.norm(lower[:, :, c, :]) for c in range(4))
  for weighting, (a, b) in {"share": (2 / 6, 4 / 6), "relative": (1.0, 2.0), "uniform": (1 / 3, 1 / 3)}.items():
    got = sapr.partial_group_lasso(tiny.params, tiny.graph, two, weighting=weighting)
    np.testing.assert_allclose(got, a * first + b * last, rtol=1e-6)


def test_the_weights_when_nothing_is_dropped_are_zero(tiny):
  weights = group_weights(tiny.graph, tiny.graph.full_masks(), "share")
  assert all(weight == 0.0 for weight in weights.values())
  assert sapr.partial_group_lasso(tiny.params, tiny.graph, tiny.graph.full_masks()) == 0.0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_weights_of_eq_2(tiny, two, weighting):
  total = sum(float(w) for w in group_weights(tiny.graph, two, weighting).values())
  np.testing.assert_allclose(total, {"share": 1.0, "relative": 3.0, "uniform": 1.0}[weighting], rtol=1e-6)


def test_only_dropped_channels_have_a_gradient(tiny, two):
  gradient = jax.grad(lambda p: sapr.partial_group_lasso(p, tiny.graph, two, weighting="share"))(tiny.params)
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
  shrunk = sapr.prox_partial_group_lasso(tiny.params, tiny.graph, two, 0.6, weighting="share")
  (before, _), (after, _) = kernels(tiny.params, "stage1_block1"), kernels(shrunk, "stage1_block1")
  norm = np.linalg.norm(before[..., 1])
  assert norm > 0.2
  np.testing.assert_allclose(after[..., 1], (1 - 0.6 / 3 / norm) * before[..., 1], rtol=1e-5)


def test_the_proximal_step_leaves_the_rest_bit_for_bit(tiny, two):
  shrunk = sapr.prox_partial_group_lasso(tiny.params, tiny.graph, two, 0.6, weighting="share")
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
    sapr.prox_partial_group_lasso(tiny.params, tiny.graph, two, between, weighting="share"), "stage1_block1"
  )
  smaller, larger = (1, 3) if norms[0] < norms[1] else (3, 1)
  assert (shrunk[..., smaller] == 0).all()
  assert (shrunk[..., larger] != 0).any()
  everything, _ = kernels(sapr.prox_partial_group_lasso(tiny.params, tiny.graph, two, 1e6), "stage1_block1")
  assert (everything[..., [1, 3]] == 0).all() and (everything[..., [0, 2]] != 0).any()


@pytest.mark.parametrize(
  ("weighting", "step_size"), [("share", 0.05), ("share", 0.5), ("share", 3.0), ("relative", 0.5), ("uniform", 0.5)]
)
def test_the_proximal_step_minimizes_its_objective(tiny, two, weighting, step_size):
  # F(w) = 1/2 ||w - v||^2 + step_size R(w) is convex, so a point that no small step improves is its minimum. R takes
  # each kernel of the blocks on one axis only, so the operators of the groups do not overlap.
  with jax.enable_x64(True):
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
  shrunk = sapr.prox_partial_group_lasso(bottleneck.params, bottleneck.graph, masks, 0.3, weighting="share")
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
  with pytest.raises(sapr.InputError, match="weighting='sum' is unknown; expected share, relative or uniform"):
    sapr.partial_group_lasso(tiny.params, tiny.graph, two, weighting="sum")


# ----------------------------------------------------------------------------------------------------------------------
# The transform
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grads(tiny):
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tiny.params)


def test_the_transform_is_the_optimizers_step_and_then_the_proximal_one(tiny, two, grads):
  tx = optax.chain(optax.sgd(0.01), sapr.partial_regularization(tiny.graph, 0.01, gamma=20.0))
  updates, _ = tx.update(grads, tx.init(tiny.params), tiny.params, masks=two)
  got = optax.apply_updates(tiny.params, updates)
  stepped = jax.tree.map(lambda w, g: w - 0.01 * g, tiny.params, grads)
  want = sapr.prox_partial_group_lasso(stepped, tiny.graph, two, 0.01 * 20.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


def test_the_transform_makes_exact_zeros_and_leaves_kept_updates_alone(tiny, two, grads):
  tx = sapr.partial_regularization(tiny.graph, 0.01, gamma=1e6)
  updates, _ = tx.update(grads, tx.init(tiny.params), tiny.params, masks=two)
  upper, _ = kernels(optax.apply_updates(tiny.params, updates), "stage1_block1")
  assert (upper[..., [1, 3]] == 0).all()
  for axis, got, given in zip((3, 2), kernels(updates, "stage1_block1"), kernels(grads, "stage1_block1"), strict=True):
    np.testing.assert_array_equal(np.take(got, [0, 2], axis), np.take(given, [0, 2], axis))
  jax.tree.map(np.testing.assert_array_equal, updates["fc"], grads["fc"])


def test_the_threshold_follows_schedule_and_momentum(tiny, two):
  zero = jax.tree.map(jnp.zeros_like, tiny.params)
  tx = sapr.partial_regularization(
    tiny.graph, optax.piecewise_constant_schedule(0.1, {1: 0.1}), gamma=0.3, momentum=0.9, weighting="relative"
  )
  params, state = tiny.params, tx.init(tiny.params)
  norms = [np.linalg.norm(kernels(params, "stage1_block1")[0][..., 1])]
  for _ in range(3):
    updates, state = tx.update(zero, state, params, masks=two)
    params = optax.apply_updates(params, updates)
    norms.append(np.linalg.norm(kernels(params, "stage1_block1")[0][..., 1]))
  assert int(state.step) == 3
  # effective learning rate 1, then 0.1; gamma 0.3; N_k over the mean of the N_k is 1 for this group
  np.testing.assert_allclose(-np.diff(norms), [0.3, 0.03, 0.03], rtol=1e-4)


def test_the_penalty_is_a_term_of_the_loss(tiny, two, grads):
  tx = optax.chain(sapr.add_partial_group_lasso(tiny.graph, gamma=20.0, weighting="share"), optax.sgd(0.01))
  updates, _ = tx.update(grads, tx.init(tiny.params), tiny.params, masks=two)

  def loss(params):
    linear = sum(jnp.vdot(w, g) for w, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True))
    return linear + 20.0 * sapr.partial_group_lasso(params, tiny.graph, two, weighting="share")

  want = jax.tree.map(lambda g: -0.01 * g, jax.grad(loss)(tiny.params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updates, want)


@pytest.fixture(params=["penalty", "proximal"])
def either(request, tiny):
  """The transform of one of the two forms."""
  if request.param == "penalty":
    return sapr.add_partial_group_lasso(tiny.graph, gamma=1.0)
  return sapr.partial_regularization(tiny.graph, 0.1, gamma=1.0)


def test_without_masks_the_transform_does_nothing(tiny, grads, either):
  updates, _ = either.update(grads, either.init(tiny.params), tiny.params)
  jax.tree.map(np.testing.assert_array_equal, updates, grads)


def test_steps_are_counted_without_masks_too(tiny, grads):
  tx = sapr.partial_regularization(tiny.graph, 0.1, gamma=1.0)
  _, state = tx.update(grads, tx.init(tiny.params), tiny.params)
  assert int(state.step) == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [({"gamma": -1.0}, "gamma=-1.0 is out of range"), ({"gamma": 1.0, "momentum": 1.0}, "momentum=1.0 is out of range")],
)
def test_the_transform_checks_its_numbers(tiny, arguments, message):
  with pytest.raises(sapr.InputError, match=message):
    sapr.partial_regularization(tiny.graph, 0.1, **arguments)


@pytest.mark.parametrize("gamma", [-1, float("nan")])
def test_the_penalty_checks_gamma(tiny, gamma):
  with pytest.raises(sapr.InputError, match=f"gamma={gamma} is out of range"):
    sapr.add_partial_group_lasso(tiny.graph, gamma)


def test_the_penalty_leaves_alone_what_has_no_gradient(tiny, two, grads):
  tx = sapr.add_partial_group_lasso(tiny.graph, gamma=20.0)
  params = {**tiny.params, "steps": jnp.arange(3)}
  want, _ = tx.update(grads, tx.init(tiny.params), tiny.params, masks=two)
  got, _ = tx.update({**grads, "steps": None, "fc": None}, tx.init(params), params, masks=two)
  assert got["steps"] is None and got["fc"] is None
  got, _ = tx.update({**grads, "steps": jnp.ones(3)}, tx.init(params), params, masks=two)
  np.testing.assert_array_equal(got["steps"], np.ones(3))
  np.testing.assert_array_equal(got["stage1_block1"]["conv1"]["kernel"], want["stage1_block1"]["conv1"]["kernel"])


def test_gamma_may_be_a_hyperparameter_of_the_state(tiny, two, grads):
  tx = optax.inject_hyperparams(sapr.add_partial_group_lasso, static_args=("graph", "weighting"))(tiny.graph, gamma=0.0)
  state = tx.init(tiny.params)
  state.hyperparams["gamma"] = jnp.asarray(20.0)
  got, _ = jax.jit(lambda g, s: tx.update(g, s, tiny.params, masks=two))(grads, state)
  plain = sapr.add_partial_group_lasso(tiny.graph, gamma=20.0)
  want, _ = plain.update(grads, plain.init(tiny.params), tiny.params, masks=two)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_parameters_that_do_not_fit_are_refused(tiny, two):
  other = {**tiny.params, "stage1_block1": {"conv1": {"kernel": jnp.zeros((3, 3, 4, 5))}}}
  for function in (sapr.mask_params, sapr.partial_group_lasso, lambda *a: sapr.prox_partial_group_lasso(*a, 0.1)):
    with pytest.raises(sapr.InputError, match=r"params lacks stage1_block1/.*; it must be variables\['params'\]"):
      function(tiny.variables, tiny.graph, two)
    with pytest.raises(sapr.InputError, match=r"conv1/kernel must have shape \(3, 3, 4, 4\).*, got \(3, 3, 4, 5\)"):
      function(other, tiny.graph, two)


def test_frozen_parameters_stay_frozen(tiny, two, either):
  frozen = flax.core.freeze(tiny.params)
  updates, _ = either.update(jax.tree.map(jnp.zeros_like, frozen), either.init(frozen), frozen, masks=two)
  assert jax.tree.structure(optax.apply_updates(frozen, updates)) == jax.tree.structure(frozen)


def test_the_transform_needs_the_parameters(tiny, two, grads, either):
  with pytest.raises(sapr.InputError, match=r"needs the parameters: tx\.update\(\w+, state, params, masks=masks\)"):
    either.update(grads, either.init(tiny.params), masks=two)


def test_new_masks_do_not_recompile(tiny, two, grads, either):
  update = jax.jit(lambda g, s, p, m: either.update(g, s, p, masks=m))
  state = either.init(tiny.params)
  for masks in (tiny.graph.full_masks(), two):
    update(grads, state, tiny.params, masks)
  assert update._cache_size() == 1
