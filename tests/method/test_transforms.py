"""The two optax transforms: by the penalty and by its proximal operator."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapr_jax as sapr


def kernels(params, block):
  return np.asarray(params[block]["conv1"]["kernel"]), np.asarray(params[block]["conv2"]["kernel"])


def test_the_transform_is_the_optimizers_step_and_then_the_proximal_one(tiny, two, grads):
  tx = optax.chain(optax.sgd(0.01), sapr.regularize_by_prox(tiny.graph, 0.01, gamma=20.0))
  updates, _ = tx.update(grads, tx.init(tiny.params), tiny.params, masks=two)
  got = optax.apply_updates(tiny.params, updates)
  stepped = jax.tree.map(lambda w, g: w - 0.01 * g, tiny.params, grads)
  want = sapr.prox_partial_group_lasso(stepped, tiny.graph, two, 0.01 * 20.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


def test_the_transform_makes_exact_zeros_and_leaves_kept_updates_alone(tiny, two, grads):
  tx = sapr.regularize_by_prox(tiny.graph, 0.01, gamma=1e6)
  updates, _ = tx.update(grads, tx.init(tiny.params), tiny.params, masks=two)
  upper, _ = kernels(optax.apply_updates(tiny.params, updates), "stage1_block1")
  assert (upper[..., [1, 3]] == 0).all()
  for axis, got, given in zip((3, 2), kernels(updates, "stage1_block1"), kernels(grads, "stage1_block1"), strict=True):
    np.testing.assert_array_equal(np.take(got, [0, 2], axis), np.take(given, [0, 2], axis))
  jax.tree.map(np.testing.assert_array_equal, updates["fc"], grads["fc"])


def test_the_threshold_follows_schedule_and_momentum(tiny, two):
  zero = jax.tree.map(jnp.zeros_like, tiny.params)
  tx = sapr.regularize_by_prox(
    tiny.graph,
    lambda step: jnp.where(step < 1, 0.1, 0.01),
    gamma=0.3,
    momentum=0.9,
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
  tx = optax.chain(sapr.regularize_by_penalty(tiny.graph, gamma=20.0, weighting=sapr.share_weights), optax.sgd(0.01))
  updates, _ = tx.update(grads, tx.init(tiny.params), tiny.params, masks=two)

  def loss(params):
    linear = sum(jnp.vdot(w, g) for w, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True))
    return linear + 20.0 * sapr.partial_group_lasso(params, tiny.graph, two, weighting=sapr.share_weights)

  want = jax.tree.map(lambda g: -0.01 * g, jax.grad(loss)(tiny.params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updates, want)


@pytest.fixture(params=["penalty", "proximal"])
def either(request, tiny):
  """The transform of one of the two forms."""
  if request.param == "penalty":
    return sapr.regularize_by_penalty(tiny.graph, gamma=1.0)
  return sapr.regularize_by_prox(tiny.graph, 0.1, gamma=1.0)


def test_a_first_state_keeps_all_channels(tiny, grads, either):
  updates, _ = either.update(grads, either.init(tiny.params), tiny.params)
  jax.tree.map(np.testing.assert_array_equal, updates, grads)


def test_steps_are_counted_without_masks_too(tiny, grads):
  tx = sapr.regularize_by_prox(tiny.graph, 0.1, gamma=1.0)
  _, state = tx.update(grads, tx.init(tiny.params), tiny.params)
  assert int(state.step) == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"gamma": -1.0}, "gamma must be at least 0, got -1.0"),
    ({"gamma": 1.0, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
  ],
)
def test_the_transform_checks_its_numbers(tiny, arguments, message):
  with pytest.raises(sapr.InputError, match=message):
    sapr.regularize_by_prox(tiny.graph, 0.1, **arguments)


@pytest.mark.parametrize("gamma", [-1, float("nan")])
def test_the_penalty_checks_gamma(tiny, gamma):
  with pytest.raises(sapr.InputError, match=f"gamma must be at least 0, got {gamma}"):
    sapr.regularize_by_penalty(tiny.graph, gamma)


def test_the_penalty_leaves_alone_what_has_no_gradient(tiny, two, grads):
  tx = sapr.regularize_by_penalty(tiny.graph, gamma=20.0)
  params = {**tiny.params, "steps": jnp.arange(3)}
  want, _ = tx.update(grads, tx.init(tiny.params), tiny.params, masks=two)
  got, _ = tx.update({**grads, "steps": None, "fc": None}, tx.init(params), params, masks=two)
  assert got["steps"] is None and got["fc"] is None
  got, _ = tx.update({**grads, "steps": jnp.ones(3)}, tx.init(params), params, masks=two)
  np.testing.assert_array_equal(got["steps"], np.ones(3))
  np.testing.assert_array_equal(got["stage1_block1"]["conv1"]["kernel"], want["stage1_block1"]["conv1"]["kernel"])


def test_gamma_may_be_a_hyperparameter_of_the_state(tiny, two, grads):
  tx = optax.inject_hyperparams(sapr.regularize_by_penalty, static_args=("graph", "weighting"))(tiny.graph, gamma=0.0)
  state = tx.init(tiny.params)
  state.hyperparams["gamma"] = jnp.asarray(20.0)
  got, _ = jax.jit(lambda g, s: tx.update(g, s, tiny.params, masks=two))(grads, state)
  plain = sapr.regularize_by_penalty(tiny.graph, gamma=20.0)
  want, _ = plain.update(grads, plain.init(tiny.params), tiny.params, masks=two)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_frozen_parameters_stay_frozen(tiny, two, either):
  frozen = flax.core.freeze(tiny.params)
  updates, _ = either.update(jax.tree.map(jnp.zeros_like, frozen), either.init(frozen), frozen, masks=two)
  assert jax.tree.structure(optax.apply_updates(frozen, updates)) == jax.tree.structure(frozen)


def test_the_transform_needs_the_parameters(tiny, two, grads, either):
  with pytest.raises(sapr.InputError, match=r"needs the parameters: tx\.update\(\w+, state, params\)"):
    either.update(grads, either.init(tiny.params), masks=two)


def test_new_masks_do_not_recompile(tiny, two, grads, either):
  update = jax.jit(lambda g, s, p, m: either.update(g, s, p, masks=m))
  state = either.init(tiny.params)
  for masks in (tiny.graph.full_masks(), two):
    update(grads, state, tiny.params, masks)
  assert update._cache_size() == 1


@pytest.mark.parametrize("form", ["penalty", "prox"])
def test_a_parameter_without_an_update_is_left_alone(tiny, form):
  masks = {group.name: np.arange(group.size) % 2 for group in tiny.graph.groups}
  tx = (
    sapr.regularize_by_penalty(tiny.graph, 0.1) if form == "penalty" else sapr.regularize_by_prox(tiny.graph, 0.1, 0.1)
  )
  grads = jax.tree.map(jnp.zeros_like, tiny.params)
  grads["stage1_block1"]["conv1"]["kernel"] = None
  updates, _ = tx.update(grads, tx.init(tiny.params), tiny.params, masks=masks)
  assert updates["stage1_block1"]["conv1"]["kernel"] is None
  assert np.any(updates["stage1_block1"]["conv2"]["kernel"])
