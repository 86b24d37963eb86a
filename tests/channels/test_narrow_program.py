"""The pruned network that evaluates the dense one's program: in evaluation, in training, differentiated, nested."""

from __future__ import annotations

import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import sapr_jax as sapr
from sapr_jax.channels.dense_program import merged_cuts
from sapr_jax.errors import InputError


@jax.custom_jvp
def clipped(x):
  """Clips, and lets a tenth of the gradient through."""
  return jnp.clip(x, -0.5, 0.5) + jnp.zeros(x.shape)


clipped.defjvp(lambda x, t: (clipped(*x), jnp.where(jnp.abs(x[0]) < 0.5, t[0], jnp.full(x[0].shape, 0.1) * t[0])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded(x, step):
  """Rounds, with the gradient of the identity; counts how many entries there are, an integer."""
  return jnp.round(x / step) * step, jnp.sum(jnp.ones(x.shape, jnp.int32), -1)


rounded.defvjp(lambda x, step: (rounded(x, step), x.shape), lambda step, shape, g: (g[0] * jnp.ones(shape),))


class Heads(nn.Module):
  """Attention whose code holds the number of heads, and whose widths nobody can set."""

  @nn.compact
  def __call__(self, x, train=False):
    b, n, c = x.shape
    y = nn.LayerNorm(name="ln")(x)
    q, k, v = (nn.Dense(12, name=name)(y).reshape((b, n, 3, 4)) for name in ("q", "k", "v"))
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape((b, n, 12))
    x = x + nn.Dense(c, name="out")(y)
    y = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(6, name="up")(x)))
    y = nn.BatchNorm(use_running_average=not train, name="bn")(y)
    return x + nn.Dense(c, name="down")(y)


class Rules(nn.Module):
  """Derivatives of the user's own, rematerialization and a scan, in code that holds widths."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("inner", nn.initializers.normal(1.0), (6, 6))
    x = clipped(nn.Dense(6, name="a")(x)).reshape((-1, 6))
    x, _ = rounded(jax.checkpoint(lambda y: jnp.sin(y).reshape((-1, 6)))(x), 1e-3)
    x = nn.relu(nn.Dense(6, name="b")(x))
    scale = self.param("scale", nn.initializers.normal(1.0), (6,))
    x, _ = jax.lax.scan(lambda carry, t: (jnp.tanh(carry * scale) + t + jnp.zeros((1, 6)), None), x, jnp.arange(3.0))
    return nn.Dense(2, name="c")(x @ kernel)


def network(model, shape, seed=1):
  """Returns variables of some size, a graph and masks that drop something in each group."""
  x = jax.random.normal(jax.random.key(seed), shape)
  variables = model.init(jax.random.key(0), x)
  variables = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), variables)
  graph = sapr.trace_channels(model, variables, x, select="unjoined")
  masks = {group.name: (np.arange(group.size) % 3 > 0).astype(float) for group in graph.groups}
  return x, variables, graph, masks


@pytest.fixture(scope="module")
def heads():
  model = Heads()
  x, variables, graph, masks = network(model, (2, 5, 8))
  small, small_variables = sapr.prune(model, variables, graph, masks)
  masked = {**variables, "params": sapr.mask_params(variables["params"], graph, masks)}
  return model, x, masked, graph, masks, small, small_variables


def test_heads_in_the_code_are_cut(heads):
  model, x, masked, graph, masks, small, small_variables = heads
  assert {group.name: group.size for group in graph.groups} == {"q": 3, "v": 4, "up": 6}
  assert small_variables["params"]["q"]["kernel"].shape == (8, 2 * 4)
  assert small_variables["params"]["v"]["kernel"].shape == (8, 2 * 2)
  assert small.cuts and not small.widths
  for shape in ((2, 5, 8), (3, 7, 8)):  # another batch, and another length, than those that were traced
    x = jax.random.normal(jax.random.key(3), shape)
    assert laws.relative_error(jax.jit(small.apply)(small_variables, x), model.apply(masked, x)) < 1e-5
  assert graph.macs(masks) == sapr.count_macs(small, small_variables, x[:2, :5])


class Noisy(nn.Module):
  """Draws numbers in evaluation too, in code that holds a width."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, name="up")(x).reshape((-1, 6))
    return nn.Dense(2, name="down")(x + jax.random.normal(self.make_rng("noise"), (x.shape[0], 1)))


