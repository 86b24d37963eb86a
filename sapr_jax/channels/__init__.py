"""What must be cut together in a Flax network, and the cutting. Knows nothing of training, data or the paper."""

from sapr_jax.channels.graph import ChannelGraph, ChannelGroup, Masks, Member, check_masks
from sapr_jax.channels.masking import mask_params, masked_apply
from sapr_jax.channels.pruning import prune
from sapr_jax.channels.rules import register_rule
from sapr_jax.channels.surgery import NarrowModule, map_members, prune_tree
from sapr_jax.channels.trace import count_macs, trace_channels

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
