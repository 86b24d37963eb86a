"""Flax NNX: the law masked = pruned, the fields of the small module, the optimizer, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from laws import QUICK, drawn, random_masks, relative_error

import sapr_jax as sapr
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
  """The code knows a width, so that the first group cannot be cut."""

  def __init__(self, rngs):
    self.up = nnx.Linear(6, 8, rngs=rngs)
    self.middle = nnx.Linear(8, 8, rngs=rngs)
    self.down = nnx.Linear(8, 3, rngs=rngs)
    self.width = 8

  def __call__(self, x):
    x = nnx.relu(self.up(x))
    return self.down(nnx.relu(self.middle(x.reshape(-1, self.width))))


NETWORKS = {
  "mlp": (Mlp, VECTOR),
  "conv": (ConvNet, IMAGE),
  "resnet": (ResNet, IMAGE),
  "depthwise": (Depthwise, IMAGE),
  "transformer": (Transformer, TOKENS),
  "shared": (Shared, VECTOR),
  "stacked": (Stacked, VECTOR),
}
GROUPS = {
  "mlp": {"up"},
  "conv": {"conv1", "conv2"},
  "resnet": {"stem", "blocks/0/conv1", "blocks/1/conv1"},
  "depthwise": {"expand", "project", "grow"},
  "transformer": {"attention/query", "up"},
  "shared": {"up"},
  "stacked": {"up", "middle"},
}


def follows(group):
  """Says whether the code follows: `jax.nn.dot_product_attention` wants values as deep as queries."""
  return group.name != "attention/value"


def in_float64(name, seed=0):
  make, shape = NETWORKS[name]
  return drawn(make(nnx.Rngs(0)), seed), jnp.asarray(np.random.default_rng(1).normal(size=shape))


def masked(module, graph, masks):
  copy = nnx.clone(module)
  nnx.update(copy, sapr.mask_params(nnx.state(copy, nnx.Param), graph, masks))
  return copy


def run(module, x):
  copy = nnx.clone(module)
  copy.eval()
  graphdef, state = nnx.split(copy)
  return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x), compiler_options=QUICK)(state, x)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_masked_is_pruned(name, single):
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # for nnx.MultiHeadAttention
    module, x = in_float64(name)
    before = jax.tree.map(np.array, nnx.state(module, nnx.Param))
    graph = sapr.trace_channels(module, x, select=follows)
    assert {group.name for group in graph.groups} == GROUPS[name]
    masks = random_masks(graph, 3, single=single)
    small = sapr.prune(module, graph, masks)
    assert type(small) is type(module)
    assert relative_error(run(small, x), run(masked(module, graph, masks), x)) < 1e-10
    assert graph.macs(masks) == sapr.count_macs(small, x) < sapr.count_macs(module, x)
    assert graph.num_params(masks) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(small, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(module, nnx.Param))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_small_module_can_be_pruned_again_and_the_dense_one_keeps_its_fields(name):
  module = NETWORKS[name][0](nnx.Rngs(0))
  x = jnp.zeros(NETWORKS[name][1])
  graph = sapr.trace_channels(module, x, select=follows)
  same = sapr.prune(module, graph, graph.full_masks())
  assert nnx.graphdef(same) == nnx.graphdef(module)
  masks = graph.full_masks() | {graph.groups[0].name: np.arange(graph.groups[0].size) > 0}
  small = sapr.prune(module, graph, masks)
  again = sapr.trace_channels(small, x, select=follows)
  assert [group.size for group in again.groups] == list(graph.kept(masks))
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


def test_a_width_in_the_code_is_refused_by_name():
  module, x = Rigid(nnx.Rngs(0)), jnp.zeros(VECTOR)
  graph = sapr.trace_channels(module, x, select="exact")
  half = np.arange(8) < 5
  assert sapr.prune(module, graph, {"up": np.ones(8), "middle": half}).middle.out_features == 5
  with pytest.raises(InputError, match=r"Cutting group 'up' changes what the model computes .*exclude='up'"):
    sapr.prune(module, graph, {"up": half, "middle": half})


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
    (lambda m, g: sapr.masked_apply(m, {}, g, {}), r"must be a Flax linen module, .* got an NNX module"),
  ],
)
def test_bad_input(call, message):
  module = Mlp(nnx.Rngs(0))
  graph = sapr.trace_channels(module, jnp.zeros(VECTOR), select="unjoined")
  with pytest.raises(InputError, match=message):
    call(module, graph)
