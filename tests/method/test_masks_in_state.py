"""Masks in the optimizer state, within whatever optax and Flax put around it."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import sapr_jax as sapr
from sapr_jax.method import RegularizationState, channel_norms

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def standard_promotion():
  """The wrappers of optax rest on it; what is ours is held to strict promotion by the other tests."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def is_kernel(params):
  return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def by_layer(params):
  return {name: "head" if name == "fc" else "body" for name in params}


OPTIMIZERS = {
  "sgd": lambda reg: optax.chain(reg, optax.sgd(0.1)),
  "adamw": lambda reg: optax.chain(reg, optax.adamw(0.02)),
  "MultiSteps": lambda reg: optax.MultiSteps(optax.chain(reg, optax.sgd(0.4)), 4).gradient_transformation(),
  "apply_if_finite": lambda reg: optax.apply_if_finite(optax.chain(reg, optax.sgd(0.1)), 3),
  "masked": lambda reg: optax.chain(optax.masked(reg, is_kernel), optax.sgd(0.1)),
  "multi_transform": lambda reg: optax.multi_transform(
    {"body": optax.chain(reg, optax.sgd(0.1)), "head": optax.adam(0.1)}, by_layer
  ),
  "inject_hyperparams": lambda reg: optax.chain(
    reg, optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(0.1))
  ),
}


def norms_after(graph, masks, params):
  """Returns the mean norm of kept and of dropped channels."""
  norms = channel_norms(params, graph)
  rows = [(row, np.asarray(masks[name]) > 0) for name, of_group in norms.items() for row in of_group]
  return [float(np.mean(np.concatenate([np.asarray(row)[side == keep] for row, keep in rows]))) for side in (1, 0)]


def train(params, tx, masks):
  """Takes 24 steps without a gradient of a loss, by an unmodified `apply_gradients`, after one without masks."""
  step = jax.jit(lambda state: state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, state.params)))
  state = step(TrainState.create(apply_fn=None, params=params, tx=tx).replace(step=jnp.zeros((), jnp.int32)))
  state = state.replace(opt_state=sapr.set_masks(state.opt_state, masks))
  for _ in range(24):
    state = step(state)
  assert step._cache_size() == 1
  return state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_train_state_of_flax_regularizes_what_set_masks_drops(tiny, two, name):
  tx = OPTIMIZERS[name](sapr.regularize_by_penalty(tiny.graph, 0.3, expected_from=None))
  state = train(tiny.params, tx, two)
  kept, dropped = norms_after(tiny.graph, two, tiny.params)
  kept_after, dropped_after = norms_after(tiny.graph, two, state.params)
  assert dropped_after < 0.75 * dropped
  np.testing.assert_allclose(kept_after, kept, rtol=0.01)  # adamw decays all weights


