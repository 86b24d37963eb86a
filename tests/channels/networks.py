"""Networks that the package does not contain, in the forms in which people write them.

All are tiny. Many use smooth activations, so that a network of which one channel a layer is left still sees its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def norm(**kwargs: Any) -> nn.BatchNorm:
  return nn.BatchNorm(use_running_average=True, **kwargs)


class TwoDense(nn.Module):
  """The smallest network: `[n] -> 2 channels -> [1]`."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(1, use_bias=False, name="down")(nn.relu(nn.Dense(2, name="up")(x)))


class Vgg(nn.Module):
  """Plain convolutions, then flatten and two Dense layers."""

  @nn.compact
  def __call__(self, x):
    for i, features in enumerate((6, 4)):
      x = nn.elu(norm(name=f"bn{i}")(nn.Conv(features, (3, 3), name=f"conv{i}")(x)))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape((x.shape[0], -1))
    x = nn.elu(nn.Dense(5, name="fc0")(x))
    return nn.Dense(3, name="fc1")(x)


class SqueezeExciteBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.swish(norm(name="bn1")(nn.Conv(6, (3, 3), use_bias=False, name="conv1")(x)))
    s = jnp.mean(y, axis=(1, 2), keepdims=True)
    s = nn.relu(nn.Dense(4, name="reduce")(s))
    y = y * nn.sigmoid(nn.Dense(6, name="expand")(s))
    y = norm(name="bn2")(nn.Conv(x.shape[-1], (1, 1), use_bias=False, name="conv2")(y))
    return x + y


