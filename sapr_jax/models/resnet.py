"""Residual networks for CIFAR: He et al., CVPR 2016, section 4.2."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# He et al., ICCV 2015, as in torchvision.
_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BasicBlock(nn.Module):
  """Two 3x3 convolutions with a shortcut that has no parameters (option A).

  Attributes:
    features: Output channels.
    stride: Stride of the first convolution. Where it is not 1 the shortcut is subsampled and padded with zeros.
    dtype: Dtype of the computation; parameters are float32.
  """

  features: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    conv = functools.partial(
      nn.Conv, self.features, (3, 3), padding=1, use_bias=False, dtype=self.dtype, kernel_init=_kernel_init
    )
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)
    y = conv(strides=self.stride, name="conv1")(x)
    y = nn.relu(norm(name="bn1")(y))
    y = conv(name="conv2")(y)
    y = norm(name="bn2")(y)
    if self.stride != 1 or x.shape[-1] != self.features:
      missing = self.features - x.shape[-1]
      x = x[:, :: self.stride, :: self.stride]
      x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
    return nn.relu(x + y)


class CifarResNet(nn.Module):
  """ResNet for small images: three stages of basic blocks at full, half and quarter resolution.

  Attributes:
    depth: 6 n + 2 for n blocks in a stage: 20, 32, 44, 56, 110; 8 and 14 are good for trying things out.
    num_classes: Number of logits.
    width: Channels of the first stage; the others have two and four times as many.
    dtype: Dtype of the computation; parameters are float32.
  """

  depth: int
  num_classes: int = 10
  width: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[batch, height, width, channels]` to float32 logits `[batch, num_classes]`."""
    blocks, remainder = divmod(self.depth - 2, 6)
    if remainder or blocks < 1:
      raise ValueError(f"A CIFAR ResNet has depth 6 n + 2 (20, 32, 44, 56, 110); got {self.depth}.")
    x = x.astype(self.dtype)
    x = nn.Conv(self.width, (3, 3), padding=1, use_bias=False, dtype=self.dtype, kernel_init=_kernel_init, name="conv")(
      x
    )
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name="bn")(x)
    x = nn.relu(x)
    for stage in range(3):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        x = BasicBlock(self.width * 2**stage, stride, self.dtype, name=f"stage{stage + 1}_block{block + 1}")(x, train)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x).astype(jnp.float32)
