"""Checkpoints: the newest comes back exactly, only the newest few stay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapr_jax.artifacts import Checkpointer
from sapr_jax.errors import InputError
from sapr_jax.training.state import network_state


def test_the_newest_state_comes_back_exactly(tmp_path):
  tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9))
  first = {"network": network_state({"params": {"w": jnp.arange(3.0)}}, tx), "masks": {"a": jnp.ones(2)}}
  checkpointer = Checkpointer(tmp_path / "run", keep=2)
  assert checkpointer.restore(first) == (first, None)
  for step in (1, 2, 3):
    checkpointer.save(step, jax.tree.map(lambda x, e=step: x + e, first), {"step": step, "loss": 0.1 + 0.2})
  checkpointer.close()

  checkpointer = Checkpointer(tmp_path / "run", keep=2)
  restored, position = checkpointer.restore(first)
  assert position == {"step": 3, "loss": 0.1 + 0.2}
  checkpointer.close()
  want = jax.tree.map(lambda x: x + 3, first)
  assert jax.tree.structure(restored) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, restored, want)
  assert sorted(d.name for d in (tmp_path / "run").iterdir() if d.name.isdigit()) == ["2", "3"]
