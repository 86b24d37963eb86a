"""Channels that must be cut together in a network, and the cutting. Knows nothing of training, data or the paper."""

from sapr_jax.channels.graph import ChannelGraph, ChannelGroup, Masks, Member, check_masks
from sapr_jax.channels.linen import NarrowModule, count_macs, masked_apply, prune, trace_channels
from sapr_jax.channels.rules import register_rule
from sapr_jax.channels.trees import map_members, mask_params, prune_tree

__all__ = [
  "ChannelGraph",
  "ChannelGroup",
  "Masks",
  "Member",
  "NarrowModule",
  "check_masks",
  "count_macs",
  "map_members",
  "mask_params",
  "masked_apply",
  "prune",
  "prune_tree",
  "register_rule",
  "trace_channels",
]
