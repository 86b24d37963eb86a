"""The CIFAR ResNets: sizes by formula, and the groups that the paper prunes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapr_jax import models
from sapr_jax.channels import count_macs, trace_channels
from sapr_jax.errors import InputError

SHAPE = (1, 32, 32, 3)


def abstract_variables(model, shape=SHAPE):
  return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def macs_by_formula(blocks):
  """Returns (all, in the blocks): each 3x3 convolution has pixels * 9 * in * out."""
  inside = 0
  for stage, width in enumerate((16, 32, 64)):
    pixels = (32 >> stage) ** 2
    first = width if stage == 0 else width // 2
    inside += pixels * 9 * width * (first + (2 * blocks - 1) * width)
  return 32 * 32 * 9 * 3 * 16 + inside + 64 * 10, inside


def parameters_by_formula(blocks):
  kernels = 9 * 3 * 16 + 64 * 10 + 10
  norms = 2 * 16
  for stage, width in enumerate((16, 32, 64)):
    first = width if stage == 0 else width // 2
    kernels += 9 * width * (first + (2 * blocks - 1) * width)
    norms += 2 * blocks * 2 * width
  return kernels + norms


DEEP = ((32, 15), (44, 21), (56, 27), (110, 54))


@pytest.mark.parametrize(
  ("depth", "num_groups"), [(20, 9), *(pytest.param(*row, marks=pytest.mark.slow) for row in DEEP)]
)
def test_groups_macs_and_parameters(depth, num_groups):
  model = models.create(f"resnet{depth}")
  variables = abstract_variables(model)
  graph = trace_channels(model, variables, SHAPE)
  blocks = (depth - 2) // 6
  assert (graph.macs(), graph.prunable_macs()) == macs_by_formula(blocks)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters_by_formula(blocks)
  names = [f"stage{s}_block{b}/conv1" for s in (1, 2, 3) for b in range(1, blocks + 1)]
  assert [group.name for group in graph.groups] == names
  assert len(names) == num_groups
  assert [group.size for group in graph.groups] == [width for width in (16, 32, 64) for _ in range(blocks)]
  assert all(group.is_block and not group.joined for group in graph.groups)


def test_resnet56_has_the_figures_of_the_paper():
  model = models.create("resnet56")
  variables = abstract_variables(model)
  graph = trace_channels(model, variables, SHAPE)
  assert graph.macs() == count_macs(model, variables, SHAPE) == 125_485_696
  assert graph.prunable_macs() == 125_042_688
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 853_018


def test_the_residual_stream_is_made_of_pieces_by_the_padded_shortcut():
  model = models.create("resnet8")
  graph = trace_channels(model, abstract_variables(model), SHAPE, select="exact")
  blocks = {f"stage{s}_block1/conv1": 8 * 2**s for s in (1, 2, 3)}
  # Stage 2 has the 16 channels of stage 1 between 8 and 8 new ones, stage 3 these 32 between 16 and 16.
  stream = {f"stage{s}_block1/conv2{end}": 4 * 2 ** (s - 1) for s in (2, 3) for end in ("", ":2")}
  assert {group.name: group.size for group in graph.groups} == {**blocks, "conv": 16, **stream}
  assert {key[1:-1]: reason for key, _, reason in graph.fixed} == {("fc",): "it is the network's output"}


def test_logits_are_float32_whatever_the_dtype_of_the_computation():
  model = models.create("resnet8", width_multiplier=0.125, dtype=jnp.bfloat16)
  variables = abstract_variables(model)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
  logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((3, 8, 8, 3), jnp.float32))
  assert (logits.shape, logits.dtype) == ((3, 10), np.dtype(np.float32))


def test_training_mode_updates_the_statistics():
  model = models.create("resnet8", width_multiplier=0.125)
  variables = abstract_variables(model)
  images = jax.ShapeDtypeStruct((3, 8, 8, 3), jnp.float32)
  _, updates = jax.eval_shape(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images)
  assert jax.tree.map(jnp.shape, updates["batch_stats"]) == jax.tree.map(jnp.shape, variables["batch_stats"])


def test_unknown_names_fields_and_depths():
  with pytest.raises(InputError, match=r"'resnet57' is unknown; expected one of .*resnet56"):
    models.create("resnet57")
  with pytest.raises(InputError, match="'resnet56' does not take these fields"):
    models.create("resnet56", layers=3)
  with pytest.raises(InputError, match=r"depth of a CifarResNet must be 6 n \+ 2 .*, got 21\."):
    models.CifarResNet(depth=21)