def test_lookahead_takes_masks_from_the_state(tiny, two):
  fast = optax.chain(sapr.regularize_by_penalty(tiny.graph, 0.3, expected_from=None), optax.sgd(0.1))
  tx = optax.lookahead(fast, sync_period=2, slow_step_size=0.8)
  params = optax.LookaheadParams.init_synced(tiny.params)
  opt_state = sapr.set_masks(tx.init(params), two)
  zeros = jax.tree.map(jnp.zeros_like, tiny.params)

  @jax.jit
  def step(params, opt_state):
    updates, opt_state = tx.update(zeros, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for _ in range(24):
    params, opt_state = step(params, opt_state)
  (kept, dropped), (kept_after, dropped_after) = (
    norms_after(tiny.graph, two, each) for each in (tiny.params, params.slow)
  )
  assert dropped_after < 0.75 * dropped
  np.testing.assert_allclose(kept_after, kept, rtol=1e-5)


def test_the_prox_within_a_train_state(tiny, two):
  tx = optax.chain(optax.adam(0.01), sapr.regularize_by_prox(tiny.graph, 0.1, 10.0, expected_from=None))
  state = train(tiny.params, tx, two)
  assert norms_after(tiny.graph, two, state.params)[1] == 0.0


def test_what_a_part_of_the_kernels_gets_is_what_they_get_alone(tiny, two, grads):
  upper = jax.tree_util.tree_map_with_path(lambda place, leaf: "conv1" in str(place), tiny.params)
  for tx in (sapr.regularize_by_penalty(tiny.graph, 0.3), sapr.regularize_by_prox(tiny.graph, 0.1, 0.3)):
    whole, _ = jax.jit(tx.update)(grads, tx.init(tiny.params), tiny.params, masks=two)
    part = optax.masked(tx, upper)
    state = sapr.set_masks(part.init(tiny.params), two)
    got, _ = jax.jit(part.update)(grads, state, tiny.params)
    want = jax.tree.map(lambda is_upper, w, g: w if is_upper else g, upper, whole, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)


def test_a_mask_that_leaves_no_kernel_is_refused(tiny, grads):
  tx = optax.masked(
    sapr.regularize_by_penalty(tiny.graph, 0.3), lambda params: jax.tree.map(lambda w: w.ndim < 2, params)
  )
  with pytest.raises(sapr.InputError, match="params must have a kernel of at least one channel group, got none"):
    tx.update(grads, tx.init(tiny.params), tiny.params)


def test_masks_given_to_update_go_before_those_in_the_state(tiny, two, grads):
  tx = sapr.regularize_by_penalty(tiny.graph, 0.3)
  state = tx.init(tiny.params)
  update = jax.jit(tx.update)
  given, after = update(grads, state, tiny.params, masks=two)
  stored, _ = update(grads, sapr.set_masks(state, two), tiny.params)
  jax.tree.map(np.testing.assert_array_equal, given, stored)
  jax.tree.map(np.testing.assert_array_equal, sapr.get_masks(after), tiny.graph.full_masks())


def test_get_masks_returns_what_set_masks_put(tiny, two):
  tx = optax.chain(optax.sgd(0.1, momentum=0.9), sapr.regularize_by_prox(tiny.graph, 0.1, 0.1))
  found = sapr.get_masks(sapr.set_masks(tx.init(tiny.params), two))
  assert found.keys() == two.keys()
  jax.tree.map(np.testing.assert_array_equal, found, two)


def test_every_state_in_the_tree_gets_the_masks(tiny, two):
  one = sapr.regularize_by_penalty(tiny.graph, 0.1)
  states = sapr.set_masks({"a": one.init(tiny.params), "b": [one.init(tiny.params), 3]}, two)
  for state in (states["a"], states["b"][0]):
    jax.tree.map(np.testing.assert_array_equal, state.masks, two)
  assert states["b"][1] == 3


@pytest.mark.parametrize("placing", ["fresh", "committed", "numpy", "stacked"])
def test_arrays_keep_dtype_shape_and_place(tiny, two, placing):
  state = sapr.regularize_by_penalty(tiny.graph, 0.1).init(tiny.params)
  if placing == "committed":
    state = jax.device_put(state, jax.devices()[0])
  elif placing == "numpy":
    state = jax.device_get(state)
  elif placing == "stacked":
    state = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
  double = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2, state))
  double(state)
  new = sapr.set_masks(state, {name: mask.astype(bool) for name, mask in two.items()})
  double(new)
  assert double._cache_size() == 1
  for name, mask in two.items():
    assert type(new.masks[name]) is type(state.masks[name]) and new.masks[name].dtype == np.float32
    np.testing.assert_array_equal(new.masks[name], np.broadcast_to(mask, state.masks[name].shape))


