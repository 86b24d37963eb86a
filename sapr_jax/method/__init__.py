"""The paper's method: generator, partial regularization, budget. Knows `channels`, nothing of data or devices."""

from sapr_jax.method.budget import check_budget, check_share, macs_penalty, project_to_budget
from sapr_jax.method.generator import (
  ArchitectureGenerator,
  keep_probability,
  most_likely_masks,
  sample_masks,
  split_by_group,
)
from sapr_jax.method.regularization import (
  PartialRegularizationState,
  add_partial_group_lasso,
  channel_norms,
  group_weights,
  partial_group_lasso,
  partial_regularization,
  prox_partial_group_lasso,
)
from sapr_jax.method.search import SearchMetrics, architecture_loss

__all__ = [
  "ArchitectureGenerator",
  "PartialRegularizationState",
  "SearchMetrics",
  "add_partial_group_lasso",
  "architecture_loss",
  "channel_norms",
  "check_budget",
  "check_share",
  "group_weights",
  "keep_probability",
  "macs_penalty",
  "most_likely_masks",
  "partial_group_lasso",
  "partial_regularization",
  "project_to_budget",
  "prox_partial_group_lasso",
  "sample_masks",
  "split_by_group",
]
