"""The channel graph of networks worked by hand: members, roles, MACs, reasons and errors."""

from __future__ import annotations

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import laws
import networks
import numpy as np
import pytest

from sapr_jax import channels, models
from sapr_jax.channels import prune_tree, register_rule, trace_channels
from sapr_jax.channels.graph import check_masks, polynomial
from sapr_jax.channels.rules import RULES
from sapr_jax.errors import InputError


class TwoConvs(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(2, (3, 3), name="conv")(x)
    return nn.Dense(2, name="fc")(x.reshape((x.shape[0], -1)))


@pytest.fixture(scope="module")
def two_dense():
  model = networks.TwoDense()
  return trace_channels(model, laws.abstract_variables(model, (1, 3)), (1, 3), select="unjoined")


@pytest.fixture(scope="module")
def resnet():
  model = models.create("resnet8", width_multiplier=0.25)
  return trace_channels(model, laws.abstract_variables(model), laws.SHAPE)


def members(group):
  return [("/".join((m.collection, *m.path)), m.axis, m.role) for m in group.members]


def test_two_channels_by_hand(two_dense):
  (group,) = two_dense.groups
  assert (group.name, group.size, group.scope, group.joined) == ("up", 2, (), False)
  assert members(group) == [
    ("params/down/kernel", 0, "in"),
    ("params/up/bias", 0, "vector"),
    ("params/up/kernel", 1, "out"),
  ]
  assert all(member.is_whole_axis for member in group.members)
  assert two_dense.macs() == 3 * 2 + 2 * 1
  assert two_dense.macs({"up": np.array([0, 1])}) == 3 + 1
  assert two_dense.prunable_macs() == 8
  assert two_dense.explain() == "it is the network's output:\n  down"
  assert str(two_dense).splitlines() == [
    "1 channel groups, 8 MACs, 8 in layers that touch them",
    "group  channels  of MACs  joined  members",
    "up            2   100.0%  no      up out, down in",
  ]


def test_flattening_repeats_the_channels_of_each_pixel():
  model = TwoConvs()
  graph = trace_channels(model, laws.abstract_variables(model, (1, 2, 2, 1)), (1, 2, 2, 1), select="unjoined")
  (group,) = graph.groups
  member = next(m for m in group.members if m.path == ("fc", "kernel"))
  assert (member.axis, member.role) == (0, "in")
  assert list(member.channels) == [0, 1] * 4
  assert not member.is_whole_axis
  np.testing.assert_array_equal(member.along_axis(np.array([5.0, 7.0]), 1), [[5], [7]] * 4)
  # 4 positions of a 3x3 window over one channel, then 4 pixels of 2 channels times 2 logits.
  assert graph.macs() == 4 * 9 * 2 + 8 * 2
  assert graph.macs({"conv": np.array([1, 0])}) == 4 * 9 + 4 * 2


def test_a_concatenated_member_fills_what_is_not_its_own():
  model = networks.DenseLayer()
  graph = trace_channels(networks.DenseNet(), laws.abstract_variables(networks.DenseNet()), laws.SHAPE, select="exact")
  group = next(g for g in graph.groups if g.name == "dense0/conv2")
  scale = next(m for m in group.members if m.path == ("dense1", "bn1", "scale"))
  assert list(scale.channels) == [-1] * 5 + [0, 1, 2, 3]
  assert list(scale.along_axis(np.array([2.0, 3.0, 4.0, 5.0]), 1)) == [1] * 5 + [2, 3, 4, 5]
  assert list(scale.along_axis(jnp.array([2.0, 3.0, 4.0, 5.0]), 1)) == [1] * 5 + [2, 3, 4, 5]
  assert model.growth == group.size


def test_one_block_of_a_residual_network(resnet):
  group = resnet.groups[1]
  assert (group.name, group.size, group.scope) == ("stage2_block1/conv1", 8, ("stage2_block1",))
  assert group.is_block and not group.joined
  block = "stage2_block1"
  assert members(group) == [
    (f"batch_stats/{block}/bn1/mean", 0, "vector"),
    (f"batch_stats/{block}/bn1/var", 0, "vector"),
    (f"params/{block}/bn1/bias", 0, "vector"),
    (f"params/{block}/bn1/scale", 0, "vector"),
    (f"params/{block}/conv1/kernel", 3, "out"),
    (f"params/{block}/conv2/kernel", 2, "in"),
  ]
  assert str(group).splitlines()[0] == "stage2_block1/conv1: 8 channels"
  assert str(resnet).startswith("3 channel groups, ")
  found = resnet.members_by_variable("params")[(block, "conv2", "kernel")]
  assert [(name, member.axis) for name, member in found] == [(group.name, 2)]


def test_macs_of_one_channel_is_the_gradient(resnet):
  masks = {name: jnp.asarray(mask) for name, mask in laws.random_masks(resnet, 0).items()}
  gradient = jax.grad(lambda m: resnet.macs(m))({name: mask.astype(jnp.float32) for name, mask in masks.items()})
  for group in resnet.groups:
    for channel in range(group.size):
      high = {**masks, group.name: masks[group.name].at[channel].set(1)}
      low = {**masks, group.name: masks[group.name].at[channel].set(0)}
      assert float(gradient[group.name][channel]) == resnet.macs(high) - resnet.macs(low)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_])
