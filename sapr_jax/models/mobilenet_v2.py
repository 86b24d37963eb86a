"""MobileNet-V2: Sandler et al., CVPR 2018, in torchvision's form, and its usual adaptation to 32x32 images."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sapr_jax.models.layers import BLOCK_LAYER, batch_norm, convolution, traced_once
from sapr_jax.models.network import Network

_dense_init = traced_once(nn.initializers.normal(0.01))  # as in torchvision

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels, blocks, stride of the first block) of each stage: Table 2 of the paper."""


class InvertedResidual(nn.Module):
  """A 1x1 convolution that expands, a depthwise 3x3 one, and a 1x1 one that projects without an activation.

  Attributes:
    inputs: Channels of its input. (Not read off the input, so that a cut network is still the same program.)
    features: Output channels.
    expansion: The depthwise convolution has this times `inputs` channels; at 1 the first convolution is left out.
    stride: Stride of the depthwise convolution; at 1, and with as many outputs as inputs, the input is added.
    dtype: Dtype of the computation; parameters are float32.
  """

  inputs: int
  features: int
  expansion: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    norm = functools.partial(batch_norm, train, dtype=self.dtype)
    hidden = self.inputs * self.expansion
    y = x
    if self.expansion != 1:
      y = convolution(hidden, 1, dtype=self.dtype, name="expand")(y)
      y = nn.relu6(norm(name="bn_expand")(y))
    y = convolution(hidden, 3, stride=self.stride, groups=hidden, dtype=self.dtype, name="depthwise")(y)
    y = nn.relu6(norm(name="bn_depthwise")(y))
    y = convolution(self.features, 1, dtype=self.dtype, name="project")(y)
    y = norm(name="bn_project")(y)
    return x + y if self.stride == 1 and self.inputs == self.features else y


class MobileNetV2(Network):
  """MobileNet-V2.

  Attributes:
    num_classes: Number of logits.
    width_multiplier: Times the channels, which are then rounded to multiples of 8; the last convolution has no less
      than 1280.
    small_images: For 32x32 images: stem and first down-sampling stage at stride 1, so that 4x4 pixels are left at the
      end as they would be of 128x128 ones.
    dropout: Rate of the dropout before the last layer; training then wants a key named "dropout".
    dtype: Dtype of the computation; parameters are float32.
    remat: Whether the backward pass computes the activations within a block again, to need less memory.
  """

  num_classes: int = 1000
  width_multiplier: float = 1.0
  small_images: bool = False
  dropout: float = 0.2
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[batch, height, width, channels]` to float32 logits `[batch, num_classes]`."""
    norm = functools.partial(batch_norm, train, dtype=self.dtype)
    inputs = _scaled(32, self.width_multiplier)
    stride = 1 if self.small_images else 2
    x = convolution(inputs, 3, stride=stride, dtype=self.dtype, name="conv")(x.astype(self.dtype))
    x = nn.relu6(norm(name="bn")(x))
    block_type: Any = nn.remat(InvertedResidual, static_argnums=(2,)) if self.remat else InvertedResidual
    for stage, (expansion, features, blocks, stage_stride) in enumerate(_STAGES):
      features = _scaled(features, self.width_multiplier)
      if self.small_images and stage == 1:
        stage_stride = 1
      for block in range(blocks):
        name = f"stage{stage + 1}_block{block + 1}"
        stride = stage_stride if block == 0 else 1
        x = block_type(inputs, features, expansion, stride, self.dtype, name=name)(x, train)
        inputs = features
    x = convolution(_scaled(1280, max(1.0, self.width_multiplier)), 1, dtype=self.dtype, name="head")(x)
    x = nn.relu6(norm(name="bn_head")(x))
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=_dense_init, name="fc")(x).astype(jnp.float32)


def _scaled(features: int, multiplier: float) -> int:
  """Rounds to a multiple of 8, and never down by more than a tenth (the authors' rule)."""
  target = features * multiplier
  rounded = max(8, int(target + 4) // 8 * 8)
  return rounded if rounded >= 0.9 * target else rounded + 8


def torch_names(paths: Iterable[str]) -> dict[str, str]:
  """Returns path of a layer -> its name in torchvision."""
  matches = [match for path in paths if (match := BLOCK_LAYER.fullmatch(path))]
  blocks = sorted({(int(stage), int(block)) for stage, block, _ in map(re.Match.groups, matches)})
  last = len(blocks) + 1
  names = {"conv": "features.0.0", "bn": "features.0.1", "fc": "classifier.1"}
  names |= {"head": f"features.{last}.0", "bn_head": f"features.{last}.1"}
  # Each convolution with an activation is one Sequential in torchvision; the first of three is left out at expansion 1.
  short = {"depthwise": "0.0", "bn_depthwise": "0.1", "project": "1", "bn_project": "2"}
  long = {"expand": "0.0", "bn_expand": "0.1", "depthwise": "1.0", "bn_depthwise": "1.1"}
  long |= {"project": "2", "bn_project": "3"}
  expanded = {match.group(1, 2) for match in matches if match.group(3) == "expand"}
  for match in matches:
    stage, block, layer = match.groups()
    index = blocks.index((int(stage), int(block))) + 1
    names[match.group()] = f"features.{index}.conv.{(long if (stage, block) in expanded else short)[layer]}"
  return names
