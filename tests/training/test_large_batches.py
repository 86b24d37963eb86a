"""Large batches: gradients accumulated over pieces, activations computed again, learning rates scaled and warmed up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import small_config
from tiny_main import Tiny

import sapr_jax as sapr
from sapr_jax.configs import default
from sapr_jax.runtime import devices
from sapr_jax.training import optimizers, steps
from sapr_jax.training.experiment import check_batches
from sapr_jax.training.inputs import Preprocessing, Shared
from sapr_jax.training.state import TrainState

PREPROCESSING = Preprocessing(mean=(0.5,), std=(0.25,), crop_padding=1, flip=True)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
SHARED = Shared(images=IMAGES, labels=RNG.integers(0, 10, 12).astype(np.int32), key=jax.random.key(0))


@pytest.fixture(scope="module")
def variables():
  return jax.jit(Tiny().init)(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))


def stepped(variables, **options):
  """Returns the state after a step on all images, and its metrics."""
  tx = optax.sgd(0.1)
  step = devices.MappedStep(steps.weight_step(Tiny(), tx, PREPROCESSING, **options), devices.data_mesh())
  state = jax.tree.map(jnp.copy, TrainState.create(variables, tx))
  return step.run(state, SHARED, [np.arange(12)[None]])


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [True, False])
def test_pieces_are_averaged_and_the_statistics_follow_them(variables, unroll):
  after, metrics = stepped(variables, accumulate=3, unroll=unroll)

  # The same images as in one piece: they are augmented before they are divided.
  image_key, _ = jax.random.split(jax.random.fold_in(jax.random.fold_in(SHARED.key, 0), 0))
  x = PREPROCESSING.normalize(PREPROCESSING.augment(image_key, jnp.asarray(IMAGES)))
  batch_stats, grads, losses = variables["batch_stats"], [], []
  for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):

    def loss_fn(params):
      state = {"params": params, "batch_stats": batch_stats}  # noqa: B023
      logits, updated = Tiny().apply(state, x[rows], train=True, mutable=["batch_stats"])  # noqa: B023
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, SHARED.labels[rows]).mean()  # noqa: B023
      return loss, updated["batch_stats"]

    (loss, batch_stats), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])
    losses.append(loss)
    grads.append(gradient)
  want = jax.tree.map(lambda w, *g: w - 0.1 * sum(g) / 3, variables["params"], *grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.params, want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.batch_stats, batch_stats)
  np.testing.assert_allclose(metrics["loss"][0], np.mean(losses), rtol=1e-5)
  assert int(after.step) == 1


@pytest.mark.slow
def test_the_regularization_comes_once_however_many_pieces(variables):
  graph = sapr.trace_channels(Tiny(), variables, (1, 8, 8, 1), select="unjoined")
  masks = {name: np.zeros_like(mask) for name, mask in graph.full_masks().items()}
  lost = []
  for accumulate in (1, 2):
    changes = []
    for gamma in (0.0, 10.0):
      tx = optax.chain(sapr.regularize_by_penalty(graph, gamma), optax.sgd(0.1))
      step = steps.weight_step(Tiny(), tx, PREPROCESSING, accumulate=accumulate)
      mapped = devices.MappedStep(step, devices.data_mesh())
      state = jax.tree.map(jnp.copy, TrainState.create(variables, tx, masks=masks))
      after, _ = mapped.run(state, SHARED, [np.arange(12)[None]])
      changes.append(after.params["conv0"]["kernel"])
    lost.append(changes[1] - changes[0])
  want = jax.grad(lambda p: -1.0 * sapr.partial_group_lasso(p, graph, masks))(variables["params"])["conv0"]["kernel"]
  for change in lost:
    np.testing.assert_allclose(change, want, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_accumulation_in_a_loop_needs_less_memory():
  model = Tiny()
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  tx, needed = optax.sgd(0.1), []
  state = jax.eval_shape(lambda v: TrainState.create(v, tx), shapes)
  images = jax.ShapeDtypeStruct((1024, 8, 8, 1), np.uint8)
  shared = Shared(images=images, labels=jax.ShapeDtypeStruct((1024,), np.int32), key=jax.random.key(0))
  for accumulate in (1, 8):
    step = steps.weight_step(model, tx, PREPROCESSING, accumulate=accumulate, unroll=False)
    mapped = devices.MappedStep(step, devices.data_mesh())
    compiled = mapped._many.lower(state, shared, jax.ShapeDtypeStruct((1, 1024), np.int32)).compile()
    needed.append(compiled.memory_analysis().temp_size_in_bytes)
  assert needed[1] < 0.3 * needed[0]


def phase(**fields):
  config = default.phase()
  config.update({"epochs": 4, "decay_epochs": (2,)} | fields)
  return config


def test_the_learning_rate_scales_with_the_batch_and_rises_from_zero():
  config = phase(batch_size=1024, base_batch_size=256, warmup_epochs=0.5)
  rate = optimizers.learning_rate_schedule(config, steps_per_epoch=8)
  got = [float(rate(step)) for step in range(32)]
  assert got == pytest.approx([0.1, 0.2, 0.3, 0.4] + [0.4] * 12 + [0.04] * 16)


def test_without_these_options_the_learning_rate_is_as_it_was():
  for fields in ({}, {"base_batch_size": 128}):
    rate = optimizers.learning_rate_schedule(phase(**fields), steps_per_epoch=8)
    assert [float(rate(step)) for step in (0, 15, 16)] == pytest.approx([0.1, 0.1, 0.01])
  warmed = optimizers.learning_rate_schedule(phase(schedule="cosine", warmup_epochs=1), steps_per_epoch=2)
  assert float(warmed(0)) == pytest.approx(0.05)


@pytest.mark.parametrize(
  ("batch", "accumulate", "count", "text"),
  [
    (60, 1, 8, r"train\.batch_size=60 must be a multiple of the 8 devices; use 56 or 64\."),
    (4, 1, 8, r"train\.batch_size=4 must be a multiple of the 8 devices; use 8\."),
    (64, 3, 8, r"train\.batch_size=64 must be a multiple of the 8 devices times train\.accumulate=3; use 48 or 72\."),
  ],
)
def test_batches_that_do_not_divide_are_refused_with_those_that_would(batch, accumulate, count, text):
  config = small_config(train__batch_size=batch, train__accumulate=accumulate)
  with pytest.raises(sapr.InputError, match=text):
    check_batches(config, 320, count)


def test_the_batch_of_a_generator_counts_where_its_images_are_read():
  fields = {"generator__batch_size": 64, "generator__data_share": 0.1}
  with pytest.raises(sapr.InputError, match=r"generator\.batch_size=64 is more than the 32 images there are"):
    check_batches(small_config(**fields), 320, 1)
  check_batches(small_config(prune__proposer="l2_norm", **fields), 320, 1)


@pytest.mark.parametrize(
  ("name", "fields", "shape"),
  [
    ("resnet8", {"width_multiplier": 0.25}, (2, 8, 8, 1)),
    pytest.param(
      "resnet50",
      {"width_multiplier": 0.125, "blocks": (1, 1, 1, 1), "num_classes": 10},
      (2, 32, 32, 3),
      marks=pytest.mark.slow,
    ),
    pytest.param("mobilenetv2_cifar", {"width_multiplier": 0.1}, (2, 16, 16, 3), marks=pytest.mark.slow),
  ],
)
def test_a_network_that_computes_activations_again_is_the_same_network(name, fields, shape, tmp_path):
  plain, remat = sapr.models.create(name, **fields), sapr.models.create(name, remat=True, **fields)
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  shapes = jax.eval_shape(plain.init, jax.random.key(0), x)
  assert jax.eval_shape(remat.init, jax.random.key(0), x) == shapes
  draw = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda s: jnp.asarray(draw.uniform(0.5, 1.5, s.shape) / max(np.prod(s.shape[:-1]), 1), s.dtype), shapes
  )
  graphs = [sapr.trace_channels(model, shapes, (1, *shape[1:])) for model in (plain, remat)]
  assert [group.name for group in graphs[0].groups] == [group.name for group in graphs[1].groups]
  assert graphs[0].macs() == graphs[1].macs()

  masks = {name: np.arange(len(mask)) % 2 for name, mask in graphs[1].full_masks().items()}
  masks = {name: np.where(mask.any(), mask, 1) for name, mask in masks.items()}
  small, small_variables = sapr.prune(remat, variables, graphs[1], masks)
  masked = {**variables, "params": sapr.mask_params(variables["params"], graphs[1], masks)}
  want = jax.jit(plain.apply)(masked, x)
  np.testing.assert_allclose(jax.jit(small.apply)(small_variables, x), want, rtol=1e-4, atol=1e-5)

  # A saved model can be read with or without.
  sapr.save(tmp_path / "model", small, small_variables)
  assert sapr.load(tmp_path / "model")[0].base.remat
  if "blocks" not in fields:
    assert not sapr.load(tmp_path / "model", base=plain)[0].base.remat


def test_a_network_that_computes_activations_again_keeps_less_for_the_backward_pass(tiny):
  x = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)

  def kept(model):
    def residuals(params, batch_stats, x):
      variables = {"params": params, "batch_stats": batch_stats}
      return jax.vjp(lambda p: model.apply(variables | {"params": p}, x, train=True, mutable=["batch_stats"]), params)[
        1
      ]

    shapes = jax.eval_shape(residuals, tiny.params, tiny.variables["batch_stats"], x)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

  assert kept(tiny.model.clone(remat=True)) < 0.5 * kept(tiny.model)


@pytest.mark.slow
def test_gradients_are_the_same_with_activations_computed_again(tiny):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)

  def gradient(model):
    def loss_fn(params):
      logits, updated = model.apply({**tiny.variables, "params": params}, x, train=True, mutable=["batch_stats"])
      return jnp.mean(logits**2), updated

    return jax.jit(jax.grad(loss_fn, has_aux=True))(tiny.params)

  want, got = gradient(tiny.model), gradient(tiny.model.clone(remat=True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)