def test_macs_are_the_same_inside_jit(resnet, dtype):
  masks = {name: mask.astype(dtype) for name, mask in laws.random_masks(resnet, 1).items()}
  want = resnet.macs(masks)
  assert isinstance(want, int)
  assert float(jax.jit(resnet.macs)(masks)) == want
  assert float(jax.jit(resnet.prunable_macs)(masks)) == resnet.prunable_macs(masks)


def test_macs_of_fractional_masks_are_the_same_inside_jit(resnet):
  masks = {name: np.full_like(mask, 0.25) for name, mask in resnet.full_masks().items()}
  np.testing.assert_allclose(resnet.macs(masks), jax.jit(resnet.macs)(masks), rtol=1e-6)
  assert resnet.macs(masks) < resnet.macs()


def test_large_networks_do_not_overflow_under_jit():
  huge = polynomial([(2_000_000, (0, 1))], 2)
  assert huge(np.array([512, 512])) == 2_000_000 * 512 * 512
  np.testing.assert_allclose(huge(jnp.array([512.0, 512.0])), 2e6 * 512**2, rtol=1e-6)


def test_equal_monomials_are_merged():
  merged = polynomial([(2, (0, 1)), (3, (1, 0)), (7, ())], 2)
  assert merged(np.array([10, 100])) == 5 * 1000 + 7
  assert len(merged.coefficients) == 2


def test_a_predicate_selects(resnet):
  model = models.create("resnet8", width_multiplier=0.25)
  graph = trace_channels(model, laws.abstract_variables(model), laws.SHAPE, select=lambda group: group.size > 4)
  assert [group.name for group in graph.groups] == [group.name for group in resnet.groups[1:]]
  assert graph.macs() == resnet.macs()
  assert graph.prunable_macs() < resnet.prunable_macs()


def test_what_a_choice_leaves_out_is_told():
  model = networks.ImageNetResNet()
  graph = trace_channels(model, laws.abstract_variables(model), laws.SHAPE)
  assert "it can be cut exactly, but select='blocks' leaves it out:\n  conv1" in graph.explain()


def test_variables_may_be_arrays_or_shapes(two_dense):
  model = networks.TwoDense()
  arrays = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), laws.abstract_variables(model, (1, 3)))
  graph = trace_channels(model, arrays, (16, 3), select="unjoined")
  assert graph.macs() == two_dense.macs()
  assert [members(group) for group in graph.groups] == [members(group) for group in two_dense.groups]


