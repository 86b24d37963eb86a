"""Weights from PyTorch and back: what files may hold, messages, round trips."""

from __future__ import annotations

import json
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from trees import assert_same, draw

import sapr_jax as sapr

WITHOUT_TORCH = "PyTorch is not installed: pip install 'sapr_jax[torch]'"

# ----------------------------------------------------------------------------------------------------------------------
# Files and messages
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
  """The state dict of the tiny ResNet-8."""
  path = tmp_path_factory.mktemp("torch") / "tiny.safetensors"
  sapr.export_torch(path, tiny.model, tiny.variables)
  return safetensors.numpy.load_file(path)


def write(path, state):
  safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
  return path


def import_tiny(tiny, path, **options):
  return sapr.import_torch(path, tiny.model, tiny.input_shape, **options)


def test_a_kernel_and_its_statistics_by_hand(tiny, exported):
  variables = tiny.variables
  assert exported["layer1.0.conv2.weight"].shape == (4, 4, 3, 3)
  kernel = np.asarray(variables["params"]["stage1_block1"]["conv2"]["kernel"])
  assert exported["layer1.0.conv2.weight"][3, 1, 0, 2] == kernel[0, 2, 1, 3]
  assert exported["fc.weight"][7, 2] == np.asarray(variables["params"]["fc"]["kernel"])[2, 7]
  statistics = variables["batch_stats"]["stage3_block1"]["bn2"]
  np.testing.assert_array_equal(exported["layer3.0.bn2.running_mean"], statistics["mean"])
  np.testing.assert_array_equal(exported["layer3.0.bn2.running_var"], statistics["var"])
  np.testing.assert_array_equal(exported["layer3.0.bn2.weight"], variables["params"]["stage3_block1"]["bn2"]["scale"])
  counter = exported["bn1.num_batches_tracked"]
  assert counter.shape == () and counter.dtype == np.int64


def replaced(old, new):
  return lambda state: {name.replace(old, new): array for name, array in state.items()}


@pytest.mark.parametrize(
  "change",
  [
    lambda state: state,
    lambda state: {name: array for name, array in state.items() if not name.endswith("num_batches_tracked")},
    lambda state: {f"module.{name}": array for name, array in state.items()},
    lambda state: {f"_orig_mod.module.{name}": array for name, array in state.items()},
    lambda state: {f"module._orig_mod.{name}": array for name, array in state.items()},
    replaced("fc.", "linear."),
    replaced("fc.", "classifier."),
    lambda state: {name: array.astype(np.float64) if array.ndim else array for name, array in state.items()},
  ],
  ids=["plain", "no counters", "DataParallel", "compiled", "compiled inside", "linear", "classifier", "double"],
)
def test_what_files_call_the_same(tiny, exported, tmp_path, change):
  path = write(tmp_path / "weights.safetensors", change(exported))
  assert_same(import_tiny(tiny, path), tiny.variables)


def test_half_precision_becomes_float32(tiny, exported, tmp_path):
  for dtype in (np.float16, jnp.bfloat16):
    state = {name: array.astype(dtype) if array.ndim else array for name, array in exported.items()}
    path = write(tmp_path / "weights.safetensors", state)
    assert_same(
      import_tiny(tiny, path),
      jax.tree.map(lambda a, d=dtype: np.asarray(a).astype(d).astype(np.float32), tiny.variables),
    )


def without(*names):
  return lambda state: {name: array for name, array in state.items() if name not in names}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (without("bn1.weight", "fc.bias"), r"does not fit CifarResNet: missing bn1\.weight, fc\.bias\. Expected"),
    (lambda state: {}, r"missing conv1\.weight, bn1\.weight, bn1\.bias, .* and 29 more\. Expected"),
    (
      lambda state: state | {"bn9.bias": np.ones(3), "bn9.num_batches_tracked": np.ones(())},
      r"left over bn9\.bias\. E",
    ),
    (
      lambda state: state | {"conv1.weight": np.ones((4, 3, 3, 3)), "fc.bias": np.ones(11)},
      r"of the wrong shape conv1\.weight \[4, 3, 3, 3\] instead of \[4, 1, 3, 3\], fc\.bias \[11\] instead of \[10\]",
    ),
    (replaced("layer1.0.bn1", "layer1.0.norm"), r"missing (layer1\.0\.bn1\.\w+[,;] )+left over (layer1\.0\.norm\.\w+)"),
    (lambda state: state | {"fc.bias": np.ones(10, np.int64)}, r"not of floats fc\.bias\. E"),
    (
      lambda state: state | {"layer2.0.downsample.0.weight": np.ones((8, 4, 1, 1))},
      r"is of another network: its shortcuts have parameters \(layer2\.0\.downsample\.0\.weight\).*option A",
    ),
    (
      lambda state: state | {"module.layer2.0.shortcut.0.weight": np.ones((8, 4, 1, 1))},
      r"is of another network: its shortcuts have parameters \(module\.layer2\.0\.shortcut\.0\.weight\)",
    ),
  ],
)
def test_what_does_not_fit_is_named(tiny, exported, tmp_path, change, message):
  path = write(tmp_path / "weights.safetensors", change(exported))
  with pytest.raises(sapr.InputError, match=message) as info:
    import_tiny(tiny, path)
  assert "\n" not in str(info.value) and str(info.value).startswith(str(path))


