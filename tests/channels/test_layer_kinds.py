"""The kinds of layers that Flax offers, between two others: what can be cut there, and that cutting it is exact.

What other tests of this folder have in larger networks, as pooling and `nn.remat`, is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from flax import nnx

from sapr_jax.channels import count_macs, mask_params, masked_apply, prune, trace_channels

ROW, IMAGE, VOLUME = (1, 4, 3), (1, 4, 4, 3), (1, 3, 3, 3, 3)
F64 = {"param_dtype": np.float64}
FIRST, BOTH = {"first": 6}, {"first": 6, "layer": 7}
KEPT = {}  # neither the layer nor what it reads


class Around(nn.Module):
  """`first` -> the layer -> `next` -> `last`; `next` can always be cut."""

  layer: Callable[[Any], Any]

  @nn.compact
  def __call__(self, x):
    x = self.layer(nn.elu(nn.Dense(6, name="first")(x)))
    return nn.Dense(2, name="last")(nn.elu(nn.Dense(4, name="next")(nn.elu(x))))


def named(kind, *args, **options):
  return lambda x: kind(*args, **options, name="layer")(x)


def conv(features, *args, **options):
  return named(nn.Conv, features, *args, **options)


def rnn(cell, **options):
  return lambda x: nn.RNN(cell(5, **F64, **options), name="rnn")(x)


def attention(**options):
  return named(nn.MultiHeadAttention, 3, qkv_features=12, **options)


def heads_of_einsum(x):
  return nn.Einsum((6, 3, 4), "blc,chd->blhd", name="layer")(x).reshape((*x.shape[:2], 12))


def heads_of_vmap(x):
  axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None, "out_axes": -2}
  heads = nn.vmap(nn.Dense, axis_size=3, **axes)(4, name="layer")(x)
  return nn.DenseGeneral(5, (-2, -1), name="out")(nn.elu(heads))


def rotated(x):
  """Turns pairs of channels by an angle that grows with the position."""
  angles = jnp.arange(x.shape[1], dtype=x.dtype)[:, None, None] / 10.0 ** jnp.arange(x.shape[-1] // 2, dtype=x.dtype)
  a, b = jnp.split(x, 2, -1)
  return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1)


def rotary_attention(x):
  q, k, v = (nn.DenseGeneral((3, 4), name=name)(x) for name in "qkv")
  weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", rotated(q), rotated(k)))
  return nn.DenseGeneral(5, (-2, -1), name="out")(jnp.einsum("bhqk,bkhd->bqhd", weights, v))


def spectrum(x):
  layer = nn.Dense(7, param_dtype=np.complex128, name="layer")
  return jnp.fft.ifft(layer(jnp.fft.fft(x, axis=1)), axis=1).real


def over_edges(x):
  return jax.ops.segment_sum(nn.Dense(7, name="layer")(x)[0], jnp.array([0, 2, 0, 1]), num_segments=3)[None]


HEADS = FIRST | {"layer/query": 3, "layer/value": 4}

# (the layer, shape of the input, the groups that must be offered beside "next")
LINEN = {
  "Dense": (named(nn.Dense, 7), ROW, BOTH),
  "DenseGeneral": (
    lambda x: nn.DenseGeneral(5, (-2, -1), name="out")(nn.elu(nn.DenseGeneral((3, 4), name="layer")(x))),
    ROW,
    FIRST | {"layer": 3, "layer:2": 4, "out": 5},
  ),
  "Einsum": (heads_of_einsum, ROW, FIRST | {"layer": 3, "layer:2": 4}),
  "Conv, 1-D": (conv(7, (3,)), ROW, BOTH),
  "Conv, causal": (conv(7, (3,), padding="CAUSAL"), ROW, BOTH),
  "Conv, 3-D": (conv(7, (3, 3, 3), strides=2), VOLUME, BOTH),
  "Conv, circular": (conv(7, (3, 3), padding="CIRCULAR"), IMAGE, BOTH),
  "Conv, reflected": (conv(7, (3, 3), padding="REFLECT"), IMAGE, BOTH),
  "Conv, dilated": (conv(7, (2, 2), kernel_dilation=2), IMAGE, BOTH),
  "Conv, input dilated": (conv(7, (2, 2), input_dilation=2, padding=1), IMAGE, BOTH),
  "segment_sum": (over_edges, ROW, BOTH),
  "Conv, depthwise": (conv(12, (3,), feature_group_count=6), ROW, FIRST),
  "ConvTranspose": (named(nn.ConvTranspose, 7, (2, 2, 2), strides=(2, 2, 2), transpose_kernel=True), VOLUME, BOTH),
  "ConvLocal": (named(nn.ConvLocal, 7, (3, 3)), IMAGE, BOTH),
  "Embed": (lambda x: nn.Embed(7, 6, name="layer").attend(x), ROW, BOTH),
  "BatchNorm": (named(nn.BatchNorm, use_running_average=True), ROW, FIRST),
  "BatchNorm, of positions": (named(nn.BatchNorm, use_running_average=True, axis=1), ROW, FIRST),
  "LayerNorm": (nn.LayerNorm(), ROW, KEPT),
  "RMSNorm": (nn.RMSNorm(), ROW, KEPT),
  "GroupNorm": (nn.GroupNorm(3), IMAGE, {"first": 3}),
  "GroupNorm, by size": (nn.GroupNorm(num_groups=None, group_size=2), IMAGE, {"first": 3}),
  "InstanceNorm": (nn.InstanceNorm(), IMAGE, FIRST),
  "SpectralNorm": (lambda x: nn.SpectralNorm(nn.Dense(7, name="layer"))(x, update_stats=False), ROW, KEPT),
  "WeightNorm": (lambda x: nn.WeightNorm(nn.Conv(7, (3, 3), name="layer"))(x), IMAGE, {"layer": 7}),
  "LSTMCell": (rnn(nn.LSTMCell), ROW, FIRST | {"LSTMCell_0/ii": 5}),
  "OptimizedLSTMCell": (rnn(nn.OptimizedLSTMCell), ROW, FIRST | {"OptimizedLSTMCell_0/hi": 5}),
  "GRUCell": (rnn(nn.GRUCell), ROW, FIRST | {"GRUCell_0/ir": 5}),
  "MGUCell": (rnn(nn.MGUCell), ROW, FIRST | {"MGUCell_0/if": 5}),
  "SimpleCell": (rnn(nn.SimpleCell), ROW, FIRST | {"SimpleCell_0/i": 5}),
  "ConvLSTMCell": (rnn(nn.ConvLSTMCell, kernel_size=(3, 3)), VOLUME, FIRST | {"ConvLSTMCell_0/ih": 5}),
  "Bidirectional": (
    lambda x: nn.Bidirectional(*(nn.RNN(nn.SimpleCell(width, **F64)) for width in (5, 4)))(x),
    ROW,
    FIRST | {"SimpleCell_0/i": 5, "SimpleCell_1/i": 4},
  ),
  "MultiHeadAttention": (attention(out_features=7), ROW, HEADS | {"layer/out": 7}),
  "MultiHeadAttention, normalized": (attention(normalize_qk=True), ROW, HEADS | {"layer/out": 6}),
  "rotary attention": (rotary_attention, ROW, FIRST | {"q": 3, "v": 4, "out": 5}),
  "PReLU": (nn.PReLU(), ROW, FIRST),
  "Dropout": (nn.Dropout(0.5, deterministic=True), ROW, FIRST),
  "vmap": (heads_of_vmap, ROW, FIRST | {"layer": 3, "layer:2": 4, "out": 5}),
  "complex": (spectrum, ROW, BOTH),
}


def masks_of(graph):
  """Returns masks that drop two fifths, or one of two, of every group."""
  return {group.name: np.arange(group.size) % 5 % 2 == 0 for group in graph.groups}


def check(graph, expected, got, want, small_macs, tolerance=1e-10):
  assert {group.name: group.size for group in graph.groups} == expected | {"next": 4}
  assert laws.relative_error(got, want) < tolerance
  assert graph.macs(masks_of(graph)) == small_macs < graph.macs()


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
  layer, shape, expected = LINEN[name]
  model = Around(layer)
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    variables, x = laws.random_variables(model, 7, shape=shape), laws.random_images(1, shape=shape)
    graph = trace_channels(model, variables, x[:1], select="exact")
    masked = {**variables, "params": mask_params(variables["params"], graph, masks_of(graph))}
    small, small_variables = prune(model, variables, graph, masks_of(graph))
    run = jax.jit(lambda *both: (small.apply(both[0], x), model.apply(both[1], x)))
    check(graph, expected, *run(small_variables, masked), count_macs(small, small_variables, x[:1]))


class AroundNnx(nnx.Module):
  """The same for NNX; `width` is the number of channels that the layer returns."""

  def __init__(self, make, width, call=lambda layer, x: layer(x)):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(3, 6, rngs=rngs)
    self.layer = make(rngs)
    self.next = nnx.Linear(width, 4, rngs=rngs)
    self.last = nnx.Linear(4, 2, rngs=rngs)
    self.call = call

  def __call__(self, x):
    x = self.call(self.layer, nnx.elu(self.first(x)))
    return self.last(nnx.elu(self.next(nnx.elu(x))))


def of(kind, *args, **options):
  return lambda rngs: kind(*args, **options, rngs=rngs)


def nnx_rnn(cell, **options):
  return lambda rngs: nnx.RNN(cell(6, 5, **F64, **options, rngs=rngs))


SIMPLE = nnx_rnn(nnx.SimpleCell, dtype=np.float64)


def stacked(rngs):
  return nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs), in_axes=0)(rngs.split(2))


def scan_over(layers, x):
  return nnx.scan(lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)


# ((the layer, the width that it returns, how it is called), shape, groups)
NNX = {
  "Linear, remat": ((of(nnx.Linear, 6, 7), 7, nnx.remat(lambda layer, x: layer(x))), ROW, BOTH),
  "LinearGeneral": (
    (
      lambda rngs: nnx.Sequential(
        nnx.LinearGeneral(6, (3, 4), rngs=rngs), nnx.elu, nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), rngs=rngs)
      ),
      5,
    ),
    ROW,
    FIRST | {"layer/layers/0": 3, "layer/layers/0:2": 4, "layer/layers/2": 5},
  ),
  "Einsum": (
    (of(nnx.Einsum, "blc,chd->blhd", (6, 3, 4), (3, 4)), 12, lambda layer, x: layer(x).reshape((*x.shape[:2], 12))),
    ROW,
    FIRST | {"layer": 3, "layer:2": 4},
  ),
  "Conv, 3-D": ((of(nnx.Conv, 6, 7, (3, 3, 3), strides=2), 7), VOLUME, BOTH),
  "Conv, circular and dilated": (
    (of(nnx.Conv, 6, 7, (2, 2), kernel_dilation=2, padding="CIRCULAR"), 7),
    IMAGE,
    BOTH,
  ),
  "Conv, depthwise": ((of(nnx.Conv, 6, 12, (3,), feature_group_count=6), 12), ROW, FIRST),
  "Conv, grouped": ((of(nnx.Conv, 6, 8, (3,), feature_group_count=2), 8), ROW, {"first": 3, "layer": 4}),
  "ConvTranspose": ((of(nnx.ConvTranspose, 6, 7, (2, 2), strides=(2, 2)), 7), IMAGE, BOTH),
  "Embed": ((of(nnx.Embed, 7, 6, **F64), 7, lambda layer, x: layer.attend(x)), ROW, BOTH),
  "BatchNorm": ((of(nnx.BatchNorm, 6), 6), ROW, FIRST),
  "LayerNorm": ((of(nnx.LayerNorm, 6), 6), ROW, KEPT),
  "RMSNorm": ((of(nnx.RMSNorm, 6), 6), ROW, KEPT),
  "GroupNorm": ((of(nnx.GroupNorm, 6, 3), 6), ROW, {"first": 3}),
  "InstanceNorm": ((of(nnx.InstanceNorm, 6), 6), ROW, FIRST),
  "SpectralNorm": (
    (
      lambda rngs: nnx.SpectralNorm(nnx.Linear(6, 7, rngs=rngs), rngs=rngs),
      7,
      lambda layer, x: layer(x, update_stats=False),
    ),
    ROW,
    KEPT,
  ),
  "WeightNorm": (
    (lambda rngs: nnx.WeightNorm(nnx.Linear(6, 7, rngs=rngs), rngs=rngs), 7),
    ROW,
    {"layer/layer_instance": 7},
  ),
  "LSTMCell": ((nnx_rnn(nnx.LSTMCell), 5), ROW, FIRST | {"layer/cell/ii": 5}),
  "OptimizedLSTMCell": ((nnx_rnn(nnx.OptimizedLSTMCell), 5), ROW, FIRST | {"layer/cell/dense_i": 5}),
  "GRUCell": ((nnx_rnn(nnx.GRUCell), 5), ROW, FIRST | {"layer/cell/dense_i": 5}),
  "Bidirectional, SimpleCell": (
    (lambda rngs: nnx.Bidirectional(SIMPLE(rngs), SIMPLE(rngs)), 10),
    ROW,
    FIRST | {f"layer/{way}_rnn/cell/dense_i": 5 for way in ("forward", "backward")},
  ),
  "MultiHeadAttention": (
    (of(nnx.MultiHeadAttention, 3, 6, qkv_features=12, decode=False), 6),
    ROW,
    HEADS | {"layer/out": 6},
  ),
  "MultiHeadAttention, grouped queries": (
    (of(nnx.MultiHeadAttention, 4, 6, qkv_features=16, num_kv_heads=2, decode=False), 6),
    ROW,
    FIRST | {"layer/query": 2, "layer/query:2": 2, "layer/value": 4, "layer/out": 6},
  ),
  "LoRA": ((of(nnx.LoRA, 6, 3, 7), 7), ROW, FIRST | {"layer": 3, "layer:2": 7}),
  "LoRALinear": ((of(nnx.LoRALinear, 6, 7, lora_rank=3), 7), ROW, BOTH | {"layer/lora": 3}),
  "PReLU": ((lambda rngs: nnx.PReLU(), 6), ROW, FIRST),
  "Dropout": ((of(nnx.Dropout, 0.5), 6), ROW, FIRST),
  "vmap and scan": ((stacked, 6, scan_over), ROW, FIRST),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
  options, shape, expected = NNX[name]
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    # Arrays that are no variables, as those of WeightNorm are not, must be there.
    make = (lambda make: make()) if name == "WeightNorm" else nnx.eval_shape
    module, x = laws.drawn(make(lambda: AroundNnx(*options))), laws.random_images(1, shape=shape)
    graph = trace_channels(module, x[:1], select="exact")
    masks = masks_of(graph)
    small = prune(module, graph, masks)
    small.eval()
    graphdef, state = nnx.split(small)
    run = jax.jit(lambda state: (nnx.merge(graphdef, state)(x), masked_apply(module, graph, masks, x)))
    tolerance = 1e-7 if "MultiHead" in name else 1e-10  # jax.nn.dot_product_attention has a softmax in float32
    check(graph, expected, *run(state), count_macs(small, x[:1]), tolerance)
