"""What is saved beside the weights comes back as it was, and damage to it is noticed."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import damage
from ml_collections import ConfigDict

import sapr_jax as sapr
from sapr_jax import artifacts
from sapr_jax.artifacts import saved_model
from sapr_jax.artifacts.files import sha256
from sapr_jax.channels import dense_features, evaluation_kwargs

INPUTS = sapr.Inputs((8, 8, 1), mean=(0.3,), std=(0.4,), class_names=list("abcdefghij"))
METRICS = {"accuracy": 0.44, "latency_ms": {"1": 0.25}, "dense": {"accuracy": 0.5, "macs": 9}}
CONFIG = {"train.epochs": 3, "data.mean": [0.3], "model.name": "résnet"}


@pytest.fixture(scope="module")
def pruned(tiny):
  masks = tiny.graph.full_masks()
  masks["stage1_block1/conv1"][1:] = 0
  return sapr.prune(tiny.model, tiny.variables, tiny.graph, masks)


@pytest.fixture(scope="module")
def saved(pruned, tmp_path_factory):
  path = tmp_path_factory.mktemp("saved") / "model"
  sapr.save(path, *pruned, inputs=INPUTS, metrics=METRICS, config=CONFIG)
  return path


def test_everything_comes_back(saved, pruned):
  info = sapr.load_info(saved)
  assert (info.inputs, info.metrics, info.config, info.module) == (INPUTS, METRICS, CONFIG, "CifarResNet")
  assert info.macs == sapr.count_macs(*pruned, (1, 8, 8, 1))
  assert info.params == artifacts.count_params(pruned[1])
  assert info.widths == {"stage1_block1/conv1": (4, 1)}
  model, _ = sapr.load(saved)
  assert model == pruned[0]


def test_people_can_read_it(saved):
  document = json.loads((saved / "info.json").read_text())
  assert list(document) == ["format", "inputs", "metrics", "config", "macs", "widths"]
  assert document["inputs"]["pixels"] == [0, 1] and document["inputs"]["mean"] == [0.3]
  assert document["widths"] == {"stage1_block1/conv1": {"dense": 4, "kept": 1}}
  names = {file.name for file in saved.iterdir()}
  assert names == {"README.md", "info.json", "model.json", "weights.safetensors"}


def test_a_model_without_any_of_it_is_still_read(tmp_path, pruned):
  sapr.save(tmp_path / "model", *pruned)
  info = sapr.load_info(tmp_path / "model")
  assert (info.inputs, info.metrics, info.config, info.macs) == (None, {}, {}, None)
  assert info.widths == {"stage1_block1/conv1": (None, 1)} and info.params == artifacts.count_params(pruned[1])
  assert "# CifarResNet, pruned" in sapr.model_card(info)


def test_saving_again_without_it_leaves_nothing_of_the_old(tmp_path, pruned):
  sapr.save(tmp_path / "model", *pruned, inputs=INPUTS)
  sapr.save(tmp_path / "model", *pruned)
  assert sapr.load_info(tmp_path / "model").inputs is None
  assert not (tmp_path / "model" / "README.md").exists()


@dataclasses.dataclass
class Recipe:
  """A configuration of the user's own."""

  epochs: int = 3
  rates: tuple[float, ...] = (0.1, 0.01)


def test_numbers_of_arrays_and_other_configurations_are_taken(tmp_path, pruned):
  metrics = {"accuracy": jnp.float32(0.5), "counts": np.arange(2), "best": np.int64(3)}
  sapr.save(tmp_path / "a", *pruned, metrics=metrics, config=Recipe())
  info = sapr.load_info(tmp_path / "a")
  assert info.metrics == {"accuracy": 0.5, "counts": [0, 1], "best": 3}
  assert info.config == {"epochs": 3, "rates": [0.1, 0.01]}
  sapr.save(tmp_path / "b", *pruned, config=ConfigDict({"train": {"epochs": 3}}))
  assert sapr.load_info(tmp_path / "b").config == {"train": {"epochs": 3}}


class WithMode(nn.Module):
  """Must be told whether it trains."""

  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


def test_a_module_that_must_be_told_its_mode_is_told(tmp_path):
  variables = {"params": {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}}
  sapr.save(tmp_path / "model", WithMode(), variables, inputs=sapr.Inputs((3,)))
  assert sapr.load_info(tmp_path / "model").macs == 6


