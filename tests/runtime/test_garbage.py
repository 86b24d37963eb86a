"""No garbage collection where nothing would be found."""

from __future__ import annotations

import gc

import jax.numpy as jnp
import numpy as np
import pytest

from sapr_jax.runtime import MappedStep, data_mesh
from sapr_jax.runtime.garbage import without_collection


def test_it_is_off_within_the_block_and_afterwards_as_before():
  with pytest.raises(KeyError), without_collection():
    assert not gc.isenabled()
    raise KeyError
  assert gc.isenabled()
  gc.disable()
  try:
    with without_collection():
      assert not gc.isenabled()
    assert not gc.isenabled()
  finally:
    gc.enable()


def test_steps_are_traced_without_it():
  seen = []

  def step(state, shared, batch):
    seen.append(gc.isenabled())
    return state + shared, {"sum": jnp.sum(batch)}

  mapped = MappedStep(step, data_mesh())
  mapped(jnp.zeros(()), jnp.ones(()), mapped.place(np.ones((1, 8), np.float32)))
  assert seen == [False] and gc.isenabled()
