"""Weights from PyTorch and back: names, messages, and the same logits as the reference networks."""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import sapr_jax as sapr
from sapr_jax.artifacts import torch_names
from sapr_jax.artifacts.torch_weights import _describe, _name_tensors

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "torch.md"
WITHOUT_TORCH = "PyTorch is not installed: pip install 'sapr_jax[torch]'"


def draw(model, input_shape):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(input_shape, jnp.float32))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32), shapes)


def torch_shapes(model, input_shape=(1, 32, 32, 3)):
  """Returns torch name -> shape of all tensors of a network of the package."""
  variables, layers = _describe(model, input_shape)
  tensors = _name_tensors(variables, torch_names.name_layers(model, list(layers)))
  shapes = {name: variables[variable].shape for name, variable in tensors.items()}
  return {name: (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else shape for name, shape in shapes.items()}


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert isinstance(a, jax.Array) and a.dtype == np.float32
    np.testing.assert_array_equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "tensors", "norms"),
  # Entries of torchvision's state dicts; with the counters 122, 218, 320, 626, 932 and 314.
  [
    ("resnet18", 102, 20),
    ("resnet34", 182, 36),
    ("resnet50", 267, 53),
    ("resnet101", 522, 104),
    ("resnet152", 777, 155),
    ("mobilenetv2", 262, 52),
    ("mobilenetv2_cifar", 262, 52),
    ("resnet8", 37, 7),
    ("resnet14", 67, 13),
    ("resnet20", 97, 19),
    ("resnet32", 157, 31),
    ("resnet44", 217, 43),
    ("resnet56", 277, 55),
    ("resnet110", 547, 109),
  ],
)
def test_every_model_has_as_many_tensors_as_in_pytorch(name, tensors, norms):
  shapes = torch_shapes(sapr.models.create(name))
  assert len(shapes) == tensors
  assert sum(key.endswith(".running_mean") for key in shapes) == norms


def test_every_model_of_the_package_was_counted():
  (mark,) = test_every_model_has_as_many_tensors_as_in_pytorch.pytestmark
  makers = {name: getattr(make, "func", make) for name, make in sapr.models.MODELS.items()}
  # Other tests may have added a network of their own.
  own = {name for name, maker in makers.items() if maker.__module__.startswith("sapr_jax")}
  assert {row[0] for row in mark.args[1]} == own


def norm(name, size):
  return {f"{name}.{tensor}": (size,) for tensor in ("weight", "bias", "running_mean", "running_var")}


def test_names_and_shapes_of_resnet50_are_those_of_torchvision():
  shapes = torch_shapes(sapr.models.create("resnet50"))
  want = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
  want |= {"layer1.0.conv1.weight": (64, 64, 1, 1), **norm("layer1.0.bn1", 64)}
  want |= {"layer1.0.conv2.weight": (64, 64, 3, 3), **norm("layer1.0.bn2", 64)}
  want |= {"layer1.0.conv3.weight": (256, 64, 1, 1), **norm("layer1.0.bn3", 256)}
  want |= {"layer1.0.downsample.0.weight": (256, 64, 1, 1), **norm("layer1.0.downsample.1", 256)}
  want |= {"layer4.2.conv1.weight": (512, 2048, 1, 1), **norm("layer4.2.bn1", 512)}
  want |= {"layer4.2.conv2.weight": (512, 512, 3, 3), **norm("layer4.2.bn2", 512)}
  want |= {"layer4.2.conv3.weight": (2048, 512, 1, 1), **norm("layer4.2.bn3", 2048)}
  want |= {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
  ends = ("conv1.", "bn1.", "layer1.0.", "layer4.2.", "fc.")
  assert {name: shape for name, shape in shapes.items() if name.startswith(ends)} == want


def test_names_and_shapes_of_mobilenet_are_those_of_torchvision():
  shapes = torch_shapes(sapr.models.create("mobilenetv2"))
  want = {"features.0.0.weight": (32, 3, 3, 3), **norm("features.0.1", 32)}
  want |= {"features.1.conv.0.0.weight": (32, 1, 3, 3), **norm("features.1.conv.0.1", 32)}
  want |= {"features.1.conv.1.weight": (16, 32, 1, 1), **norm("features.1.conv.2", 16)}
  want |= {"features.17.conv.0.0.weight": (960, 160, 1, 1), **norm("features.17.conv.0.1", 960)}
  want |= {"features.17.conv.1.0.weight": (960, 1, 3, 3), **norm("features.17.conv.1.1", 960)}
  want |= {"features.17.conv.2.weight": (320, 960, 1, 1), **norm("features.17.conv.3", 320)}
  want |= {"features.18.0.weight": (1280, 320, 1, 1), **norm("features.18.1", 1280)}
  want |= {"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}
  ends = ("features.0.", "features.1.", "features.17.", "features.18.", "classifier.")
  assert {name: shape for name, shape in shapes.items() if name.startswith(ends)} == want


def test_names_of_resnet56_are_those_of_the_usual_repositories():
  shapes = torch_shapes(sapr.models.create("resnet56"))
  assert list(shapes)[:2] == ["conv1.weight", "bn1.weight"] and list(shapes)[-2:] == ["fc.weight", "fc.bias"]
  assert shapes["layer3.8.conv2.weight"] == (64, 64, 3, 3)
  assert shapes["layer2.0.conv1.weight"] == (32, 16, 3, 3)
  assert not any("downsample" in name for name in shapes)


# ----------------------------------------------------------------------------------------------------------------------
# Files and messages, without PyTorch
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
    (lambda state: state | {"fc.bias": np.ones(10, np.int64)}, r"not of floats fc\.bias \(int64\)"),
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


def test_files_that_cannot_be_read_are_named(tiny, tmp_path):
  for name, content, message in (
    ("missing.safetensors", None, r"cannot be read \(No such file or directory\)"),
    ("damaged.safetensors", b"x" * 20, "is no whole safetensors file"),
    ("weights.npz", b"x", r"has an unknown ending; expected \.safetensors or \.pth, \.pt, \.th"),
    ("missing.pth", None, "is missing"),
    ("page.pth", b"<html></html>", "is no file of torch.save"),
  ):
    if content is not None:
      (tmp_path / name).write_bytes(content)
    with pytest.raises(sapr.InputError, match=message) as info:
      import_tiny(tiny, tmp_path / name)
    assert "\n" not in str(info.value) and name in str(info.value)


def test_a_truncated_safetensors_file_is_named(tiny, exported, tmp_path):
  path = write(tmp_path / "weights.safetensors", exported)
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(sapr.InputError, match=r"weights\.safetensors is no whole safetensors file"):
    import_tiny(tiny, path)


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
  with pytest.raises(sapr.InputError, match=r"model\.pth does not end in \.safetensors"):
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
      "Transposed has params/up/bias, params/up/kernel, of no Conv, Dense or BatchNorm",
    ),
  ],
)
def test_names_that_cannot_be_used(tmp_path, model, layer_names, message):
  with pytest.raises(sapr.InputError, match=message):
    sapr.import_torch(tmp_path / "x.safetensors", model, (1, 5, 5, 2), layer_names=layer_names)


