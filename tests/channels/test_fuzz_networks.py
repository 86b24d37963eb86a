"""Random small networks: whatever is offered can be cut exactly."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import laws
import networks
import numpy as np
import pytest

from sapr_jax.channels import trace_channels
from sapr_jax.errors import InputError

SHAPE = (1, 4, 4, 3)


class Draws:
  """Draws numbers, and draws the same ones when the network is traced again, narrower."""

  def __init__(self, seed: int) -> None:
    self._rng = np.random.default_rng(seed)
    self._drawn: list[int] = []
    self._next = 0

  def restart(self) -> None:
    self._next = 0

  def choice(self, options: list) -> int:
    if self._next == len(self._drawn):
      self._drawn.append(options[self._rng.integers(len(options))])
    self._next += 1
    return self._drawn[self._next - 1]


def conv(x, rng):
  return nn.Conv(rng.choice([4, 6, 8]), (rng.choice([1, 3]),) * 2, use_bias=rng.choice([False, True]))(x)


def grouped(x, rng):
  groups = rng.choice([d for d in (4, 3, 2, 1) if x.shape[-1] % d == 0])
  return nn.Conv(groups * rng.choice([1, 2, 3]), (1, 1), feature_group_count=groups)(x)


def depthwise(x, rng):
  width = x.shape[-1]
  return nn.Conv(width * rng.choice([1, 2]), (3, 3), feature_group_count=width)(x)


def residual(x, rng):
  y = nn.elu(nn.Conv(rng.choice([4, 6]), (1, 1))(x))
  return x + nn.Conv(x.shape[-1], (3, 3))(y)


def dense_layer(x, rng):
  parts = [x, nn.Conv(rng.choice([2, 3, 4]), (3, 3))(nn.elu(networks.norm()(x)))]
  return jnp.concatenate(parts[:: rng.choice([1, -1])], -1)


def branches(x, rng):
  sizes = [rng.choice([2, 3, 4]) for _ in range(3)]
  y = jnp.concatenate([nn.Conv(size, (1, 1))(x) for size in sizes], -1)
  others = [sizes[0] + 1, sum(sizes) - sizes[0] - 1] if rng.choice([False, True]) else sizes[::-1]
  return y + jnp.concatenate([nn.Conv(size, (1, 1))(x) for size in others], -1)


def squeeze_excite(x, rng):
  s = nn.elu(nn.Dense(rng.choice([2, 3, 4]))(x.mean((1, 2), keepdims=True)))
  return x * nn.sigmoid(nn.Dense(x.shape[-1])(s))


def shuffle(x, rng):
  return networks.shuffle_channels(x, rng.choice([d for d in (4, 3, 2, 1) if x.shape[-1] % d == 0]))


def gate(x, rng):
  width = rng.choice([4, 6])
  return nn.Conv(width, (1, 1))(x) * nn.sigmoid(nn.Conv(width, (1, 1))(x))


def tokens(x, rng):
  b, h, w, c = x.shape
  y = nn.Dense(rng.choice([4, 5]))(x.reshape((b, h * w, c)))
  return y.reshape((b, h, w, -1))


def token_mixing(x, rng):
  b, h, w, c = x.shape
  y = x.reshape((b, h * w, c)).swapaxes(1, 2)
  return nn.Dense(h * w)(jnp.tanh(nn.Dense(5)(y))).swapaxes(1, 2).reshape(x.shape)


def attention(x, rng):
  b, h, w, c = x.shape
  y = x.reshape((b, h * w, c))
  q, k, v = nn.Dense(4)(y), nn.Dense(4)(y), nn.Dense(rng.choice([4, c]))(y)
  return (nn.softmax(q @ k.swapaxes(1, 2)) @ v).reshape((b, h, w, -1))


def transposed(x, rng):
  return nn.ConvTranspose(rng.choice([4, 6]), (2, 2), transpose_kernel=rng.choice([False, True]))(x)


def twice(x, rng):
  layer = nn.Conv(x.shape[-1], (3, 3))
  return layer(nn.elu(layer(x)))


def self_concatenation(x, rng):
  return jnp.concatenate([x, jnp.tanh(-x)], -1)


def nested_concatenation(x, rng):
  y = nn.Conv(4, (1, 1))(x)
  return jnp.concatenate([y, jnp.concatenate([x, y], -1)], -1)


def split_and_gate(x, rng):
  if rng.choice([x.shape[-1] % 2]):
    return x
  a, b = jnp.split(x, 2, -1)
  return a * nn.sigmoid(b)


def outer_product(x, rng):
  y = nn.Conv(2, (1, 1))(x)
  return (y[..., :, None] * x[..., None, :]).reshape((*x.shape[:3], -1))


OPERATIONS = [
  *(conv, conv, grouped, depthwise, residual, residual, dense_layer, branches, squeeze_excite, shuffle, gate, tokens),
  *(token_mixing, attention, transposed, twice, self_concatenation, nested_concatenation, split_and_gate),
  outer_product,
  lambda x, rng: networks.norm()(x),
  lambda x, rng: nn.elu(x),
  lambda x, rng: nn.gelu(x) + jnp.tanh(x),
  lambda x, rng: nn.max_pool(x, (2, 2), (1, 1), "SAME"),
  lambda x, rng: nn.LayerNorm()(x),
  lambda x, rng: nn.GroupNorm(num_groups=None, group_size=1)(x),
  lambda x, rng: x[..., : rng.choice([max(2, x.shape[-1] - 1)])],
  lambda x, rng: x / (1 + jnp.square(x).mean((1, 2), keepdims=True)),
]


DRAWS: dict[int, Draws] = {}


class RandomNet(nn.Module):
  """Draws its operations from `seed`, the same at every trace."""

  seed: int

  @nn.compact
  def __call__(self, x):
    rng = DRAWS.setdefault(self.seed, Draws(self.seed))
    rng.restart()
    x = nn.elu(nn.Conv(rng.choice([4, 6]), (3, 3), name="first")(x))
    for _ in range(rng.choice([3, 4, 5, 6])):
      x = OPERATIONS[rng.choice(list(range(len(OPERATIONS))))](x, rng)
      if rng.choice([x.shape[-1] > 24]):
        x = nn.Conv(6, (1, 1))(x)
    if rng.choice([False, True]):
      x = x.reshape((x.shape[0], -1))
      x = nn.elu(nn.Dense(4)(x))
    else:
      x = x.mean((1, 2))
    return nn.Dense(2, name="last")(x)


def check(seed: int) -> str:
  """Returns what became of the network: checked, nothing offered, or refused by `prune`."""
  model = RandomNet(seed)
  with jax.enable_x64(True):
    variables = laws.random_variables(model, seed, shape=SHAPE)
    try:
      graph = trace_channels(model, variables, SHAPE, select="exact", input_dtype=np.float64)
    except InputError as error:
      assert "finds no channel group" in str(error)
      return "nothing offered"
    try:
      laws.check_masked_is_pruned(model, graph, variables, laws.random_masks(graph, seed, seed % 4 == 3), 1e-9)
    except InputError as error:
      assert "changes what the model computes" in str(error)
      return "refused"
  return "checked"


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed):
  assert check(seed) == "checked"