def test_macs_count_scans_repetitions_and_transposed_convolutions():
  scanned = networks.Scanned()
  graph = trace_channels(scanned, laws.abstract_variables(scanned), laws.SHAPE)
  body = 2 * 16 * 9 * 4 * 6
  assert graph.macs() == 16 * 9 * 3 * 4 + 3 * body + 4 * 3
  assert graph.prunable_macs() == 3 * body

  class Up(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(1)(nn.ConvTranspose(5, (2, 2), strides=(2, 2))(x))

  graph = trace_channels(Up(), laws.abstract_variables(Up()), laws.SHAPE, select="exact")
  # Each of 64 input pixels meets the 2x2 window; then 256 pixels.
  assert graph.macs() == 64 * 4 * 3 * 5 + 256 * 5


def test_macs_count_what_a_scan_makes_of_a_carry_of_zeros():
  model = networks.ScannedProduct()
  graph = trace_channels(model, laws.abstract_variables(model), laws.SHAPE, select="exact")
  assert graph.macs() == 64 * 9 * 3 * 4 + 8 * 4 * 5 + 8 * 5 * 5 + 5 * 3


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


def error_line(info):
  assert "\n" not in str(info.value)
  return str(info.value)


def test_an_unknown_choice():
  model = networks.TwoDense()
  with pytest.raises(
    InputError, match="select must be one of blocks, unjoined, exact, or a predicate, got 'all'"
  ) as info:
    trace_channels(model, laws.abstract_variables(model, (1, 3)), (1, 3), select="all")
  error_line(info)


def test_no_group_names_the_choice_that_finds_some():
  model = networks.Vgg()
  with pytest.raises(InputError, match="select='blocks' finds no channel group") as info:
    trace_channels(model, laws.abstract_variables(model), laws.SHAPE)
  assert "select='unjoined' would offer 3, 'exact' would offer 3" in error_line(info)
  assert "Fixed: fc1: it is the network's output." in str(info.value)


def test_masks_that_do_not_fit(resnet):
  masks = resnet.full_masks()
  first = resnet.groups[0].name
  with pytest.raises(InputError, match=f"masks misses the group '{first}'"):
    check_masks(resnet, {name: mask for name, mask in masks.items() if name != first})
  with pytest.raises(InputError, match="masks names an unknown group 'stem'"):
    check_masks(resnet, {**masks, "stem": np.ones(4)})
  with pytest.raises(InputError, match=rf"group '{first}' must have shape \(4,\), got \(5,\)"):
    check_masks(resnet, {**masks, first: np.ones(5)})
  with pytest.raises(InputError, match=f"group '{first}' must hold only 0"):
    check_masks(resnet, {**masks, first: np.full(4, 0.5)}, allow_empty=False)
  with pytest.raises(InputError, match=f"group '{first}' must hold only 0"):
    check_masks(resnet, {**masks, first: np.full(4, np.nan)}, allow_empty=False)
  with pytest.raises(InputError, match=f"group '{first}' drops all 4 channels") as info:
    check_masks(resnet, {**masks, first: np.zeros(4)}, allow_empty=False)
  error_line(info)


# ----------------------------------------------------------------------------------------------------------------------
# Rules of one's own
# ----------------------------------------------------------------------------------------------------------------------


def test_a_primitive_without_a_rule_fixes_until_one_is_registered(monkeypatch):
  model = networks.Between(lambda x: jnp.sort(x, axis=1))
  variables = laws.abstract_variables(model)
  before = trace_channels(model, variables, laws.SHAPE, select="exact")
  assert "conv1" not in before.full_masks()
  assert "it goes through `sort`, for which there is no rule:\n  conv1" in before.explain()

  monkeypatch.delitem(RULES, "sort", raising=False)  # so that it is restored
  try:

    @register_rule("sort")
    def sort(interpreter, eqn, operands):
      return [dataclasses.replace(operands[0], zeroed_by=frozenset())]

    graph = laws.check_laws(model, "exact", (0,))
    assert graph.full_masks()["conv1"].size == 8
  finally:
    RULES.pop("sort", None)
  assert "sort" not in RULES


class WithUnusedProduct(nn.Module):
  """Makes an axis that no variable has, by a product whose result goes nowhere."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (1, 1), name="first")(x))
    jnp.einsum("bhwi,j->bhwij", x, jnp.zeros(7))
    return nn.Conv(2, (1, 1), name="second")(x)


def test_an_axis_that_no_variable_has_is_no_group():
  model = WithUnusedProduct()
  graph = trace_channels(model, laws.abstract_variables(model), laws.SHAPE, select="exact")
  assert [group.name for group in graph.groups] == ["first"]


def test_parameters_of_a_sub_network_are_those_of_the_cut_tree(bottleneck):
  masks = {group.name: np.arange(group.size) % 3 > 0 for group in bottleneck.graph.groups}
  cut = prune_tree(bottleneck.params, bottleneck.graph, masks)
  assert bottleneck.graph.num_params(masks) == sum(leaf.size for leaf in jax.tree.leaves(cut))
  assert bottleneck.graph.num_params() == sum(leaf.size for leaf in jax.tree.leaves(bottleneck.params))


def test_only_the_front_ends_know_flax():
  files = pathlib.Path(channels.__file__).parent.glob("*.py")
  assert {file.name for file in files if "flax" in file.read_text()} == {
    "linen.py",
    "narrow_module.py",
    "networks.py",
    "nnx.py",
  }
