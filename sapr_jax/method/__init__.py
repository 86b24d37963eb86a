"""The paper's method, and importances without learning: scores, costs, budgets, partial regularization.

Knows `channels`, nothing of data or devices.
"""

from sapr_jax.method.budget import (
  Budget,
  amount_in_words,
  budget_penalty,
  check_budget,
  macs_budget,
  make_budget,
  params_budget,
  project_to_budget,
)
from sapr_jax.method.channel_norms import channel_norms
from sapr_jax.method.compensation import compensate, with_moments
from sapr_jax.method.cost import COSTS, Cost, cost_of, measured_costs
from sapr_jax.method.generator import (
  ArchitectureGenerator,
  keep_probability,
  most_likely_masks,
  sample_masks,
  split_by_group,
)
from sapr_jax.method.importance import (
  COMPARISONS,
  IMPORTANCES,
  Scores,
  batch_norm_scale,
  l1_norm,
  l2_norm,
  make_comparable,
  random as random_scores,
  rank_within_groups,
  relative_to_group_mean,
  score_channels,
  slopes,
  taylor,
)
from sapr_jax.method.latency import LatencyCost, LatencyTable, TimedLayer, latency_cost
from sapr_jax.method.masks_in_state import RegularizationState, get_masks, set_masks
from sapr_jax.method.prior import outputs_of_prior, reorder, start_from
from sapr_jax.method.progress import learned_share, overlap
from sapr_jax.method.proposing import GeneratorOptions, Search
from sapr_jax.method.pruner import Pruner, PrunerState
from sapr_jax.method.regularization import (
  Weighting,
  partial_group_lasso,
  prox_partial_group_lasso,
  relative_weights,
  share_weights,
)
from sapr_jax.method.rounding import default_round_to
from sapr_jax.method.search import GeneratorState, SearchMetrics, SearchOptions, architecture_loss, learn
from sapr_jax.method.statistics import renew_statistics
from sapr_jax.method.strength import gamma_for, shrinkage_of
from sapr_jax.method.transforms import regularize_by_penalty, regularize_by_prox

__all__ = [
  "COMPARISONS",
  "COSTS",
  "IMPORTANCES",
  "ArchitectureGenerator",
  "Budget",
  "Cost",
  "GeneratorOptions",
  "GeneratorState",
  "LatencyCost",
  "LatencyTable",
  "Pruner",
  "PrunerState",
  "RegularizationState",
  "Scores",
  "Search",
  "SearchMetrics",
  "SearchOptions",
  "TimedLayer",
  "Weighting",
  "amount_in_words",
  "architecture_loss",
  "batch_norm_scale",
  "budget_penalty",
  "channel_norms",
  "check_budget",
  "compensate",
  "cost_of",
  "default_round_to",
  "gamma_for",
  "get_masks",
  "keep_probability",
  "l1_norm",
  "l2_norm",
  "latency_cost",
  "learn",
  "learned_share",
  "macs_budget",
  "make_budget",
  "make_comparable",
  "measured_costs",
  "most_likely_masks",
  "outputs_of_prior",
  "overlap",
  "params_budget",
  "partial_group_lasso",
  "project_to_budget",
  "prox_partial_group_lasso",
  "random_scores",
  "rank_within_groups",
  "regularize_by_penalty",
  "regularize_by_prox",
  "relative_to_group_mean",
  "relative_weights",
  "renew_statistics",
  "reorder",
  "sample_masks",
  "score_channels",
  "set_masks",
  "share_weights",
  "shrinkage_of",
  "slopes",
  "split_by_group",
  "start_from",
  "taylor",
  "with_moments",
]
