"""Masked networks: the gradient to a mask is that of a gate on the feature map, however the network is written."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import laws
import networks
import numpy as np
import pytest
from laws import by_params

from sapr_jax import models
from sapr_jax.channels import mask_params, masked_apply, prune, trace_channels
from sapr_jax.errors import InputError


class Gated(nn.Module):
  """Two convolutions and a BatchNorm, with a gate on the hidden feature map that can be set by hand."""

  @nn.compact
  def __call__(self, x, gate=None):
    x = nn.tanh(networks.norm(name="bn")(nn.Conv(4, (3, 3), name="conv1")(x)))
    if gate is not None:
      x = x * gate
    x = nn.Conv(3, (3, 3), name="conv2")(x)
    return nn.Dense(2, name="fc")(x.mean((1, 2)))


@pytest.mark.parametrize("run", [by_params, masked_apply])
def test_the_gradient_to_the_mask_is_that_of_a_gate_on_the_feature_map(run):
  model = Gated()
  with jax.enable_x64(True):
    variables = laws.random_variables(model, 0)
    graph = trace_channels(model, variables, laws.SHAPE, select="exact", input_dtype=np.float64)
    images = laws.random_images(0)
    gate = jnp.array([1.0, 0.0, 0.3, 1.0])

    def by_masks(gate):
      masks = {**{name: jnp.asarray(mask) for name, mask in graph.full_masks().items()}, "conv1": gate}
      return jnp.sum(run(model, variables, graph, masks, images) ** 2)

    def by_hand(gate):
      return jnp.sum(model.apply(variables, images, gate) ** 2)

    got, want = (jax.jit(jax.grad(f))(gate) for f in (by_masks, by_hand))
  np.testing.assert_allclose(got, want, rtol=1e-10)
  assert np.all(np.abs(want) > 1e-6)


class Pair(nn.Module):
  """Two pointwise convolutions that compute in `dtype`."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (1, 1), dtype=self.dtype, name="up")(x))
    return nn.Conv(1, (1, 1), dtype=self.dtype, name="down")(x)


def test_the_gradient_to_the_mask_is_summed_in_float32_where_the_network_computes_in_bfloat16():
  x, model = jnp.ones((4, 32, 32, 3)), Pair(jnp.float32)
  variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(model.init, jax.random.key(0), x[:1]))
  graph = trace_channels(model, variables, (1, *x.shape[1:]), select="unjoined")

  def loss(masks, dtype):
    return masked_apply(Pair(dtype), variables, graph, masks, x).astype(jnp.float32).sum()

  got, want = (jax.grad(loss)({"up": jnp.ones(4)}, dtype)["up"] for dtype in (jnp.bfloat16, jnp.float32))
  np.testing.assert_array_equal(want, np.full(4, 4 * 4096))
  np.testing.assert_allclose(got, want, rtol=1e-6)


def double(variables):
  return jax.tree.map(lambda leaf: 2 * leaf, variables)


class Wrapped(nn.Module):
  """A layer whose kernel a wrapper makes from the stored one."""

  @nn.compact
  def __call__(self, x):
    x = nn.elu(nn.Conv(5, (3, 3), name="first")(x))
    doubled = nn.map_variables(nn.Conv, "params", double, init=True)
    x = nn.elu(doubled(4, (3, 3), name="second")(x))
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class ReadTwice(nn.Module):
  """A kernel that is also read outside of its layer."""

  @nn.compact
  def __call__(self, x):
    x = nn.elu(nn.Dense(5, name="first")(x))
    second = nn.Dense(4, use_bias=False, name="second")
    y = nn.elu(second(x)) + nn.elu(2 * x @ second.variables["params"]["kernel"])
    return nn.Dense(3, name="fc")(y.mean((1, 2)))


class OwnOperations(nn.Module):
  """Layers whose operation is not linear in the input, only in the kernel."""

  @nn.compact
  def __call__(self, x):
    def shifted(x, kernel, *args, **kwargs):
      return jax.lax.dot_general(x + 1, kernel, *args, **kwargs)

    def doubled_sine(x, kernel, *args, **kwargs):
      return jax.lax.conv_general_dilated(jnp.sin(2 * x), kernel, *args, **kwargs)

    x = nn.elu(nn.Conv(5, (3, 3), name="first")(x))
    x = nn.elu(nn.Conv(4, (3, 3), conv_general_dilated=doubled_sine, name="second")(x)).mean((1, 2))
    return nn.Dense(3, dot_general=shifted, name="fc")(x)


class Jitted(nn.Module):
  """The same compiled layers for two calls."""

  @nn.compact
  def __call__(self, x):
    block = nn.jit(networks.PlainBlock)(4, name="block")
    return nn.Dense(3, name="fc")(block(block(nn.Conv(4, (1, 1), name="stem")(x))).mean((1, 2)))