def test_it_draws_the_numbers_of_the_dense_network():
  class Twice(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
      return self.inner(x), self.inner(x)

  model, x, rngs = Noisy(), jnp.ones((3, 4)), {"noise": KEY}
  variables = model.init({"params": KEY, **rngs}, x)
  graph = sapr.trace_channels(model, variables, x, rngs=rngs, select="unjoined")
  masks = {"up": np.array([1.0, 0, 1, 1, 0, 1])}
  small, small_variables = sapr.prune(model, variables, graph, masks)
  assert small.cuts
  want = model.apply({"params": sapr.mask_params(variables["params"], graph, masks)}, x, rngs=rngs)
  assert laws.relative_error(small.apply(small_variables, x, rngs=rngs), want) < 1e-6
  first, second = Twice(small).apply({"params": {"inner": small_variables["params"]}}, x, rngs=rngs)
  assert not jnp.allclose(first, second)


def loss(model, variables, params, x):
  y, updates = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"], rngs={"dropout": KEY})
  return jnp.mean(y**2), updates


KEY = jax.random.key(5)


@pytest.mark.slow
def test_it_trains(heads, monkeypatch):
  model, x, masked, graph, masks, small, small_variables = heads
  got, updates = jax.jit(jax.grad(functools.partial(loss, small, small_variables), has_aux=True))(
    small_variables["params"], x
  )
  assert jax.tree.map(jnp.shape, updates) == {"batch_stats": {"bn": {"mean": (4,), "var": (4,)}}}
  assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, small_variables["params"])
  # Without dropout, whose numbers are others in another shape, it learns what the masked network learns.
  monkeypatch.setattr(nn.Dropout, "__call__", lambda self, x: x)
  got, updates = jax.grad(functools.partial(loss, small, small_variables), has_aux=True)(small_variables["params"], x)
  want, stats = jax.grad(functools.partial(loss, model, masked), has_aux=True)(masked["params"], x)
  for grads in (got, want):
    del grads["k"]["bias"]  # softmax takes no notice of it: the gradient is rounding
  assert laws.relative_error(got, sapr.prune_tree(want, graph, masks)) < 1e-4
  assert laws.relative_error(updates, sapr.prune_tree(stats, graph, masks)) < 1e-5


@pytest.mark.slow
def test_derivatives_are_those_of_the_users_rules():
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    model = Rules()
    x, variables, graph, masks = network(model, (4, 3))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    x = x.astype(jnp.float64)
    assert {group.name for group in graph.groups} == {"a", "b", "inner"}
    small, small_variables = sapr.prune(model, variables, graph, masks)
    assert small.cuts
    masked = sapr.mask_params(variables["params"], graph, masks)

    def total(model, params):
      return jnp.sum(jnp.sin(model.apply({"params": params}, x)))

    assert laws.relative_error(small.apply(small_variables, x), model.apply({"params": masked}, x)) < 1e-12
    want = jax.grad(functools.partial(total, model))(masked)
    got = jax.jit(jax.grad(functools.partial(total, small)))(small_variables["params"])
    assert laws.relative_error(got, sapr.prune_tree(want, graph, masks)) < 1e-12
    # The rule and not the derivative of the function: that is zero where values are clipped or rounded.
    assert float(jnp.abs(got["a"]["kernel"]).min()) > 0


def test_it_is_a_module_like_any_other(heads, tmp_path):
  model, x, _, _, _, small, small_variables = heads
  fresh = jax.jit(small.init)(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small_variables)
  assert np.std(fresh["params"]["up"]["kernel"]) > 0 and np.isfinite(small.apply(fresh, x)).all()

  class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2, name="head")(small.copy(name="inner")(x))

  outer = Outer()
  variables = outer.init(jax.random.key(1), x)
  assert jax.tree.map(jnp.shape, variables["params"]["inner"]) == jax.tree.map(jnp.shape, small_variables["params"])
  assert outer.apply(variables, x).shape == (2, 5, 2)
  assert pickle.loads(pickle.dumps(small)) == small
  sapr.save(tmp_path / "model", small, small_variables)
  loaded, read = sapr.load(tmp_path / "model", base=model)
  assert loaded == small and laws.relative_error(loaded.apply(read, x), small.apply(small_variables, x)) == 0


