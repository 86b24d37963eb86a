"""The law for the package's own networks: masked = pruned, for the paper's choice of groups and for all exact ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_masked_is_pruned, random_masks, random_variables

from sapr_jax import models
from sapr_jax.channels import trace_channels
from sapr_jax.channels.graph import SELECTIONS

NETWORKS = {
  "basic": lambda: models.ResNet((1, 2), bottleneck=False, num_classes=3, width_multiplier=1 / 16),
  "bottleneck": lambda: models.ResNet((2, 1), bottleneck=True, num_classes=3, width_multiplier=1 / 16),
  "mobilenetv2": lambda: models.create("mobilenetv2", num_classes=3, width_multiplier=0.2),
  "mobilenetv2_cifar": lambda: models.create("mobilenetv2_cifar", num_classes=3, width_multiplier=0.2),
}
EXACT_ONLY = {
  # The streams (one a stage), the stem where it is not the first of them, the head.
  "basic": {"conv", "stage2_block1/conv2"},
  "bottleneck": {"conv", "stage1_block1/conv3", "stage2_block1/conv3"},
  "mobilenetv2": {"conv", *(f"stage{s}_block1/project" for s in range(2, 8)), "head"},
}


@pytest.mark.parametrize("select", ["blocks", "exact"])
@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.slow if "mobilenet" in name else ()) for name in NETWORKS]
)
def test_masked_is_pruned(name, select):
  model, shape = NETWORKS[name](), (1, 24, 20, 3)
  with jax.enable_x64(True):
    variables = random_variables(model.clone(dtype=np.float64), 7, shape=shape)
    graph = trace_channels(model.clone(dtype=np.float64), variables, shape, select=select, input_dtype=np.float64)
    # Single channels in the streams too would leave hardly any network.
    for seed in (0, 1) if select == "blocks" and "mobilenet" not in name else (0,):
      masks = random_masks(graph, seed, single=seed == 1)
      # Logits are cast to float32.
      check_masked_is_pruned(model.clone(dtype=np.float64), graph, variables, masks, 1e-6)


@pytest.mark.parametrize("name", EXACT_ONLY)
def test_what_exact_adds_to_the_choice_of_the_paper(name):
  model, shape = NETWORKS[name](), (1, 24, 20, 3)
  variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
  graph = trace_channels(model, variables, shape, select="exact")
  assert {group.name for group in graph.groups if not SELECTIONS["blocks"](group)} == EXACT_ONLY[name]


@pytest.mark.slow
def test_streams_of_equal_widths_are_not_added():
  """Shortcuts are there by the nominal widths: streams that were cut to the same width get none."""
  model, shape = NETWORKS["mobilenetv2"](), (1, 24, 20, 3)
  with jax.enable_x64(True):
    model = model.clone(dtype=np.float64)
    variables = random_variables(model, 4, shape=shape)
    graph = trace_channels(model, variables, shape, select="exact", input_dtype=np.float64)
    masks = graph.full_masks()
    for stage, width in ((4, 12), (5, 12), (6, 24), (7, 24)):  # stages 5 and 7 begin at stride 1
      masks[f"stage{stage}_block1/project"][width:] = 0
    check_masked_is_pruned(model, graph, variables, masks, 1e-6)
