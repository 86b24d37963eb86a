from . import (
  artifacts as artifacts,
  channels as channels,
  configs as configs,
  errors as errors,
  method as method,
  models as models,
  version as version,
)
from .artifacts import (
  ModelInfo as ModelInfo,
  export_torch as export_torch,
  import_torch as import_torch,
  load as load,
  load_info as load_info,
  model_card as model_card,
  save as save,
)
from .channels import (
  ChannelGraph as ChannelGraph,
  ChannelGroup as ChannelGroup,
  NarrowModule as NarrowModule,
  count_macs as count_macs,
  mask_params as mask_params,
  masked_apply as masked_apply,
  prune as prune,
  prune_tree as prune_tree,
  register_rule as register_rule,
  trace_channels as trace_channels,
)
from .data import Inputs as Inputs
from .errors import DivergedError as DivergedError, InputError as InputError, InterruptedRunError as InterruptedRunError
from .method import (
  COSTS as COSTS,
  IMPORTANCES as IMPORTANCES,
  ArchitectureGenerator as ArchitectureGenerator,
  Budget as Budget,
  Cost as Cost,
  SearchOptions as SearchOptions,
  architecture_loss as architecture_loss,
  batch_norm_scale as batch_norm_scale,
  budget_penalty as budget_penalty,
  check_budget as check_budget,
  l1_norm as l1_norm,
  l2_norm as l2_norm,
  macs_budget as macs_budget,
  make_budget as make_budget,
  params_budget as params_budget,
  partial_group_lasso as partial_group_lasso,
  project_to_budget as project_to_budget,
  prox_partial_group_lasso as prox_partial_group_lasso,
  random_scores as random_scores,
  rank_within_groups as rank_within_groups,
  regularize_by_penalty as regularize_by_penalty,
  regularize_by_prox as regularize_by_prox,
  relative_to_group_mean as relative_to_group_mean,
  relative_weights as relative_weights,
  sample_masks as sample_masks,
  share_weights as share_weights,
  split_by_group as split_by_group,
  taylor as taylor,
)
from .training import RunResult as RunResult, evaluate as evaluate, load_run as load_run, run as run
from .version import __version__ as __version__
