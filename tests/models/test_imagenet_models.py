"""The ImageNet networks: published sizes, groups, and what of them can be cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapr_jax import models
from sapr_jax.channels import trace_channels


def abstract_variables(model, shape):
  return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


# Parameters as published with torchvision; MACs of convolutions and dense layers at 224x224.
@pytest.mark.parametrize(
  ("name", "params", "macs", "prunable", "groups", "exact_groups"),
  [
    ("resnet18", 11_689_512, 1_814_073_344, 1_676_279_808, 8, 12),
    pytest.param("resnet34", 21_797_672, 3_663_761_408, 3_525_967_872, 16, 20, marks=pytest.mark.slow),
    pytest.param("resnet50", 25_557_032, 4_089_184_256, 3_609_460_736, 32, 37, marks=pytest.mark.slow),
    pytest.param("resnet101", 44_549_160, 7_801_405_440, 7_321_681_920, 66, 71, marks=pytest.mark.slow),
    ("mobilenetv2", 3_504_872, 300_774_272, 258_550_656, 16, 25),
  ],
)
def test_sizes_and_groups(name, params, macs, prunable, groups, exact_groups):
  model, shape = models.create(name), (1, 224, 224, 3)
  variables = abstract_variables(model, shape)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == params
  graph = trace_channels(model, variables, shape)
  assert (graph.macs(), graph.prunable_macs(), len(graph.groups)) == (macs, prunable, groups)
  # With the residual streams, the stem and the head, every convolution touches a group.
  exact = trace_channels(model, variables, shape, select="exact")
  assert (exact.prunable_macs(), len(exact.groups)) == (macs, exact_groups)


@pytest.mark.slow
def test_resnet152_has_the_published_number_of_parameters():
  variables = abstract_variables(models.create("resnet152"), (1, 64, 64, 3))
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 60_192_808


def test_mobilenet_for_small_images_keeps_the_resolution_longer():
  model = models.create("mobilenetv2_cifar")
  shape = (1, 32, 32, 3)
  variables = abstract_variables(model, shape)
  graph = trace_channels(model, variables, shape)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 2_236_682
  assert (graph.macs(), len(graph.groups)) == (87_976_448, 16)
  taps = lambda module, _: isinstance(module, models.InvertedResidual)  # noqa: E731
  run = lambda v, x: model.apply(v, x, capture_intermediates=taps)[1]["intermediates"]  # noqa: E731
  outputs = jax.eval_shape(run, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
  sizes = [outputs[f"stage{stage}_block1"]["__call__"][0].shape[1] for stage in range(1, 8)]
  assert sizes == [32, 32, 16, 8, 8, 4, 4]


def test_groups_lie_where_the_paper_has_them():
  shape = (1, 64, 64, 3)
  model = models.create("resnet50", width_multiplier=0.125)
  names = [group.name for group in trace_channels(model, abstract_variables(model, shape), shape).groups]
  assert names[:4] == [f"stage1_block{b}/conv{c}" for b in (1, 2) for c in (1, 2)]
  model = models.create("mobilenetv2", width_multiplier=0.25)
  groups = trace_channels(model, abstract_variables(model, shape), shape).groups
  assert [group.name for group in groups][:2] == ["stage2_block1/expand", "stage2_block2/expand"]
  # Expanding, depthwise and projecting kernel, two normalizations of scale, bias, mean and variance.
  assert len(groups[0].members) == 3 + 2 * 4


@pytest.mark.parametrize(("multiplier", "stem", "last"), [(0.25, 8, 80), (0.5, 16, 160), (1.4, 48, 448)])
def test_widths_of_mobilenet_are_multiples_of_eight(multiplier, stem, last):
  variables = abstract_variables(models.create("mobilenetv2", width_multiplier=multiplier), (1, 32, 32, 3))
  params = variables["params"]
  assert params["conv"]["kernel"].shape == (3, 3, 3, stem)
  assert params["stage7_block1"]["project"]["kernel"].shape[-1] == last
  assert params["head"]["kernel"].shape[-1] == max(1280, 1792 if multiplier == 1.4 else 0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2"])
def test_dtypes(name):
  model = models.create(name, width_multiplier=0.125, num_classes=4, dtype=jnp.bfloat16)
  variables = abstract_variables(model, (1, 32, 32, 3))
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
  images = jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32)
  apply = lambda v, x, key: model.apply(v, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})  # noqa: E731
  logits, updates = jax.eval_shape(apply, variables, images, jax.random.key(0))
  assert (logits.shape, logits.dtype) == ((3, 4), np.dtype(np.float32))
  assert jax.tree.map(jnp.shape, updates["batch_stats"]) == jax.tree.map(jnp.shape, variables["batch_stats"])
