"""The fast forms of layers on CPUs: the same values and gradients as the layers they stand for."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapr_jax import models
from sapr_jax.channels import prune, trace_channels
from sapr_jax.models import fast_layers
from sapr_jax.models.fast_layers import has_fast_layers, with_fast_layers
from sapr_jax.models.mobilenet_v2 import InvertedResidual


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_close(actual, expected, tolerance=2e-4):
  for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    scale = float(jnp.max(jnp.abs(e))) + 1e-6
    np.testing.assert_allclose(a / scale, e / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def drawn(module, x, **kwargs):
  """Variables drawn by NumPy, as compiling `init` takes long."""

  def draw(leaf):
    values = normal(*leaf.shape, seed=np.prod(leaf.shape, dtype=int))
    return 0.3 * values if len(leaf.shape) > 1 else 1 + 0.3 * values**2

  return jax.tree.map(draw, jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), x))


def gradients(module, variables, x, **kwargs):
  """Output, updated statistics, and gradients to parameters and input of one training step; and its primitives."""

  def loss(params, x):
    y, updated = module.apply({**variables, "params": params}, x, mutable=["batch_stats"], **kwargs)
    return jnp.sum(jnp.sin(y)), (y, updated)

  return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)


def compare(module, x, variables=None, **kwargs):
  """Runs the module as it is and in its fast form; returns the fast form's program as text."""
  variables = drawn(module, x, **kwargs) if variables is None else variables
  plain = jax.jit(lambda v, x: gradients(module, v, x, **kwargs))(variables, x)
  fast = jax.jit(with_fast_layers(lambda v, x: gradients(module, v, x, **kwargs)))
  assert_close(fast(variables, x), plain)
  forward = with_fast_layers(lambda v, x: module.apply(v, x, mutable=["batch_stats"], **kwargs))
  return str(jax.make_jaxpr(forward)(variables, x))


def test_batch_norm_by_hand():
  y, mean, var = fast_layers.batch_norm(jnp.array([[1.0], [3.0]]), jnp.array([2.0]), jnp.array([5.0]), 0.0)
  assert (float(mean[0]), float(var[0])) == (2.0, 1.0)
  np.testing.assert_allclose(y, [[3.0], [7.0]], rtol=1e-6)


def test_gradient_of_batch_norm_includes_its_statistics():
  x, scale, bias = normal(6, 3), normal(3, seed=1), normal(3, seed=2)

  def plain(x, scale, bias):
    mean, var = jnp.mean(x, 0), jnp.var(x, 0)
    return (x - mean) * jax.lax.rsqrt(var + 1e-3) * scale + bias, mean, var

  def objective(function):
    return lambda *args: sum(jnp.sum(jnp.cos(k + part)) for k, part in enumerate(function(*args)))

  fast = objective(lambda *args: fast_layers.batch_norm(*args, 1e-3))
  assert_close(jax.grad(fast, (0, 1, 2))(x, scale, bias), jax.grad(objective(plain), (0, 1, 2))(x, scale, bias))


def test_batch_norms_of_one_shape_are_traced_once(monkeypatch):
  calls, rsqrt = [], jax.lax.rsqrt
  monkeypatch.setattr(jax.lax, "rsqrt", lambda x: calls.append(x.shape) or rsqrt(x))

  def loss(x, scale, bias):
    for _ in range(3):
      x = fast_layers.batch_norm(x, scale, bias, 1e-5)[0]
    return jnp.sum(x)

  jax.make_jaxpr(jax.grad(loss))(jnp.ones((7, 5, 3)), jnp.ones(3), jnp.ones(3))
  assert calls == [(3,)]


def test_batch_norm_layer():
  assert "custom_vjp" in compare(nn.BatchNorm(use_running_average=False, momentum=0.8), normal(4, 5, 5, 3) + 2)