def test_files_that_cannot_be_read_are_named(tiny, exported, tmp_path):
  whole = write(tmp_path / "whole.safetensors", exported).read_bytes()
  for name, content, message in (
    ("missing.safetensors", None, r"missing\.safetensors is missing"),
    ("damaged.safetensors", b"x" * 20, "is not a whole safetensors file"),
    ("truncated.safetensors", whole[:-10], "is not a whole safetensors file"),
    ("weights.npz", b"x", r"has an unknown ending; expected \.safetensors or \.pth, \.pt, \.th"),
  ):
    if content is not None:
      (tmp_path / name).write_bytes(content)
    with pytest.raises(sapr.InputError, match=message) as info:
      import_tiny(tiny, tmp_path / name)
    assert "\n" not in str(info.value) and name in str(info.value)


def test_a_pretrained_network_of_others():
  default = pathlib.Path(__file__).parents[3] / "shared" / "data" / "resnet20.th"
  path = pathlib.Path(os.environ.get("SAPR_RESNET20_WEIGHTS", default))
  if not path.is_file():
    pytest.skip(f"needs PyTorch weights of a ResNet-20: {path}; name others in SAPR_RESNET20_WEIGHTS")
  torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
  variables = sapr.import_torch(path, sapr.models.create("resnet20"), (1, 32, 32, 3))
  want = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]["module.linear.weight"]
  np.testing.assert_array_equal(variables["params"]["fc"]["kernel"], want.numpy().T)


# ----------------------------------------------------------------------------------------------------------------------
# Round trips, and networks of one's own
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("model", "input_shape"),
  [
    (sapr.models.ResNet(blocks=(1, 2, 1, 1), bottleneck=False, num_classes=3, width_multiplier=0.125), (1, 33, 33, 3)),
    (sapr.models.ResNet(blocks=(1, 2, 1, 1), bottleneck=True, num_classes=3, width_multiplier=0.0625), (1, 32, 32, 1)),
    (sapr.models.create("mobilenetv2", num_classes=3, width_multiplier=0.1), (1, 32, 32, 3)),
  ],
  ids=["basic", "bottleneck", "mobilenet"],
)
def test_a_round_trip_changes_nothing(tmp_path, model, input_shape):
  variables = draw(model, input_shape)
  sapr.export_torch(tmp_path / "model.safetensors", model, variables)
  assert_same(sapr.import_torch(tmp_path / "model.safetensors", model, input_shape), variables)


def test_a_round_trip_of_a_pruned_network(tmp_path, tiny):
  masks = {group.name: np.arange(group.size) % 3 != 1 for group in tiny.graph.groups}
  model, variables = sapr.prune(tiny.model, tiny.variables, tiny.graph, masks)
  path = tmp_path / "deep" / "model.safetensors"
  sapr.export_torch(path, model, variables)
  assert sorted(file.name for file in path.parent.iterdir()) == ["model.json", "model.safetensors"]
  assert_same(sapr.import_torch(path, model, tiny.input_shape), variables)
  with pytest.raises(sapr.InputError, match=r"layer1\.0\.conv1\.weight \[3, 4, 3, 3\] instead of \[4, 4, 3, 3\]"):
    import_tiny(tiny, path)


def test_the_json_file_has_what_a_rebuilder_needs(tmp_path):
  model = sapr.models.create("mobilenetv2", num_classes=3, width_multiplier=0.1)
  variables = draw(model, (1, 32, 32, 3))
  graph = sapr.trace_channels(model, variables, (1, 32, 32, 3))
  masks = {group.name: np.arange(group.size) != 5 for group in graph.groups}
  sapr.export_torch(tmp_path / "model.safetensors", *sapr.prune(model, variables, graph, masks))
  description = json.loads((tmp_path / "model.json").read_text())
  assert description["class"] == "MobileNetV2" and description["fields"]["width_multiplier"] == 0.1
  layers = description["layers"]
  assert layers["features.2.conv.1.0"] == {"type": "Conv2d", "in_channels": 47, "out_channels": 47, "groups": 47}
  assert layers["features.2.conv.1.1"] == {"type": "BatchNorm2d", "num_features": 47}
  assert layers["features.2.conv.2"] == {"type": "Conv2d", "in_channels": 47, "out_channels": 8, "groups": 1}
  assert layers["classifier.1"] == {"type": "Linear", "in_features": 1280, "out_features": 3}
  state = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert {name.rpartition(".")[0] for name in state} == set(layers)


