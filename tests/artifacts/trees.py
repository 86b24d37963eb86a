"""Variables for the tests of files, and their comparison."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def draw(model, input_shape):
  """Returns variables of a model between 0.5 and 1.5, without compiling anything."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(input_shape, jnp.float32))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32), shapes)


def assert_same(got, want):
  """Asserts that two trees have the same structure, dtypes and numbers, and that `got` is of JAX arrays."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert isinstance(a, jax.Array) and a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
