"""Kept weights make up for dropped channels, as far as these are sums of kept ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import sapr_jax as sapr
from sapr_jax.channels import readers


class Doubled(nn.Module):
  """Uses its kernel in a way of its own."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 3))
    return x @ (2 * kernel)


class Block(nn.Module):
  """A convolution whose channels 2 and 3 are copies of 0 and of the sum of 0 and 1, and three that read them."""

  @nn.compact
  def __call__(self, x):
    h = jax.checkpoint(nn.relu)(nn.Conv(4, (3, 3), use_bias=False, name="writer")(x))
    y = nn.Conv(2, (3, 3), strides=2, name="reader")(h)
    z = nn.Dense(3, name="dense")(h.mean((1, 2)))
    return y, z, Doubled(name="own")(h)


def positive_copies(model, x):
  """Variables in which a dropped channel is a sum of kept ones, behind the ReLU as well."""
  variables = model.init(jax.random.key(0), x)
  writer = jnp.abs(variables["params"]["writer"]["kernel"])
  writer = writer.at[..., 2].set(writer[..., 0]).at[..., 3].set(writer[..., 0] + writer[..., 1])
  return {"params": {**variables["params"], "writer": {"kernel": writer}}}


@pytest.fixture(scope="module")
def block():
  model, x = Block(), jax.random.uniform(jax.random.key(1), (4, 8, 8, 2))
  variables = positive_copies(model, x)
  graph = sapr.trace_channels(model, variables, (1, 8, 8, 2), select="unjoined", include="writer")
  return model, variables, graph, x


MASKS = {"writer": np.array([1, 1, 0, 0], np.float32)}


def test_what_is_a_sum_of_kept_channels_is_made_up_for_exactly(block):
  model, variables, graph, x = block
  found = sapr.compensate(model, variables, graph, MASKS, [x[:1], x[1:]])
  small, small_variables = sapr.prune(model, found, graph, MASKS)
  want, got = model.apply(variables, x), small.apply(small_variables, x)
  for a, b in zip(want[:2], got[:2], strict=True):
    np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-3)
  plain, plain_variables = sapr.prune(model, variables, graph, MASKS)
  assert np.abs(plain.apply(plain_variables, x)[0] - want[0]).max() > 0.1


def test_kernels_that_read_in_another_way_and_writers_stay(block):
  model, variables, graph, x = block
  found = sapr.compensate(model, variables, graph, MASKS, [x])["params"]
  for name in ("writer", "own"):
    np.testing.assert_array_equal(found[name]["kernel"], variables["params"][name]["kernel"])
  for name in ("reader", "dense"):
    assert found[name]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(found[name]["bias"], variables["params"][name]["bias"], atol=1e-2)
    assert np.abs(found[name]["kernel"] - variables["params"][name]["kernel"]).max() > 0.01


def test_full_masks_change_nothing_and_the_least_squares_are_the_best(block):
  model, variables, graph, x = block
  same = sapr.compensate(model, variables, graph, graph.full_masks(), [x])
  jax.tree.map(np.testing.assert_array_equal, same, variables)
  # Channels 1 and 2 do not say all of 0 and 3.
  masks, kept = {"writer": np.array([0, 1, 1, 0], np.float32)}, np.array([1, 2])
  writer = nn.Conv(4, (3, 3), use_bias=False)
  inputs = np.asarray(nn.relu(writer.apply({"params": variables["params"]["writer"]}, x)).mean((1, 2)))
  kernel = np.asarray(variables["params"]["dense"]["kernel"])
  found = sapr.compensate(model, variables, graph, masks, [x])["params"]["dense"]
  ones = np.hstack([inputs[:, kept], np.ones((len(inputs), 1))])
  best = np.linalg.lstsq(ones, inputs @ kernel, rcond=None)[0]
  np.testing.assert_allclose(inputs[:, kept] @ found["kernel"][kept] + found["bias"], ones @ best, atol=1e-2)
  assert np.abs(inputs[:, kept] @ kernel[kept] - inputs @ kernel).max() > 0.1


class Reader(nn.Module):
  """Reads three channels by a layer of one's choice."""

  layer: nn.Module
  heads: int | None = None

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(3, name="writer")(x))
    if self.heads:
      x = x.reshape(*x.shape[:-1], 1, 3) * jnp.arange(1.0, self.heads + 1)[:, None]
    return self.layer(x)