@pytest.mark.parametrize(
  ("known", "message"),
  [
    ({"inputs": sapr.Inputs((8, 8, 3))}, r"inputs of shape \(1, 8, 8, 3\) do not fit together"),
    ({"inputs": sapr.Inputs((8, 8, 1), class_names=["a", "b"])}, r"class_names must name the 10 outputs .* got 2"),
    ({"inputs": (8, 8, 1)}, r"inputs must be a Inputs, got \(8, 8, 1\); sapr_jax\.Inputs"),
    ({"metrics": {"accuracy": float("nan")}}, r"metrics must hold finite numbers, text"),
    ({"metrics": {"accuracy": object()}}, r"metrics must hold finite numbers, text"),
    ({"metrics": 0.9}, r"metrics must map names to values"),
    ({"config": {3: 1}}, r"config must map names to values"),
  ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, pruned, known, message):
  with pytest.raises(sapr.InputError, match=message) as info:
    sapr.save(tmp_path / "model", *pruned, **known)
  assert "\n" not in str(info.value)
  assert not list(tmp_path.iterdir())


def edit(path, **changes):
  document = json.loads((path / "info.json").read_text())
  (path / "info.json").write_text(json.dumps(document | changes))


def reseal(path, content):
  """Writes `info.json` with its checksum, as another version or a careful hand might."""
  (path / "info.json").write_bytes(content)
  definition = json.loads((path / "model.json").read_text())
  definition["sha256"]["info.json"] = sha256(content)
  (path / "model.json").write_text(json.dumps(definition))


def sealed(**changes):
  def act(path):
    document = json.loads((path / "info.json").read_text())
    reseal(path, json.dumps(document | changes).encode())

  return act


@pytest.mark.parametrize(
  ("act", "message"),
  [
    (lambda d: (d / "info.json").unlink(), r"info\.json is missing; the directory is incomplete"),
    (lambda d: edit(d, macs=1), r"info\.json is damaged or was edited: its SHA-256 is not the one in model\.json"),
    (lambda d: (d / "info.json").write_bytes(b""), r"info\.json is damaged or was edited"),
    (lambda d: (d / "model.json").unlink(), r"model\.json is missing"),
    (lambda d: reseal(d, b"{"), r"info\.json is damaged"),
    (lambda d: reseal(d, b"[" * 10**5), r"info\.json is damaged"),
    (lambda d: reseal(d, b"[]"), r"info\.json cannot be used: it has format None; this version reads format 1"),
    (sealed(format=2), r"it has format 2; this version reads format 1"),
    (sealed(metrics=3), r"entries are missing or of the wrong kind"),
    (sealed(macs="x"), r"entries are missing or of the wrong kind"),
    (sealed(inputs={"shape": [1]}), r"info\.json cannot be used: document must be what Inputs\.to_json returned"),
    (sealed(inputs=INPUTS.to_json() | {"pixels": [0, 255]}), r"pixels must be \[0, 1\]"),
  ],
)
def test_damage_is_noticed_and_named(tmp_path, saved, act, message):
  shutil.copytree(saved, tmp_path / "model")
  act(tmp_path / "model")
  with pytest.raises(sapr.InputError, match=message) as info:
    sapr.load_info(tmp_path / "model")
  assert "\n" not in str(info.value)


def test_a_file_that_the_definition_does_not_name_is_refused(tmp_path, saved, pruned):
  sapr.save(tmp_path / "model", *pruned)
  shutil.copy(saved / "info.json", tmp_path / "model")
  with pytest.raises(sapr.InputError, match=r"info\.json is not of this model, as model\.json does not name it"):
    sapr.load_info(tmp_path / "model")


def test_random_damage_is_never_taken(tmp_path, saved):
  shutil.copytree(saved, tmp_path / "model")
  file, rng = tmp_path / "model" / "info.json", random.Random(0)
  content = file.read_bytes()
  assert saved_model.is_whole(tmp_path / "model")
  for _ in range(30):
    what, changed = damage(content, rng)
    file.write_bytes(changed)
    with pytest.raises(sapr.InputError, match=r"info\.json is damaged or was edited"):
      pytest.fail(f"{what} is taken: {sapr.load_info(tmp_path / 'model')}")
    assert not saved_model.is_whole(tmp_path / "model"), what


def test_the_card_is_for_people_and_may_be_edited(tmp_path, saved):
  shutil.copytree(saved, tmp_path / "model")
  (tmp_path / "model" / "README.md").write_text("mine")
  assert sapr.load_info(tmp_path / "model") == sapr.load_info(saved)
  assert saved_model.is_whole(tmp_path / "model")


def test_dense_features_are_those_of_the_module_that_was_cut(tiny, pruned):
  struct = jax.ShapeDtypeStruct(tiny.input_shape, jnp.float32)
  assert dense_features(pruned[0], struct) == dense_features(tiny.model, struct)
  assert dense_features(pruned[0], struct)["stage1_block1/conv1"] == 4
  assert dense_features(pruned[0], jax.ShapeDtypeStruct((1,), jnp.float32)) == {}
  assert evaluation_kwargs(pruned[0]) == {"train": False} and evaluation_kwargs(nn.Dense(2)) == {}
