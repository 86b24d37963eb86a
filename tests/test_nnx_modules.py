"""A module of Flax NNX from the `Pruner` to the saved model and the exported program."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sapr_jax as sapr

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(size=(8, 6)).astype(np.float32) for _ in range(2)]
TRACES = []


class Net(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(6, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
    self.drop = nnx.Dropout(0.2, rngs=rngs)
    self.down = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.down(self.activation(self.drop(self.norm(self.up(x)))))

  def activation(self, x):
    return nnx.relu(x)


class HoldsWidth(Net):
  def activation(self, x):
    return nnx.relu(x.reshape(-1, 8))


def loss_fn(module, batch):
  return jnp.mean((module(batch) - batch[:, :3]) ** 2)


@nnx.jit
def train_step(module, optimizer, batch):
  TRACES.append(1)
  optimizer.update(module, nnx.grad(loss_fn)(module, batch))


def run(module, x):
  module.eval()
  return np.asarray(module(x))


@pytest.fixture(scope="module")
def trained():
  """A trained module, its pruner and its optimizer."""
  module = Net(nnx.Rngs(0))
  pruner = sapr.Pruner(module, BATCHES[0], budget=0.5, gamma=0.5, select="unjoined", search=sapr.Search(start=1))
  optimizer = nnx.Optimizer(module, pruner.regularize(optax.sgd(0.1, momentum=0.5)), wrt=nnx.Param)
  norms, traces = sapr.l2_norm(nnx.state(module, nnx.Param), pruner.graph)["up"], len(TRACES)
  for epoch in range(4):
    assert pruner.update(optimizer, module) is optimizer
    assert (sum(pruner.masks(optimizer)["up"]) < 8) == (epoch > 0)
    for batch in BATCHES:
      train_step(module, optimizer, batch)
  assert len(TRACES) == traces + 1, "new masks compile nothing"
  return module, pruner, optimizer, norms


def test_the_pruner_takes_a_module_and_its_optimizer(trained):
  module, pruner, optimizer, before = trained
  masks = jax.device_get(pruner.masks(optimizer))
  assert "36 of 72 MACs (50.0%)" in pruner.report(optimizer) and "after 4 epochs\nup 4/8" in pruner.report(optimizer)
  after, dropped = sapr.l2_norm(nnx.state(module, nnx.Param), pruner.graph)["up"], masks["up"] == 0
  assert (after[dropped] < before[dropped]).all() and np.mean(after[~dropped] / before[~dropped]) > 0.9
  small = pruner.prune(module, optimizer)
  assert type(small) is Net and small.up.out_features == 4
  want = sapr.masked_apply(module, pruner.graph, masks, BATCHES[0])
  np.testing.assert_allclose(run(small, BATCHES[0]), want, rtol=1e-4, atol=1e-5)
  again = pruner.prune(module, optimizer, BATCHES, lambda module, batch: module(batch))
  mean = np.asarray(small.norm.mean[...])
  for batch in BATCHES:  # with a momentum of one half
    mean = 0.5 * mean + 0.5 * (batch @ small.up.kernel[...] + small.up.bias[...]).mean(0)
  np.testing.assert_allclose(again.norm.mean[...], mean, rtol=1e-4, atol=1e-5)
  assert np.any(small.norm.mean[...] != mean)


@pytest.mark.parametrize("search", [sapr.Search(importance="taylor"), sapr.Search(generator=sapr.GeneratorOptions())])
def test_a_search_that_learns_gets_the_module_in_evaluation(search):
  module, seen = Net(nnx.Rngs(0)), []

  def loss(module, batch):
    seen.append((module.drop.deterministic, module.norm.use_running_average))
    return loss_fn(module, batch)

  pruner = sapr.Pruner(module, BATCHES[0], budget=0.5, gamma=0.5, select="unjoined", search=search)
  optimizer = nnx.Optimizer(module, pruner.regularize(optax.sgd(0.1)), wrt=nnx.Param)
  with pytest.raises(sapr.InputError, match="loss_fn must be given to this search"):
    pruner.update(optimizer, module, BATCHES)
  state = jax.tree.map(np.asarray, nnx.state(module, (nnx.Param, nnx.BatchStat)))
  for _ in range(2):
    pruner.update(optimizer, module, BATCHES, loss)
  assert seen == [(True, True)], "it is compiled once"
  assert sum(pruner.masks(optimizer)["up"]) == 4
  jax.tree.map(np.testing.assert_array_equal, state, nnx.state(module, (nnx.Param, nnx.BatchStat)))


def cut(kind):
  module = kind(nnx.Rngs(0))
  graph = sapr.trace_channels(module, BATCHES[0], select="unjoined")
  return sapr.prune(module, graph, {"up": np.arange(8) % 2})


@pytest.mark.parametrize("kind", [Net, HoldsWidth])
def test_a_small_module_is_saved_and_exported(kind, tmp_path):
  small = cut(kind)
  sapr.save(tmp_path / "net", small, inputs=sapr.Inputs((6,)), metrics={"accuracy": 0.5})
  loaded = sapr.load(tmp_path / "net", base=nnx.eval_shape(lambda: kind(nnx.Rngs(1))))
  assert type(loaded) is type(small) and nnx.graphdef(loaded) == nnx.graphdef(small)
  np.testing.assert_array_equal(loaded(BATCHES[0]), small(BATCHES[0]))  # with dropout of the same numbers
  assert np.array_equal(run(loaded, BATCHES[1]), run(small, BATCHES[1]))
  pickled = pickle.loads(pickle.dumps(small))
  assert type(pickled) is type(small) and np.array_equal(run(pickled, BATCHES[1]), run(small, BATCHES[1]))
  info = sapr.load_info(tmp_path / "net")
  assert (info.module, info.macs) == (kind.__name__, sapr.count_macs(small, BATCHES[0][:1]))
  sapr.export(tmp_path / "net.stablehlo", small, (1, 6))
  served = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
  np.testing.assert_allclose(served.call(BATCHES[0]), run(small, BATCHES[0]), rtol=1e-5, atol=1e-6)


def test_a_number_in_a_variable_comes_from_a_base_that_holds_it(tmp_path):
  def dense():
    module = nnx.Sequential(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    module.number = nnx.Variable(3)
    return module

  sapr.save(tmp_path / "net", dense())
  assert sapr.load(tmp_path / "net", base=dense()).number.get_value() == 3
  with pytest.raises(sapr.InputError, match=r"variable/number is int32\[\] in it, not there .*give the module itself"):
    sapr.load(tmp_path / "net", base=nnx.eval_shape(dense))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda path: sapr.load(path), r"holds a Net of NNX; give the dense module: load\(path, base=Net\("),
    (lambda path: sapr.load(path, base=nnx.Linear(2, 3, rngs=nnx.Rngs(0))), "holds a Net; base is a Linear"),
    (lambda path: sapr.load(path, base=cut(HoldsWidth)), "holds a Net; base is a NarrowHoldsWidth"),
    (lambda path: sapr.load(path, base=with_width(2)), r"norm/mean is float32\[2\] in it, float32\[4\] in the file"),
    (lambda path: sapr.save(path, cut(Net), {}), "a module of NNX must be saved alone"),
    (
      lambda path: sapr.save(path, nnx.eval_shape(lambda: Net(nnx.Rngs(0)))),
      r"variables must hold arrays .*got ShapeDtype",
    ),
    (
      lambda path: sapr.save(path, nnx.Optimizer(cut(Net), optax.sgd(0.1), wrt=nnx.Param)),
      "module, got NNX's Optimizer",
    ),
    (lambda path: sapr.trace_channels(Net, BATCHES[0]), r"must be a module, got the class Net; make one, Net\("),
    (lambda path: sapr.export(path / "net.stablehlo", cut(Net)), "input_shape must be positive sizes, .* got None"),
    (lambda path: sapr.export(path / "a.stablehlo", cut(Net), (1, 6), dtype="float16"), "for a linen model"),
    (lambda path: sapr.export(path / "a.safetensors", cut(Net), (1, 6)), "must be a Flax linen module"),
    (lambda path: sapr.renew_statistics(cut(Net), BATCHES), r"renew must be a function, got None; it takes \(module"),
  ],
)
def test_bad_input(call, message, tmp_path_factory):
  path = tmp_path_factory.getbasetemp() / "saved_nnx"
  if not path.exists():
    sapr.save(path, cut(Net))
  with pytest.raises(sapr.InputError, match=message):
    call(path)


def with_width(width):
  module = Net(nnx.Rngs(0))
  module.norm = nnx.BatchNorm(width, rngs=nnx.Rngs(0))
  return module


def test_a_loop_that_forgets_update_is_told(caplog):
  module = Net(nnx.Rngs(0))
  pruner = sapr.Pruner(module, inputs=(1, 6), budget=0.5, gamma=0.5, select="unjoined")
  optimizer = nnx.Optimizer(module, pruner.regularize(optax.sgd(0.1)), wrt=nnx.Param)
  train_step(module, optimizer, BATCHES[0])
  jax.effects_barrier()
  assert "came before pruner.update" in caplog.records[0].getMessage()
  with pytest.raises(sapr.InputError, match=r"pruner\.update was called 0 times"):
    pruner.prune(module, optimizer)
