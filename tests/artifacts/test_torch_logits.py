"""Imported and exported weights give the logits of PyTorch's own networks."""

from __future__ import annotations

import json
import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest
from trees import assert_same

import sapr_jax as sapr

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'sapr_jax[torch]'")

from safetensors.torch import load_file, save_file  # noqa: E402

from benchmarks import torch_networks as ref  # noqa: E402

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "torch.md"
models = sapr.models
slow = pytest.mark.slow

# Name -> (ours, theirs, sizes of images, one even and one odd).
NARROW = {
  "cifar_resnet": (
    models.create("resnet14", width_multiplier=0.25),
    lambda: ref.CifarResNet(14, widths=(4, 8, 16)),
    (32, 33),
  ),
  "resnet18": (
    models.ResNet(blocks=(1, 2, 1, 1), bottleneck=False, num_classes=5, width_multiplier=0.125),
    lambda: ref.ResNet(ref.BasicBlock, (1, 2, 1, 1), 5, 8),
    (32, 45),
  ),
  "resnet50": (
    models.ResNet(blocks=(1, 2, 1, 1), bottleneck=True, num_classes=5, width_multiplier=0.125),
    lambda: ref.ResNet(ref.Bottleneck, (1, 2, 1, 1), 5, 8),
    (64, 33),
  ),
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
FULL = {
  "resnet34": (lambda: ref.ResNet(ref.BasicBlock, (3, 4, 6, 3)), 224),
  "resnet50": (ref.resnet50, 224),
  "resnet101": (lambda: ref.ResNet(ref.Bottleneck, (3, 4, 23, 3)), 224),
  "mobilenetv2": (ref.MobileNetV2, 224),
  "resnet56": (lambda: ref.CifarResNet(56), 32),
}


def assert_same_logits(model, variables, torch_model, size):
  images = np.random.default_rng(size).normal(size=(2, size, size, 3)).astype(np.float32)
  with torch.no_grad():
    want = torch_model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
  got = jax.jit(model.apply)(variables, images)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
  # The logits depend on the images by far more than the tolerance, so this compares more than biases.
  assert np.abs(want[0] - want[1]).max() > 2e-3 * np.abs(want).max()


def save_torch(torch_model, folder, how="zip"):
  state = torch_model.state_dict()
  path = folder / {"safetensors": "weights.safetensors", "zip": "weights.pth", "legacy": "weights.th"}[how]
  if how == "safetensors":
    save_file(state, path)
  else:
    optimizer = torch.optim.SGD(torch_model.parameters(), 0.1, momentum=0.9).state_dict()
    checkpoint = {"epoch": 3, "best": 0.7, "optimizer": optimizer, "state_dict": state}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=how == "zip")
  return path


@pytest.mark.parametrize(
  "name",
  [
    "cifar_resnet",
    "resnet18",
    *(pytest.param(name, marks=slow) for name in ("resnet50", "mobilenetv2", "mobilenetv2_cifar")),
  ],
)
def test_imported_weights_give_the_logits_of_pytorch(tmp_path, name):
  model, theirs, sizes = NARROW[name]
  torch_model, shape = ref.randomize(theirs()), (1, sizes[0], sizes[0], 3)
  read = {how: sapr.import_torch(save_torch(torch_model, tmp_path, how), model, shape) for how in ("zip", "legacy")}
  assert_same(read["zip"], sapr.import_torch(save_torch(torch_model, tmp_path, "safetensors"), model, shape))
  assert_same(read["legacy"], read["zip"])
  for size in sizes:
    assert_same_logits(model, read["zip"], torch_model, size)


@pytest.fixture(scope="module")
def example():
  """The example of docs/torch.md."""
  (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
  return code


@pytest.mark.parametrize(
  ("name", "select"),
  [
    # The streams of "cifar_resnet" can be cut, but the network in PyTorch pads them by fixed numbers.
    *(("cifar_resnet", "blocks"), ("resnet18", "blocks"), ("resnet18", "exact")),
    pytest.param("resnet50", "blocks", marks=slow),
    pytest.param("resnet50", "exact", marks=slow),
    pytest.param("mobilenetv2", "exact", marks=slow),
    pytest.param("mobilenetv2_cifar", "blocks", marks=slow),
  ],
)
def test_pruned_networks_compute_the_same_in_pytorch(example, tmp_path, name, select):
  model, theirs, sizes = NARROW[name]
  shape = (1, sizes[0], sizes[0], 3)
  variables = sapr.import_torch(save_torch(ref.randomize(theirs()), tmp_path), model, shape)
  graph = sapr.trace_channels(model, variables, shape, select=select)
  rng = np.random.default_rng(0)
  masks = {group.name: rng.permutation(group.size) < rng.uniform(0.5, 1) * group.size for group in graph.groups}
  small, small_variables = sapr.prune(model, variables, graph, masks)
  path = tmp_path / "small.safetensors"
  sapr.export_torch(path, small, small_variables)
  assert_same(sapr.import_torch(path, small, shape), small_variables)

  torch_model, layers = theirs(), json.loads(path.with_suffix(".json").read_text())["layers"]
  if name == "cifar_resnet":
    torch_model.linear, torch_model.fc = None, torch_model.linear
    torch_model.forward = types.MethodType(cifar_forward, torch_model)
  namespace = {"nn": torch.nn}
  exec(re.search(r"def narrow.*?return model\n", example, re.DOTALL).group(), namespace)
  namespace["narrow"](torch_model, layers).load_state_dict(load_file(path), strict=True)
  assert_same_logits(small, small_variables, torch_model, sizes[1])


def cifar_forward(self, x):
  x = self.bn1(self.conv1(x)).relu()
  return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@slow
def test_the_example_of_the_guide(example, tmp_path, monkeypatch, capsys):
  # Our reference network in the place of torchvision, which need not be installed.
  stand_in = types.SimpleNamespace(models=types.SimpleNamespace(resnet18=lambda: ref.randomize(ref.resnet18())))
  monkeypatch.setitem(sys.modules, "torchvision", stand_in)
  monkeypatch.chdir(tmp_path)
  exec(compile(example, str(DOCS), "exec"), {})
  assert float(capsys.readouterr().out.splitlines()[-1]) < 1e-4


@slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(tmp_path, name):
  theirs, size = FULL[name]
  torch_model, model = ref.randomize(theirs()), models.create(name)
  variables = sapr.import_torch(save_torch(torch_model, tmp_path), model, (1, size, size, 3))
  assert_same_logits(model, variables, torch_model, size)