def test_export_refuses_what_it_cannot_write(tmp_path, tiny):
  with pytest.raises(sapr.InputError, match=r"model\.pth must end in \.safetensors"):
    sapr.export_torch(tmp_path / "model.pth", tiny.model, tiny.variables)
  params = {name: layer for name, layer in tiny.params.items() if name != "fc"}
  path = tmp_path / "model.safetensors"
  with pytest.raises(sapr.InputError, match=r"variables has params/fc/bias of shape None; CifarResNet has \(10,\)"):
    sapr.export_torch(path, tiny.model, {**tiny.variables, "params": params})
  with pytest.raises(sapr.InputError, match=r"variables has batch_stats/bn/mean of shape None; CifarResNet has \(4,\)"):
    sapr.export_torch(path, tiny.model, {})
  wider = sapr.models.create("resnet8", width_multiplier=0.5)
  with pytest.raises(sapr.InputError, match=r"of shape \(4,\); CifarResNet has \(8,\)"):
    sapr.export_torch(path, wider, tiny.variables)
  graph = sapr.trace_channels(tiny.model, tiny.variables, (1, 8, 8, 1), select="exact")
  masks = {group.name: np.arange(group.size) > 0 for group in graph.groups}  # with the streams, which it pads
  with pytest.raises(sapr.InputError, match=r"cut in layers only, got one whose code holds widths.*select='blocks'"):
    sapr.export_torch(path, *sapr.prune(tiny.model, tiny.variables, graph, masks))
  assert not list(tmp_path.iterdir())


class Own(nn.Module):
  """A grouped convolution with a bias, inside a sub-module's scope."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(4, (3, 3), feature_group_count=2, name="first")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    return nn.Dense(3, name="last")(nn.relu(x).mean(axis=(1, 2)))


OWN_NAMES = {"first": "body.0", "norm": "body.1", "last": "module.head"}


def test_a_network_of_ones_own_is_named_by_its_owner(tmp_path):
  model, shape = Own(), (1, 5, 5, 2)
  variables = draw(model, shape)
  path = tmp_path / "own.safetensors"
  for layer_names in (OWN_NAMES, OWN_NAMES.__getitem__):
    sapr.export_torch(path, model, variables, input_shape=shape, layer_names=layer_names)
    assert_same(sapr.import_torch(path, model, shape, layer_names=layer_names), variables)
  state = safetensors.numpy.load_file(path)
  assert state["body.0.weight"].shape == (4, 1, 3, 3) and state["module.head.bias"].shape == (3,)
  layers = json.loads((tmp_path / "own.json").read_text())["layers"]
  assert layers["body.0"] == {"type": "Conv2d", "in_channels": 2, "out_channels": 4, "groups": 2}


def test_names_for_a_network_of_the_package_can_be_given_too(tmp_path, tiny):
  path = tmp_path / "own.safetensors"
  names = lambda layer: f"net.{layer.replace('/', '_')}"  # noqa: E731
  sapr.export_torch(path, tiny.model, tiny.variables, input_shape=tiny.input_shape, layer_names=names)
  assert "net.stage1_block1_conv1.weight" in safetensors.numpy.load_file(path)
  assert_same(import_tiny(tiny, path, layer_names=names), tiny.variables)
  with pytest.raises(sapr.InputError, match=r"missing conv1\.weight.*left over net\.bn\.bias"):
    import_tiny(tiny, path)


def test_shortcuts_with_parameters_by_either_name(tmp_path):
  model = sapr.models.ResNet(blocks=(1, 1, 1, 1), bottleneck=False, num_classes=3, width_multiplier=0.0625)
  variables = draw(model, (1, 32, 32, 3))
  sapr.export_torch(tmp_path / "model.safetensors", model, variables)
  state = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert "layer2.0.downsample.1.running_var" in state
  path = write(tmp_path / "other.safetensors", replaced("downsample", "shortcut")(state))
  assert_same(sapr.import_torch(path, model, (1, 32, 32, 3)), variables)


class Transposed(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.ConvTranspose(4, (3, 3), name="up")(x)


@pytest.mark.parametrize(
  ("model", "layer_names", "message"),
  [
    (Own(), None, r"Own is not a model of this package \(CifarResNet, ResNet, MobileNetV2\).*layer_names=\{"),
    (Own(), {"first": "a", "norm": "b"}, "layer_names gives no name for last"),
    (Own(), {**OWN_NAMES, "lost": "c"}, "layer_names names lost; the layers are first, last, norm"),
    (Own(), lambda path: "a", "layer_names gives several layers the name a"),
    (Own(), lambda path: None, "layer_names gives no name for first, norm, last"),
    (
      Transposed(),
      lambda path: path,
      "Transposed has params/up/bias, params/up/kernel outside Conv, Dense and BatchNorm",
    ),
  ],
)
def test_names_that_cannot_be_used(tmp_path, model, layer_names, message):
  with pytest.raises(sapr.InputError, match=message):
    sapr.import_torch(tmp_path / "x.safetensors", model, (1, 5, 5, 2), layer_names=layer_names)


def test_export_of_a_network_of_ones_own_wants_the_shape(tmp_path):
  with pytest.raises(sapr.InputError, match="needs the input_shape too"):
    sapr.export_torch(tmp_path / "x.safetensors", Own(), draw(Own(), (1, 5, 5, 2)), layer_names=OWN_NAMES)
