"""The vision transformer: what can be cut, and that it is what the masked one computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax import models
from sapr_jax.errors import InputError
from sapr_jax.training import optimizers
from sapr_jax.training.config import check_config

SHAPE = (1, 8, 8, 3)


@pytest.fixture(scope="module")
def network():
  model = models.create("vit_tiny", layers=1, num_heads=3, width_multiplier=0.25)
  variables = model.init(jax.random.key(0), jnp.ones(SHAPE))
  return model, variables, sapr.trace_channels(model, variables, SHAPE)


def test_heads_values_and_hidden_units_are_offered(network):
  _, _, graph = network
  assert {group.name: group.size for group in graph.groups} == {
    "block1/attention/query": 3,
    "block1/attention/value": 6,
    "block1/mlp1": 48,
  }
  patches, width, heads, depth, hidden = 4, 24, 3, 6, 48
  block = patches * width * heads * depth * 4 + 2 * heads * patches**2 * depth + 2 * patches * width * hidden
  assert graph.prunable_macs() == block
  assert graph.macs() == block + patches * 48 * width + width * 10


def test_most_of_the_full_network_can_be_cut():
  model, shape = models.create("vit_tiny"), (1, 32, 32, 3)
  variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
  graph = sapr.trace_channels(model, variables, shape)
  assert graph.prunable_macs() / graph.macs() > 0.95


@pytest.mark.slow
def test_a_budget_is_met_exactly(network):
  model, variables, graph = network
  scores = sapr.relative_to_group_mean(sapr.l2_norm(variables["params"], graph))
  masks = sapr.project_to_budget(graph, scores, sapr.macs_budget(graph, 0.5))
  small, small_variables = sapr.prune(model, variables, graph, masks)
  assert 0.4 < graph.prunable_macs(masks) / graph.prunable_macs() <= 0.5
  assert sapr.count_macs(small, small_variables, SHAPE) == graph.macs(masks)
  x = jax.random.normal(jax.random.key(2), (2, *SHAPE[1:]))
  masked = {"params": sapr.mask_params(variables["params"], graph, masks)}
  np.testing.assert_allclose(small.apply(small_variables, x), model.apply(masked, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("layers", 0), ("num_heads", 1.5), ("patch_size", "4")])
def test_fields_are_checked(field, value):
  with pytest.raises(InputError, match=f"{field} of a VisionTransformer must be an integer of at least 1"):
    models.create("vit_tiny", **{field: value})


def test_adamw_decays_kernels_alone_and_its_first_step_is_the_sign():
  phase = sapr.configs.get("vit_tiny_cifar10").train
  tx = optimizers.optimizer(phase, lambda step: 0.1)
  params = {"kernel": jnp.full((1, 2), 2.0), "bias": jnp.full(2, 2.0)}
  grads = {"kernel": jnp.array([[3.0, -0.5]]), "bias": jnp.array([0.1, -7.0])}
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates["bias"], [-0.1, 0.1], rtol=1e-5)
  np.testing.assert_allclose(updates["kernel"], [[-0.1 - 0.1 * 0.05 * 2, 0.1 - 0.1 * 0.05 * 2]], rtol=1e-5)


def test_a_penalty_is_refused_before_adamw():
  config = sapr.configs.get("vit_tiny_cifar10")
  config.prune.form = "penalty"
  with pytest.raises(InputError, match=r"prune\.form must be proximal where train\.optimizer=adamw"):
    check_config(config)
