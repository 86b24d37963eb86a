"""Flax NNX: the law masked = pruned, the fields of the small module, the optimizer, and what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from laws import drawn, random_masks, relative_error

import sapr_jax as sapr
from sapr_jax.channels.nnx import NarrowNnx
from sapr_jax.errors import InputError

IMAGE = (2, 8, 8, 3)
VECTOR = (2, 6)
TOKENS = (2, 5, 6)


class Mlp(nnx.Module):
  def __init__(self, rngs, width=8):
    self.up = nnx.Linear(6, width, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.down = nnx.Linear(width, 3, rngs=rngs)

  def __call__(self, x):
    return self.down(self.drop(nnx.relu(self.up(x))))


class ConvNet(nnx.Module):
  def __init__(self, rngs):
    self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(8, rngs=rngs)
    self.conv2 = nnx.Conv(8, 6, (3, 3), strides=2, use_bias=False, rngs=rngs)
    self.norm2 = nnx.BatchNorm(6, rngs=rngs)
    self.head = nnx.Linear(6 * 16, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.conv1(x)))
    x = nnx.relu(self.norm2(self.conv2(x)))
    return self.head(x.reshape(x.shape[0], -1))


class Block(nnx.Module):
  def __init__(self, width, rngs):
    self.conv1 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
    self.norm1 = nnx.BatchNorm(width, rngs=rngs)
    self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
    self.norm2 = nnx.BatchNorm(width, rngs=rngs)

  def __call__(self, x):
    return nnx.relu(x + self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x))))))


class ResNet(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
    self.blocks = nnx.List([Block(6, rngs) for _ in range(2)])
    self.head = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    for block in self.blocks:
      x = block(x)
    return self.head(x.mean((1, 2)))


class Depthwise(nnx.Module):
  def __init__(self, rngs):
    self.expand = nnx.Conv(3, 8, (1, 1), rngs=rngs)
    self.spatial = nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs)
    self.project = nnx.Conv(16, 4, (1, 1), rngs=rngs)
    self.grow = nnx.ConvTranspose(4, 5, (2, 2), strides=2, transpose_kernel=True, rngs=rngs)
    self.head = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.spatial(nnx.relu(self.expand(x))))
    return self.head(nnx.relu(self.grow(nnx.relu(self.project(x)))).mean((1, 2)))


class Transformer(nnx.Module):
  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(3, 6, qkv_features=12, decode=False, rngs=rngs)
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.up = nnx.Linear(6, 10, rngs=rngs)
    self.down = nnx.LinearGeneral(10, (6,), rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.norm(x))
    return x + self.down(nnx.gelu(self.up(x)))


class Shared(nnx.Module):
  """One layer is called twice, and one kernel is held by two layers."""

  def __init__(self, rngs):
    self.up = nnx.Linear(6, 8, rngs=rngs)
    self.twice = nnx.Linear(8, 8, rngs=rngs)
    self.again = self.twice
    self.tied = nnx.Linear(8, 8, rngs=rngs)
    self.tied.kernel = self.twice.kernel
    self.down = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.up(x))
    for layer in (self.twice, self.again, self.tied):
      x = nnx.relu(layer(x))
    return self.down(x)


class Stacked(nnx.Module):
  """Layers whose variables `nnx.vmap` stacked, between two that can be cut."""

  def __init__(self, rngs):
    self.up = nnx.Linear(6, 8, rngs=rngs)
    self.middle = nnx.Linear(8, 7, rngs=rngs)
    stack = nnx.vmap(lambda rngs: nnx.Linear(7, 7, rngs=rngs), in_axes=0)
    self.layers = nnx.split_rngs(splits=2)(stack)(rngs)
    self.down = nnx.Linear(7, 3, rngs=rngs)

  def __call__(self, x):
    x = self.middle(nnx.relu(self.up(x)))
    scan = nnx.scan(lambda x, layer: nnx.relu(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return self.down(scan(x, self.layers))


class Rigid(nnx.Module):
  """The code knows a width, so that the first group cannot be cut in it."""

  def __init__(self, rngs):
    self.up = nnx.Linear(6, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.middle = nnx.Linear(8, 8, rngs=rngs)
    self.down = nnx.Linear(8, 3, rngs=rngs)
    self.width = 8

  def __call__(self, x):
    x = self.drop(nnx.relu(self.norm(self.up(x))))
    return self.down(nnx.relu(self.middle(x.reshape(-1, self.width))))


NETWORKS = {
  "mlp": (Mlp, VECTOR, {"up": 8}),
  "conv": (ConvNet, IMAGE, {"conv1": 8, "conv2": 6}),
  "resnet": (ResNet, IMAGE, {"stem": 6, "blocks/0/conv1": 6, "blocks/1/conv1": 6}),
  "depthwise": (Depthwise, IMAGE, {"expand": 8, "project": 4, "grow": 5}),
  "transformer": (Transformer, TOKENS, {"attention/query": 3, "up": 10}),
  "shared": (Shared, VECTOR, {"up": 8}),
  "stacked": (Stacked, VECTOR, {"up": 8, "middle": 7}),
}


def follows(group):
  """Says whether the code follows: `jax.nn.dot_product_attention` wants values as deep as queries."""
  return group.name != "attention/value"


@pytest.fixture
def float64():
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # for nnx.MultiHeadAttention
    yield


@functools.cache
def network(name):
  """Returns a module, its input, its graph, masks and the small module, all in float64."""
  make, shape, groups = NETWORKS[name]
  module = drawn(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape))
  graph = sapr.trace_channels(module, x, select=follows)
  assert {group.name: group.size for group in graph.groups} == groups
  masks = random_masks(graph, 3, single=name == "conv")
  before = jax.tree.map(np.array, nnx.state(module, nnx.Param))
  small = sapr.prune(module, graph, masks)
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(module, nnx.Param))
  return module, x, graph, masks, small


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_is_pruned(name, float64):
  module, x, graph, masks, small = network(name)
  assert type(small) is type(module)
  copy = nnx.clone(small)
  copy.eval()
  graphdef, state = nnx.split(copy)
  run = jax.jit(lambda state: (nnx.merge(graphdef, state)(x), sapr.masked_apply(module, graph, masks, x)))
  assert relative_error(*run(state)) < 1e-10
  assert graph.macs(masks) == sapr.count_macs(small, x) < sapr.count_macs(module, x)
  assert graph.num_params(masks) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(small, nnx.Param)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_small_module_can_be_pruned_again_and_the_dense_one_keeps_its_fields(name, float64):
  module, x, graph, masks, small = network(name)
  assert nnx.graphdef(sapr.prune(module, graph, graph.full_masks())) == nnx.graphdef(module)
  widths = [n for n in graph.kept(masks) if n > 1]
  if widths:
    again = sapr.trace_channels(small, x, select=follows)
    assert [group.size for group in again.groups] == widths
    assert again.macs() == graph.macs(masks)


def test_fields_have_the_new_sizes():
  module = Depthwise(nnx.Rngs(0))
  graph = sapr.trace_channels(module, jnp.zeros(IMAGE), select="exact")
  masks = graph.full_masks()
  masks["expand"][2:5] = 0
  masks["grow"][0] = 0
  small = sapr.prune(module, graph, masks)
  spatial = small.spatial
  assert (spatial.in_features, spatial.out_features, spatial.feature_group_count) == (5, 10, 5)
  assert spatial.kernel_shape == spatial.kernel.shape == (3, 3, 1, 10)
  assert (small.grow.in_features, small.grow.out_features, small.head.in_features) == (4, 4, 4)
  assert module.spatial.feature_group_count == 8


def test_hand_worked():
  """Channel 1 is dropped: its column of `up` and its row of `down` go."""
  module = Mlp(nnx.Rngs(0), width=2)
  kernel, reader = module.up.kernel[...], module.down.kernel[...]
  graph = sapr.trace_channels(module, jnp.zeros((1, 6)), select="unjoined")
  small = sapr.prune(module, graph, {"up": np.array([1.0, 0.0])})
  np.testing.assert_array_equal(small.up.kernel[...], kernel[:, :1])
  np.testing.assert_array_equal(small.down.kernel[...], reader[:1])
  assert graph.macs() == 6 * 2 + 2 * 3
  assert small.drop.deterministic is False, "prune leaves the mode as it is"


def test_variables_without_an_array_stay():
  module = Mlp(nnx.Rngs(0))
  module.epoch, module.nothing, module.table = nnx.Variable(2), nnx.Variable(None), jnp.arange(3.0)
  graph = sapr.trace_channels(module, jnp.zeros(VECTOR), select="unjoined")
  small = sapr.prune(module, graph, {"up": np.arange(8) < 5})
  assert small.epoch.get_value() == 2
  assert small.nothing.get_value() is None
  np.testing.assert_array_equal(small.table, module.table)
  assert small.up.out_features == 5


def test_a_tied_kernel_stays_tied():
  module = Shared(nnx.Rngs(0))
  graph = sapr.trace_channels(module, jnp.zeros(VECTOR), select="exact")
  small = sapr.prune(module, graph, {"up": np.arange(8) < 5})
  assert small.again is small.twice
  assert small.tied.kernel is small.twice.kernel
  assert small.tied.out_features == 5


def test_scores_and_penalty_take_the_state_of_the_parameters():
  module = Mlp(nnx.Rngs(0))
  graph = sapr.trace_channels(module, jnp.zeros(VECTOR), select="unjoined")
  params = nnx.state(module, nnx.Param)
  np.testing.assert_allclose(sapr.l1_norm(params, graph)["up"], np.abs(module.up.kernel[...]).sum(axis=0), rtol=1e-6)
  assert sapr.partial_group_lasso(params, graph, {"up": np.zeros(8)}) > 0
  small = sapr.prune_tree(params, graph, {"up": np.arange(8) < 3})
  assert isinstance(small, nnx.State)
  assert isinstance(small["up"]["kernel"], nnx.Param)
  assert small["up"]["kernel"].shape == (6, 3)


@pytest.mark.parametrize("form", ["penalty", "prox"])
def test_the_optimizer_holds_the_masks(form):
  """Dropped channels shrink, kept ones do not, and new masks compile nothing."""
  module = Mlp(nnx.Rngs(0))
  graph = sapr.trace_channels(module, jnp.zeros(VECTOR), select="unjoined")
  sgd = optax.sgd(0.1, momentum=0.9)
  regularize = {
    "penalty": lambda: optax.chain(sapr.regularize_by_penalty(graph, 0.5), sgd),
    "prox": lambda: optax.chain(sgd, sapr.regularize_by_prox(graph, 0.1, 0.5, momentum=0.9)),
  }
  optimizer = nnx.Optimizer(module, regularize[form](), wrt=nnx.Param)
  traces = []

  @nnx.jit
  def step(module, optimizer):
    traces.append(1)
    grads = nnx.grad(lambda module: 0.0 * module(jnp.ones(VECTOR)).sum())(module)
    optimizer.update(module, grads)

  def norms():
    return np.asarray(sapr.l2_norm(nnx.state(module, nnx.Param), graph)["up"])

  first = norms()
  for mask in (np.arange(8) < 5.0, np.arange(8) < 3.0):
    optimizer.opt_state = nnx.data(sapr.set_masks(optimizer.opt_state, {"up": mask}))
    before = norms()
    step(module, optimizer)
    np.testing.assert_array_equal(sapr.get_masks(optimizer.opt_state)["up"], mask)
    assert (norms()[~mask] < before[~mask]).all()
  np.testing.assert_array_equal(norms()[:3], first[:3])
  assert len(traces) == 1
  small = sapr.prune_tree(optimizer.opt_state, graph, {"up": np.arange(8) < 3})
  np.testing.assert_array_equal(sapr.get_masks(small)["up"], np.ones(3))


@pytest.fixture(scope="module")
def rigid():
  """A module whose code holds a width, and what is left of it."""
  module = drawn(nnx.eval_shape(lambda: Rigid(nnx.Rngs(0))), dtype=np.float32)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 6)), jnp.float32)
  graph = sapr.trace_channels(module, x, select="exact")
  masks = {"up": np.arange(8) < 5, "middle": np.arange(8) % 2}
  return module, x, graph, masks, sapr.prune(module, graph, masks)


def test_a_width_in_the_code_stays_and_the_program_is_evaluated(rigid):
  module, x, graph, masks, small = rigid
  assert type(sapr.prune(module, graph, graph.full_masks() | {"middle": masks["middle"]})) is Rigid
  assert isinstance(small, Rigid) and isinstance(small, NarrowNnx) and type(small).__name__ == "NarrowRigid"
  assert small.up.kernel.shape == (6, 5) and small.middle.kernel.shape == (5, 4)
  small.eval()
  assert relative_error(small(x), sapr.masked_apply(module, graph, masks, x)) < 1e-5
  assert sapr.count_macs(small, x) == graph.macs(masks)
  again = sapr.trace_channels(small, x, select="exact")
  assert {group.name: group.size for group in again.groups} == {"up": 5, "middle": 4}
  masks = {"up": np.arange(5) > 1, "middle": np.ones(4)}
  smaller = sapr.prune(small, again, masks)
  assert type(smaller) is type(small)
  smaller.eval()
  assert relative_error(smaller(x), sapr.masked_apply(small, again, masks, x)) < 1e-5


def test_methods_that_run_as_they_are_written_are_named(caplog):
  class WithMethods(Rigid):
    def features(self, x):
      return self.up(x)

  module = WithMethods(nnx.Rngs(0))
  graph = sapr.trace_channels(module, jax.ShapeDtypeStruct((2, 6), jnp.float32), select="exact")
  masks = {group.name: np.arange(group.size) > 0 for group in graph.groups}
  for _ in range(2):
    sapr.prune(module, graph, masks)
  (record,) = caplog.records
  assert "WithMethods holds widths as numbers" in record.getMessage() and record.getMessage().endswith(": features.")


def test_it_trains_as_the_masked_module_does(rigid):
  """Gradients and batch statistics; dropout is off, as its numbers are others in another shape."""
  module, x, graph, masks, small = rigid
  masked = nnx.clone(module)
  nnx.update(masked, sapr.mask_params(nnx.state(masked, nnx.Param), graph, masks))

  @nnx.jit
  def gradients(module):
    module.train()
    module.drop.deterministic = True
    return nnx.grad(lambda module: jnp.sum(jnp.sin(module(x))))(module)

  before = jax.tree.map(np.array, nnx.state(small, nnx.BatchStat))
  got, want = nnx.to_pure_dict(gradients(small)), nnx.to_pure_dict(gradients(masked))
  for grads in (got, want):
    del grads["up"]["bias"]  # a normalization takes no notice of it: the gradient is rounding
  assert relative_error(got, sapr.prune_tree(want, graph, masks)) < 1e-4
  found, wanted = (nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (small, masked))
  assert relative_error(found, sapr.prune_tree(wanted, graph, masks)) < 1e-5
  assert relative_error(found, nnx.to_pure_dict(before)) > 1e-3
  small.drop.deterministic, count = False, int(small.drop.rngs.count[...])
  first, second = small(x), small(x)
  assert np.any(first != second) and int(small.drop.rngs.count[...]) == count + 2


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda m, g: sapr.trace_channels(m, jnp.zeros((2, 7))), r"inputs \(float32\[2,7\]\) do not fit together: .*Pass"),
    (lambda m, g: sapr.trace_channels(m, jnp.zeros((2, 6)), flag=1), r"do not fit together: .*flag"),
    (lambda m, g: sapr.trace_channels(m), r"inputs of the model must be arrays"),
    (lambda m, g: sapr.prune(m, nnx.state(m), g, g.full_masks()), r"graph must be a ChannelGraph in prune\(module"),
    (lambda m, g: sapr.prune(m, g, {}), r"masks misses the group 'up'"),
    (lambda m, g: sapr.prune(m, g, {"up": np.zeros(8)}), r"'up' drops all 8 channels"),
    (lambda m, g: sapr.prune(m, g, None), r"masks must map the names"),
    (lambda m, g: sapr.prune(Mlp(nnx.Rngs(0), 4), g, g.full_masks()), r"variables: params/down/kernel must have shape"),
    (lambda m, g: sapr.masked_apply(m, {}, g, {}), r"graph must be a ChannelGraph in masked_apply\(module, graph"),
    (lambda m, g: sapr.masked_apply(m, g, {}), r"masks misses the group 'up'"),
  ],
)
def test_bad_input(call, message):
  module = Mlp(nnx.Rngs(0))
  graph = sapr.trace_channels(module, jnp.zeros(VECTOR), select="unjoined")
  with pytest.raises(InputError, match=message):
    call(module, graph)
