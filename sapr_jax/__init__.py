"""Structured pruning for JAX and Flax: a convolutional network made truly smaller and faster.

    import sapr_jax as sapr

    graph = sapr.trace_channels(model, variables, input_shape=(1, 32, 32, 3))
    masks = {group.name: ... for group in graph.groups}
    small_model, small_variables = sapr.prune(model, variables, graph, masks)

The method is that of Gao et al., Structural Alignment for Network Pruning through Partial Regularization, ICCV 2023;
docs/method.md leads from its equations to the code.
"""

from sapr_jax import models
from sapr_jax.artifacts import export_torch, import_torch, load, save
from sapr_jax.channels import (
  ChannelGraph,
  ChannelGroup,
  NarrowModule,
  count_macs,
  mask_params,
  masked_apply,
  prune,
  prune_tree,
  register_rule,
  trace_channels,
)
from sapr_jax.errors import InputError, InterruptedRunError
from sapr_jax.method import (
  ArchitectureGenerator,
  add_partial_group_lasso,
  architecture_loss,
  macs_penalty,
  partial_group_lasso,
  partial_regularization,
  project_to_budget,
  prox_partial_group_lasso,
  sample_masks,
  split_by_group,
)
from sapr_jax.version import __version__

__all__ = [
  "ArchitectureGenerator",
  "ChannelGraph",
  "ChannelGroup",
  "InputError",
  "InterruptedRunError",
  "NarrowModule",
  "__version__",
  "add_partial_group_lasso",
  "architecture_loss",
  "count_macs",
  "export_torch",
  "import_torch",
  "load",
  "macs_penalty",
  "mask_params",
  "masked_apply",
  "models",
  "partial_group_lasso",
  "partial_regularization",
  "project_to_budget",
  "prox_partial_group_lasso",
  "prune",
  "prune_tree",
  "register_rule",
  "sample_masks",
  "save",
  "split_by_group",
  "trace_channels",
]