def test_it_is_pruned_again(heads):
  _, x, _, _, _, small, small_variables = heads
  graph = sapr.trace_channels(small, small_variables, x, select="unjoined")
  assert {group.name: group.size for group in graph.groups} == {"q": 2, "v": 2, "up": 4}
  masks = {name: np.append(np.zeros(1), mask[1:]) for name, mask in graph.full_masks().items()}
  smaller, variables = sapr.prune(small, small_variables, graph, masks)
  masked = {**small_variables, "params": sapr.mask_params(small_variables["params"], graph, masks)}
  assert not isinstance(smaller.base, sapr.NarrowModule)
  assert laws.relative_error(smaller.apply(variables, x), small.apply(masked, x)) < 1e-5
  graph = sapr.trace_channels(smaller, variables, x, select="unjoined")
  assert {group.name: group.size for group in graph.groups} == {"up": 3}  # one head and one value are left
  masks = {"up": np.array([1.0, 0.0, 0.0])}
  smallest, last = sapr.prune(smaller, variables, graph, masks)
  masked = {**variables, "params": sapr.mask_params(variables["params"], graph, masks)}
  assert laws.relative_error(smallest.apply(last, x), smaller.apply(masked, x)) < 1e-5


def test_cuts_follow_one_another():
  old = (("a", 1, 12, ((3, 2), (4, 4))), ("b", 0, 5, ((5, 4),)))
  new = (("a", 1, 8, ((2, 1), (4, 3))), ("c", 0, 2, ((2, 1),)))
  assert merged_cuts(old, new) == (
    ("a", 1, 12, ((3, 1), (4, 3))),
    ("b", 0, 5, ((5, 4),)),
    ("c", 0, 2, ((2, 1),)),
  )
  # One head is left, which is no axis any more.
  assert merged_cuts((("a", 1, 12, ((3, 1), (4, 4))),), (("a", 1, 4, ((4, 2),)),)) == (("a", 1, 12, ((3, 1), (4, 2))),)
  assert merged_cuts((("a", 1, 12, ((3, 2), (4, 4))),), (("a", 1, 8, ((8, 2),)),)) is None


def test_wrong_cuts_are_refused(heads):
  model, x, _, _, _, small, small_variables = heads
  with pytest.raises(InputError, match=r"cuts must be \(path of a variable, axis, size, \(\(size, kept\), ...\)\)"):
    sapr.NarrowModule(model, (), (("params/q/kernel", 1, 12, ((3, 4),)),))
  other = sapr.NarrowModule(model, (), (*small.cuts[:-1], (*small.cuts[-1][:3], ((12, 4),))))
  with pytest.raises(InputError, match="cannot be run like this: axis 1 of params/v/kernel is made of other channels"):
    other.apply(small_variables, x)


def positions(x):
  """Divides by how many pixels a window covers, as a partial convolution does."""
  ones, numbers = jnp.ones((1, 8, 8, 1)), ("NHWC", "HWIO", "NHWC")
  counts = jax.lax.conv_general_dilated(ones, jnp.ones((3, 3, 1, 1)), (1, 1), "SAME", dimension_numbers=numbers)
  return x / counts.astype(x.dtype)


class Convolved(nn.Module):
  """A variable that meets the channels, and is convolved by itself."""

  @nn.compact
  def __call__(self, x):
    places = self.param("places", nn.initializers.normal(1.0), (1, 8, 8, 4))
    y = nn.Conv(4, (3, 3), name="a")(nn.elu(nn.Conv(5, (1, 1), name="first")(x))) + places
    return nn.Conv(3, (3, 3), name="b")(positions(y)) + nn.Conv(3, (3, 3), name="c")(places)


class Fortran(nn.Module):
  """Reshapes in another order than that of the dimensions."""

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(12, name="a")(x).reshape((*x.shape[:3], 3, 4))
    y = jax.lax.reshape(y, (*x.shape[:3], 12), dimensions=(0, 1, 2, 4, 3))
    return nn.Dense(3, name="b")(nn.elu(y))


