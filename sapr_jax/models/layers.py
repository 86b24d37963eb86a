"""Convolution and normalization as the networks of this package have them: those of torchvision."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax

BLOCK_LAYER = re.compile(r"stage(\d+)_block(\d+)/(\w+)")
"""Path of a layer inside a block: stage, block, layer."""


def traced_once(init: nn.initializers.Initializer) -> nn.initializers.Initializer:
  """Returns an initializer that is traced once for parameters of one shape: Flax traces it again in each `apply`."""
  return jax.jit(init, static_argnums=(1, 2))


_kernel_init = traced_once(nn.initializers.variance_scaling(2.0, "fan_out", "normal"))  # He et al., ICCV 2015


def convolution(features: int, size: int, *, dtype: Any, name: str, stride: int = 1, groups: int = 1) -> nn.Conv:
  """A convolution without bias, padded evenly on all sides as in PyTorch ("SAME" is uneven at stride 2)."""
  return nn.Conv(
    features,
    (size, size),
    strides=stride,
    padding=size // 2,
    feature_group_count=groups,
    use_bias=False,
    dtype=dtype,
    kernel_init=_kernel_init,
    name=name,
  )


def batch_norm(train: bool, *, dtype: Any, name: str) -> nn.BatchNorm:
  """Batch normalization with PyTorch's defaults; its momentum 0.1 is the share of the new statistics."""
  return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)
