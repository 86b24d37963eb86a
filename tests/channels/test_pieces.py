"""Axes that are split, sliced and padded: worked cases of the analysis, one function of the axes at a time."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from sapr_jax import models
from sapr_jax.channels.analysis import analyze
from sapr_jax.channels.atoms import Axis, atoms, channel_index, find
from sapr_jax.channels.call import Call
from sapr_jax.channels.linen import LINEN
from sapr_jax.channels.rules import AxisInterpreter, Value


def run(function, *shapes, interpreter=None):
  """Returns (inputs, results, interpreter) of the rules on a function of arrays with free axes."""
  operands = [
    Value(tuple(map(Axis, shape)), zeroed_by=frozenset({("params", str(i))})) for i, shape in enumerate(shapes)
  ]
  interpreter = interpreter or AxisInterpreter()
  jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
  return operands, interpreter.run(jaxpr.jaxpr, operands), interpreter


def sizes(axis):
  return [atom.size for atom in atoms(axis)]


def is_free(axis):
  return not any(atom.fixed for atom in atoms(axis))


def analysis_of(model, shape, dtype=jnp.float32):
  call = Call((jax.ShapeDtypeStruct(shape, dtype),), {})
  variables = jax.eval_shape(model.init, jax.random.key(0), *call.args)
  return analyze(LINEN.trace(model, variables, call), variables, call)


def reasons_of(analysis, *path):
  """Returns why the atoms of the last axis of a parameter are fixed."""
  return [atom.fixed for atom in atoms(analysis.axes[("params", *path)][-1])]


def test_a_split_axis_is_made_of_its_pieces():
  (x,), (a, b), _ = run(lambda x: jnp.split(x, [2], -1), (3, 6))
  assert a.axes[0] is x.axes[0] is b.axes[0]
  assert sizes(x.axes[1]) == [2, 4] and is_free(x.axes[1])
  assert list(channel_index(x.axes[1], find(b.axes[1]))) == [-1, -1, 0, 1, 2, 3]
  assert a.zeroed_by == b.zeroed_by == x.zeroed_by


def test_the_halves_of_a_gate_are_the_same_channels():
  (x,), (y,), _ = run(lambda x: (lambda a, b: a * jax.nn.gelu(b))(*jnp.split(x, 2, -1)), (1, 6))
  assert list(channel_index(x.axes[1], find(y.axes[1]))) == [0, 1, 2, 0, 1, 2]


def test_a_sliced_axis_is_what_is_before_the_slice_the_slice_and_what_is_after():
  (x,), (y,), interpreter = run(lambda x: x[:, 1:4], (3, 6))
  assert sizes(x.axes[1]) == [1, 3, 2]
  assert list(channel_index(x.axes[1], find(y.axes[1]))) == [-1, 0, 1, 2, -1, -1]
  (((none, nothing), (before, after)),) = interpreter.margins.values()
  assert (none.size, nothing.size, before.size, after.size) == (0, 0, 1, 2)
  assert list(channel_index(x.axes[1], find(after))) == [-1, -1, -1, -1, 0, 1]


def test_slices_one_after_another_divide_further():
  (x,), (a, b), _ = run(lambda x: (x[:4], x[2:5]), (6,))
  assert sizes(x.axes[0]) == [2, 2, 1, 1] and is_free(x.axes[0])
  assert sizes(a.axes[0]) == [2, 2] and sizes(b.axes[0]) == [2, 1]
  shared = next(atoms(b.axes[0]))
  assert list(channel_index(a.axes[0], shared)) == [-1, -1, 0, 1]


def test_slices_of_an_axis_that_repeats_channels():
  """Of [y, y] with six channels each the first eight entries: y is cut at 2, and so are both of its copies."""
  (y,), (x,), _ = run(lambda y: jnp.concatenate([y, y])[:8], (6,))
  assert sizes(y.axes[0]) == [2, 4] and is_free(y.axes[0])
  first, rest = atoms(y.axes[0])
  assert list(channel_index(x.axes[0], first)) == [0, 1, -1, -1, -1, -1, 0, 1]
  assert list(channel_index(x.axes[0], rest)) == [-1, -1, 0, 1, 2, 3, -1, -1]


def test_products_are_cut_along_their_major_factor_again_and_again():
  def function(x, y):  # [8], [2] -> [8 * 2]
    z = (x[:, None] * y).reshape(16)
    return z[:8], z[4:12], z[6:]

  (x, y), (a, b, c), _ = run(function, (8,), (2,))
  assert sizes(x.axes[0]) == [2, 1, 1, 2, 2] and is_free(x.axes[0]) and is_free(y.axes[0])
  minor = find(y.axes[0])
  for piece, size in ((a, 8), (b, 8), (c, 10)):
    assert list(channel_index(piece.axes[0], minor)) == [0, 1] * (size // 2)


def test_a_slice_across_the_channels_of_a_product_fixes_both():
  (x,), (y,), _ = run(lambda x: x.reshape(6)[:3], (3, 2))
  assert not is_free(x.axes[0]) and not is_free(x.axes[1]) and not is_free(y.axes[0])


def test_shifts_of_an_axis_against_itself_leave_single_channels():
  """Channel c is tied to c + 1: as many atoms as channels, which takes neither deep recursion nor long."""
  (x,), _, _ = run(lambda x: x[1:] * x[:-1], (300,))
  assert set(sizes(x.axes[0])) == {1}


@pytest.mark.parametrize("function", [lambda x: x[::2], lambda x: jax.lax.dynamic_slice(x, (jnp.argmax(x),), (3,))])
def test_strides_and_computed_bounds_fix(function):
  (x,), (y,), _ = run(function, (6,))
  assert not is_free(x.axes[0]) and not is_free(y.axes[0])


def test_a_padded_axis_has_new_channels_of_zeros():
  (x,), (y,), interpreter = run(lambda x: jnp.pad(x, ((0, 0), (1, 2))), (3, 4))
  assert sizes(y.axes[1]) == [1, 4, 2] and is_free(y.axes[1])
  assert list(channel_index(y.axes[1], x.axes[1])) == [-1, 0, 1, 2, 3, -1, -1]
  (((none, nothing), (before, after)),) = interpreter.margins.values()
  assert (none.size, nothing.size, before.size, after.size) == (0, 0, 1, 2)
  assert y.axes[1].parts == (before, x.axes[1], after)


@pytest.mark.parametrize(
  "function",
  [
    lambda x: jnp.pad(x, 1, constant_values=2),
    lambda x: jnp.pad(x, 1, constant_values=x.max()),
    lambda x: jax.lax.pad(x, 0.0, ((0, 0, 1),)),
    lambda x: jax.lax.pad(x, 0.0, ((-1, 2, 0),)),
  ],
  ids=["constant", "computed", "interior", "negative"],
)
def test_other_paddings_fix(function):
  (x,), (y,), _ = run(function, (6,))
  assert all(atom.fixed for atom in (*atoms(x.axes[0]), *atoms(y.axes[0])))


def test_pieces_of_what_is_fixed_stay_whole():
  """Space and time are fixed at the input, and are not divided into single rows."""
  x = Value((Axis(6, fixed="space"),))
  jaxpr = jax.make_jaxpr(lambda x: (x[1:] * x[:-1], jnp.pad(x, 1), jnp.split(x, 2)[0]))(np.zeros(6, np.float32))
  for value in AxisInterpreter().run(jaxpr.jaxpr, [x]):
    assert value.axes[0].kind is None and value.axes[0].fixed
  assert x.axes[0].kind is None and x.axes[0].fixed == "space"


def test_masks_of_dropout_are_narrower_in_training_alone():
  def function(x):
    return nn.Dropout(0.5, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(0)})

  for training in (False, True):
    (x,), (y,), _ = run(function, (2, 6), interpreter=AxisInterpreter(training=training))
    assert find(x.axes[1]) is find(y.axes[1])
    assert is_free(x.axes[1]) == training


def test_the_streams_of_padding_shortcuts_are_groups():
  analysis = analysis_of(models.create("resnet8", width_multiplier=0.25), (1, 8, 8, 3))
  groups = {group.name: group for _, group in analysis.groups}
  joined = {name: group.size for name, group in groups.items() if group.joined}
  # Four channels, four more around them, and eight around these.
  assert joined == {
    "conv": 4,
    "stage2_block1/conv2": 2,
    "stage2_block1/conv2:2": 2,
    "stage3_block1/conv2": 4,
    "stage3_block1/conv2:2": 4,
  }
  (last,) = (m for m in groups["conv"].members if m.path == ("fc", "kernel"))
  assert list(last.channels) == [-1] * 6 + [0, 1, 2, 3] + [-1] * 6


def test_fused_query_key_and_value():
  """Queries and keys stay, as their product is no kernel; the values can lose channels, alike in each head."""

  class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(7, name="embed")(x)
      q, k, v = (y.reshape((*y.shape[:2], 2, 3)) for y in jnp.split(nn.Dense(18, name="qkv")(x), 3, -1))
      scores = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
      y = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape((*x.shape[:2], 6))
      return nn.Dense(2, name="out")(y)

  analysis = analysis_of(Attention(), (1, 5, 4))
  axis = analysis.axes[("params", "qkv", "kernel")][1]
  heads, depth, _, depth_again, _, values = atoms(axis)
  assert [atom.size for atom in (heads, depth, values)] == [2, 3, 3]
  assert depth is depth_again and "stored kernel" in depth.fixed
  assert list(channel_index(axis, values)) == [-1] * 12 + [0, 1, 2, 0, 1, 2]
  out = analysis.axes[("params", "out", "kernel")][0]
  assert list(channel_index(out, heads)) == [0, 0, 0, 1, 1, 1]
  assert list(channel_index(out, values)) == [0, 1, 2, 0, 1, 2]
  assert [(group.name, group.size) for _, group in analysis.groups] == [("embed", 7), ("qkv", 2), ("qkv:2", 3)]


def test_gates_of_a_recurrent_cell():
  class Cell(nn.Module):
    @nn.compact
    def __call__(self, x):
      recurrent = nn.Dense(12, use_bias=False, name="recurrent")
      inputs = nn.Dense(12, name="inputs")(x)
      h = c = nn.Dense(3, name="start")(x[:, 0])
      for t in range(1, 3):
        i, f, g, o = jnp.split(inputs[:, t] + recurrent(h), 4, -1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
      return nn.Dense(2, name="fc")(h)

  analysis = analysis_of(Cell(), (1, 5, 4))
  ((_, group),) = analysis.groups
  assert (group.name, group.size) == ("inputs", 3)
  found = {(m.path[0], m.axis): (m.role, list(m.channels)) for m in group.members if m.ndim == 2}
  assert found == {
    ("inputs", 1): ("out", [0, 1, 2] * 4),
    ("start", 1): ("out", [0, 1, 2]),
    ("recurrent", 0): ("in", [0, 1, 2]),
    ("recurrent", 1): ("out", [0, 1, 2] * 4),
    ("fc", 0): ("in", [0, 1, 2]),
  }


def test_group_normalization_keeps_or_loses_whole_groups():
  analysis = analysis_of(networks.Normalized(lambda: nn.GroupNorm(4)), (1, 4, 4, 3))
  groups = {group.name: group for _, group in analysis.groups}
  assert groups["normalized"].size == 4
  (kernel,) = (m for m in groups["normalized"].members if m.path == ("normalized", "kernel"))
  assert list(kernel.channels) == [0, 0, 1, 1, 2, 2, 3, 3]
  whole, within = reasons_of(analysis, "normalized", "kernel")
  assert whole is None and "reduce_sum" in within


@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.RMSNorm])
def test_normalization_over_all_channels_fixes_them(layer):
  analysis = analysis_of(networks.Normalized(layer), (1, 4, 4, 3))
  assert all("reduce_sum" in reason for reason in reasons_of(analysis, "normalized", "kernel"))
  assert "free" in {group.name for _, group in analysis.groups}


class StandardizedConv(nn.Module):
  """Weight standardization: the kernel of each output channel has mean 0 and variance 1."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], 5))
    kernel = (kernel - kernel.mean((0, 1, 2))) / kernel.std((0, 1, 2))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


READERS = {
  "weight norm": lambda x: nn.WeightNorm(nn.Conv(5, (3, 3)))(x),
  "spectral norm": lambda x: nn.SpectralNorm(nn.Conv(5, (3, 3)))(x, update_stats=False),
  "weight standardization": lambda x: StandardizedConv()(x),
}


class Reader(nn.Module):
  """A layer that reads the channels of `before` with a kernel that it normalizes as a whole."""

  reader: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), name="before")(x))
    return nn.Dense(2, name="fc")(nn.relu(self.reader(x)).mean((1, 2)))


@pytest.mark.parametrize("name", READERS)
def test_kernels_that_are_normalized_as_a_whole_fix_what_they_read(name):
  analysis = analysis_of(Reader(READERS[name]), (1, 4, 4, 3))
  assert all("reduce_sum" in reason for reason in reasons_of(analysis, "before", "kernel"))
