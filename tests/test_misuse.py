"""Misuse of the library: every public function, with every absurd argument, says in one line what must be instead.

One table of right calls, one of absurd values. Each argument of each call is replaced by each value; the call must
raise `InputError`, or be right after all. Functions of the user's (a predicate, a weighting)
are not among the values: what they raise is the user's.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import shutil
import unittest.mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sapr_jax as sapr
from sapr_jax.training import latency


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=True, name="bn")(nn.Dense(4, name="up")(x))
    return nn.Dense(2, name="down")(nn.relu(x))


class WithoutParameters(nn.Module):
  def __call__(self, x):
    return 2 * x


class InNnx(nnx.Module):
  pass


MODEL = Net()
VARIABLES = {
  "params": {
    "up": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
    "bn": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "down": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
  },
  "batch_stats": {"bn": {"mean": jnp.ones(4), "var": jnp.ones(4)}},
}
PARAMS = VARIABLES["params"]
GRAPH = sapr.trace_channels(MODEL, VARIABLES, (1, 3), select="unjoined")
MASKS = {"up": np.array([1, 0, 1, 1], np.float32)}
SCORES = {"up": np.arange(4, dtype=np.float32)}
BUDGET = sapr.macs_budget(GRAPH, 0.5)
KEY = jax.random.key(0)
IMAGE = (1, 8, 8, 3)
RESNET = sapr.models.create("resnet8", width_multiplier=0.25)
RESNET_VARIABLES = jax.tree.map(
  lambda leaf: np.ones(leaf.shape, leaf.dtype), jax.eval_shape(RESNET.init, KEY, jnp.zeros(IMAGE))
)
PRUNER = sapr.Pruner(MODEL, VARIABLES, (1, 3), budget=0.5, gamma=0.1, select="unjoined")
PRUNED_STATE = PRUNER.update(PRUNER.regularize(optax.sgd(0.1)).init(PARAMS), VARIABLES)
PENALTY, PROX = sapr.regularize_by_penalty(GRAPH, 0.1), sapr.regularize_by_prox(GRAPH, 0.1, 0.1)


def masked_apply(model, variables, graph, masks):
  return sapr.masked_apply(model, variables, graph, masks, jnp.ones((1, 3)))


def update(tx, updates, params, masks):
  return jax.eval_shape(lambda: tx.update(updates, tx.init(PARAMS), params, masks=masks))


def generator(sizes, input_size, hidden_size):
  return jax.eval_shape(sapr.ArchitectureGenerator(sizes, input_size, hidden_size).init, KEY)


def architecture_loss(generator, variables, graph, loss_fn, key, options):
  return jax.eval_shape(lambda: sapr.architecture_loss(generator, variables, graph, loss_fn, key, options))


def sample_masks(key, outputs, bias, temperature):
  return jax.eval_shape(lambda: sapr.sample_masks(key, outputs, bias=bias, temperature=temperature))


class Instant:
  """In the place of a timer."""

  best = 1e-3

  def __init__(self, piece, widths):
    self.count = len(widths)

  def run(self):
    pass


def measure_latency(**arguments):
  with unittest.mock.patch.multiple(latency, _LayerTimer=Instant, _NetworkTimer=Instant):
    return sapr.measure_latency(**arguments)


NETWORK = {"model": MODEL, "variables": VARIABLES}
TRACE = {**NETWORK, "input_shape": (1, 3), "apply_kwargs": {}, "input_dtype": jnp.float32}
CUT = {"graph": GRAPH, "masks": MASKS}
SCORED = {"params": PARAMS, "graph": GRAPH}
WEIGHTED = {**CUT, "weighting": sapr.relative_weights}
AGN = sapr.ArchitectureGenerator.for_graph(GRAPH)
AGN_VARIABLES = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(AGN.init, KEY))
OPTIONS = {"budget": BUDGET, "budget_weight": 4.0, "bias": 3.0, "temperature": 0.4}
INPUTS = sapr.Inputs((3,))
INFO = sapr.ModelInfo("Net", INPUTS, {"accuracy": 0.5}, {"epochs": 3}, 20, 26, {"up": (8, 4)})
TORCH = {"model": MODEL, "input_shape": (1, 3), "layer_names": {"up": "a", "bn": "b", "down": "c"}}

TABLE = measure_latency(**NETWORK, graph=GRAPH)

CALLS = {
  "trace_channels": (sapr.trace_channels, {**TRACE, "select": "unjoined"}),
  "count_macs": (sapr.count_macs, TRACE),
  "prune": (sapr.prune, {**NETWORK, **CUT}),
  "prune_tree": (sapr.prune_tree, {"tree": VARIABLES, **CUT}),
  "mask_params": (sapr.mask_params, {"params": PARAMS, **CUT}),
  "masked_apply": (masked_apply, {**NETWORK, **CUT}),
  "NarrowModule": (sapr.NarrowModule, {"base": MODEL, "widths": (("up", (("features", 3),)),), "cuts": ()}),
  "macs_budget": (sapr.macs_budget, {"graph": GRAPH, "p": 0.5, "of": "network"}),
  "params_budget": (sapr.params_budget, {"graph": GRAPH, "amount": 10}),
  "make_budget": (sapr.make_budget, {"graph": GRAPH, "cost": "macs", "share": 0.5}),
  "Budget": (sapr.Budget, {"cost": BUDGET.cost, "limit": 10.0, "full": 20.0}),
  "measure_latency": (measure_latency, {**NETWORK, "graph": GRAPH, "batch_size": 2, "transform": lambda f: f}),
  "latency_cost": (sapr.latency_cost, {"graph": GRAPH, "table": TABLE}),
  "LatencyTable.from_json": (sapr.LatencyTable.from_json, {"document": TABLE.to_json()}),
  "read_latency_table": (sapr.read_latency_table, {"path": "given/times.json"}),
  "write_latency_table": (sapr.write_latency_table, {"path": "times.json", "table": TABLE}),
  "check_budget": (sapr.check_budget, {"graph": GRAPH, "budget": BUDGET, "min_width": 1, "round_to": 1}),
  "project_to_budget": (sapr.project_to_budget, {"graph": GRAPH, "scores": SCORES, "budget": BUDGET}),
  "budget_penalty": (sapr.budget_penalty, {**CUT, "budget": BUDGET}),
  "ArchitectureGenerator": (generator, {"sizes": (4,), "input_size": 32, "hidden_size": 64}),
  "for_graph": (sapr.ArchitectureGenerator.for_graph, {"graph": GRAPH}),
  "split_by_group": (sapr.split_by_group, {"padded": jnp.ones((1, 4)), "graph": GRAPH}),
  "sample_masks": (sample_masks, {"key": KEY, "outputs": jnp.ones(4), "bias": 3.0, "temperature": 0.4}),
  "SearchOptions": (sapr.SearchOptions, OPTIONS),
  "architecture_loss": (
    architecture_loss,
    {
      "generator": AGN,
      "variables": AGN_VARIABLES,
      "graph": GRAPH,
      "loss_fn": lambda masks: jnp.sum(masks["up"]),
      "key": KEY,
      "options": sapr.SearchOptions(BUDGET),
    },
  ),
  "l1_norm": (sapr.l1_norm, SCORED),
  "l2_norm": (sapr.l2_norm, SCORED),
  "batch_norm_scale": (sapr.batch_norm_scale, SCORED),
  "taylor": (sapr.taylor, {**SCORED, "grads": PARAMS}),
  "random_scores": (functools.partial(sapr.random_scores, None), {"graph": GRAPH, "key": KEY}),
  "rank_within_groups": (sapr.rank_within_groups, {"scores": SCORES}),
  "relative_to_group_mean": (sapr.relative_to_group_mean, {"scores": SCORES}),
  "relative_weights": (sapr.relative_weights, {"dropped": jnp.ones(1)}),
  "share_weights": (sapr.share_weights, {"dropped": jnp.ones(1)}),
  "partial_group_lasso": (sapr.partial_group_lasso, {"params": PARAMS, **WEIGHTED}),
  "prox_partial_group_lasso": (
    sapr.prox_partial_group_lasso,
    {"params": PARAMS, **WEIGHTED, "step_size": 0.1},
  ),
  "regularize_by_penalty": (sapr.regularize_by_penalty, {"graph": GRAPH, "gamma": 0.1, "weighting": len}),
  "regularize_by_prox": (
    sapr.regularize_by_prox,
    {"graph": GRAPH, "learning_rate": 0.1, "gamma": 0.1, "momentum": 0.9, "weighting": len},
  ),
  "update of the penalty": (
    functools.partial(update, PENALTY),
    {"updates": PARAMS, "params": PARAMS, "masks": MASKS},
  ),
  "update of the prox": (functools.partial(update, PROX), {"updates": PARAMS, "params": PARAMS, "masks": MASKS}),
  "set_masks": (sapr.set_masks, {"opt_state": PENALTY.init(PARAMS), "masks": MASKS}),
  "get_masks": (sapr.get_masks, {"opt_state": PENALTY.init(PARAMS)}),
  "gamma_for": (sapr.gamma_for, {"shrinkage": 4, "learning_rate": 0.1, "steps": 10, "momentum": 0.9}),
  "shrinkage_of": (sapr.shrinkage_of, {"gamma": 0.1, "learning_rate": 0.1, "steps": 10, "momentum": 0.9}),
  "compensate": (
    sapr.compensate,
    {"model": MODEL, "variables": VARIABLES, "graph": GRAPH, "masks": MASKS, "batches": [np.ones((1, 3))]},
  ),
  "renew_statistics": (
    sapr.renew_statistics,
    {
      "model": MODEL,
      "variables": VARIABLES,
      "batches": [np.ones((1, 3))],
      "renew": lambda model, variables, batch: {"batch_stats": variables["batch_stats"]},
    },
  ),
  "Search": (
    sapr.Search,
    {"start": 0, "end": 3, "in_force": 1, "importance": "taylor", "compare": "group_mean", "cost_exponent": 0.2}
    | {"min_width": 2, "round_to": 1, "generator": sapr.GeneratorOptions()},
  ),
  "GeneratorOptions": (
    sapr.GeneratorOptions,
    {"learning_rate": 0.1, "weight_decay": 0.1, "budget_weight": 1.0, "bias": 3.0, "temperature": 0.4}
    | {"prior": "l1_norm", "prior_strength": 1.0, "order": "l1_norm"},
  ),
  "Pruner": (
    sapr.Pruner,
    {**NETWORK, "inputs": (1, 3), "budget": 0.5, "gamma": 0.1, "search": sapr.Search()}
    | {"select": "unjoined", "apply_kwargs": {}, "seed": 0},
  ),
  "regularize of a pruner": (
    PRUNER.regularize,
    {"optimizer": optax.sgd(0.1), "form": "proximal", "learning_rate": 0.1},
  ),
  "update of a pruner": (PRUNER.update, {"opt_state": PRUNED_STATE, "variables": VARIABLES}),
  "prune of a pruner": (PRUNER.prune, {"variables": VARIABLES, "opt_state": PRUNED_STATE}),
  "masks of a pruner": (PRUNER.masks, {"opt_state": PRUNED_STATE}),
  "report of a pruner": (PRUNER.report, {"opt_state": PRUNED_STATE}),
  "macs": (GRAPH.macs, {"masks": MASKS}),
  "from_json": (sapr.ChannelGraph.from_json, {"document": GRAPH.to_json()}),
  "save": (
    sapr.save,
    {"path": "saved", **NETWORK, "inputs": INPUTS, "metrics": {"accuracy": 0.5}, "config": {"epochs": 3}},
  ),
  "load": (sapr.load, {"path": "given/own", "base": MODEL}),
  "load_info": (sapr.load_info, {"path": "given/own"}),
  "model_card": (sapr.model_card, {"info": INFO, "name": "net", "license": "mit"}),
  "Inputs": (sapr.Inputs, {"shape": (8, 8, 1), "dtype": "float32", "mean": [0.5], "std": [0.5], "class_names": ["a"]}),
  "Inputs, resized": (functools.partial(sapr.Inputs, (8, 8, 1)), {"resize": 8}),
  "Inputs.from_json": (sapr.Inputs.from_json, {"document": INPUTS.to_json()}),
  "prepare": (sapr.Inputs((2, 2, 1), mean=[0.5], std=[0.5]).prepare, {"images": np.ones((1, 2, 2, 1), np.uint8)}),
  "evaluate": (
    sapr.evaluate,
    {**NETWORK, "data": (np.ones((2, 3), np.float32), [0, 1]), "inputs": INPUTS, "batch_size": 2, "apply_kwargs": {}},
  ),
  "import_torch": (sapr.import_torch, {"path": "given/weights.safetensors", **TORCH}),
  "export": (
    functools.partial(sapr.export, "net.stablehlo", platforms="cpu"),
    {**NETWORK, "input_shape": (1, 3), "batch": 2, "dtype": None, "class_names": ["a", "b"]},
  ),
  "export_torch": (sapr.export_torch, {"path": "w.safetensors", **TORCH, "variables": VARIABLES}),
  "create": (sapr.models.create, {"name": "mobilenetv2", "num_classes": 3, "width_multiplier": 0.5, "dropout": 0.1}),
  "create, switches": (functools.partial(sapr.models.create, "mobilenetv2"), {"remat": True, "small_images": True}),
  "create for CIFAR": (functools.partial(sapr.models.create, "resnet8"), {"depth": 8, "dtype": jnp.float32}),
  "create for ImageNet": (functools.partial(sapr.models.create, "resnet18"), {"blocks": (1,), "bottleneck": True}),
  "with_fast_layers": (sapr.models.with_fast_layers, {"function": len}),
}
NONE_IS_RIGHT = {
  "apply_kwargs",
  "class_names",
  "config",
  "inputs",
  "license",
  "metrics",
  "resize",
  "base of load",
  "batch of export",
  "dtype of export",
  "masks of macs",
  "masks of update of the penalty",
  "masks of update of the prox",
  "updates of update of the penalty",
  "transform of measure_latency",
  "search of Pruner",
  "end of Search",
  "in_force of Search",
  "round_to of Search",
  "generator of Search",
  "prior of GeneratorOptions",
  "order of GeneratorOptions",
}
FUNCTIONS = {
  "select",
  "weighting",
  "loss_fn",
  "transform",
  "layer_names",
  "function",
  "learning_rate",
  "renew",
  "budget of Pruner",
}
"""Arguments that may be any function, so that Flax modules are too."""


def absurd():
  """Name -> a value that is right for hardly any argument."""
  one = {"up": np.ones(4, np.float32)}
  values = [None, True, -1, 0, 3, 0.5, 1e30, 10**400, float("nan"), "x", "a\n\0b", "gs://x/y", b"x", 1j, object()]
  values += [
    (),
    [],
    [1],
    (1, "x"),
    [[1], [1, 2]],
    {},
    {"x": 1},
    {3: 1, "x": 2},
    {"up": None},
    {"up": "1111"},
    {**one, 3: 1},
  ]
  values += [np.full(4, np.nan), np.ones(3), np.ones((4, 1)), np.array(["a"]), np.array([None]), np.ones(4, complex)]
  values += [
    {"up": np.full(4, np.nan)},
    {"up": np.full(4, np.inf)},
    {"up": [10**400] * 4},
    {"up": jax.random.split(KEY, 4)},
  ]
  values += [KEY, jax.ShapeDtypeStruct((4,), jnp.float32), np.datetime64("2020-01-01"), (1, 2.5), (1, -3), (None, 3)]
  values += [WithoutParameters(), InNnx(), RESNET, RESNET_VARIABLES, MODEL, GRAPH, BUDGET]
  values += [
    {"params": {"up": "x"}},
    {"params": {"up": {"kernel": object(), "bias": None}}},
    {**VARIABLES, "rng": {"k": KEY}},
  ]
  values += [jax.eval_shape(lambda x: x, VARIABLES), jax.eval_shape(lambda x: x, PARAMS)]
  return values


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  folder = tmp_path_factory.mktemp("given")
  sapr.save(folder / "own", MODEL, VARIABLES)
  sapr.write_latency_table(folder / "times.json", TABLE)
  sapr.save(folder / "resnet", RESNET, RESNET_VARIABLES)
  sapr.export_torch(folder / "weights.safetensors", variables=VARIABLES, **TORCH)
  return folder


@pytest.fixture
def here(given, tmp_path, monkeypatch):
  """The current directory, with the given files in `given`."""
  (tmp_path / "given").symlink_to(given)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def outcome(call):
  """Returns None for a result, the message of an `InputError`; raises for a message of many lines."""
  try:
    call()
  except sapr.InputError as error:
    assert str(error).isprintable() and 20 < len(str(error)) < 1000, str(error)
    return str(error)
  return None


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_may_be_absurd(here, name):
  function, right = CALLS[name]
  assert outcome(lambda: function(**right)) is None
  wrong = []
  for argument in right:
    for value in absurd():
      if {argument, f"{argument} of {name}"} & FUNCTIONS and callable(value):
        continue
      what = f"{argument}={type(value).__name__} {str(value)[:60]}"
      try:
        message = outcome(lambda argument=argument, value=value: function(**{**right, argument: value}))
      except Exception as error:
        wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        continue
      is_right = argument == "tree" or (value is None and {argument, f"{argument} of {name}"} & NONE_IS_RIGHT)
      if message is None and (value is None or type(value) is object) and not is_right:
        wrong.append(f"{what}: is taken")
  assert not wrong, "\n".join(wrong)


def test_absurd_runs(here):
  for value in absurd():
    assert outcome(lambda value=value: sapr.load_run(value)), value
    assert outcome(lambda value=value: sapr.run(value, "run")), value
  assert not (here / "run").exists()


def test_every_public_name_is_called():
  from_types = {
    "ChannelGraph",
    "ChannelGroup",
    "Cost",
    "DivergedError",
    "InputError",
    "InterruptedRunError",
    "LatencyTable",
    "ModelInfo",
  }
  from_types |= {"RunResult"}
  others = {"COSTS", "IMPORTANCES", "__version__", "register_rule", "run", "load_run"}  # the last two: see below
  names = {name for name in sapr.__all__ if not inspect.ismodule(getattr(sapr, name))}
  assert names <= CALLS.keys() | from_types | others


# ----------------------------------------------------------------------------------------------------------------------
# What is said, and what a table cannot hold
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: sapr.masked_apply(InNnx(), VARIABLES, GRAPH, MASKS),
      r"graph must be .* in masked_apply\(module",
    ),
    (
      lambda: sapr.trace_channels(len, VARIABLES, (1, 3)),
      r"must be a Flax linen module, .*got <built-in function len>",
    ),
    (lambda: sapr.trace_channels(WithoutParameters(), {}, (1, 3)), r"finds no channel group to prune"),
    (lambda: sapr.trace_channels(MODEL, VARIABLES, None), r"inputs of the model must be arrays .*, got None"),
    (lambda: sapr.trace_channels(MODEL, VARIABLES, (1, 8, 8, 4)), r"the inputs \(float32\[1,8,8,4\]\) do not fit"),
    (lambda: sapr.trace_channels(MODEL, None, (1, 3)), r"variables must map collections to arrays, .*got None"),
    (lambda: sapr.prune(RESNET, VARIABLES, GRAPH, MASKS), r"do not fit together"),
    (lambda: sapr.regularize_by_penalty(GRAPH, "x"), r"gamma must be at least 0, got 'x'"),
    (lambda: sapr.mask_params(PARAMS, GRAPH, {"up": np.full(4, np.nan)}), r"mask of group 'up' must be finite"),
    (lambda: sapr.mask_params(PARAMS, 3, MASKS), r"graph must be a ChannelGraph, got 3; trace_channels.* returns it"),
    (lambda: sapr.register_rule(3), r"register_rule must be given names of primitives, got \(3,\)"),
    (lambda: sapr.register_rule("x")(3), r"a rule must be a function, got 3"),
    (lambda: sapr.models.create("resnet8", num_classes="x"), r"num_classes of a CifarResNet must be .*, got 'x'"),
    (lambda: sapr.save("gs://bucket/x", MODEL, VARIABLES), r"path must be one of the file system, got 'gs://bucket/x'"),
    (lambda: sapr.save("x", MODEL, {"params": {"k": KEY}}), r"hold arrays of numbers .* at params/k; .*key_data"),
    (lambda: sapr.save("x", MODEL, {"params": {3: np.ones(1)}}), r"The variable \('params', 3\) .* or is no text"),
    (lambda: sapr.save("x", MODEL, {"params": {"..": np.ones(1)}}), r"\('params', '\.\.'\) has an empty name"),
  ],
)
def test_the_line_says_what_must_be(here, call, message):
  with pytest.raises(sapr.InputError, match=message):
    call()
  assert {path.name for path in here.iterdir()} == {"given"}


@pytest.mark.parametrize(
  ("name", "argument"),
  [
    ("prune", "variables"),
    ("prune", "masks"),
    ("prune_tree", "tree"),
    ("project_to_budget", "scores"),
    ("save", "variables"),
    ("export_torch", "variables"),
    ("make_budget", "share"),
  ],
)
def test_what_needs_numbers_is_not_for_jit(here, name, argument):
  function, right = CALLS[name]
  with pytest.raises(sapr.InputError, match=r"traced array.*outside of jax\.jit"):
    jax.eval_shape(lambda value: function(**{**right, argument: value}), right[argument])


@pytest.mark.parametrize(
  "call",
  [
    lambda masks: sapr.mask_params(PARAMS, GRAPH, masks),
    lambda masks: sapr.partial_group_lasso(PARAMS, GRAPH, masks),
    lambda masks: sapr.prox_partial_group_lasso(PARAMS, GRAPH, masks, masks["up"][0]),
    lambda masks: sapr.budget_penalty(GRAPH, masks, BUDGET),
    lambda masks: masked_apply(MODEL, VARIABLES, GRAPH, masks),
    lambda masks: sapr.regularize_by_prox(GRAPH, 0.1, masks["up"][0], momentum=masks["up"][1]).init(PARAMS),
    lambda masks: sapr.rank_within_groups(masks),
    lambda masks: sapr.sample_masks(KEY, masks["up"], bias=masks["up"][0], temperature=masks["up"][0]),
  ],
)
def test_what_is_for_jit_takes_traced_arrays(call):
  assert jax.tree.structure(jax.eval_shape(call, MASKS)) == jax.tree.structure(call(MASKS))


def places(document, path=()):
  """Yields the path of every entry of a JSON document."""
  items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
  for key, value in items:
    yield (*path, key)
    yield from places(value, (*path, key))


JSON = [
  None,
  True,
  -1,
  0,
  10**400,
  1e308,
  "",
  "x",
  "../../x",
  "os.system",
  [],
  [[]],
  {},
  {"x": 1},
  {"tuple": 3},
  {"dtype": []},
]


@pytest.mark.parametrize("is_sealed", [True, False])
def test_an_edited_definition_is_refused_or_right(here, is_sealed):
  shutil.copytree("given/resnet", "edited")
  file = here / "edited" / "model.json"
  definition = json.loads(file.read_text())
  if not is_sealed:  # as older versions saved it
    del definition["sha256"]["model.json"]
  few = [path for path in places(definition) if path[0] != "variables" or path[1:2] in ((), ("params/fc/bias",))]
  for path in few:
    for value in JSON:
      edited = copy.deepcopy(definition)
      parent = functools.reduce(lambda entry, key: entry[key], path[:-1], edited)
      if type(parent[path[-1]]) is type(value) and parent[path[-1]] == value:
        continue
      parent[path[-1]] = value
      file.write_text(json.dumps(edited))
      message = outcome(lambda: sapr.load("edited"))
      assert message or not is_sealed or path[0] == "format", (path, value)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "9" * 10**5, '"\\ud800"', "\udcff", "NaN", "", "\0"])
def test_absurd_json_is_damage(here, text):
  shutil.copytree("given/resnet", "edited")
  (here / "edited" / "model.json").write_bytes(text.encode(errors="surrogateescape"))
  with pytest.raises(sapr.InputError, match=r"model\.json (is damaged|has format)"):
    sapr.load("edited")


@pytest.mark.parametrize("call", ["save", "load", "load_info", "import_torch", "export_torch"])
def test_paths_that_are_something_else(here, call):
  function, right = CALLS[call]
  suffix = ".safetensors" if "torch" in call else ""
  (here / f"file{suffix}").write_text("x")
  os.mkfifo(here / f"pipe{suffix}")
  (here / f"link{suffix}").symlink_to(f"link{suffix}")
  (here / f"folder{suffix}").mkdir()
  (here / f"folder{suffix}" / "x").mkdir()
  for path in (f"pipe{suffix}", f"link{suffix}", f"folder{suffix}", f"file{suffix}/x{suffix}", f"{'x' * 300}{suffix}"):
    assert outcome(lambda path=path: function(**{**right, "path": path})), path
