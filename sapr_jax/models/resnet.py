"""Residual networks: He et al., CVPR 2016. For CIFAR as in section 4.2, for ImageNet as in torchvision.

Widths come from the fields alone, never from the shape of an input, so that a network whose channels were cut is still
the same program.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sapr_jax.models.layers import BLOCK_LAYER, batch_norm, convolution
from sapr_jax.models.network import Network

_EXPANSION = 4


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut.

  Attributes:
    features: Output channels.
    stride: Stride of the first convolution and of the shortcut.
    shortcut: "identity"; "projection", a 1x1 convolution with batch normalization (option B); or "padding", which
      subsamples and adds channels of zeros, without parameters (option A).
    added: Channels of zeros that the padding adds.
    dtype: Dtype of the computation; parameters are float32.
  """

  features: int
  stride: int = 1
  shortcut: str = "identity"
  added: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    conv = functools.partial(convolution, dtype=self.dtype)
    norm = functools.partial(batch_norm, train, dtype=self.dtype)
    y = conv(self.features, 3, stride=self.stride, name="conv1")(x)
    y = nn.relu(norm(name="bn1")(y))
    y = conv(self.features, 3, name="conv2")(y)
    y = norm(name="bn2")(y)
    if self.shortcut == "projection":
      x = conv(self.features, 1, stride=self.stride, name="shortcut")(x)
      x = norm(name="bn_shortcut")(x)
    elif self.shortcut == "padding":
      # Indexing would be a gather where the number of images is a symbol, in an export.
      x = lax.slice(x, (0, 0, 0, 0), x.shape, (1, self.stride, self.stride, 1))
      x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (self.added // 2, self.added - self.added // 2)))
    return nn.relu(x + y)


class Bottleneck(nn.Module):
  """A 1x1 convolution that reduces, a 3x3 one, and a 1x1 one that expands by four, with a shortcut.

  Attributes:
    features: Channels of the first two convolutions; the block has four times as many outputs.
    stride: Stride of the 3x3 convolution (torchvision's form; He et al. have it on the first) and of the shortcut.
    shortcut: "identity" or "projection", see `BasicBlock`.
    dtype: Dtype of the computation; parameters are float32.
  """

  features: int
  stride: int = 1
  shortcut: str = "identity"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    conv = functools.partial(convolution, dtype=self.dtype)
    norm = functools.partial(batch_norm, train, dtype=self.dtype)
    y = conv(self.features, 1, name="conv1")(x)
    y = nn.relu(norm(name="bn1")(y))
    y = conv(self.features, 3, stride=self.stride, name="conv2")(y)
    y = nn.relu(norm(name="bn2")(y))
    y = conv(self.features * _EXPANSION, 1, name="conv3")(y)
    y = norm(name="bn3")(y)
    if self.shortcut == "projection":
      x = conv(self.features * _EXPANSION, 1, stride=self.stride, name="shortcut")(x)
      x = norm(name="bn_shortcut")(x)
    return nn.relu(x + y)


class CifarResNet(Network):
  """ResNet for small images: three stages of basic blocks at full, half and quarter resolution, option A shortcuts.

  Attributes:
    depth: 6 n + 2 for n blocks in a stage: 20, 32, 44, 56, 110; 8 and 14 are good for trying things out.
    num_classes: Number of logits.
    width_multiplier: The stages have 16, 32 and 64 channels times this.
    dtype: Dtype of the computation; parameters are float32.
    remat: Whether the backward pass computes the activations within a block again, to need less memory.
  """

  depth: int
  num_classes: int = 10
  width_multiplier: float = 1.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[batch, height, width, channels]` to float32 logits `[batch, num_classes]`."""
    blocks = (self.depth - 2) // 6
    widths = [_scaled(16 * 2**stage, self.width_multiplier) for stage in range(3)]
    block_type: Any = nn.remat(BasicBlock, static_argnums=(2,)) if self.remat else BasicBlock
    x = convolution(widths[0], 3, dtype=self.dtype, name="conv")(x.astype(self.dtype))
    x = nn.relu(batch_norm(train, dtype=self.dtype, name="bn")(x))
    for stage, features in enumerate(widths):
      for block in range(blocks):
        down: dict[str, Any] = {}
        if stage > 0 and block == 0:
          down = {"stride": 2, "shortcut": "padding", "added": features - widths[stage - 1]}
        x = block_type(features, dtype=self.dtype, name=f"stage{stage + 1}_block{block + 1}", **down)(x, train)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x).astype(jnp.float32)


class ResNet(Network):
  """ResNet for ImageNet in torchvision's form: 7x7 stem, max-pooling, four stages, projection shortcuts.

  Attributes:
    blocks: Number of blocks in each stage: (3, 4, 6, 3) for ResNet-34 and ResNet-50.
    bottleneck: Whether the blocks are bottlenecks (ResNet-50 and deeper) or pairs of 3x3 convolutions.
    num_classes: Number of logits.
    width_multiplier: The stages have 64, 128, 256 and 512 channels times this (bottlenecks expand them by four).
    dtype: Dtype of the computation; parameters are float32.
    remat: Whether the backward pass computes the activations within a block again, to need less memory.
  """

  blocks: Sequence[int]
  bottleneck: bool
  num_classes: int = 1000
  width_multiplier: float = 1.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[batch, height, width, channels]` to float32 logits `[batch, num_classes]`."""
    block_type: Any = Bottleneck if self.bottleneck else BasicBlock
    if self.remat:
      block_type = nn.remat(block_type, static_argnums=(2,))
    x = convolution(_scaled(64, self.width_multiplier), 7, stride=2, dtype=self.dtype, name="conv")(
      x.astype(self.dtype)
    )
    x = nn.relu(batch_norm(train, dtype=self.dtype, name="bn")(x))
    x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.blocks):
      for block in range(blocks):
        first = block == 0 and (stage > 0 or self.bottleneck)
        x = block_type(
          _scaled(64 * 2**stage, self.width_multiplier),
          stride=2 if block == 0 and stage > 0 else 1,
          shortcut="projection" if first else "identity",
          dtype=self.dtype,
          name=f"stage{stage + 1}_block{block + 1}",
        )(x, train)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x).astype(jnp.float32)


def _scaled(features: int, multiplier: float) -> int:
  return max(1, round(features * multiplier))


def torch_names(paths: Iterable[str]) -> dict[str, str]:
  """Returns path of a layer -> its name in torchvision."""
  stem = {"conv": "conv1", "bn": "bn1", "fc": "fc"}
  inner = {"shortcut": "downsample.0", "bn_shortcut": "downsample.1"}
  names = {}
  for path in paths:
    if match := BLOCK_LAYER.fullmatch(path):
      stage, block, layer = match.groups()
      names[path] = f"layer{stage}.{int(block) - 1}.{inner.get(layer, layer)}"
    else:
      names[path] = stem[path]
  return names
