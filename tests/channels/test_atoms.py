"""Identities of axes: worked cases, then a law on random trees of axes against entries with labels."""

import numpy as np
import pytest

from sapr_jax.channels.atoms import (
  Axis,
  atoms,
  channel_index,
  concatenation,
  find,
  fix,
  fix_repeated_factors,
  mark_joined,
  product,
  unify,
)


def same(a, b):
  return find(a) is find(b)


def sizes(axis):
  return [atom.size for atom in atoms(axis)]


def reasons(axis):
  return [atom.fixed for atom in atoms(axis)]


def test_two_atoms_become_one_and_share_what_is_known_of_them():
  a, b = Axis(2, fixed="reason a"), Axis(2)
  mark_joined(b)
  unify(a, b)
  assert same(a, b)
  (atom,) = atoms(a)
  assert (atom.size, atom.fixed, atom.joined) == (2, "reason a", True)


def test_the_first_reason_is_kept():
  a = Axis(2)
  fix(a, "first")
  fix(a, "second")
  assert reasons(a) == ["first"]
  b = Axis(2, fixed="of b")
  unify(a, b)
  assert reasons(a) == ["of b"] or reasons(a) == ["first"]


def test_different_sizes_cannot_be_one_axis():
  with pytest.raises(ValueError, match="sizes 2 and 3"):
    unify(Axis(2), Axis(3))


def test_a_broadcast_dimension_has_no_identity():
  a, b = Axis(1), Axis(1, fixed="reason")
  unify(a, b)
  assert not same(a, b)
  assert reasons(a) == [None]


def test_products_are_flat_and_drop_ones():
  a, b, c = Axis(2), Axis(3), Axis(5)
  nested = product([a, product([b, Axis(1), c])])
  assert nested.size == 30
  assert [find(part) for part in nested.parts] == [a, b, c]
  assert product([a, Axis(1)]) is a
  assert product([]).size == 1


def test_concatenations_are_flat_and_drop_nothing_but_empty_parts():
  a, b = Axis(2), Axis(1)
  nested = concatenation([a, concatenation([b, Axis(0)])])
  assert nested.size == 3
  assert list(nested.parts) == [a, b]
  assert concatenation([]).size == 0


def test_an_atom_takes_the_parts_it_is_unified_with():
  height, channels = Axis(2, fixed="space"), Axis(3)
  rows = Axis(6)
  unify(rows, product([height, channels]))
  assert list(channel_index(rows, channels)) == [0, 1, 2, 0, 1, 2]
  assert list(channel_index(rows, height)) == [0, 0, 0, 1, 1, 1]
  assert reasons(rows) == ["space", None]


def test_aligned_products_unify_factor_by_factor():
  a, b, c, d = Axis(2), Axis(3), Axis(2), Axis(3)
  unify(product([a, b]), product([c, d]))
  assert same(a, c) and same(b, d)


def test_a_product_splits_an_atom_of_the_other():
  a, b, c = Axis(2), Axis(3), Axis(4)
  whole = Axis(6)
  unify(product([whole, c]), product([a, b, c]))
  assert sizes(whole) == [2, 3]
  assert list(channel_index(whole, find(a))) == [0, 0, 0, 1, 1, 1]


def test_a_channel_shuffle_splits_into_what_both_sides_share():
  groups, members = Axis(2), Axis(4)
  kernel_groups, kernel_members = Axis(2), Axis(4)
  unify(product([members, groups]), product([kernel_groups, kernel_members]))
  assert sizes(members) == [2, 2]
  assert sizes(kernel_members) == [2, 2]
  assert not any(reasons(members) + reasons(kernel_members) + reasons(groups))
  # Entry (i, g) of the shuffled axis is entry 2 i + g of the other, for i in 0..3 and g in 0..1.
  major, minor = atoms(members)
  shuffled = product([members, groups])
  assert list(channel_index(shuffled, major)) == [0, 0, 0, 0, 1, 1, 1, 1]
  assert list(channel_index(shuffled, minor)) == [0, 0, 1, 1, 0, 0, 1, 1]


def test_products_that_do_not_divide_are_fixed_on_both_sides():
  a, b, c, d = Axis(2), Axis(3), Axis(3), Axis(2)
  unify(product([a, b]), product([c, d]))
  assert all(axis.fixed and "reshaped" in axis.fixed for axis in (a, b, c, d))


def test_concatenations_that_are_cut_elsewhere_are_divided():
  a, b, c, d = Axis(2), Axis(4), Axis(3), Axis(3)
  unify(concatenation([a, b]), concatenation([c, d]))
  assert [sizes(axis) for axis in (a, b, c, d)] == [[2], [1, 3], [2, 1], [3]]
  assert same(next(atoms(c)), a)
  assert list(channel_index(concatenation([a, b]), find(d))) == [-1, -1, -1, 0, 1, 2]


