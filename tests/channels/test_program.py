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


@pytest.mark.parametrize(
  ("dense", "small", "proved"),
  [
    ((8, 0, 4), (6, 0, 3), True),
    ((8, 4, 8), (6, 3, 6), True),
    ((8, 4, 8), (7, 4, 7), True),
    ((8, 4, 8), (6, 2, 5), False),  # the last of the entries are not the last of the axis
    ((8, 2, 5), (7, 2, 4), True),
    ((8, 2, 5), (7, 2, 5), False),  # the entry that went may have stood before
    ((8, 2, 5), (7, 1, 4), False),
  ],
)
def test_a_slice_is_proved_where_its_start_follows_from_the_sizes(dense, small, proved):
  def program(size, start, limit):
    return jax.make_jaxpr(lambda x: x[start:limit])(jnp.zeros(size))

  _, start, limit = small
  found = difference(program(*dense), program(*small), {(0,): [(limit - start,)]})
  assert (found is None) == proved