class TwoFactors(nn.Module):
  """A kernel that is computed from two parameters, each of which has some of its channels."""

  @nn.compact
  def __call__(self, x):
    a, b = nn.Dense(4, name="a")(x), nn.Dense(6, name="b")(x)
    draw = nn.initializers.normal(1.0)
    kernel = self.param("A", draw, (4,))[:, None, None] * self.param("B", draw, (6, 3))[None]
    y = (a[..., :, None] * b[..., None, :]).reshape((*x.shape[:3], 24))
    return y @ kernel.reshape((24, 3)) + nn.Dense(3, name="c")(a)


class InnerConstant(nn.Module):
  """A constant of a program within the program, which code computes from a width."""

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(8, name="a")(x)
    scale = np.arange(1, 4.0).astype(x.dtype) * y.shape[-1]
    return jax.jit(lambda z: z * scale)(nn.Dense(3, name="b")(y))


class Tiled(nn.Module):
  """Repeats one number for as many channels as the code holds."""

  @nn.compact
  def __call__(self, x):
    gate = nn.sigmoid(nn.Dense(1, name="gate")(x))
    return nn.Dense(3, name="b")(nn.elu(nn.Dense(8, name="a")(x)) * jnp.tile(gate, (1, 1, 1, 8)))


class InnerResults(nn.Module):
  """A program within the program, which returns as many arrays as there are channels."""

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(8, name="a")(x)
    first = jax.jit(lambda z: [2 * z] * z.shape[-1])(nn.elu(y))[0]
    return nn.Dense(3, name="b")(first)


@pytest.mark.parametrize("kind", [Convolved, Fortran, TwoFactors, InnerConstant, Tiled, InnerResults])
def test_what_once_was_wrong(kind):
  laws.check_laws(kind(), "exact", (0,))


class TrainsOtherwise(nn.Module):
  """Sums channels without a kernel, but in training only."""

  @nn.compact
  def __call__(self, x, train=False):
    y = nn.Dense(8, name="a")(x) + jnp.zeros(8)
    out = nn.Dense(4, name="b")(nn.relu(y))
    return out + jnp.einsum("bc,bc->b", y, y)[:, None] if train else out


def test_training_that_a_cut_would_change_is_refused():
  model = TrainsOtherwise()
  x, variables, graph, masks = network(model, (2, 5))
  small, small_variables = sapr.prune(model, variables, graph, masks)
  assert small.cuts and small.apply(small_variables, x).shape == (2, 4)
  with pytest.raises(InputError, match=r"cannot be run like this: 8 channels cannot be cut in this mode: it is summed"):
    small.apply(small_variables, x, train=True)


class OverDevices(nn.Module):
  """Batch statistics over the devices, in code that holds a width."""

  @nn.compact
  def __call__(self, x, train=False):
    y = nn.BatchNorm(use_running_average=not train, axis_name="data", name="bn")(nn.Dense(8, name="a")(x))
    return nn.Dense(3, name="b")(nn.relu(y.reshape((-1, 8))))


def test_batch_statistics_over_devices():
  model = OverDevices()
  x, variables, graph, masks = network(model, (4, 5))
  small, small_variables = sapr.prune(model, variables, graph, masks)
  masked = {**variables, "params": sapr.mask_params(variables["params"], graph, masks)}
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def train(model, variables):
    step = jax.shard_map(
      lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]),
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec("data")),
      out_specs=(PartitionSpec("data"), PartitionSpec()),
    )
    return jax.jit(step)(variables, x)

  (got, stats), (want, dense_stats) = train(small, small_variables), train(model, masked)
  assert small.cuts and laws.relative_error(got, want) < 1e-5
  assert laws.relative_error(stats, sapr.prune_tree(dense_stats, graph, masks)) < 1e-5


class Stateful(nn.Module):
  """Keeps a tuple of arrays as one variable."""

  @nn.compact
  def __call__(self, x):
    state = self.variable("state", "h", lambda: (jnp.zeros(4), jnp.ones(4)))
    return nn.Dense(2)(nn.relu(nn.Dense(4)(x) + state.value[0]))


def test_several_arrays_of_one_name_are_refused():
  variables = Stateful().init(jax.random.key(0), jnp.ones((1, 2)))
  with pytest.raises(InputError, match="must be nested dictionaries of arrays, got several in state/h"):
    sapr.trace_channels(Stateful(), variables, (1, 2))