@pytest.mark.parametrize(
  ("layer", "shape", "at_once"),
  [
    (nn.Conv(2, (3, 3)), (12, 5, 5, 2), 1000),  # two images, in two and four parts
    (nn.Conv(2, (3, 2), strides=(2, 1), padding="VALID", use_bias=False), (12, 6, 6, 2), 2**25),  # all images
    (nn.Conv(2, (3, 3), kernel_dilation=(1, 2), padding=((0, 1), (3, 0))), (12, 6, 6, 2), 1),  # one image
    (nn.ConvTranspose(2, (3, 3), strides=(2, 1)), (12, 4, 4, 2), 1800),  # room for three; two divide the batch
    (nn.Conv(2, (3,)), (12, 6, 2), 2**25),
    (nn.DenseGeneral((2, 2), axis=(-2, -1)), (32, 2), 1),
  ],
)
def test_a_kernel_gives_the_least_error_that_its_weights_can_give(layer, shape, at_once, monkeypatch):
  monkeypatch.setattr(readers, "_AT_ONCE", at_once)
  model = Reader(layer, heads=2 if isinstance(layer, nn.DenseGeneral) else None)
  x = jax.random.normal(jax.random.key(0), shape)
  variables = model.init(jax.random.key(1), x)
  graph = sapr.trace_channels(model, variables, (1, *shape[1:]), select="unjoined", include="writer")
  found = sapr.compensate(model, variables, graph, masks := {"writer": np.array([1.0, 0.0, 1.0])}, [x[:4], x[4:]])
  small, small_variables = sapr.prune(model, found, graph, masks)
  params, reader = small_variables["params"], next(name for name in small_variables["params"] if name != "writer")

  def outputs(of_reader):
    return small.apply({"params": {**params, reader: of_reader}}, x)

  # The outputs are linear in the layer's weights, so numpy finds the best ones.
  flat, unravel = jax.flatten_util.ravel_pytree(params[reader])
  slopes = np.asarray(jax.jacobian(lambda flat: outputs(unravel(flat)).ravel())(flat))
  want = np.asarray(model.apply(variables, x)).ravel()
  least = np.square(slopes @ np.linalg.lstsq(slopes, want, rcond=None)[0] - want).mean()
  np.testing.assert_allclose(np.square(outputs(params[reader]).ravel() - want).mean(), least, rtol=1e-2)
  plain = sapr.prune(model, variables, graph, masks)[1]["params"][reader]
  assert np.square(outputs(plain).ravel() - want).mean() > 1.2 * least


def test_what_is_dropped_and_gives_nothing_changes_nothing(block):
  model, variables, graph, x = block
  kernel = variables["params"]["reader"]["kernel"].at[:, :, 2:].set(0)
  dense = variables["params"]["dense"]["kernel"].at[2:].set(0)
  params = variables["params"] | {
    "reader": {**variables["params"]["reader"], "kernel": kernel},
    "dense": {**variables["params"]["dense"], "kernel": dense},
  }
  found = sapr.compensate(model, {"params": params}, graph, MASKS, [x])
  jax.tree.map(np.testing.assert_array_equal, found["params"], params)


@pytest.mark.parametrize(("use_bias", "has_statistics"), [(True, False), (False, True), (False, False)])
def test_a_mean_goes_into_the_bias_or_to_the_statistics_or_else_to_the_weights(use_bias, has_statistics):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(2, name="writer")(x)
      x = nn.Dense(1, use_bias=use_bias, name="reader")(x)
      return nn.BatchNorm(use_running_average=True)(x) if has_statistics else x

  model, x = Net(), jnp.asarray([[-1.0], [0.0], [1.0]])
  variables = model.init(jax.random.key(0), x)
  # The first channel is 1 + x, the second, which is dropped, is always 3.
  writer = {"kernel": jnp.asarray([[1.0, 0.0]]), "bias": jnp.asarray([1.0, 3.0])}
  reader = {**variables["params"]["reader"], "kernel": jnp.asarray([[1.0], [2.0]])}
  variables = {**variables, "params": {**variables["params"], "writer": writer, "reader": reader}}
  graph = sapr.trace_channels(model, variables, (1, 1), select="unjoined")
  found = sapr.compensate(model, variables, graph, {"writer": np.array([1.0, 0.0])}, [x])["params"]["reader"]
  # E[(1 + x) * 3] / E[(1 + x)^2] = 3 / (5 / 3) = 1.8 of the first channel, if nothing else can take the mean.
  weight, bias = (1.0, 6.0) if use_bias else (1.0, None) if has_statistics else (1.0 + 2 * 1.8, None)
  np.testing.assert_allclose(found["kernel"][0, 0], weight, rtol=1e-3)
  assert bias is None or np.isclose(found["bias"][0], bias, rtol=1e-3)


