"""Channels that must be cut together in a network, and the cutting. Knows nothing of training, data or the paper."""

from sapr_jax.channels.call import Call, abstract_image, checked_kwargs, errors_of_model, is_array
from sapr_jax.channels.dense_program import are_cuts
from sapr_jax.channels.graph import SELECTIONS, ChannelGraph, ChannelGroup, Masks, Member, check_graph, check_masks
from sapr_jax.channels.linen import dense_features, evaluation_kwargs
from sapr_jax.channels.narrow_module import NarrowModule, check_module
from sapr_jax.channels.networks import (
  count_macs,
  evaluate,
  is_nnx,
  masked_apply,
  network_of,
  network_pieces,
  prune,
  reader_moments,
  trace_channels,
)
from sapr_jax.channels.pieces import Piece
from sapr_jax.channels.readers import Moments, kept_features, kept_weights
from sapr_jax.channels.rules import register_rule
from sapr_jax.channels.trees import check_params, check_variables, map_members, mask_params, prune_tree

__all__ = [
  "SELECTIONS",
  "Call",
  "ChannelGraph",
  "ChannelGroup",
  "Masks",
  "Member",
  "Moments",
  "NarrowModule",
  "Piece",
  "abstract_image",
  "are_cuts",
  "check_graph",
  "check_masks",
  "check_module",
  "check_params",
  "check_variables",
  "checked_kwargs",
  "count_macs",
  "dense_features",
  "errors_of_model",
  "evaluate",
  "evaluation_kwargs",
  "is_array",
  "is_nnx",
  "kept_features",
  "kept_weights",
  "map_members",
  "mask_params",
  "masked_apply",
  "network_of",
  "network_pieces",
  "prune",
  "prune_tree",
  "reader_moments",
  "register_rule",
  "trace_channels",
]
