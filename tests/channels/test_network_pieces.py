"""A network's program in pieces: together they are the network, in any width."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.channels import network_pieces
from sapr_jax.models import with_fast_layers

BATCH = 2


class Blocks(nn.Module):
  """Two blocks that do the same, a function that is compiled, a gain of parameters alone, a loop, and a head."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), name="stem")(x)
    for i in range(2):
      y = nn.Conv(6, (3, 3), name=f"up{i}")(x)
      y = nn.relu(nn.BatchNorm(use_running_average=True, name=f"norm{i}")(y))
      y = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6, name=f"each{i}")(y))
      x = x + jax.jit(jnp.tanh)(nn.Conv(8, (3, 3), name=f"down{i}")(y))
    x = x.mean(axis=(1, 2)) * jnp.exp(self.param("gain", nn.initializers.ones, (8,)))
    x, _ = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ jnp.eye(8)), None), x, None, length=2)
    return nn.Dense(3, name="head")(x)


@pytest.fixture(scope="module")
def network():
  model = Blocks()
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype), shapes)
  return model, variables, sapr.trace_channels(model, variables, (1, 4, 4, 3), select="unjoined")


def test_each_layer_begins_a_piece_and_equal_ones_have_one_key(network):
  pieces, _ = network_pieces(*network, BATCH)
  up0, each0, down0, up1, each1, down1 = pieces[1:7]
  assert [piece.groups for piece in pieces] == [(), *[("up0",)] * 3, *[("up1",)] * 3, (), ()]
  assert up0.key == up1.key and each0.key == each1.key
  assert len({piece.key for piece in pieces}) == len(pieces) - 2
  assert down0.key != down1.key  # which takes the mean besides
  assert down0.layer == "conv_general_dilated float32[2,4,4,6] float32[3,3,6,8]" and down0.sizes == (6,)
  assert [array.shape for array in up0.shapes([2])] == [(2, 4, 4, 8), (3, 3, 8, 2), *[(2,)] * 5]
  assert up0.feeds_layer == (True, True, *[False] * 5)


@pytest.mark.parametrize("transform", [lambda function: function, with_fast_layers])
def test_the_pieces_together_compute_what_the_network_does(network, transform):
  model, variables, graph = network
  pieces, whole = transform(network_pieces)(model, variables, graph, BATCH)
  assert len(pieces) == (9 if transform is not with_fast_layers else 7)  # depthwise layers are sums of products there
  widths = {"up0": 2, "up1": 5}
  masks = {name: (np.arange(6) < width).astype(np.float32) for name, width in widths.items()}
  small_model, small = sapr.prune(model, variables, graph, masks)
  x = jax.random.normal(jax.random.key(1), (BATCH, 4, 4, 3))

  @jax.jit
  def results(leaves):
    values = {((-1,), k): leaf for k, leaf in enumerate(leaves)}
    (at_once,) = whole.function([widths[name] for name in whole.groups], [values[name] for name in whole.takes])
    for piece in pieces:
      own = [widths[name] for name in piece.groups]
      arrays = [values[name] for name in piece.takes]
      assert [array.shape for array in arrays] == [like.shape for like in piece.shapes(own)]
      values.update(zip(piece.gives, piece.function(own, arrays), strict=True))
    return at_once, values[whole.gives[0]], small_model.apply(small, x)

  *found, want = results([*jax.tree.leaves(small), x])
  for result in found:
    np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)


def test_a_graph_of_another_model_is_refused(network):
  model, variables, graph = network
  with pytest.raises(sapr.InputError, match="must have shape"):
    network_pieces(model, jax.tree.map(lambda leaf: leaf[..., :1], variables), graph, BATCH)