class SqueezeExcite(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
    for i in range(2):
      x = SqueezeExciteBlock(name=f"block{i}")(x)
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class DenseLayer(nn.Module):
  growth: int = 4

  @nn.compact
  def __call__(self, x):
    y = nn.Conv(6, (1, 1), use_bias=False, name="conv1")(nn.elu(norm(name="bn1")(x)))
    y = nn.Conv(self.growth, (3, 3), use_bias=False, name="conv2")(nn.elu(norm(name="bn2")(y)))
    return jnp.concatenate([x, y], axis=-1)


class DenseNet(nn.Module):
  """Concatenation -> BatchNorm -> ReLU -> convolution, with a transition that halves."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(5, (3, 3), use_bias=False, name="stem")(x)
    for i in range(2):
      x = DenseLayer(name=f"dense{i}")(x)
    x = nn.Conv(x.shape[-1] // 2, (1, 1), name="transition")(nn.elu(norm(name="bn")(x)))
    x = nn.avg_pool(x, (2, 2), (2, 2))
    x = DenseLayer(name="dense2")(x)
    return nn.Dense(3, name="fc")(jnp.mean(nn.elu(norm(name="bn_last")(x)), (1, 2)))


class MobileNetV1(nn.Module):
  """Depthwise-separable convolutions."""

  multiplier: int = 1

  @nn.compact
  def __call__(self, x):
    x = nn.elu(norm(name="bn")(nn.Conv(4, (3, 3), strides=2, use_bias=False, name="stem")(x)))
    for i, features in enumerate((6, 5)):
      width = x.shape[-1]
      x = nn.Conv(width * self.multiplier, (3, 3), feature_group_count=width, use_bias=False, name=f"depthwise{i}")(x)
      x = nn.elu(norm(name=f"bn_d{i}")(x))
      x = nn.elu(norm(name=f"bn_p{i}")(nn.Conv(features, (1, 1), use_bias=False, name=f"pointwise{i}")(x)))
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class InvertedResidual(nn.Module):
  features: int
  stride: int = 1
  expand: int = 2

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1] * self.expand
    y = x
    if self.expand != 1:
      y = nn.elu(norm(name="bn1")(nn.Conv(width, (1, 1), use_bias=False, name="conv1")(y)))
    y = nn.Conv(width, (3, 3), strides=self.stride, padding=1, feature_group_count=width, use_bias=False, name="conv2")(
      y
    )
    y = nn.elu(norm(name="bn2")(y))
    y = norm(name="bn3")(nn.Conv(self.features, (1, 1), use_bias=False, name="conv3")(y))
    return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV2(nn.Module):
  """(expansion, features, repetitions, stride) per stage, as in torchvision."""

  stages: Sequence[tuple[int, int, int, int]] = ((1, 3, 1, 1), (2, 4, 2, 2), (2, 5, 2, 1))

  @nn.compact
  def __call__(self, x):
    x = nn.elu(norm(name="bn")(nn.Conv(4, (3, 3), strides=2, padding=1, use_bias=False, name="stem")(x)))
    count = 0
    for expand, features, repetitions, stride in self.stages:
      for i in range(repetitions):
        x = InvertedResidual(features, stride if i == 0 else 1, expand, name=f"features{count}")(x)
        count += 1
    x = nn.elu(norm(name="bn_head")(nn.Conv(7, (1, 1), use_bias=False, name="head")(x)))
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class PlainBlock(nn.Module):
  features: int = 4

  @nn.compact
  def __call__(self, x):
    y = nn.relu(nn.Conv(6, (3, 3), name="conv1")(x))
    return x + nn.Conv(self.features, (3, 3), name="conv2")(y)


class Rematerialized(nn.Module):
  """Blocks under `nn.remat`, and one block that is called twice."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), strides=2, name="stem")(x)
    for i in range(2):
      x = nn.remat(PlainBlock)(name=f"block{i}")(x)
    shared = PlainBlock(name="shared")
    x = shared(nn.relu(shared(x)))
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class Bottleneck(nn.Module):
  features: int
  stride: int = 1
  project: bool = False

  @nn.compact
  def __call__(self, x):
    out = 2 * self.features
    y = nn.elu(norm(name="bn1")(nn.Conv(self.features, (1, 1), use_bias=False, name="conv1")(x)))
    y = nn.Conv(self.features, (3, 3), strides=self.stride, padding=1, use_bias=False, name="conv2")(y)
    y = nn.elu(norm(name="bn2")(y))
    y = norm(name="bn3")(nn.Conv(out, (1, 1), use_bias=False, name="conv3")(y))
    if self.project:
      x = nn.Conv(out, (1, 1), strides=self.stride, use_bias=False, name="downsample")(x)
      x = norm(name="bn_downsample")(x)
    return nn.elu(x + y)


class BasicBlock(nn.Module):
  features: int
  stride: int = 1
  project: bool = False

  @nn.compact
  def __call__(self, x):
    y = nn.Conv(self.features, (3, 3), strides=self.stride, padding=1, use_bias=False, name="conv1")(x)
    y = nn.elu(norm(name="bn1")(y))
    y = norm(name="bn2")(nn.Conv(self.features, (3, 3), padding=1, use_bias=False, name="conv2")(y))
    if self.project:
      x = nn.Conv(self.features, (1, 1), strides=self.stride, use_bias=False, name="downsample")(x)
      x = norm(name="bn_downsample")(x)
    return nn.elu(x + y)


class ImageNetResNet(nn.Module):
  """torchvision's ResNet: stem, max-pooling, stages of blocks with projection shortcuts."""

  block: Any = Bottleneck
  depths: Sequence[int] = (1, 2)
  width: int = 4

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.width, (7, 7), strides=2, padding=3, use_bias=False, name="conv1")(x)
    x = nn.elu(norm(name="bn1")(x))
    x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage, depth in enumerate(self.depths):
      for i in range(depth):
        stride = 2 if stage > 0 and i == 0 else 1
        project = i == 0 and (stage > 0 or self.block is Bottleneck)
        x = self.block(self.width * 2**stage, stride, project, name=f"layer{stage + 1}_{i}")(x)
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class ResNeXt(nn.Module):
  """Grouped convolutions inside bottlenecks."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
    for i in range(2):
      y = nn.relu(nn.Conv(8, (1, 1), name=f"reduce{i}")(x))
      y = nn.relu(norm(name=f"bn{i}")(nn.Conv(8, (3, 3), feature_group_count=2, name=f"grouped{i}")(y)))
      x = x + nn.Conv(4, (1, 1), name=f"restore{i}")(y)
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


def shuffle_channels(x, groups):
  *rest, channels = x.shape
  return x.reshape((*rest, groups, channels // groups)).swapaxes(-1, -2).reshape((*rest, channels))


class ShuffleNet(nn.Module):
  """Grouped pointwise convolution, channel shuffle, depthwise, grouped pointwise."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
    y = nn.relu(nn.Conv(8, (1, 1), feature_group_count=2, name="group1")(x))
    y = shuffle_channels(y, 2)
    y = norm(name="bn")(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(y))
    x = x + nn.Conv(8, (1, 1), feature_group_count=2, name="group2")(y)
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class ShuffledStream(nn.Module):
  """Channel shuffle between ordinary convolutions: the number of groups is in the code alone."""

  @nn.compact
  def __call__(self, x):
    x = nn.elu(nn.Conv(8, (3, 3), name="conv1")(x))
    x = nn.elu(nn.Conv(6, (3, 3), name="conv2")(shuffle_channels(x, 4)))
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class UNet(nn.Module):
  """Transposed convolutions and skip connections by concatenation; maps an image to an image."""

  transpose_kernel: bool = False

  @nn.compact
  def __call__(self, x):
    a = nn.elu(norm(name="bn0")(nn.Conv(4, (3, 3), name="enc0")(x)))
    b = nn.elu(nn.Conv(6, (3, 3), strides=2, name="enc1")(a))
    c = nn.elu(nn.Conv(5, (3, 3), strides=2, name="middle")(b))
    up = nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=self.transpose_kernel, name="up1")(c)
    d = nn.elu(nn.Conv(5, (3, 3), name="dec1")(jnp.concatenate([b, up], -1)))
    up = nn.ConvTranspose(3, (3, 3), strides=(2, 2), name="up0")(d)
    e = nn.elu(norm(name="bn1")(nn.Conv(4, (3, 3), name="dec0")(jnp.concatenate([up, a], -1))))
    return nn.Conv(2, (1, 1), name="out")(e)


