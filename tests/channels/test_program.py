"""Whether two programs are the same but for their shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from sapr_jax.channels.program import ProgramError, difference

X = jnp.arange(4.0)


def program(scale, kept, fill=jnp.nan):
  return jax.make_jaxpr(lambda x: jax.jit(lambda y: jnp.take(y * scale, jnp.arange(kept), fill_value=fill))(x))(X)


def test_a_program_is_the_same_as_itself():
  assert difference(program(2.0, 3), program(2.0, 3), {}) is None  # gathers are filled with NaN
  assert difference(program(2.0, 3), program(2.5, 3), {}) == "`mul` uses 2.5 where the dense model uses 2.0"


def test_shapes_behind_a_difference_are_compared_too():
  with pytest.raises(ProgramError, match=r"gives an array \[2\] instead of \[3\]"):
    difference(program(2.0, 3), program(2.5, 2), {})
