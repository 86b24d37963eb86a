"""The generator: shapes of Table 2, Eq. 1 and its gradient."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.method import keep_probability, most_likely_masks

SIZES = (3, 5, 2)


@pytest.fixture(scope="module")
def generator():
  return sapr.ArchitectureGenerator(SIZES)


@pytest.fixture(scope="module")
def variables(generator):
  return generator.init(jax.random.key(0))


def test_the_parameters_have_the_shapes_of_table_2(variables):
  shapes = jax.tree.map(jnp.shape, variables)
  assert shapes["constants"] == {"z": (3, 32)}
  params = shapes["params"]
  assert params["GRUCell_0"] == {
    **{gate: {"kernel": (32, 64), "bias": (64,)} for gate in ("ir", "iz", "in")},
    **{gate: {"kernel": (64, 64)} for gate in ("hr", "hz")},
    "hn": {"kernel": (64, 64), "bias": (64,)},
  }
  assert params["norm"] == {"scale": (64,), "bias": (64,)}
  assert params["heads_kernel"] == (3, 64, 5)
  assert params["heads_bias"] == (3, 5)
  assert params.keys() == {"GRUCell_0", "norm", "heads_kernel", "heads_bias"}


def test_the_padded_heads_are_one_dense_layer_for_each_group(generator, variables):
  outputs = generator.apply(variables)
  params = variables["params"]
  # By hand: the GRU's recurrence, LayerNorm, GELU, then the k-th Dense(64, C_k).
  h, expected = np.zeros(64), []
  gru = jax.tree.map(np.asarray, params["GRUCell_0"])
  for z in np.asarray(variables["constants"]["z"]):
    r = 1 / (1 + np.exp(-(z @ gru["ir"]["kernel"] + gru["ir"]["bias"] + h @ gru["hr"]["kernel"])))
    u = 1 / (1 + np.exp(-(z @ gru["iz"]["kernel"] + gru["iz"]["bias"] + h @ gru["hz"]["kernel"])))
    n = np.tanh(z @ gru["in"]["kernel"] + gru["in"]["bias"] + r * (h @ gru["hn"]["kernel"] + gru["hn"]["bias"]))
    h = (1 - u) * n + u * h
    normal = (h - h.mean()) / np.sqrt(h.var() + 1e-6)
    gelu = np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in normal])
    expected.append(gelu)
  for k, size in enumerate(SIZES):
    want = expected[k] @ np.asarray(params["heads_kernel"][k, :, :size]) + np.asarray(params["heads_bias"][k, :size])
    np.testing.assert_allclose(outputs[k, :size], want, atol=1e-5)


def test_the_input_is_drawn_once_and_depends_on_the_seed(generator, variables):
  again, other = generator.init(jax.random.key(0)), generator.init(jax.random.key(1))
  np.testing.assert_array_equal(variables["constants"]["z"], again["constants"]["z"])
  assert not np.allclose(variables["constants"]["z"], other["constants"]["z"])


def test_compiling_does_not_grow_with_the_number_of_groups():
  def equations(num_groups):
    generator = sapr.ArchitectureGenerator((4,) * num_groups)
    variables = jax.eval_shape(generator.init, jax.random.key(0))
    return str(jax.make_jaxpr(generator.apply)(variables)).count("\n")

  assert equations(60) == equations(6)


def test_split_by_group_cuts_the_padding_off(tiny):
  padded = jnp.arange(3 * 16.0).reshape(3, 16)
  split = sapr.split_by_group(padded, tiny.graph)
  assert [len(row) for row in split.values()] == [4, 8, 16]
  np.testing.assert_array_equal(split[tiny.graph.groups[1].name], np.arange(16.0, 24.0))


def test_sampled_masks_are_equation_1():
  key, outputs = jax.random.key(3), jnp.linspace(-6.0, 1.0, 50)
  noise = np.asarray(jax.random.gumbel(key, outputs.shape))
  for bias, temperature in ((3.0, 0.4), (1.0, 2.0)):
    masks = sapr.sample_masks(key, outputs, bias=bias, temperature=temperature)
    want = np.round(1 / (1 + np.exp(-(np.asarray(outputs) + noise + bias) / temperature)))
    np.testing.assert_array_equal(masks, want)
    assert 0 < want.sum() < 50


def test_the_gradient_passes_straight_through_the_rounding():
  key, outputs = jax.random.key(4), jnp.linspace(-6.0, 1.0, 20)
  weights = jnp.arange(20.0)
  gradient = jax.grad(lambda o: jnp.sum(weights * sapr.sample_masks(key, o, bias=3.0, temperature=0.4)))(outputs)
  soft = jax.nn.sigmoid((outputs + jax.random.gumbel(key, outputs.shape) + 3.0) / 0.4)
  np.testing.assert_allclose(gradient, weights * soft * (1 - soft) / 0.4, rtol=1e-5)


def test_a_channel_is_kept_with_the_probability_that_is_said():
  outputs = jnp.repeat(jnp.array([-5.0, -3.3665, -2.0])[:, None], 20_000, axis=1)
  share = sapr.sample_masks(jax.random.key(5), outputs).mean(axis=1)
  np.testing.assert_allclose(share, keep_probability(outputs[:, 0]), atol=0.012)
  np.testing.assert_allclose(share[1], 0.5, atol=0.012)


def test_most_likely_masks_keep_what_is_kept_more_often_than_not():
  outputs = {"a": np.array([-3.5, -3.37, -3.36, 0.0])}
  masks = most_likely_masks(outputs, bias=3.0)["a"]
  np.testing.assert_array_equal(masks, [0, 0, 1, 1])


def test_pruning_starts_from_the_whole_network(generator, variables):
  outputs = {"all": np.asarray(generator.apply(variables)).ravel()}
  assert most_likely_masks(outputs, bias=3.0)["all"].all()
