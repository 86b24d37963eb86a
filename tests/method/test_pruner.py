"""Pruning in a loop of one's own: what `Pruner` keeps in the optimizer state, proposes, and cuts."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax.training import train_state
from jax_options import virtual_devices

import sapr_jax as sapr
from sapr_jax.method import PrunerState, channel_norms


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(8, name="a")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x))
    return nn.Dense(2, name="c")(nn.relu(nn.Dense(6, name="b")(x)))


class TrainState(train_state.TrainState):
  batch_stats: dict

  @property
  def variables(self):
    return {"params": self.params, "batch_stats": self.batch_stats}


MODEL = Net()
RNG = np.random.default_rng(0)
BATCHES = [{"x": RNG.normal(size=(16, 5)).astype(np.float32), "y": RNG.integers(0, 2, 16)} for _ in range(4)]
VARIABLES = {
  "params": {
    name: {"kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32), "bias": jnp.zeros(shape[1])}
    for name, shape in (("a", (5, 8)), ("b", (8, 6)), ("c", (6, 2)))
  }
  | {"norm": {"scale": jnp.asarray(RNG.uniform(0.5, 1.5, 8), jnp.float32), "bias": jnp.zeros(8)}},
  "batch_stats": {"norm": {"mean": jnp.zeros(8), "var": jnp.ones(8)}},
}
LEARNING = sapr.GeneratorOptions(learning_rate=0.05, order=None)


def loss_fn(variables, batch):
  logits = MODEL.apply(variables, batch["x"])
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def make(search=None, **options):
  given = {"budget": 0.5, "gamma": 0.2, "select": "unjoined", **options}
  return sapr.Pruner(MODEL, VARIABLES, (1, 5), search=search, **given)


def first_state(tx):
  return TrainState.create(apply_fn=MODEL.apply, tx=tx, **VARIABLES).replace(step=jnp.zeros((), jnp.int32))


@jax.jit
def train_step(state, batch):
  def loss(params):
    logits, updated = state.apply_fn(
      {**state.variables, "params": params}, batch["x"], train=True, mutable="batch_stats"
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), updated

  grads, updated = jax.grad(loss, has_aux=True)(state.params)
  return state.apply_gradients(grads=grads, **updated)


def run(pruner, state, epochs):
  for _ in range(epochs):
    state = pruner.update(state, state.variables, BATCHES, loss_fn)
    for batch in BATCHES:
      state = train_step(state, batch)
  return state


def assert_equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def renew(model, variables, batch):
  return model.apply(variables, batch["x"], train=True, mutable=["batch_stats"])[1]


@pytest.mark.parametrize("form", ["penalty", "proximal"])
def test_ten_lines_in_an_unmodified_train_state(form):
  pruner = make(gamma=0.3)
  options = {} if form == "penalty" else {"form": form, "learning_rate": 0.1, "momentum": 0.9}
  state = first_state(pruner.regularize(optax.sgd(0.1, momentum=0.9), **options))
  programs = train_step._cache_size()
  state = run(pruner, state, 6)
  assert train_step._cache_size() == programs + 1
  masks = pruner.masks(state)
  assert pruner.graph.prunable_macs(masks) <= 0.5 * pruner.graph.prunable_macs()
  before, after = (channel_norms(params, pruner.graph) for params in (VARIABLES["params"], state.params))
  for name, mask in masks.items():
    dropped = np.asarray(mask) == 0
    assert dropped.any()
    for first, last in zip(before[name], after[name], strict=True):
      assert np.mean(last[dropped]) < 0.25 * np.mean(first[dropped])
      assert np.mean(last[~dropped]) > 0.4 * np.mean(first[~dropped])

  small_model, small_variables = pruner.prune(state.variables, state, BATCHES, renew)
  assert {g.name: int(np.sum(masks[g.name])) for g in pruner.graph.groups} == {
    "a": small_variables["params"]["a"]["kernel"].shape[1],
    "b": small_variables["params"]["b"]["kernel"].shape[1],
  }
  plain = pruner.prune(state.variables, state)[1]
  gated = {**state.variables, "params": sapr.mask_params(state.params, pruner.graph, masks)}
  x = BATCHES[0]["x"]
  np.testing.assert_allclose(small_model.apply(plain, x), MODEL.apply(gated, x), rtol=1e-4, atol=1e-5)
  assert np.any(small_variables["batch_stats"]["norm"]["mean"] != plain["batch_stats"]["norm"]["mean"])
  want = np.asarray(plain["batch_stats"]["norm"]["mean"])
  for batch in BATCHES:  # with a momentum of one half
    want = 0.5 * want + 0.5 * (batch["x"] @ plain["params"]["a"]["kernel"] + plain["params"]["a"]["bias"]).mean(0)
  np.testing.assert_allclose(small_variables["batch_stats"]["norm"]["mean"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sapr.IMPORTANCES)
@pytest.mark.parametrize("compare", ["group_mean", "equal_shares"])
def test_every_importance_chooses_what_its_function_ranks_highest(name, compare):
  select = (lambda group: group.name == "a") if name == "batch_norm_scale" else "unjoined"
  pruner = make(sapr.Search(importance=name, compare=compare, cost_exponent=0.0), select=select, seed=3)
  opt_state = pruner.regularize(optax.sgd(0.1)).init(VARIABLES["params"])
  masks = pruner.masks(pruner.update(opt_state, VARIABLES, BATCHES, loss_fn))
  params, graph = VARIABLES["params"], pruner.graph
  slope = jax.grad(lambda params: sum(loss_fn({**VARIABLES, "params": params}, batch) for batch in BATCHES))(params)
  extra = {"taylor": (slope,), "random": (jax.random.key(3),)}.get(name, ())
  scores = sapr.IMPORTANCES[name](params, graph, *extra)
  rank = sapr.relative_to_group_mean if compare == "group_mean" else sapr.rank_within_groups
  assert_equal(masks, sapr.project_to_budget(graph, rank(scores), pruner.budget))


def first_is_dear(kept):
  return 40 * kept[0] + 10 * kept[1]


first_is_dear.name = "cost"


def test_the_cost_tilts_the_shares():
  budget = sapr.make_budget(make().graph, first_is_dear, 0.5)
  masks = {}
  for exponent in (0.0, 1.0):
    pruner = make(sapr.Search(cost_exponent=exponent), budget=budget)
    opt_state = pruner.regularize(optax.sgd(0.1)).init(VARIABLES["params"])
    masks[exponent] = pruner.masks(pruner.update(opt_state, VARIABLES))
  shares = {e: [float(np.mean(mask)) for mask in of_one.values()] for e, of_one in masks.items()}
  assert [group.name for group in pruner.graph.groups] == ["a", "b"]
  assert shares[1.0][0] < shares[0.0][0] and shares[1.0][1] > shares[0.0][1]


def test_masks_come_when_the_search_says():
  pruner = make(sapr.Search(start=1, end=4, in_force=2, importance="l1_norm"))
  state, kept = first_state(pruner.regularize(optax.sgd(0.1))), []
  for epoch in range(5):
    grown = jax.tree.map(lambda leaf, epoch=epoch: leaf * (1.0 + epoch), state.variables)
    if epoch == 4:  # too late to change anything
      grown["params"]["a"]["kernel"] = grown["params"]["a"]["kernel"][:, ::-1]
    state = pruner.update(state, grown)
    kept.append(sum(int(np.sum(mask)) for mask in pruner.masks(state).values()))
  assert kept[:2] == [14, 14] and kept[2] < 14 and kept[2] == kept[3] == kept[4]
  assert int(state.opt_state.epoch) == 5


@pytest.mark.slow
@pytest.mark.parametrize("options", [LEARNING, sapr.GeneratorOptions(prior="l2_norm", order="l1_norm")])
def test_a_generator_learns_and_meets_the_budget(options):
  pruner = make(sapr.Search(generator=options))
  opt_state = pruner.regularize(optax.sgd(0.1)).init(VARIABLES["params"])
  first = opt_state.generator
  after = pruner.update(opt_state, VARIABLES, BATCHES, loss_fn)
  assert int(after.generator["step"]) == len(BATCHES) and int(first["step"]) == 0
  assert any((after.generator[path] != leaf).any() for path, leaf in first.items() if path.startswith("params"))
  masks = pruner.masks(after)
  assert 0.4 < pruner.graph.prunable_macs(masks) / pruner.graph.prunable_macs() <= 0.5
  if options.order is not None:  # widths are the generator's, channels those of the largest norms
    norms = sapr.l1_norm(VARIABLES["params"], pruner.graph)
    for name, mask in masks.items():
      mask = np.asarray(mask) > 0
      assert np.asarray(norms[name])[mask].min() >= np.asarray(norms[name])[~mask].max(initial=0)


@pytest.mark.slow
def test_a_generator_finds_the_channels_that_the_loss_needs():
  # Channels 4 to 7 of "a" are read by nothing.
  kernel = VARIABLES["params"]["b"]["kernel"].at[4:].set(0.0)
  variables = {**VARIABLES, "params": {**VARIABLES["params"], "b": {**VARIABLES["params"]["b"], "kernel": kernel}}}
  teacher = [{**batch, "y": np.argmax(MODEL.apply(variables, batch["x"]), -1)} for batch in BATCHES]
  pruner = make(sapr.Search(generator=LEARNING), select=lambda group: group.name == "a")
  opt_state = pruner.regularize(optax.sgd(0.1)).init(variables["params"])
  for _ in range(15):
    opt_state = pruner.update(opt_state, variables, teacher, loss_fn)
  mask = np.asarray(pruner.masks(opt_state)["a"])
  assert mask.sum() == 4 and mask[:4].sum() >= 3


@pytest.mark.parametrize("how", ["flax", pytest.param("orbax", marks=pytest.mark.slow)])
def test_a_saved_state_goes_on_bit_for_bit(tmp_path, how):
  pruner = make(sapr.Search(generator=LEARNING, in_force=1))
  state = first_state(pruner.regularize(optax.sgd(0.1, momentum=0.9)))
  straight = run(pruner, state, 4)
  half = run(pruner, state, 2)
  if how == "flax":
    restored = flax.serialization.from_bytes(first_state(state.tx), flax.serialization.to_bytes(half))
  else:
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / "state", half)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: half))
  resumed = run(make(sapr.Search(generator=LEARNING, in_force=1)), restored, 2)
  assert_equal(jax.device_get(resumed.opt_state), jax.device_get(straight.opt_state))
  assert_equal(jax.device_get(resumed.params), jax.device_get(straight.params))


def test_the_state_is_found_within_other_transforms():
  pruner = make()
  tx = optax.MultiSteps(optax.chain(optax.clip(1.0), pruner.regularize(optax.sgd(0.1))), 2)
  opt_state = pruner.update(tx.init(VARIABLES["params"]), VARIABLES)
  assert "50.0%" in pruner.report(opt_state)
  assert int(opt_state.inner_opt_state[1].epoch) == 1
  assert pruner.graph.prunable_macs(pruner.masks(opt_state)) <= 0.5 * pruner.graph.prunable_macs()


def test_the_report_names_costs_and_widths():
  pruner = make()
  opt_state = pruner.update(pruner.regularize(optax.sgd(0.1)).init(VARIABLES["params"]), VARIABLES)
  masks = pruner.masks(opt_state)
  a, b = (int(np.sum(masks[name])) for name in ("a", "b"))
  macs = 5 * a + a * b + 2 * b
  assert pruner.report(opt_state) == (
    f"{macs} of 100 MACs ({macs / 100:.1%}), {macs / 100:.1%} of prunable_macs (budget 50.0%), after 1 epochs\n"
    f"a {a}/8, b {b}/6"
  )


def test_momentum_is_cut_and_the_generator_is_not():
  pruner = make(sapr.Search(generator=LEARNING))
  state = run(pruner, first_state(pruner.regularize(optax.sgd(0.1, momentum=0.9))), 1)
  masks = jax.device_get(pruner.masks(state))
  small: PrunerState = sapr.prune_tree(state.opt_state, pruner.graph, masks)
  params = sapr.prune_tree(state.params, pruner.graph, masks)
  assert jax.tree.map(jnp.shape, small.optimizer[0].trace) == jax.tree.map(jnp.shape, params)
  assert all(np.all(mask == 1) for mask in small.regularization.masks.values())
  assert_equal(small.generator, state.opt_state.generator)


def test_a_budget_of_ones_own():
  pruner = make(budget=lambda graph: sapr.params_budget(graph, 0.6))
  assert pruner.budget.cost.name == "params"
  assert make(budget=pruner.budget).budget is pruner.budget


def test_a_loop_that_forgets_update_is_told(caplog):
  pruner = make(sapr.Search(start=1))
  state = first_state(pruner.regularize(optax.sgd(0.1)))
  train_step(state, BATCHES[0])
  jax.effects_barrier()
  lines = [record.getMessage() for record in caplog.records if record.name == "sapr_jax"]
  assert len(lines) == 1 and "the first step of training came before pruner.update" in lines[0]
  caplog.clear()
  once = pruner.update(state, state.variables)
  train_step(once, BATCHES[0])
  jax.effects_barrier()
  assert not [record for record in caplog.records if record.name == "sapr_jax"]
  for opt_state, calls in ((state, 0), (once, 1)):
    with pytest.raises(sapr.InputError, match=rf"pruner.update was called {calls} times, and masks come .* in call 2;"):
      pruner.prune(state.variables, opt_state)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda p: p.update(optax.sgd(0.1).init({}), VARIABLES),
      r"opt_state must hold a PrunerState, got none .*regularize",
    ),
    (lambda p: p.masks([p.regularize(optax.sgd(0.1)).init({})] * 2), r"must hold one PrunerState, got 2"),
    (lambda p: p.regularize(3), r"optimizer must be a GradientTransformation, got 3"),
    (lambda p: p.regularize(optax.sgd(0.1), form="prox"), r"form must be 'penalty' or 'proximal', got 'prox'"),
    (lambda p: p.regularize(optax.sgd(0.1), form="proximal"), r"learning_rate must be that of the optimizer"),
    (lambda p: p.prune(VARIABLES, None, BATCHES), r"batches and renew must be given together"),
    (lambda p: make(budget=1.5), r"p must be a number in \(0, 1\], got 1.5"),
    (lambda p: make(budget=lambda graph: 3), r"What budget returns must be a Budget, got 3"),
    (lambda p: make(gamma=-1), r"gamma must be at least 0, got -1"),
    (lambda p: make("l2_norm"), r"search must be a Search, got 'l2_norm'"),
    (lambda p: sapr.Search(importance="l3"), r"importance must be one of 'l1_norm', .* got 'l3'"),
    (lambda p: sapr.Search(compare="x"), r"compare must be one of 'group_mean', 'equal_shares', got 'x'"),
    (lambda p: sapr.Search(start=3, end=3), r"end must be an integer of at least 4, got 3"),
    (lambda p: sapr.Search(in_force=1), r"in_force must be an epoch of the search, below end=1, got 1"),
    (lambda p: sapr.GeneratorOptions(prior="taylor"), r"prior must be one of .*'random', got 'taylor'"),
  ],
)
def test_the_line_says_what_must_be(call, message):
  with pytest.raises(sapr.InputError, match=message):
    call(make())


@pytest.mark.parametrize("search", [sapr.Search(importance="taylor"), sapr.Search(generator=LEARNING)])
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "batches must be given to this search"),
    ((BATCHES,), "loss_fn must be given to this search"),
    ((iter(()), loss_fn), "batches must hold at least one batch, got none"),
  ],
)
def test_a_search_that_learns_needs_batches_and_a_loss(search, arguments, message):
  pruner = make(search)
  opt_state = pruner.regularize(optax.sgd(0.1)).init(VARIABLES["params"])
  with pytest.raises(sapr.InputError, match=message):
    pruner.update(opt_state, VARIABLES, *arguments)


def test_gamma_is_what_the_shrinkage_takes():
  schedule = optax.piecewise_constant_schedule(0.1, {3: 0.1})
  with jax.numpy_dtype_promotion("standard"):
    gamma = sapr.gamma_for(2.0, schedule, range(1, 5), momentum=0.5)
    assert gamma * (0.1 + 0.1 + 0.01 + 0.01) / 0.5 == pytest.approx(2.0)
    assert sapr.shrinkage_of(gamma, schedule, range(1, 5), momentum=0.5) == pytest.approx(2.0)
  assert sapr.gamma_for(2.0, 0.1, 10) == pytest.approx(2.0)
  with pytest.raises(sapr.InputError, match=r"learning_rate must be above 0 in some of the steps"):
    sapr.gamma_for(2.0, 0.1, 0)
  with pytest.raises(sapr.InputError, match=r"steps must be a number of steps or a range of them, got 'x'"):
    sapr.gamma_for(2.0, 0.1, "x")


@pytest.mark.slow
def test_two_devices_choose_and_train_as_one_does(tmp_path):
  script = pathlib.Path(__file__).with_name("pruner_on_devices.py")
  command = [sys.executable, script, str(tmp_path / "found.npz")]
  environment = os.environ | virtual_devices(2) | {"PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = np.load(tmp_path / "found.npz")
  for name in ("a", "b"):
    np.testing.assert_array_equal(found[f"masks/2/{name}"], found[f"masks/1/{name}"])
    np.testing.assert_allclose(found[f"params/2/{name}"], found[f"params/1/{name}"], rtol=1e-4, atol=1e-5)


def test_globs_choose_groups():
  given = {"budget": 0.8, "gamma": 0.1, "select": "unjoined"}
  names = [
    [g.name for g in sapr.Pruner(MODEL, VARIABLES, (1, 5), **given, **globs).graph.groups]
    for globs in ({"include": "b"}, {"exclude": ("b",)}, {})
  ]
  assert names == [["b"], ["a"], ["a", "b"]]