def test_export_of_a_network_of_ones_own_wants_the_shape(tmp_path):
  with pytest.raises(sapr.InputError, match="wants the input_shape too"):
    sapr.export_torch(tmp_path / "x.safetensors", Own(), draw(Own(), (1, 5, 5, 2)), layer_names=OWN_NAMES)


# ----------------------------------------------------------------------------------------------------------------------
# Against PyTorch
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
  """The networks in PyTorch: name -> (ours, theirs, sizes of images)."""
  pytest.importorskip("torch", reason=WITHOUT_TORCH)
  sys.path.insert(0, str(pathlib.Path(__file__).parent))
  from benchmarks import torch_networks as ref

  models = sapr.models
  basic = models.ResNet(blocks=(1, 2, 1, 1), bottleneck=False, num_classes=5, width_multiplier=0.125)
  bottleneck = models.ResNet(blocks=(1, 2, 1, 1), bottleneck=True, num_classes=5, width_multiplier=0.125)
  return {
    "cifar_resnet": (
      models.create("resnet14", width_multiplier=0.25),
      lambda: ref.CifarResNet(14, widths=(4, 8, 16)),
      (32, 33),
    ),
    "resnet18": (basic, lambda: ref.ResNet(ref.BasicBlock, (1, 2, 1, 1), 5, 8), (32, 45)),
    "resnet50": (bottleneck, lambda: ref.ResNet(ref.Bottleneck, (1, 2, 1, 1), 5, 8), (33, 64)),
    "mobilenetv2": (
      models.create("mobilenetv2", num_classes=5, width_multiplier=0.25),
      lambda: ref.MobileNetV2(5, 0.25),
      (64, 45),
    ),
    "mobilenetv2_cifar": (
      models.create("mobilenetv2_cifar", width_multiplier=0.25),
      lambda: ref.MobileNetV2(10, 0.25, small_images=True),
      (16, 33),
    ),
  }


SELECTIONS = ("blocks", "exact")
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
ARCHITECTURES = ("cifar_resnet", "resnet18", "resnet50", "mobilenetv2", "mobilenetv2_cifar")


def randomized(theirs):
  from benchmarks import torch_networks as ref

  return ref.randomize(theirs())


def torch_logits(model, images):
  import torch

  with torch.no_grad():
    return model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def assert_same_logits(model, variables, torch_model, size):
  images = np.random.default_rng(size).normal(size=(2, size, size, 3)).astype(np.float32)
  want = torch_logits(torch_model, images)
  got = jax.jit(model.apply, compiler_options=QUICK)(variables, images)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
  # The images tell, by far more than what is tolerated: this is no comparison of biases.
  assert np.abs(want[0] - want[1]).max() > 2e-3 * np.abs(want).max()


