"""Exported programs give the logits of the model, in a process that has neither this package nor Flax."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr

SERVE = """
import sys
sys.modules["sapr_jax"] = sys.modules["flax"] = None  # importing either fails
import jax, numpy as np
folder = sys.argv[1]
served = jax.export.deserialize(bytearray(open(f"{folder}/net.stablehlo", "rb").read()))
for name in sys.argv[2:]:
  np.save(f"{folder}/logits_{name}.npy", jax.jit(served.call)(np.load(f"{folder}/images_{name}.npy")))
"""


def pruned(name, size, share=0.5, select="blocks", **fields):
  """Returns a network with variables unlike those of initialization, pruned by l1 norm."""
  model = sapr.models.create(name, **fields)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == "kernel":
      values = rng.normal(size=leaf.shape) * (2 / np.prod(leaf.shape[:-1])) ** 0.5
    elif path[-1].key in ("mean", "bias"):
      values = 0.1 * rng.normal(size=leaf.shape)
    else:
      values = rng.uniform(0.5, 1.5, leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  graph = sapr.trace_channels(model, variables, (1, size, size, 3), select=select)
  scores = sapr.relative_to_group_mean(sapr.l1_norm(variables["params"], graph))
  return sapr.prune(model, variables, graph, sapr.project_to_budget(graph, scores, sapr.macs_budget(graph, share)))


def images(batch, size):
  return np.random.default_rng(batch).normal(size=(batch, size, size, 3)).astype(np.float32)


def logits(model, variables, x):
  return np.asarray(jax.jit(model.apply)(variables, x))


def run_onnx(path, x):
  session = pytest.importorskip("onnxruntime", reason="pip install onnxruntime").InferenceSession(str(path))
  (result,) = session.run(["logits"], {"images": x})
  return result


@pytest.fixture(scope="module")
def resnet():
  return pruned("resnet8", 8, width_multiplier=0.25)


@pytest.fixture(scope="module")
def streams():
  """A network that evaluates the dense one's program, as the padding of its shortcuts is a number in the code."""
  model, variables = pruned("resnet8", 8, select="exact", width_multiplier=0.25)
  assert any(path == "params/fc/kernel" for path, *_ in model.cuts)
  return model, variables


@pytest.fixture(scope="module")
def mobilenet():
  return pruned("mobilenetv2_cifar", 16, width_multiplier=0.25)


@pytest.mark.parametrize(
  "name, size", [("resnet", 8), ("streams", 8), pytest.param("mobilenet", 16, marks=pytest.mark.slow)]
)
def test_onnx_gives_the_same_logits_for_any_batch(name, size, request, tmp_path):
  pytest.importorskip("onnx", reason="pip install 'sapr_jax[onnx]'")
  model, variables = request.getfixturevalue(name)
  sapr.export(tmp_path / "net.onnx", model, variables, (1, size, size, 3))
  for batch in (1, 7):
    x = images(batch, size)
    np.testing.assert_allclose(run_onnx(tmp_path / "net.onnx", x), logits(model, variables, x), rtol=1e-4, atol=1e-4)
  about = json.loads((tmp_path / "net.onnx.json").read_text())
  assert about["opset"] == 17 and about["input"] == {"shape": ["batch", size, size, 3], "dtype": "float32"}


def test_onnx_holds_the_weights_once_one_transposition_and_activations(mobilenet, tmp_path):
  onnx = pytest.importorskip("onnx", reason="pip install 'sapr_jax[onnx]'")
  sapr.export(tmp_path / "net.onnx", *mobilenet, (1, 16, 16, 3))
  graph = onnx.load(tmp_path / "net.onnx").graph
  ops = [node.op_type for node in graph.node]
  assert ops.count("Transpose") == 1
  # ReLU6; with Max and Min, ONNX Runtime took up to twice as long.
  assert ops.count("Relu") == ops.count("Clip") == 35 and not {"Max", "Min"} & set(ops)
  held = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
  assert held < 1.01 * sum(leaf.size for leaf in jax.tree.leaves(mobilenet[1]))


