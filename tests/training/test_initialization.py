"""First values: those that the whole of `init` would give, without running it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.models.layers import batch_norm, convolution, traced_once
from sapr_jax.training.initialization import initialize

KEY = jax.random.fold_in(jax.random.key(3), 0)


def assert_same_bits(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), *jax.device_get((found, wanted)))


class Small(nn.Module):
  """The initializers of this package's networks; its evaluation may fail."""

  fails: bool = False

  @nn.compact
  def __call__(self, x):
    x = batch_norm(True, dtype=jnp.float32, name="norm")(convolution(4, 3, dtype=jnp.float32, name="conv")(x))
    x = x + self.param("position", traced_once(nn.initializers.normal(0.02)), x.shape[1:])
    self.variable("constants", "table", lambda: np.arange(3.0, dtype=np.float32))
    x = nn.Dense(2)(x)
    return jax.pure_callback(self.evaluated, x, x) if self.fails else x

  def evaluated(self, x):
    raise AssertionError("the network is evaluated")


def test_a_network_has_the_values_of_its_compiled_init_and_is_not_evaluated():
  image = np.zeros((1, 8, 8, 3), np.float32)
  assert_same_bits(initialize(Small(fails=True).init, KEY, image), jax.jit(Small().init)(KEY, image))


@pytest.mark.slow
def test_the_generator_has_the_values_of_its_init():
  generator = sapr.ArchitectureGenerator((3, 5))
  assert_same_bits(initialize(generator.init, KEY), generator.init(KEY))
