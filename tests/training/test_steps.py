"""The per-device steps and how they are mapped and repeated."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapr_jax as sapr
from sapr_jax.configs import default
from sapr_jax.method import GeneratorState, share_weights, split_by_group
from sapr_jax.runtime import devices
from sapr_jax.training import optimizers, steps
from sapr_jax.training.distillation import Distillation
from sapr_jax.training.inputs import Preprocessing, Shared
from sapr_jax.training.state import TrainState

PREPROCESSING = Preprocessing(mean=(0.5,), std=(0.25,), crop_padding=0, flip=False)


@pytest.fixture(scope="module")
def mesh():
  return devices.data_mesh()


@pytest.fixture(scope="module")
def shared(mesh):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(0, 256, (20, 8, 8, 1)), jnp.uint8)
  return devices.replicate(
    Shared(images=images, labels=jnp.asarray(rng.integers(0, 10, 20), jnp.int32), key=jax.random.key(0)), mesh
  )


def test_many_steps_in_one_call_equal_one_after_the_other(mesh):
  def step(state, shared, batch):
    state = state * shared + jnp.sum(batch)
    return state, {"sum": jnp.sum(batch)}

  batches = np.arange(14.0, dtype=np.float32).reshape(7, 2)
  mapped = devices.MappedStep(step, mesh)
  results = []
  for size in (1, 3, 7):
    calls = [batches[start : start + size] for start in range(0, 7, size)]
    state, metrics = mapped.run(jnp.ones(()), jnp.asarray(0.5), calls)
    np.testing.assert_array_equal(metrics["sum"], batches.sum(axis=1))
    results.append(float(state))
  assert results == pytest.approx([results[0]] * 3)


def test_metrics_are_fetched_some_calls_at_a_time_in_order():
  queue = devices.MetricsQueue(every=3)
  fetched = [queue.add({"loss": np.asarray([i])}) for i in range(8)]
  assert [[int(m["loss"][0]) for m in calls] for calls in fetched] == [[]] * 5 + [[0, 1, 2]] + [[]] * 2
  assert [int(m["loss"][0]) for m in queue.fetch()] == [3, 4, 5, 6, 7]
  assert queue.fetch() == []


def test_the_host_runs_a_bounded_number_of_calls_ahead(mesh, monkeypatch):
  read, seen = [], []

  def calls():
    for i in range(9):
      read.append(i)
      yield np.full((1, 2), float(i), np.float32)

  mapped = devices.MappedStep(lambda state, shared, batch: (state + jnp.sum(batch), {"sum": jnp.sum(batch)}), mesh)
  fetch = devices.MetricsQueue.fetch
  monkeypatch.setattr(
    devices.MetricsQueue, "fetch", lambda queue, count=None: seen.append(read[-1]) or fetch(queue, count)
  )
  state, metrics = mapped.run(jnp.zeros(()), jnp.zeros(()), calls())
  assert float(state) == 2 * sum(range(9)) and metrics["sum"].tolist() == [2.0 * i for i in range(9)]
  assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 8]  # on a CPU, one call is under way while the next is read


def test_the_weight_step_is_sgd_with_weight_decay_by_hand(tiny, mesh, shared):
  tx = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9))
  step = devices.MappedStep(steps.weight_step(tiny.model, tx, PREPROCESSING), mesh)
  before = TrainState.create(tiny.variables, tx)
  after, metrics = step.run(jax.tree.map(jnp.copy, before), shared, [np.arange(8)[None]])

  x = (np.asarray(shared.images[:8], np.float32) / 255 - 0.5) / 0.25

  def loss_fn(params):
    logits, updated = tiny.model.apply({**tiny.variables, "params": params}, x, train=True, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, shared.labels[:8]).mean(), updated["batch_stats"]

  (loss, batch_stats), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(tiny.params)
  want = jax.tree.map(lambda w, g: w - 0.1 * (g + 1e-2 * w), tiny.params, grads)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)  # noqa: E731
  jax.tree.map(close, after.params, want)
  jax.tree.map(close, after.batch_stats, batch_stats)
  close(metrics["loss"][0], loss)
  assert int(after.step) == 1


@pytest.mark.slow
def test_a_teacher_counts_from_its_first_step_on(tiny, mesh, shared):
  tx = optax.sgd(0.1)
  teacher = {**tiny.variables, "batch_stats": jax.tree.map(jnp.abs, tiny.variables["batch_stats"])}  # variances are
  state = TrainState.create(tiny.variables, tx, teacher=teacher)

  taught = Distillation(tiny.model, weight=0.25, temperature=2.0, first_step=5)
  mapped = devices.MappedStep(steps.weight_step(tiny.model, tx, PREPROCESSING, distillation=taught), mesh)

  def loss(step):
    begun = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))
    after, metrics = mapped.run(jax.tree.map(jnp.copy, begun), shared, [np.arange(8)[None]])
    jax.tree.map(np.testing.assert_array_equal, after.teacher, teacher)
    return float(metrics["loss"][0])

  x = (np.asarray(shared.images[:8], np.float32) / 255 - 0.5) / 0.25
  logits, _ = tiny.model.apply(tiny.variables, x, train=True, mutable=["batch_stats"])
  plain = float(optax.softmax_cross_entropy_with_integer_labels(logits, shared.labels[:8]).mean())
  log_p, log_q = (np.asarray(jax.nn.log_softmax(z / 2.0)) for z in (tiny.model.apply(teacher, x), logits))
  want = 0.75 * plain + 0.25 * 4.0 * np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))
  assert abs(want - plain) > 1e-3
  assert [loss(4), loss(5)] == pytest.approx([plain, want], rel=1e-4)


@pytest.mark.parametrize(
  ("of", "shrunk"), [("all", {"bias", "dense", "conv"}), ("kernels", {"dense", "conv"}), ("convolutions", {"conv"})]
)
def test_weight_decay_may_leave_out_what_has_few_axes(of, shrunk):
  phase = default.phase()
  phase.weight_decay, phase.weight_decay_of = 0.5, of
  tx = optimizers.sgd(phase, lambda step: 0.1)
  params = {"bias": jnp.ones(2), "dense": jnp.ones((2, 2)), "conv": jnp.ones((1, 1, 2, 2))}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  for name, update in updates.items():
    np.testing.assert_allclose(update, -0.1 * 0.5 if name in shrunk else 0.0)


def test_evaluation_counts_every_image_once(tiny, mesh, shared):
  step = devices.MappedStep(steps.evaluation_step(tiny.model, PREPROCESSING), mesh)
  x = (np.asarray(shared.images, np.float32) / 255 - 0.5) / 0.25
  logits = tiny.model.apply(tiny.variables, x)
  right = int(jnp.sum(jnp.argmax(logits, axis=-1) == shared.labels))
  indices = np.concatenate([np.arange(20), np.zeros(4, int)]).reshape(3, 8)
  weights = np.concatenate([np.ones(20), np.zeros(4)]).astype(np.float32).reshape(3, 8)
  zero = {name: jnp.zeros(()) for name in ("correct", "loss", "count")}
  sums, _ = step.run(zero, dataclasses.replace(shared, variables=tiny.variables), [(indices, weights)])
  assert float(sums["count"]) == 20
  assert float(sums["correct"]) == right
  want = optax.softmax_cross_entropy_with_integer_labels(logits, shared.labels).sum()
  np.testing.assert_allclose(sums["loss"], want, rtol=1e-4)


def test_a_step_with_masks_shrinks_the_dropped_channels_only(tiny, mesh, shared):
  masks = tiny.graph.full_masks()
  name = tiny.graph.groups[0].name
  masks[name][1] = 0
  kernel = lambda params: np.asarray(params["stage1_block1"]["conv1"]["kernel"])  # noqa: E731

  tx = optax.chain(optax.sgd(1e-3), sapr.regularize_by_prox(tiny.graph, 1e-3, gamma=50.0, weighting=share_weights))
  step = devices.MappedStep(steps.weight_step(tiny.model, tx, PREPROCESSING), mesh)

  def stepped(masks):
    state = jax.tree.map(jnp.copy, TrainState.create(tiny.variables, tx, masks=masks))
    after, _ = step.run(state, shared, [np.arange(8)[None]])
    return kernel(after.params)

  plain, regularized = stepped(tiny.graph.full_masks()), stepped(masks)
  np.testing.assert_array_equal(plain[..., [0, 2, 3]], regularized[..., [0, 2, 3]])
  lost = np.linalg.norm(plain[..., 1]) - np.linalg.norm(regularized[..., 1])
  np.testing.assert_allclose(lost, 0.05, rtol=1e-3)


@pytest.mark.slow
def test_the_generator_reads_running_statistics_or_those_of_its_batch(tiny, mesh, shared):
  architecture, tx = sapr.ArchitectureGenerator.for_graph(tiny.graph), optax.sgd(0.1)
  first = GeneratorState.create(architecture.init(jax.random.key(1)), tx)
  options = sapr.SearchOptions(sapr.macs_budget(tiny.graph, 0.5), bias=0.0)
  other = {**tiny.variables, "batch_stats": jax.tree.map(lambda leaf: leaf + 1.0, tiny.variables["batch_stats"])}

  def stepped(variables, train):
    step = steps.generator_step(tiny.model, architecture, tiny.graph, tx, PREPROCESSING, options, train=train)
    mapped, read = devices.MappedStep(step, mesh), dataclasses.replace(shared, variables=variables)
    after, metrics = mapped.run(jax.tree.map(jnp.copy, first), read, [np.arange(16)[None]])
    return after.params, float(metrics["loss"][0])

  running, batch = stepped(tiny.variables, False), stepped(tiny.variables, True)
  assert running[1] != pytest.approx(batch[1], rel=1e-3)
  jax.tree.map(np.testing.assert_array_equal, stepped(other, True), batch)
  assert stepped(other, False)[1] != pytest.approx(running[1], rel=1e-3)

  # The loss of the batch, by hand: the masks that the step samples, and a forward pass in training mode.
  key, _ = jax.random.split(jax.random.fold_in(shared.key, 0))
  outputs = architecture.apply(first.variables)
  masks = split_by_group(sapr.sample_masks(key, outputs, bias=0.0), tiny.graph)
  x = (np.asarray(shared.images[:16], np.float32) / 255 - 0.5) / 0.25
  masked = {**tiny.variables, "params": sapr.mask_params(tiny.params, tiny.graph, masks)}
  logits, _ = tiny.model.apply(masked, x, train=True, mutable=["batch_stats"])
  want = optax.softmax_cross_entropy_with_integer_labels(logits, shared.labels[:16]).mean()
  np.testing.assert_allclose(batch[1], want, rtol=1e-3)


@pytest.mark.slow
def test_gradients_of_a_pass_are_summed(tiny, mesh, shared):
  step = devices.MappedStep(steps.gradient_step(tiny.model, PREPROCESSING), mesh)
  zeros = jax.tree.map(jnp.zeros_like, tiny.params)
  calls = [np.arange(8)[None], np.arange(8, 16)[None]]
  sums, metrics = step.run(zeros, dataclasses.replace(shared, variables=tiny.variables), calls)
  x = (np.asarray(shared.images[:16], np.float32) / 255 - 0.5) / 0.25

  def loss_fn(params):
    logits = tiny.model.apply({**tiny.variables, "params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, shared.labels[:16]).mean()

  loss, grads = jax.jit(jax.value_and_grad(loss_fn))(tiny.params)
  np.testing.assert_allclose(metrics["loss"].mean(), loss, rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-3, atol=1e-5), sums, grads)