def save_torch(theirs, folder, how):
  import torch
  from safetensors.torch import save_file

  state = theirs.state_dict()
  path = folder / {"safetensors": "weights.safetensors", "zip": "weights.pth", "legacy": "weights.th"}[how]
  if how == "safetensors":
    save_file(state, path)
  else:
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9).state_dict()
    checkpoint = {"epoch": 3, "best": 0.7, "optimizer": optimizer, "state_dict": state}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=how == "zip")
  return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_imported_weights_give_the_logits_of_pytorch(reference, tmp_path, architecture):
  model, theirs, sizes = reference[architecture]
  torch_model = randomized(theirs)
  assert {size % 2 for size in sizes} == {0, 1}
  read = {}
  for how in ("zip", "legacy", "safetensors"):
    path = save_torch(torch_model, tmp_path, how)
    read[how] = sapr.import_torch(path, model, (1, sizes[0], sizes[0], 3))
  assert_same(read["zip"], read["safetensors"])
  assert_same(read["legacy"], read["safetensors"])
  for size in sizes:
    assert_same_logits(model, read["zip"], torch_model, size)


@pytest.fixture(scope="module")
def narrow(reference):
  """The function that docs/torch.md shows."""
  (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
  import torch

  namespace = {"nn": torch.nn}
  exec(re.search(r"def narrow.*?return model\n", example, re.DOTALL).group(), namespace)
  return namespace["narrow"]


@pytest.mark.parametrize(
  ("architecture", "select"),
  [
    *((architecture, select) for architecture in ("cifar_resnet", "resnet18", "resnet50") for select in SELECTIONS),
    # One program but for its strides; tracing it takes its time.
    ("mobilenetv2", "exact"),
    ("mobilenetv2_cifar", "blocks"),
  ],
)
def test_pruned_networks_compute_the_same_in_pytorch(reference, narrow, tmp_path, architecture, select):
  from safetensors.torch import load_file

  model, theirs, sizes = reference[architecture]
  shape = (1, sizes[0], sizes[0], 3)
  variables = sapr.import_torch(save_torch(randomized(theirs), tmp_path, "zip"), model, shape)
  graph = sapr.trace_channels(model, variables, shape, select=select)
  rng = np.random.default_rng(0)
  masks = {group.name: rng.permutation(group.size) < rng.uniform(0.5, 1) * group.size for group in graph.groups}
  small, small_variables = sapr.prune(model, variables, graph, masks)
  path = tmp_path / "small.safetensors"
  sapr.export_torch(path, small, small_variables)
  assert_same(sapr.import_torch(path, small, shape), small_variables)

  torch_model, state = theirs(), load_file(path)
  layers = json.loads(path.with_suffix(".json").read_text())["layers"]
  if architecture == "cifar_resnet":
    torch_model.linear, torch_model.fc = None, torch_model.linear
    torch_model.forward = types.MethodType(cifar_forward, torch_model)
  narrow(torch_model, layers).load_state_dict(state, strict=True)
  assert_same_logits(small, small_variables, torch_model, sizes[1])


def cifar_forward(self, x):
  x = self.bn1(self.conv1(x)).relu()
  return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def test_the_example_of_the_guide(reference, tmp_path, monkeypatch, capsys):
  from benchmarks import torch_networks as ref

  (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
  # Our reference network in the place of torchvision, which need not be installed.
  stand_in = types.SimpleNamespace(models=types.SimpleNamespace(resnet18=lambda: ref.randomize(ref.resnet18())))
  monkeypatch.setitem(sys.modules, "torchvision", stand_in)
  monkeypatch.chdir(tmp_path)
  exec(compile(example, str(DOCS), "exec"), {})
  assert float(capsys.readouterr().out.splitlines()[-1]) < 1e-4


@pytest.mark.skipif("SAPR_TEST_FULL_SIZE" not in os.environ, reason="takes half a minute: set SAPR_TEST_FULL_SIZE=1")
@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101", "mobilenetv2", "resnet56"])
def test_full_size(reference, tmp_path, name):
  from benchmarks import torch_networks as ref

  theirs, size = {
    "resnet34": (lambda: ref.ResNet(ref.BasicBlock, (3, 4, 6, 3)), 224),
    "resnet50": (ref.resnet50, 224),
    "resnet101": (lambda: ref.ResNet(ref.Bottleneck, (3, 4, 23, 3)), 224),
    "mobilenetv2": (ref.MobileNetV2, 224),
    "resnet56": (lambda: ref.CifarResNet(56), 32),
  }[name]
  torch_model, model = randomized(theirs), sapr.models.create(name)
  variables = sapr.import_torch(save_torch(torch_model, tmp_path, "zip"), model, (1, size, size, 3))
  assert traverse_util.flatten_dict(variables)
  assert_same_logits(model, variables, torch_model, size)
