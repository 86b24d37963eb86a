"""A small vision transformer: Dosovitskiy et al., ICLR 2021, with the mean over patches in the place of a class token.

Reference: Beyer, Zhai, Kolesnikov, Better plain ViT baselines for ImageNet-1k, 2022.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sapr_jax.models.layers import traced_once
from sapr_jax.models.network import Network

_position_init = traced_once(nn.initializers.normal(0.02))


class EncoderBlock(nn.Module):
  """Self-attention and two dense layers, each after a layer normalization and around a shortcut.

  Attributes:
    num_heads: Number of attention heads.
    head_width: Width of the queries, keys and values of a head.
    hidden: Units between the dense layers.
    dropout: Share of the units that is dropped in training.
    dtype: Dtype of the computation; parameters are float32.
  """

  num_heads: int
  head_width: int
  hidden: int
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    width = x.shape[-1]
    attention = nn.MultiHeadDotProductAttention(
      self.num_heads, qkv_features=self.num_heads * self.head_width, dtype=self.dtype, name="attention"
    )
    x = x + attention(nn.LayerNorm(dtype=self.dtype, name="norm1")(x))
    y = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
    y = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="mlp1")(y))
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    return x + nn.Dense(width, dtype=self.dtype, name="mlp2")(y)


class VisionTransformer(Network):
  """Vision transformer for images of one size.

  Attributes:
    layers: Number of blocks.
    num_heads: Number of attention heads in each block.
    patch_size: Side of a patch, pixels.
    num_classes: Number of logits.
    width_multiplier: Streams have 96 channels, heads 24, and the dense layers between them 192, times this.
    dropout: See `EncoderBlock`.
    dtype: Dtype of the computation; parameters are float32.
    remat: Whether the backward pass computes the activations within a block again, to need less memory.
  """

  layers: int = 4
  num_heads: int = 4
  patch_size: int = 4
  num_classes: int = 10
  width_multiplier: float = 1.0
  dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[batch, height, width, channels]` to float32 logits `[batch, num_classes]`."""
    block_type: Any = nn.remat(EncoderBlock, static_argnums=(2,)) if self.remat else EncoderBlock
    width, head_width, hidden = (max(1, round(n * self.width_multiplier)) for n in (96, 24, 192))
    patch = (self.patch_size, self.patch_size)
    x = nn.Conv(width, patch, strides=patch, dtype=self.dtype, name="patches")(x.astype(self.dtype))
    x = x.reshape((x.shape[0], -1, width))
    position = self.param("position", _position_init, (1, x.shape[1], width))
    x = x + position.astype(self.dtype)
    for i in range(self.layers):
      x = block_type(self.num_heads, head_width, hidden, self.dropout, self.dtype, name=f"block{i + 1}")(x, train)
    x = jnp.mean(nn.LayerNorm(dtype=self.dtype, name="norm")(x), axis=1)
    return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x).astype(jnp.float32)
