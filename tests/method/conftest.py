"""Masks and gradients that the tests of the regularization share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def two(tiny):
  """Masks of the tiny ResNet that drop 2 of 4, none of 8 and 4 of 16 channels: weights 1/3, 0 and 2/3."""
  masks = tiny.graph.full_masks()
  names = list(masks)
  masks[names[0]][[1, 3]] = 0
  masks[names[2]][:4] = 0
  return masks


@pytest.fixture(scope="module")
def grads(tiny):
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tiny.params)