class UpsamplingNet(nn.Module):
  """Upsampling by interpolation."""

  method: str = "bilinear"

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(5, (3, 3), strides=2, name="down")(x))
    x = jax.image.resize(x, (x.shape[0], 8, 8, x.shape[-1]), self.method)
    x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
    return nn.Conv(2, (1, 1), name="out")(x)


class ScanBody(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.relu(norm(name="bn")(nn.Conv(6, (3, 3), name="conv1")(x)))
    return x + nn.Conv(4, (3, 3), name="conv2")(y), None


class Scanned(nn.Module):
  """`nn.scan` over three blocks with stacked parameters."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), strides=2, name="stem")(x)
    blocks = nn.scan(ScanBody, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
    x, _ = blocks(name="blocks")(x, None)
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class Normalized(nn.Module):
  """Normalizations that mix channels."""

  layer: Callable[[], nn.Module] = nn.LayerNorm

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(8, (3, 3), name="free")(x))
    x = nn.relu(self.layer()(nn.Conv(8, (3, 3), name="normalized")(x)))
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class Inception(nn.Module):
  """Branches that are concatenated, normalized, and added to another concatenation cut elsewhere."""

  aligned: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.elu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
    branches = [nn.Conv(f, (k, k), name=f"branch{k}")(x) for f, k in ((4, 1), (3, 3), (5, 5))]
    branches.append(nn.Conv(2, (1, 1), name="pooled")(nn.max_pool(x, (3, 3), padding="SAME")))
    y = nn.elu(norm(name="bn")(jnp.concatenate(branches, -1)))
    others = ((4, "a"), (3, "b"), (7, "c")) if self.aligned else ((6, "a"), (8, "b"))
    y = y + jnp.concatenate([nn.Conv(f, (1, 1), name=f"other_{n}")(x) for f, n in others], -1)
    return nn.Dense(3, name="fc")(nn.elu(nn.Conv(4, (1, 1), name="last")(y)).mean((1, 2)))


class TransformerBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm(name="ln1")(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y, y)
    y = nn.Dense(7, name="mlp1")(nn.LayerNorm(name="ln2")(x))
    return x + nn.Dense(x.shape[-1], name="mlp2")(nn.gelu(y))


class ViT(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (4, 4), strides=(4, 4), padding="VALID", name="patches")(x)
    x = x.reshape((x.shape[0], -1, x.shape[-1]))
    token = self.param("token", nn.initializers.normal(), (1, 1, x.shape[-1]))
    x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1])), x], axis=1)
    x = x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))
    for i in range(2):
      x = TransformerBlock(name=f"block{i}")(x)
    return nn.Dense(3, name="fc")(nn.LayerNorm(name="ln")(x)[:, 0])


class PlainAttention(nn.Module):
  """Single-head attention from Dense layers: the value's channels can be cut, the query's and key's cannot."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (4, 4), strides=(4, 4), name="patches")(x)
    x = x.reshape((x.shape[0], -1, x.shape[-1]))
    q, k, v = nn.Dense(6, name="q")(x), nn.Dense(6, name="k")(x), nn.Dense(5, name="v")(x)
    scores = nn.softmax(q @ k.swapaxes(1, 2))
    return nn.Dense(3, name="out")(scores @ v).mean(1)


class GatedBlock(nn.Module):
  activation: Callable[[Any], Any] = nn.sigmoid

  @nn.compact
  def __call__(self, x):
    y = nn.Conv(6, (3, 3), name="value")(x) * self.activation(nn.Conv(6, (3, 3), name="gate")(x))
    return x + nn.Conv(x.shape[-1], (1, 1), name="project")(y)


class Gated(nn.Module):
  """Gated linear units, swish and the tanh approximation of gelu."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), strides=2, name="stem")(x)
    x = GatedBlock(name="glu")(x)
    x = GatedBlock(nn.swish, name="swiglu")(x)
    x = GatedBlock(lambda y: nn.gelu(y, approximate=True), name="geglu")(x)
    return nn.Dense(3, name="fc")(nn.hard_swish(nn.PReLU(name="prelu")(x)).mean((1, 2)))


class Wrapper(nn.Module):
  inner: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.inner(2 * x - 1)


class SetupBlock(nn.Module):
  features: int

  def setup(self):
    self.convs = [nn.Conv(self.features + 2, (3, 3)), nn.Conv(self.features, (3, 3))]
    self.bn = norm()

  def __call__(self, x):
    return x + self.convs[1](nn.relu(self.bn(self.convs[0](x))))


class SetupNet(nn.Module):
  """Sub-modules made in `setup`, in lists and dictionaries."""

  def setup(self):
    self.stem = nn.Conv(4, (3, 3), strides=2)
    self.blocks = [SetupBlock(4) for _ in range(2)]
    self.heads = {"a": nn.Dense(3), "b": nn.Dense(2)}

  def __call__(self, x):
    x = nn.relu(self.stem(x))
    for block in self.blocks:
      x = block(x)
    x = x.mean((1, 2))
    return {"a": self.heads["a"](x), "nested": [self.heads["b"](x), x.sum(-1)]}


class MyConv(nn.Module):
  """A layer of the user's own: a pointwise convolution with a learnt gain."""

  features: int
  gain: bool = False
  standardize: bool = False

  @nn.compact
  def __call__(self, x):
    kernel = self.param("weights", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
    if self.standardize:
      kernel = (kernel - kernel.mean(0)) / (kernel.std(0) + 1e-5)
    if self.gain:
      kernel = self.param("gain", nn.initializers.ones, (self.features,)) * kernel
    return jnp.einsum("bhwi,io->bhwo", x, kernel)


class OwnLayers(nn.Module):
  gain: bool = False
  standardize: bool = False

  @nn.compact
  def __call__(self, x):
    for i, features in enumerate((5, 6, 4)):
      x = nn.elu(MyConv(features, self.gain, self.standardize, name=f"mine{i}")(x))
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class NormScaledConv(nn.Module):
  """Convolution whose kernel is divided by a stored scalar (spectral normalization in evaluation mode)."""

  features: int

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features))
    sigma = self.variable("batch_stats", "sigma", jnp.ones, ())
    kernel = kernel / sigma.value
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class SpectralNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    for i, features in enumerate((5, 6)):
      x = nn.relu(NormScaledConv(features, name=f"conv{i}")(x))
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class TiedAutoencoder(nn.Module):
  """Decodes with the transposed kernel of the encoder."""

  @nn.compact
  def __call__(self, x):
    x = nn.elu(nn.Conv(4, (3, 3), strides=2, name="stem")(x)).mean((1, 2))
    encoder = nn.Dense(6, use_bias=False, name="encoder")
    hidden = nn.elu(encoder(x))
    kernel = encoder.variables["params"]["kernel"]
    return nn.Dense(3, name="fc")(hidden) + nn.Dense(3, name="fc2")(nn.elu(hidden @ kernel.T))


