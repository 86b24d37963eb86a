"""Names of layers and tensors in PyTorch: those of torchvision and of the usual CIFAR repositories."""

from __future__ import annotations

import pytest

import sapr_jax as sapr
from sapr_jax.artifacts import torch_names
from sapr_jax.artifacts.torch_weights import _describe, _name_tensors


def torch_shapes(model, input_shape=(1, 32, 32, 3)):
  """Returns torch name -> shape of all tensors of a network of the package."""
  variables, layers = _describe(model, input_shape)
  tensors = _name_tensors(variables, torch_names.name_layers(model, list(layers)))
  shapes = {name: variables[variable].shape for name, variable in tensors.items()}
  return {name: (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else shape for name, shape in shapes.items()}


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
  assert {row[0] for row in mark.args[1]} == own - {"vit_tiny"}  # which torchvision does not have


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
