"""Networks that the package does not contain: which groups are offered, and that cutting them is exact."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import laws
import networks
import numpy as np
import pytest

from sapr_jax.channels import count_macs, prune, trace_channels
from sapr_jax.errors import InputError


def offered(model, select="exact"):
  graph = trace_channels(model, laws.abstract_variables(model), laws.SHAPE, select=select)
  return {group.name: group.size for group in graph.groups}


@dataclasses.dataclass
class Case:
  """A network, the groups that `select` must offer, and the seeds of the masks (odd ones keep single channels)."""

  model: nn.Module
  groups: dict[str, int]
  select: str = "exact"
  seeds: tuple[int, ...] = (0,)


CASES = {
  "vgg": Case(networks.Vgg(), {"conv0": 6, "conv1": 4, "fc0": 5}, seeds=(0, 1)),
  "vgg_unjoined": Case(networks.Vgg(), {"conv0": 6, "conv1": 4, "fc0": 5}, "unjoined", ()),
  "squeeze_excite": Case(
    networks.SqueezeExcite(),
    {"stem": 4, "block0/conv1": 6, "block0/reduce": 4, "block1/conv1": 6, "block1/reduce": 4},
  ),
  "squeeze_excite_blocks": Case(
    networks.SqueezeExcite(),
    {"block0/conv1": 6, "block0/reduce": 4, "block1/conv1": 6, "block1/reduce": 4},
    "blocks",
    (),
  ),
  "densenet": Case(
    networks.DenseNet(),
    {
      "stem": 5,
      **{f"dense{i}/conv{j}": f for i in range(2) for j, f in ((1, 6), (2, 4))},
      "transition": 6,
      "dense2/conv1": 6,
      "dense2/conv2": 4,
    },
  ),
  "mobilenet_v1": Case(networks.MobileNetV1(), {"stem": 4, "pointwise0": 6, "pointwise1": 5}, seeds=(1,)),
  "depth_multiplier": Case(networks.MobileNetV1(multiplier=2), {"stem": 4, "pointwise0": 6, "pointwise1": 5}),
  "mobilenet_v2": Case(
    networks.MobileNetV2(),
    {"features1/conv1": 6, "features2/conv1": 8, "features3/conv1": 8, "features4/conv1": 10},
    "blocks",
  ),
  "remat_and_shared": Case(
    networks.Rematerialized(), {"stem": 4, "block0/conv1": 6, "block1/conv1": 6, "shared/conv1": 6}, seeds=(1,)
  ),
  "resnet50": Case(
    networks.ImageNetResNet(),
    {
      "conv1": 4,
      "layer1_0/conv1": 4,
      "layer1_0/conv2": 4,
      "layer1_0/conv3": 8,
      "layer2_0/conv1": 8,
      "layer2_0/conv2": 8,
      "layer2_0/conv3": 16,
      "layer2_1/conv1": 8,
      "layer2_1/conv2": 8,
    },
  ),
  "resnet34": Case(
    networks.ImageNetResNet(networks.BasicBlock),
    {"conv1": 4, "layer1_0/conv1": 4, "layer2_0/conv1": 8, "layer2_0/conv2": 8, "layer2_1/conv1": 8},
  ),
  "resnext": Case(networks.ResNeXt(), {"stem": 4, "reduce0": 4, "grouped0": 4, "reduce1": 4, "grouped1": 4}),
  "shufflenet": Case(networks.ShuffleNet(), {"stem": 4, "group1": 2}, seeds=(1,)),
  "shuffled_stream": Case(networks.ShuffledStream(), {"conv1": 4, "conv1:2": 2, "conv2": 6}),
  "unet": Case(networks.UNet(), {"enc0": 4, "enc1": 6, "middle": 5, "up1": 4, "dec1": 5, "up0": 3, "dec0": 4}),
  "unet_transposed_kernel": Case(
    networks.UNet(True), {"enc0": 4, "enc1": 6, "middle": 5, "up1": 4, "dec1": 5, "up0": 3, "dec0": 4}, seeds=(1,)
  ),
  "upsampling": Case(networks.UpsamplingNet("bilinear"), {"down": 5, "conv": 4}),
  "upsampling_nearest": Case(networks.UpsamplingNet("nearest"), {"down": 5, "conv": 4}),
  "scan": Case(networks.Scanned(), {"stem": 4, "blocks/conv1": 6}, seeds=(0, 1)),
  "inception": Case(
    networks.Inception(), {"stem": 4, "branch1": 4, "branch3": 3, "branch5": 5, "pooled": 2, "last": 4}
  ),
  "inception_cut_elsewhere": Case(
    networks.Inception(aligned=False), {"stem": 4, "branch1": 4, "branch3": 2, "branch5": 5, "pooled": 2, "last": 4}
  ),
  "vit": Case(
    networks.ViT(),
    {
      f"block{i}/{layer}": n
      for i in range(2)
      for layer, n in (("attention/query", 2), ("attention/value", 2), ("mlp1", 7))
    },
  ),
  "attention_values": Case(networks.PlainAttention(), {"patches": 4, "v": 5}),
  "gated": Case(networks.Gated(), {"glu/value": 6, "swiglu/value": 6, "geglu/value": 6}, "unjoined"),
  "setup": Case(networks.SetupNet(), {"blocks_0/convs_0": 6, "blocks_1/convs_0": 6}),
  "own_layers": Case(networks.OwnLayers(), {"mine0": 5, "mine1": 6, "mine2": 4}),
  "own_layers_with_gain": Case(networks.OwnLayers(gain=True), {"mine0": 5, "mine1": 6, "mine2": 4}),
  "spectral": Case(networks.SpectralNet(), {"conv0": 5, "conv1": 6}),
  "mlp": Case(networks.PlainMlp(), {"conv": 4, "tokens": 5, "general": 6, "einsum": 4}),
  "outer_product": Case(networks.Outer(), {"conv1": 5}),
  "barrier": Case(networks.Barrier(), {"a": 4, "b": 4}),
  "stored_elsewhere": Case(networks.StoredElsewhere(), {"first": 5, "masked": 4, "kernel": 4}),
  "scanned_product": Case(networks.ScannedProduct(), {"conv": 4, "inputs": 5}),
  "two_kernels": Case(
    networks.Between(lambda x: networks.TwoKernels(5, name="two")(x)), {"conv0": 5, "conv1": 8, "two": 5, "conv2": 4}
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_and_laws(name):
  case = CASES[name]
  graph = laws.check_laws(case.model, case.select, case.seeds)
  assert {group.name: group.size for group in graph.groups} == case.groups


# What stands between two convolutions, and whether the channels there can be cut. Where not, a word of the reason.
BETWEEN = {
  "concatenated with itself": (lambda x: jnp.concatenate([x, -x], -1), None),
  "crelu": (lambda x: jnp.concatenate([nn.relu(x), nn.relu(-x)], -1), None),
  "tiled": (lambda x: jnp.tile(x, (1, 1, 2, 2)), None),
  "stacked and flattened": (lambda x: jnp.stack([x, 2 * x], -1).reshape((*x.shape[:3], -1)), None),
  "stop_gradient": (jax.lax.stop_gradient, None),
  "where": (lambda x: jnp.where(x > 0, x, 0.1 * x), None),
  "vmap over channels": (lambda x: jax.vmap(lambda y: jnp.tanh(y) * 2, in_axes=-1, out_axes=-1)(x), None),
  "space to depth": (
    lambda x: x.reshape((x.shape[0], 4, 2, 4, 2, -1)).transpose((0, 1, 3, 2, 4, 5)).reshape((x.shape[0], 4, 4, -1)),
    None,
  ),
  "loop": (lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 0.5 + 1, x), None),
  "rows picked by index": (lambda x: x[:, jnp.array([3, 1, 2, 0])], None),
  "strided rows": (lambda x: x[:, ::2, 1:], None),
  "local max pooling": (lambda x: nn.max_pool(x, (2, 2), (1, 1), "SAME"), None),
  "average pooling": (lambda x: nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False), None),
  "split": (lambda x: (lambda a, b: a * nn.gelu(b))(*jnp.split(x, 2, -1)), None),
  "sliced in halves": (lambda x: x[..., : x.shape[-1] // 2] * jnp.tanh(x[..., x.shape[-1] // 2 :]), None),
  "split and shuffled": (
    lambda x: networks.shuffle_channels(jnp.concatenate((lambda a, b: (a, nn.elu(b)))(*jnp.split(x, 2, -1)), -1), 2),
    None,
  ),
  "gates": (
    lambda x: (lambda i, f, g, o: jnp.tanh(nn.sigmoid(i) * jnp.tanh(g) + f) * nn.sigmoid(o))(*jnp.split(x, 4, -1)),
    None,
  ),
  "slice": (lambda x: x[..., :4], "no kernel reads it"),  # the half that is left out
  "pad": (lambda x: jnp.pad(x, ((0, 0),) * 3 + ((1, 1),)), None),
  "pad with ones": (lambda x: jnp.pad(x, ((0, 0),) * 3 + ((1, 1),), constant_values=1), "padded"),
  "max over channels": (lambda x: x * jnp.max(x, -1, keepdims=True), "reduce_max"),
  "softmax": (nn.softmax, "reduce_max"),
  "cosine": (lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6), "reduce_sum"),
  "constant array": (lambda x: x * np.arange(1.0, 9.0).astype(x.dtype), "constant"),
  "index": (lambda x: x * jnp.arange(8.0), "index"),
  "reversed": (lambda x: x[..., ::-1], "reversed"),
  "rolled": (lambda x: jnp.roll(x, 1, -1), "single channel"),
  "permuted": (lambda x: x[..., jnp.array([3, 1, 2, 0, 4, 5, 6, 7])], "indices"),
  "cumulated": (lambda x: jnp.cumsum(x, -1), "cumsum"),
  "sorted": (lambda x: jnp.sort(x, -1), "sort"),
  "cond": (lambda x: jax.lax.cond(x[0, 0, 0, 0] > 0, lambda y: y * 2, lambda y: y - 1, x), "`cond`"),
  "while": (
    lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.5), (0, x))[1],
    "`while`",
  ),
  "map over channels": (lambda x: jnp.moveaxis(jax.lax.map(jnp.tanh, jnp.moveaxis(x, -1, 0)), 0, -1), "scan"),
  "hard-coded reshape": (lambda x: x.reshape((*x.shape[:3], 4, 2)).max(-1), "reduce_max"),
  "hard-coded groups": (lambda x: x.reshape((*x.shape[:3], 4, -1)).max(-1), "reduce_max"),
  "maxout": (lambda x: x.reshape((*x.shape[:3], -1, 2)).max(-1), "reduce_max"),
  "hard-coded ones": (lambda x: x + jnp.ones((8,)), None),
  "outer product": (lambda x: (x[..., :, None] * x[..., None, :]).reshape((*x.shape[:3], -1)), "outer product"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_may_stand_between_two_layers(name):
  function, reason = BETWEEN[name]
  model = networks.Between(function)
  graph = laws.check_laws(model, "exact", (0,))
  assert {"conv0", "conv2"} <= {group.name for group in graph.groups}
  reasons = [why for key, _, why in graph.fixed if key[1] == "conv1"]
  if reason is None:
    assert not reasons
  else:
    assert reason in reasons[0]


def test_wrapping_a_model_changes_nothing_but_names():
  inner = networks.ImageNetResNet()
  graph = laws.check_laws(networks.Wrapper(networks.Wrapper(inner)), "blocks", (0,))
  assert {group.name: group.size for group in graph.groups} == {
    f"inner/inner/{name}": size for name, size in offered(inner, "blocks").items()
  }


@pytest.mark.parametrize(
  ("model", "count"),
  [
    (networks.ImageNetResNet(networks.BasicBlock, (3, 4, 6, 3)), 16),
    pytest.param(networks.ImageNetResNet(networks.Bottleneck, (3, 4, 6, 3)), 32, marks=pytest.mark.slow),
    pytest.param(networks.ImageNetResNet(networks.Bottleneck, (3, 4, 23, 3)), 66, marks=pytest.mark.slow),
    pytest.param(
      networks.MobileNetV2(
        ((1, 4, 1, 1), (6, 5, 2, 2), (6, 6, 3, 2), (6, 7, 4, 2), (6, 8, 3, 1), (6, 9, 3, 2), (6, 10, 1, 1))
      ),
      16,
      marks=pytest.mark.slow,
    ),
  ],
  ids=["resnet34", "resnet50", "resnet101", "mobilenet_v2"],
)
def test_groups_of_the_deep_networks(model, count):
  graph = trace_channels(model, laws.abstract_variables(model), (1, 64, 64, 3))
  assert len(graph.groups) == count
  assert all(group.is_block and not group.joined for group in graph.groups)
  assert all(name.rsplit("/", 1)[1] in ("conv1", "conv2") for name in graph.full_masks())


@pytest.mark.parametrize(
  ("model", "reason"),
  [
    (networks.TiedAutoencoder(), "used a second time, as output channels"),
    (networks.OwnLayers(standardize=True), "not a kernel that a mask could zero"),
  ],
)
def test_networks_without_any_group_say_why(model, reason):
  with pytest.raises(InputError, match=f"no other choice would find one either.*{reason}") as info:
    trace_channels(model, laws.abstract_variables(model), laws.SHAPE)
  assert "\n" not in str(info.value)
  assert count_macs(model, laws.abstract_variables(model), laws.SHAPE) > 0


# Code that computes a number, or decides, from a width: the small model evaluates the dense program instead.
FROM_WIDTHS = {
  "scale": lambda x: x * x.shape[-1] ** -0.5,
  "scale and back": lambda x: x / x.shape[-1] * x.shape[-1],
  "branch": lambda x: jnp.tanh(x).mean(1, keepdims=True) if x.shape[-1] == 8 else x,
}


@pytest.mark.parametrize("name", FROM_WIDTHS)
def test_what_is_computed_from_a_width_stays(name):
  model = networks.Between(FROM_WIDTHS[name])
  variables = laws.random_variables(model, 0, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE, select="exact")
  masks = graph.full_masks()
  masks["conv0"][:2] = 0
  small, _ = prune(model, variables, graph, masks)
  assert small.widths and not small.cuts  # the code follows this one
  masks["conv1"][3] = 0
  small, _ = prune(model, variables, graph, masks)
  assert small.cuts and not small.widths
  laws.check_masked_is_pruned(model, graph, variables, masks, 1e-4, np.float32)


def test_half_of_each_maxout_pair_is_kept_together():
  model = networks.Between(lambda x: x.reshape((*x.shape[:3], -1, 2)).max(-1))
  graph = trace_channels(model, laws.abstract_variables(model), laws.SHAPE, select="exact")
  (group,) = (group for group in graph.groups if group.name == "conv1")
  (kernel,) = (m for m in group.members if m.path == ("conv1", "kernel"))
  assert list(kernel.channels) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_bfloat16_computation():
  model = networks.DtypeNet()
  variables = laws.random_variables(model, 0, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE, select="exact")
  assert {group.name: group.size for group in graph.groups} == {"conv0": 6, "conv1": 5}
  laws.check_masked_is_pruned(model, graph, variables, laws.random_masks(graph, 0), 0.05, np.float32)


def test_a_matrix_of_the_code_between_layers_is_no_kernel():
  """A matrix that the code makes up cannot be masked; the channels it mixes stay."""
  model = networks.Between(lambda x: x @ np.eye(8, 6).astype(x.dtype))
  graph = laws.check_laws(model, "exact", (0,))
  assert "conv1" not in {group.name for group in graph.groups}


def test_activations_that_add_functions_of_one_value_are_no_join():
  model = networks.Between(lambda x: nn.gelu(x, approximate=True) + nn.swish(x) + jnp.tanh(x) * x)
  assert offered(model, "unjoined")["conv1"] == 8


def test_a_shift_that_is_the_same_at_all_positions_is_no_join():
  """As a diffusion network adds an embedding of the time to each of its blocks."""
  model = networks.Between(lambda x: x + nn.Dense(8, name="shift")(x.mean((1, 2)))[:, None, None])
  graph = laws.check_laws(model, "unjoined", (0,))
  (group,) = (group for group in graph.groups if group.name == "conv1")
  assert {"/".join(member.path[:-1]) for member in group.members} >= {"conv1", "shift"}


def test_a_layer_that_says_where_to_select_is_no_join():
  """As a mask of the input selects the scores of attention in Flax."""
  model = networks.Between(lambda x: jnp.where(nn.Conv(8, (1, 1), name="other")(x) > 0, x, 0.0))
  assert offered(model, "unjoined")["conv1"] == 8


def test_an_addition_of_two_layers_is_a_join():
  model = networks.Between(lambda x: x + nn.Conv(8, (1, 1), name="other")(x))
  assert "conv1" not in offered(model, "unjoined")
  assert "conv1" in offered(model, "exact")


def test_a_normalization_keeps_its_groups():
  """Twelve of sixteen channels are three groups of four, not four of three, as the model's code would have it."""
  model = networks.Between(lambda x: nn.GroupNorm(4)(x), features=16)
  graph = laws.check_laws(model, "exact", (0,))
  group = next(group for group in graph.groups if group.name == "conv1")
  kernel = next(m for m in group.members if m.path == ("conv1", "kernel"))
  assert (group.size, list(kernel.channels)) == (4, [k for k in range(4) for _ in range(4)])


def pad_with_nan(x):
  windows = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
  padded = jnp.pad(windows, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=jnp.nan)
  return jnp.take(padded, jnp.arange(8), 1, mode="fill", fill_value=jnp.nan)[:, :7, :7]


def test_nan_equals_nan_in_the_proof():
  """NaN as a constant, and as the value that fills a gather: without outputs to compare, only the proof can pass."""
  model = networks.Between(pad_with_nan)
  variables = laws.random_variables(model, 0, np.float32)
  variables["params"]["fc"]["bias"] *= jnp.nan
  graph = trace_channels(model, variables, laws.SHAPE, select="exact")
  masks = {name: np.append(mask[1:], 0) for name, mask in graph.full_masks().items()}
  assert "conv1" in masks
  small, _ = prune(model, variables, graph, masks)
  assert dict(small.widths)["conv1"] == (("features", 7),)