class PlainMlp(nn.Module):
  """Rows of pixels through einsum, DenseGeneral and Dense layers."""

  @nn.compact
  def __call__(self, x):
    x = nn.elu(nn.Conv(4, (3, 3), strides=2, name="conv")(x))
    b, h, w, c = x.shape
    x = nn.elu(nn.Dense(5, name="tokens")(x.reshape((b, h * w, c))))
    x = nn.elu(nn.DenseGeneral(6, axis=(-2, -1), name="general")(x))
    x = nn.elu(nn.Einsum((6, 4), "bc,cd->bd", name="einsum")(x))
    return nn.Dense(3, name="fc")(x)


class Outer(nn.Module):
  """Bilinear pooling: the outer product of the channels with themselves."""

  @nn.compact
  def __call__(self, x):
    x = nn.elu(nn.Conv(5, (3, 3), name="conv1")(x))
    x = nn.elu(nn.Conv(4, (3, 3), name="conv2")(x)).mean((1, 2))
    return nn.Dense(3, name="fc")((x[:, :, None] * x[:, None, :]).reshape((x.shape[0], -1)))


class DtypeNet(nn.Module):
  """Computes in `dtype` on float32 parameters."""

  dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, x):
    for i, features in enumerate((6, 5)):
      x = nn.Conv(features, (3, 3), dtype=self.dtype, name=f"conv{i}")(x)
      x = nn.elu(norm(dtype=self.dtype, name=f"bn{i}")(x))
    return nn.Dense(3, dtype=self.dtype, name="fc")(x.mean((1, 2))).astype(jnp.float32)