NETWORKS = {
  "ResNet": (lambda: models.create("resnet8", width_multiplier=0.25, dtype=np.float64), "blocks"),
  "depthwise": (lambda: networks.MobileNetV2(((1, 3, 1, 1), (2, 4, 1, 2))), "exact"),
  "concatenated": (networks.DenseNet, "exact"),
  "flattened": (networks.Vgg, "exact"),
  "own layers": (networks.OwnLayers, "exact"),
  "rematerialized": (networks.Rematerialized, "exact"),
  "kernel read twice": (ReadTwice, "exact"),
  "kernel made by a wrapper": (Wrapped, "exact"),
  "operations of one's own": (OwnOperations, "exact"),
  "nn.jit": (Jitted, "exact"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gated_inputs_give_the_values_and_gradients_of_masked_kernels(name):
  make, select = NETWORKS[name]
  model = make()
  with jax.enable_x64(True):
    variables = laws.random_variables(model, 0)
    graph = trace_channels(model, variables, laws.SHAPE, select=select, input_dtype=np.float64)
    rng = np.random.default_rng(1)
    masks = {group.name: jnp.asarray(rng.uniform(0.2, 1.0, group.size)) for group in graph.groups}
    images = laws.random_images(0)

    def loss_and_gradient(run):
      def loss(masks):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(run(model, variables, graph, masks, images)))

      return jax.jit(jax.value_and_grad(loss))(masks)

    want, got = loss_and_gradient(by_params), loss_and_gradient(masked_apply)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in want[1].values()) > 1e-3
    assert laws.relative_error(got, want) < 1e-8


def test_a_network_that_was_pruned_before():
  model = models.create("resnet8", width_multiplier=0.25)
  variables = laws.random_variables(model, 0, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE)
  small, small_variables = prune(model, variables, graph, laws.random_masks(graph, 0))
  graph = trace_channels(small, small_variables, laws.SHAPE)
  masks, images = laws.random_masks(graph, 1), laws.random_images(0, np.float32)
  want, got = (
    jax.jit(lambda x, run=run: run(small, small_variables, graph, masks, x))(images)
    for run in (by_params, masked_apply)
  )
  assert laws.relative_error(got, want) < 1e-5


def test_the_gradient_to_the_masks_needs_no_gradient_of_a_kernel():
  model = models.create("resnet8", width_multiplier=0.25)
  variables = laws.random_variables(model, 0, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE)
  images = laws.random_images(0, np.float32)
  masks = jax.tree.map(jnp.asarray, graph.full_masks())
  counts = {}
  for run in (by_params, masked_apply):
    gradient = jax.grad(lambda masks, run=run: jnp.sum(run(model, variables, graph, masks, images)))
    counts[run] = str(jax.make_jaxpr(gradient)(masks)).count("conv_general_dilated[")
  # Forward 7; backward to the feature maps down to the first masked one, or to its kernel; 3 kernels are masked.
  assert counts == {by_params: 7 + 4 + 3, masked_apply: 7 + 5}


def test_what_does_not_fit_is_refused_as_by_mask_params():
  model = Gated()
  variables = laws.random_variables(model, 0, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE, select="exact")
  images = laws.random_images(0, np.float32)
  with pytest.raises(InputError, match="masks misses the group 'conv1'"):
    masked_apply(model, variables, graph, {}, images)
  with pytest.raises(InputError, match="params lacks bn/bias"):
    masked_apply(model, {"params": {}}, graph, graph.full_masks(), images)


def test_masking_is_the_same_inside_jit():
  model = models.create("resnet8", width_multiplier=0.25)
  variables = laws.random_variables(model, 3, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE)
  masks = laws.random_masks(graph, 0)
  eager = mask_params(variables["params"], graph, masks)
  jitted = jax.jit(lambda p, m: mask_params(p, graph, m))(variables["params"], masks)
  jax.tree.map(np.testing.assert_array_equal, eager, jitted)
  assert jax.tree.structure(eager) == jax.tree.structure(variables["params"])


def test_the_gradient_counts_a_gain_on_the_kernel_once():
  model = networks.OwnLayers(gain=True)
  variables = laws.random_variables(model, 0, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE, select="exact")
  half = {name: mask / 2 for name, mask in graph.full_masks().items()}
  masked = mask_params(variables["params"], graph, half)
  np.testing.assert_allclose(masked["mine1"]["weights"], variables["params"]["mine1"]["weights"] / 2)
  np.testing.assert_array_equal(masked["mine1"]["gain"], variables["params"]["mine1"]["gain"])
