"""Structured pruning for JAX and Flax: a convolutional network made truly smaller and faster.

    import sapr_jax as sapr

    graph = sapr.trace_channels(model, variables, input_shape=(1, 32, 32, 3))
    scores = sapr.relative_to_group_mean(sapr.l1_norm(variables["params"], graph))
    masks = sapr.project_to_budget(graph, scores, sapr.macs_budget(graph, 0.5))
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
from sapr_jax.errors import DivergedError, InputError, InterruptedRunError
from sapr_jax.method import (
  COSTS,
  IMPORTANCES,
  ArchitectureGenerator,
  Budget,
  Cost,
  SearchOptions,
  architecture_loss,
  batch_norm_scale,
  budget_penalty,
  check_budget,
  l1_norm,
  l2_norm,
  macs_budget,
  make_budget,
  params_budget,
  partial_group_lasso,
  project_to_budget,
  prox_partial_group_lasso,
  random_scores,
  rank_within_groups,
  regularize_by_penalty,
  regularize_by_prox,
  relative_to_group_mean,
  relative_weights,
  sample_masks,
  share_weights,
  split_by_group,
  taylor,
)
from sapr_jax.version import __version__

__all__ = [
  "COSTS",
  "IMPORTANCES",
  "ArchitectureGenerator",
  "Budget",
  "ChannelGraph",
  "ChannelGroup",
  "Cost",
  "DivergedError",
  "InputError",
  "InterruptedRunError",
  "NarrowModule",
  "SearchOptions",
  "__version__",
  "architecture_loss",
  "batch_norm_scale",
  "budget_penalty",
  "check_budget",
  "count_macs",
  "export_torch",
  "import_torch",
  "l1_norm",
  "l2_norm",
  "load",
  "macs_budget",
  "make_budget",
  "mask_params",
  "masked_apply",
  "models",
  "params_budget",
  "partial_group_lasso",
  "project_to_budget",
  "prox_partial_group_lasso",
  "prune",
  "prune_tree",
  "random_scores",
  "rank_within_groups",
  "register_rule",
  "regularize_by_penalty",
  "regularize_by_prox",
  "relative_to_group_mean",
  "relative_weights",
  "sample_masks",
  "save",
  "share_weights",
  "split_by_group",
  "taylor",
  "trace_channels",
]