class Between(nn.Module):
  """Two convolutions with a function of the feature map between them."""

  function: Callable[[Any], Any]
  features: int = 8

  @nn.compact
  def __call__(self, x):
    x = nn.leaky_relu(nn.Conv(5, (3, 3), name="conv0")(x))
    x = nn.Conv(self.features, (3, 3), name="conv1")(x)
    x = self.function(x)
    x = nn.leaky_relu(nn.Conv(4, (1, 1), name="conv2")(x))
    return nn.Dense(3, name="fc")(x.mean((1, 2)))


class TwoKernels(nn.Module):
  """A layer of the user's own with two kernels of one width."""

  features: int

  @nn.compact
  def __call__(self, x):
    shape = (x.shape[-1], self.features)
    value, other = (self.param(name, nn.initializers.lecun_normal(), shape) for name in ("value", "other"))
    return (x @ value) * nn.sigmoid(x @ other)


class Barrier(nn.Module):
  """Two feature maps of equal size behind one optimization barrier: they have nothing to do with each other."""

  @nn.compact
  def __call__(self, x):
    a = nn.elu(nn.Conv(4, (3, 3), name="a")(x))
    b = nn.elu(nn.Conv(4, (3, 3), name="b")(x))
    a, b = jax.lax.optimization_barrier((a, b))
    return nn.Dense(3, name="fc_a")(a.mean((1, 2))) + nn.Dense(3, name="fc_b")(b.mean((1, 2)))


class StoredElsewhere(nn.Module):
  """A kernel times a mask that is kept beside the parameters, and a kernel that is no parameter at all."""

  @nn.compact
  def __call__(self, x):
    x = nn.elu(nn.Conv(5, (3, 3), name="first")(x))
    mask = self.variable("masks", "mask", jnp.ones, (3, 3, 5, 4))
    x = nn.elu(nn.Conv(4, (3, 3), mask=mask.value, name="masked")(x))
    x = nn.elu(nn.Conv(6, (1, 1), name="before_frozen")(x))
    frozen = self.variable("frozen", "kernel", jnp.ones, (6, 4))
    return nn.Dense(3, name="fc")(nn.elu(x @ frozen.value).mean((1, 2)))


class ScannedProduct(nn.Module):
  """A scan whose carry starts as zeros and then depends on the input."""

  @nn.compact
  def __call__(self, x):
    x = nn.elu(nn.Conv(4, (3, 3), name="conv")(x)).mean(1)
    kernel = self.param("recurrent", nn.initializers.lecun_normal(), (5, 5))
    inputs = nn.Dense(5, name="inputs")(x).swapaxes(0, 1)

    def step(carry, row):
      return jnp.tanh(carry @ kernel + row), None

    carry, _ = jax.lax.scan(step, jnp.zeros(inputs.shape[1:], x.dtype), inputs)
    return nn.Dense(3, name="fc")(carry)