def test_a_module_of_nnx_gets_weights_of_its_own():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first, self.second = nnx.Linear(2, 3, use_bias=False, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
      return self.second(self.first(x))

  module, x = Net(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (16, 2))
  before = np.array(module.second.kernel[...])
  graph = sapr.trace_channels(module, x[:1], select="unjoined")
  masks = {"first": np.array([1, 0, 1], np.float32)}  # two channels hold all that two inputs say
  small = sapr.prune(sapr.compensate(module, graph, masks=masks, batches=[x]), graph, masks)
  np.testing.assert_allclose(small(x), module(x), rtol=1e-2, atol=1e-2)
  np.testing.assert_array_equal(module.second.kernel[...], before)
  with pytest.raises(sapr.InputError, match=r"compensate\(module, graph, masks, batches\).*got the module, dict, Ch"):
    sapr.compensate(module, {}, graph, masks, [x])


def test_boxed_kernels_are_fitted_and_complex_ones_stay():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, scale, bias):
      h = nn.Dense(4, use_bias=False, name="first")(x)
      boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
      y = nn.Dense(1, kernel_init=boxed, name="boxed")(h * scale + bias)
      waves = nn.Dense(1, dtype=jnp.complex64, param_dtype=jnp.complex64, name="waves")(h.astype(jnp.complex64))
      return y, waves, nn.Dense(1, dtype=jnp.complex64, name="real")(jax.lax.complex(h, h))

  model, x = Net(), jax.random.normal(jax.random.key(0), (16, 2))
  zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
  variables = freeze(model.init(jax.random.key(0), x, zero, one))
  graph = sapr.trace_channels(model, variables, x, scale=one, bias=zero, select="unjoined")
  # Two channels hold all that two inputs say. Keyword arguments are sorted by name: bias, scale.
  found = sapr.compensate(model, variables, graph, masks := {"first": np.array([1, 0, 1, 0], bool)}, [(x, zero, one)])
  for name in ("waves", "real"):
    np.testing.assert_array_equal(found["params"][name]["kernel"], variables["params"][name]["kernel"])
  small, small_variables = sapr.prune(model, found, graph, masks)
  got, want = small.apply(small_variables, x, one, zero)[0], model.apply(variables, x, one, zero)[0]
  np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
  ("batches", "message"),
  [
    ([], "batch"),
    ([jnp.ones((1, 8, 8, 5))], r"^The model, its variables and the inputs .* do not fit together: For"),
    ([(1.0, 2.0)], "arrays of the call"),
    (
      [(jnp.ones((3, 8, 8, 2)), jnp.zeros(3, int))],
      r"^a batch.*labels: float32\[1,8,8,2\], got \(float32.*int32\[3\]\)",
    ),
    ([jnp.ones((0, 8, 8, 2))], r"^batches must hold arrays with entries, got"),
    ([jnp.full((1, 8, 8, 2), jnp.nan)], "what dense/kernel reads must be finite, got NaN"),
    ([jax.ShapeDtypeStruct((1, 8, 8, 2), np.float32)], "arrays of numbers, got ShapeDtype"),
  ],
)
def test_batches_that_do_not_fit(block, batches, message):
  model, variables, graph, _ = block
  with pytest.raises(sapr.InputError, match=message):
    sapr.compensate(model, variables, graph, MASKS, batches)


def test_traced_or_abstract_variables(block):
  model, variables, graph, x = block

  def fit(variables):
    return sapr.compensate(model, variables, graph, MASKS, [x])

  with pytest.raises(sapr.InputError, match=r"variables must be concrete.*outside of jax\.jit"):
    jax.jit(fit)(variables)
  with pytest.raises(sapr.InputError, match="must hold arrays with values"):
    fit(jax.eval_shape(lambda: variables))