def test_a_concatenation_divides_an_atom():
  a, b, whole = Axis(2), Axis(3), Axis(5)
  unify(concatenation([a, b]), whole)
  assert list(channel_index(whole, b)) == [-1, -1, 0, 1, 2]


def test_a_concatenation_meets_a_product():
  pixels, channels = Axis(4), Axis(3)
  first, second = Axis(3), Axis(9)
  unify(concatenation([first, second]), product([pixels, channels]))
  assert same(first, channels)
  assert list(channel_index(second, find(channels))) == [0, 1, 2] * 3
  assert sizes(pixels) == [1, 3]


def test_a_concatenation_across_the_channels_of_a_product_fixes_both():
  pixels, channels = Axis(2), Axis(3)
  first, second = Axis(2), Axis(4)
  unify(concatenation([first, second]), product([pixels, channels]))
  assert all(axis.fixed for axis in (pixels, channels, first, second))


def test_a_product_inside_a_concatenation_is_cut_along_its_major_factor():
  major, minor, tail = Axis(4), Axis(2), Axis(2)
  first, second = Axis(6), Axis(4)
  unify(concatenation([product([major, minor]), tail]), concatenation([first, second]))
  assert sizes(major) == [3, 1]
  assert not any(reasons(first) + reasons(second))
  assert list(channel_index(first, find(minor))) == [0, 1, 0, 1, 0, 1]


def test_the_outer_product_with_itself_is_fixed():
  a, b = Axis(3), Axis(2)
  axis = product([a, b, a])
  fix_repeated_factors(axis)
  assert a.fixed and "outer product" in a.fixed
  assert b.fixed is None


# ----------------------------------------------------------------------------------------------------------------------
# The law
# ----------------------------------------------------------------------------------------------------------------------


def draw_axis(rng, size, pool, depth=2):
  """Draws a tree of axes of the given size; `pool` holds the atoms made so far, which may come again."""
  again = [axis for axis in pool if axis.size == size]
  choice = rng.integers(4)
  divisors = [d for d in range(2, size) if size % d == 0]
  if choice == 0 and again:
    return again[rng.integers(len(again))]
  if choice == 1 and divisors and depth:
    first = int(rng.choice(divisors))
    return product([draw_axis(rng, first, pool, depth - 1), draw_axis(rng, size // first, pool, depth - 1)])
  if choice == 2 and size > 2 and depth:
    first = int(rng.integers(1, size))
    return concatenation([draw_axis(rng, first, pool, depth - 1), draw_axis(rng, size - first, pool, depth - 1)])
  pool.append(Axis(size))
  return pool[-1]


def kept_entries(axis, dropped):
  """Returns which entries stay when each atom drops the channels that `dropped` says, by the definition of an axis."""
  axis = find(axis)
  if axis.kind is None:
    return dropped.setdefault(id(axis), np.ones(axis.size, bool))
  parts = [kept_entries(part, dropped) for part in axis.parts]
  if axis.kind == "concatenation":
    return np.concatenate(parts)
  kept = parts[0]
  for part in parts[1:]:
    kept = (kept[:, None] & part[None, :]).reshape(-1)
  return kept


@pytest.mark.parametrize("seed", range(40))
def test_unified_axes_lose_the_same_entries(seed):
  rng = np.random.default_rng(seed)
  for _ in range(10):
    pool: list[Axis] = []
    pairs = []
    for _ in range(rng.integers(1, 4)):
      size = int(rng.choice([4, 6, 8, 12]))
      pair = draw_axis(rng, size, pool), draw_axis(rng, size, pool)
      pairs.append(pair)
      unify(*pair)
    everything = [axis for pair in pairs for axis in pair] + pool
    for axis in everything:
      fix_repeated_factors(axis)
      for atom in atoms(axis):
        if atom.size == 1:  # a single channel is never cut
          fix(atom, "single")
    found = {id(atom): atom for axis in everything for atom in atoms(axis)}
    for atom in found.values():
      if atom.fixed:
        continue
      dropped = {id(atom): rng.uniform(size=atom.size) < 0.5}
      for a, b in pairs:
        assert find(a).size == find(b).size
        np.testing.assert_array_equal(kept_entries(a, dict(dropped)), kept_entries(b, dict(dropped)))
        # What the surgery uses agrees with the definition.
        index = channel_index(a, atom)
        np.testing.assert_array_equal(np.append(dropped[id(atom)], True)[index], kept_entries(a, dict(dropped)))