def test_masks_are_put_under_jit(tiny, two):
  state = sapr.regularize_by_penalty(tiny.graph, 0.1).init(tiny.params)
  new = jax.jit(sapr.set_masks)(state, two)
  jax.tree.map(np.testing.assert_array_equal, new.masks, two)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda masks: dict(list(masks.items())[1:]), r"masks misses the group 'stage1_block1/conv1'; .* all 3"),
    (lambda masks: {**masks, "other": np.ones(2)}, r"masks names an unknown group 'other'"),
    (lambda masks: {**masks, "stage1_block1/conv1": np.ones(3)}, r"must have shape \(4,\), got \(3,\)"),
    (lambda masks: {**masks, "stage1_block1/conv1": np.full(4, 0.5)}, r"must hold only 0 \(drop\) and 1 \(keep\)"),
    (lambda masks: list(masks), r"masks must map the names of the groups to arrays, got \["),
  ],
)
def test_masks_that_do_not_fit_are_refused(tiny, change, message):
  state = sapr.regularize_by_penalty(tiny.graph, 0.1).init(tiny.params)
  with pytest.raises(sapr.InputError, match=message):
    sapr.set_masks(state, change(tiny.graph.full_masks()))


def test_a_state_without_a_regularization_is_refused(tiny, two):
  opt_state = optax.adam(0.1).init(tiny.params)
  for call in (lambda: sapr.set_masks(opt_state, two), lambda: sapr.get_masks(opt_state)):
    with pytest.raises(sapr.InputError, match="opt_state must hold a RegularizationState, got none"):
      call()


@pytest.mark.parametrize("name", ["mask", "Masks", "msks"])
def test_a_misspelt_argument_is_refused_by_name(tiny, two, grads, name):
  tx = optax.chain(sapr.regularize_by_penalty(tiny.graph, 0.1), optax.sgd(0.1))
  with pytest.raises(sapr.InputError, match=f"given masks by the name masks=, got {name}="):
    tx.update(grads, tx.init(tiny.params), tiny.params, **{name: two})


def test_arguments_of_other_transforms_are_let_through(tiny, two, grads):
  tx = optax.chain(sapr.regularize_by_penalty(tiny.graph, 0.1), optax.contrib.reduce_on_plateau())
  _, state = tx.update(grads, tx.init(tiny.params), tiny.params, masks=two, value=jnp.ones(()))
  assert float(state[1].best_value) == 1.0  # which reduce_on_plateau takes from it


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("expected_from", [0, 2, None])
def test_a_transform_without_masks_says_so_once(tiny, two, grads, caplog, jit, expected_from):
  tx = sapr.regularize_by_prox(tiny.graph, 0.1, 0.1, expected_from=expected_from)
  update = jit(lambda state: tx.update(grads, state, tiny.params)[1])
  state = tx.init(tiny.params)
  for _ in range(4):
    state = update(state)
  jax.effects_barrier()
  lines = [record.getMessage() for record in caplog.records if record.name == "sapr_jax"]
  assert len(lines) == (expected_from is not None)
  for line in lines:
    assert f"regularize_by_prox keeps all channels at the step from which on it should not ({expected_from})," in line
  caplog.clear()
  state = sapr.set_masks(tx.init(tiny.params), two)
  for _ in range(4):
    state = update(state)
  jax.effects_barrier()
  assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_masks_are_cut_with_the_optimizer_state(tiny, two):
  tx = optax.chain(sapr.regularize_by_penalty(tiny.graph, 0.1), optax.sgd(0.1, momentum=0.9))
  opt_state = sapr.set_masks(tx.init(tiny.params), two)
  small = sapr.prune_tree(opt_state, tiny.graph, two)
  small_params = sapr.prune_tree(tiny.params, tiny.graph, two)
  assert isinstance(small[0], RegularizationState)
  assert {name: mask.tolist() for name, mask in small[0].masks.items()} == {
    name: [1.0] * int(mask.sum()) for name, mask in two.items()
  }
  assert jax.tree.map(jnp.shape, small[1][0].trace) == jax.tree.map(jnp.shape, small_params)