@pytest.mark.parametrize(
  "layer",
  [
    nn.BatchNorm(use_running_average=True),
    nn.BatchNorm(use_running_average=False, axis=1),
    nn.BatchNorm(use_running_average=False, use_scale=False),
    nn.BatchNorm(use_running_average=False, dtype=jnp.bfloat16),
    nn.BatchNorm(use_running_average=False, use_fast_variance=False),
    nn.LayerNorm(),
  ],
)
def test_other_normalizations_stay(layer):
  assert "custom_vjp" not in compare(layer, normal(4, 5, 5, 3))


def test_batch_norm_without_statistics_or_in_boxes_is_left_to_the_layer():
  layer, x = nn.BatchNorm(use_running_average=False), normal(4, 3)
  variables = layer.init(jax.random.key(0), x)
  boxed = nn.BatchNorm(use_running_average=False, scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))
  cases = [(layer, {"params": variables["params"]}), (boxed, boxed.init(jax.random.key(0), x))]
  for module, given in cases:
    plain = module.apply(given, x, mutable=["batch_stats"])
    assert_close(with_fast_layers(module.apply)(given, x, mutable=["batch_stats"]), plain)


@pytest.mark.parametrize(
  ("kernel", "strides", "padding"), [(3, 1, 1), (3, 2, 1), (5, 2, "SAME"), (3, 2, "VALID"), ((1, 3), 1, 1)]
)
def test_depthwise_convolution(kernel, strides, padding):
  size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
  layer = nn.Conv(6, size, strides=strides, padding=padding, feature_group_count=6)
  assert "conv_general_dilated" not in compare(layer, normal(2, 9, 8, 6))


@pytest.mark.parametrize(
  "layer",
  [
    nn.Conv(6, (3, 3)),
    nn.Conv(12, (3, 3), feature_group_count=6),
    nn.Conv(6, (3, 3), feature_group_count=2),
    nn.Conv(6, (3, 3), feature_group_count=6, kernel_dilation=2),
    nn.Conv(6, (3, 3), feature_group_count=6, dtype=jnp.bfloat16),
    nn.Conv(6, (3, 3), feature_group_count=6, padding=((-1, 2), (0, 0))),
  ],
)
def test_other_convolutions_stay(layer):
  assert "conv_general_dilated" in compare(layer, normal(2, 9, 8, 6))


def test_what_has_a_fast_form_is_told_by_the_layer_not_by_its_kernel():
  stem, depthwise = nn.Conv(6, (3, 3)), nn.Conv(6, (3, 3), feature_group_count=6)
  for layer, channels, has in ((stem, 1, False), (depthwise, 6, True)):
    x = normal(1, 5, 5, channels)
    variables = layer.init(jax.random.key(0), x)
    assert variables["params"]["kernel"].shape == (3, 3, 1, 6)
    assert has_fast_layers(layer.apply, variables, x) is has


def test_a_depthwise_window_larger_than_the_image_gives_nothing_as_ever():
  layer = nn.Conv(6, (3, 10), feature_group_count=6, padding="VALID")
  x = normal(2, 9, 8, 6)
  variables = layer.init(jax.random.key(0), x)
  assert layer.apply(variables, x).shape == with_fast_layers(layer.apply)(variables, x).shape == (2, 7, 0, 6)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_residual_network(remat):
  model = models.create("resnet8", num_classes=3, width_multiplier=0.125, remat=remat)
  assert "custom_vjp" in compare(model, normal(4, 8, 8, 3), train=True)


@pytest.mark.slow
def test_inverted_residual():
  program = compare(InvertedResidual(inputs=4, features=8, expansion=3, stride=2), normal(4, 8, 8, 4), train=True)
  assert program.count("conv_general_dilated[") == 2  # those of 1x1


@pytest.mark.slow
def test_pruned_network():
  model, x = models.create("resnet8", num_classes=3, width_multiplier=0.25), normal(4, 8, 8, 3)
  variables = drawn(model, x)
  graph = trace_channels(model, variables, (1, 8, 8, 3))
  masks = {group.name: np.arange(group.size) % 2 for group in graph.groups}
  small, small_variables = prune(model, variables, graph, masks)
  assert "custom_vjp" in compare(small, x, small_variables, train=True)