class EverySecond(nn.Module):
  """Code that holds a width, and an index that is a slice or, where the batch is a symbol, a gather."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name="b")(nn.Dense(6, name="a")(x).reshape((-1, 2, 6))[:, ::2])


def test_a_cut_program_that_depends_on_the_batch_is_refused(tmp_path):
  model, x = EverySecond(), jnp.ones((1, 2, 4))
  variables = model.init(jax.random.key(0), x)
  graph = sapr.trace_channels(model, variables, x, select="exact")
  small = sapr.prune(model, variables, graph, {"a": np.arange(6) < 4})
  with pytest.raises(sapr.InputError, match=r"takes another way where the size of the batch is not known.*batch=1"):
    sapr.export(tmp_path / "net.stablehlo", *small, (1, 2, 4))
  sapr.export(tmp_path / "net.stablehlo", *small, (1, 2, 4), batch=1)
  served = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
  np.testing.assert_allclose(served.call(x), small[0].apply(small[1], x), rtol=1e-6)


def test_stablehlo_runs_without_the_package(resnet, tmp_path):
  model, variables = resnet
  classes = [f"class {n}" for n in range(10)]
  sapr.export(tmp_path / "net.stablehlo", model, variables, (1, 8, 8, 3), class_names=classes)
  for batch in (1, 3):
    np.save(tmp_path / f"images_{batch}.npy", images(batch, 8))
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  subprocess.run([sys.executable, "-c", SERVE, str(tmp_path), "1", "3"], cwd=tmp_path, env=environment, check=True)
  for batch in (1, 3):
    served = np.load(tmp_path / f"logits_{batch}.npy")
    np.testing.assert_allclose(served, logits(model, variables, images(batch, 8)), rtol=1e-5, atol=1e-5)
  assert b".py" not in (tmp_path / "net.stablehlo").read_bytes()  # nothing is said of the exporting machine
  about = json.loads((tmp_path / "net.stablehlo.json").read_text())
  assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["class_names"] == classes
  assert about["widths"] == {layer: dict(fields) for layer, fields in model.widths} != {}
  assert about["output"] == {"shape": ["batch", 10], "dtype": "float32"}


def test_stablehlo_has_depthwise_convolutions_in_the_form_that_is_fast_on_cpus(tmp_path):
  model = nn.Sequential([nn.Conv(6, (3, 3), feature_group_count=6), nn.relu])
  x = np.random.default_rng(0).normal(size=(2, 5, 5, 6)).astype(np.float32)
  variables = model.init(jax.random.key(0), x)

  def exported(*platforms):
    sapr.export(tmp_path / "net.stablehlo", model, variables, (1, 5, 5, 6), platforms=platforms)
    return jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))

  assert "stablehlo.convolution" in exported("cuda").mlir_module()
  for platforms in (("cpu",), ("cpu", "cuda")):
    program = jax.jit(exported(*platforms).call).lower(x).compile()
    assert " convolution(" not in program.as_text()
    np.testing.assert_allclose(program(x), model.apply(variables, x), rtol=1e-5, atol=1e-6)
  assert " convolution(" in jax.jit(model.apply).lower(variables, x).compile().as_text()  # the layer's own form


def test_preprocessing_is_part_of_the_program(resnet, tmp_path):
  model, variables = resnet

  def preprocess(x):
    return (x.astype(jnp.float32) / 255 - 0.5) / jnp.asarray([0.2, 0.25, 0.3])

  x = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  expected = logits(model, variables, preprocess(jnp.asarray(x)))
  sapr.export(tmp_path / "net.stablehlo", model, variables, (1, 8, 8, 3), preprocess=preprocess, platforms="cpu")
  served = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
  np.testing.assert_allclose(jax.jit(served.call)(x), expected, rtol=1e-5, atol=1e-5)
  pytest.importorskip("onnx", reason="pip install 'sapr_jax[onnx]'")
  sapr.export(tmp_path / "net.onnx", model, variables, (1, 8, 8, 3), preprocess=preprocess)
  np.testing.assert_allclose(run_onnx(tmp_path / "net.onnx", x), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_halves_the_file_and_is_the_model_in_bfloat16(tmp_path):
  model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(10)])
  with pytest.raises(sapr.InputError, match="the field dtype"):
    sapr.export(
      tmp_path / "net.stablehlo", model, model.init(jax.random.key(0), jnp.ones((1, 64))), (1, 64), dtype="bfloat16"
    )
  model = nn.Dense(256)
  variables = model.init(jax.random.key(0), jnp.ones((1, 64)))
  sizes = {}
  for dtype in ("float32", "bfloat16"):
    sapr.export(tmp_path / "net.stablehlo", model, variables, (1, 64), dtype=dtype, platforms=["cpu"], batch=2)
    sizes[dtype] = (tmp_path / "net.stablehlo").stat().st_size
  x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
  served = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
  expected = nn.Dense(256, dtype=jnp.bfloat16).apply(variables, x)
  np.testing.assert_array_equal(served.call(x).astype(jnp.float32), expected.astype(jnp.float32))
  assert sizes["bfloat16"] < 0.6 * sizes["float32"]


class AnotherNetwork(nn.Module):
  """Operations that the networks of this package do not have."""

  @nn.compact
  def __call__(self, x):
    y = nn.silu(nn.Conv(6, (3, 3), strides=2, padding="SAME")(x))
    gate = nn.sigmoid(nn.Dense(6)(jnp.mean(y, (1, 2), keepdims=True)))
    y = jnp.maximum(0.01, nn.avg_pool(y * gate, (2, 2), (1, 1)))
    y = jnp.maximum(jnp.clip(y, -0.1, 0.2), 0.9 * y)
    y = jnp.concatenate([y, nn.leaky_relu(nn.LayerNorm()(y))], -1).transpose(0, 2, 1, 3)
    return nn.Dense(4)(y[:, 1:].reshape(y.shape[0], -1)) + jnp.max(x, (1, 2))[:, :1] ** 2


@pytest.mark.parametrize("batch", [None, 2])
def test_onnx_of_another_network(batch, tmp_path):
  pytest.importorskip("onnx", reason="pip install 'sapr_jax[onnx]'")
  with jax.numpy_dtype_promotion("standard"):
    variables = AnotherNetwork().init(jax.random.key(0), images(1, 8))
    sapr.export(tmp_path / "net.onnx", AnotherNetwork(), variables, (1, 8, 8, 3), batch=batch)
    expected = logits(AnotherNetwork(), variables, images(2, 8))
  np.testing.assert_allclose(run_onnx(tmp_path / "net.onnx", images(2, 8)), expected, rtol=1e-4, atol=1e-4)


class Lines(nn.Module):
  """A function of the images, in place of a network."""

  function: Any

  @nn.compact
  def __call__(self, x):
    return self.function(x)


NUMBERS = {
  "quotient": lambda x: x.transpose(0, 2, 1, 3) / x.max(),
  "first": lambda x: x.max() - x[:, ::2],
  "bounds": lambda x: jnp.clip(jnp.maximum(x, x.mean()), x.min(), 0.5 * x.max()),
  "choice": lambda x: jnp.where(x.sum() > 100, x, -x.transpose(0, 2, 1, 3)),
  "known": lambda x: jnp.maximum(x.sum(), jnp.zeros((2, 3))) * jnp.ones((1, 1)),
  "known choice": lambda x: jnp.where(x.sum() > 100, jnp.ones((1, 3)), jnp.zeros((1, 3))),
  "number": lambda x: jnp.maximum(x.sum(axis=()).sum(), 0.0) * 2.0,
}
"""Programs with a number that depends on the images, beside arrays."""


@pytest.mark.parametrize("name", NUMBERS)
def test_onnx_of_numbers_that_are_computed(name, tmp_path):
  pytest.importorskip("onnx", reason="pip install 'sapr_jax[onnx]'")
  x, file = images(2, 4), tmp_path / "net.onnx"
  sapr.export(file, Lines(NUMBERS[name]), {}, x.shape, batch=2)
  found, expected = run_onnx(file, x), np.asarray(NUMBERS[name](x))
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_safetensors_are_those_of_pytorch(resnet, tmp_path):
  sapr.export(tmp_path / "a.safetensors", *resnet, (1, 8, 8, 3))
  sapr.export_torch(tmp_path / "b.safetensors", *resnet)
  assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class FixedBatch(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x) if int(x.shape[0]) > 0 else x


class Sorts(nn.Module):
  @nn.compact
  def __call__(self, x):
    return jnp.sort(nn.Dense(3)(x))


def refused(path, model, shape=(1, 4), **options):
  variables = model.init(jax.random.key(0), jnp.zeros(shape))
  with pytest.raises(sapr.InputError) as error:
    sapr.export(path, model, variables, shape, **options)
  message = str(error.value)
  assert "\n" not in message
  return message


def test_misuse_is_said_in_one_line(tmp_path, monkeypatch):
  model, file = nn.Dense(3), tmp_path / "net.stablehlo"
  assert ".stablehlo or .onnx or .safetensors" in refused(tmp_path / "net.pb", model)
  assert "platforms must be some of cpu, cuda" in refused(file, model, platforms=["gpu"])
  assert "batch must be an integer" in refused(file, model, batch=0)
  assert "preprocess must be a function" in refused(file, model, preprocess=3)
  assert "class_names must be a list" in refused(file, model, class_names="cat")
  assert "holds weights alone" in refused(tmp_path / "net.safetensors", model, batch=1)
  assert "give the number, such as batch=1" in refused(file, FixedBatch())
  (tmp_path / "file").write_text("x")
  assert "cannot be used" in refused(tmp_path / "file" / "net.stablehlo", model)
  (tmp_path / "folder.stablehlo").mkdir()
  assert "is not a file" in refused(tmp_path / "folder.stablehlo", model)
  monkeypatch.setitem(sys.modules, "onnx", None)
  assert "pip install 'sapr_jax[onnx]'" in refused(tmp_path / "net.onnx", model)
  assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.stablehlo"}


def test_what_onnx_does_not_have_is_said_in_one_line(tmp_path):
  pytest.importorskip("onnx", reason="pip install 'sapr_jax[onnx]'")
  assert "operation sort, which has no rule" in refused(tmp_path / "net.onnx", Sorts())
  assert "float32 or float16 for ONNX" in refused(tmp_path / "net.onnx", nn.Dense(3), dtype="bfloat16")
  for model, options in (
    (nn.Dense(3, dtype=jnp.bfloat16), {}),
    (nn.Dense(3, dtype=jnp.float32), {"input_dtype": "bfloat16"}),
  ):
    assert "float32 or float16, got bfloat16; give" in refused(tmp_path / "net.onnx", model, **options)
  assert "give it, such as batch=1" in refused(tmp_path / "net.onnx", Lines(lambda x: x - x.mean()))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2"])
def test_networks_for_imagenet(name, tmp_path):
  pytest.importorskip("onnx", reason="pip install 'sapr_jax[onnx]'")
  model, variables = pruned(name, 224)
  size = 4 * sum(leaf.size for leaf in jax.tree.leaves(variables))
  for suffix in ("onnx", "stablehlo"):
    sapr.export(tmp_path / f"net.{suffix}", model, variables, (1, 224, 224, 3))
    assert 0.98 * size < (tmp_path / f"net.{suffix}").stat().st_size < 1.03 * size
  x = images(2, 224)
  expected = logits(model, variables, x)
  served = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
  rounding = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(jax.jit(served.call)(x), expected, rtol=0, atol=rounding)
  np.testing.assert_allclose(run_onnx(tmp_path / "net.onnx", x), expected, rtol=0, atol=rounding)
