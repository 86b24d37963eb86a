"""A model survives the way to disk and back, and damage is noticed."""

from __future__ import annotations

import errno
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_same

import sapr_jax as sapr


@pytest.fixture(scope="module")
def pruned(tiny):
  masks = tiny.graph.full_masks()
  for mask in masks.values():
    mask[1::3] = 0
  return sapr.prune(tiny.model, tiny.variables, tiny.graph, masks)


def test_a_pruned_model_comes_back_as_it_was(tmp_path, tiny, pruned):
  model, variables = pruned
  sapr.save(tmp_path / "model", model, variables)
  loaded, loaded_variables = sapr.load(tmp_path / "model")
  assert_same(loaded_variables, variables)
  assert isinstance(loaded, sapr.NarrowModule) and loaded.widths == model.widths
  x = jnp.ones(tiny.input_shape)
  np.testing.assert_array_equal(loaded.apply(loaded_variables, x), model.apply(variables, x))


def test_a_dense_model_comes_back_with_its_fields_and_dtypes(tmp_path, tiny):
  model = sapr.models.create("resnet8", width_multiplier=0.25, num_classes=7, dtype=jnp.bfloat16)
  variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.variables)
  sapr.save(tmp_path / "deep" / "model", model, variables)
  loaded, loaded_variables = sapr.load(tmp_path / "deep" / "model")
  assert (loaded.depth, loaded.width_multiplier, loaded.num_classes, loaded.dtype) == (8, 0.25, 7, jnp.bfloat16)
  assert_same(loaded_variables, variables)


def test_the_directory_holds_a_definition_people_can_read_and_no_pickle(tmp_path, pruned):
  sapr.save(tmp_path / "model", *pruned)
  assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["model.json", "weights.safetensors"]
  definition = json.loads((tmp_path / "model" / "model.json").read_text())
  assert definition["base"]["class"] == "CifarResNet"
  assert definition["widths"]["stage1_block1/conv1"] == {"features": 3}
  assert definition["variables"]["params/stage1_block1/conv1/kernel"] == {"shape": [3, 3, 4, 3], "dtype": "float32"}


def test_a_users_own_model_is_loaded_with_its_module(tmp_path, bottleneck):
  masks = bottleneck.graph.full_masks()
  masks["middle"][0] = 0
  model, variables = sapr.prune(bottleneck.model, bottleneck.variables, bottleneck.graph, masks)
  sapr.save(tmp_path / "model", model, variables)
  with pytest.raises(sapr.InputError, match=r"holds a Bottleneck, .* load\(path, base=Bottleneck\(\.\.\.\)\)"):
    sapr.load(tmp_path / "model")
  loaded, loaded_variables = sapr.load(tmp_path / "model", base=bottleneck.model)
  x = jnp.ones(bottleneck.input_shape)
  np.testing.assert_array_equal(loaded.apply(loaded_variables, x), model.apply(variables, x))


def test_another_module_than_the_saved_one_is_refused(tmp_path, tiny, pruned):
  sapr.save(tmp_path / "model", *pruned)
  with pytest.raises(sapr.InputError, match="holds a CifarResNet; base is a Dense"):
    sapr.load(tmp_path / "model", base=nn.Dense(3))
  with pytest.raises(sapr.InputError, match=r"with width_multiplier=0\.25; base has width_multiplier=0\.5"):
    sapr.load(tmp_path / "model", base=sapr.models.create("resnet8", width_multiplier=0.5))
  assert isinstance(sapr.load(tmp_path / "model", base=tiny.model)[0], sapr.NarrowModule)


def test_saving_again_replaces_the_model_and_leaves_nothing_behind(tmp_path, tiny, pruned):
  sapr.save(tmp_path / "model", *pruned)
  sapr.save(tmp_path / "model", tiny.model, tiny.variables)
  assert not isinstance(sapr.load(tmp_path / "model")[0], sapr.NarrowModule)
  assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_another_directory_is_not_overwritten(tmp_path, pruned):
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "1.jpg").write_text("x")
  with pytest.raises(sapr.InputError, match="photos exists and is not a saved model"):
    sapr.save(tmp_path / "photos", *pruned)
  assert (tmp_path / "photos" / "1.jpg").read_text() == "x"


def test_a_failed_save_leaves_the_old_model_whole(tmp_path, tiny, pruned, monkeypatch):
  sapr.save(tmp_path / "model", *pruned)

  def full_disk(file):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full_disk)
  with pytest.raises(
    sapr.InputError, match=r"model cannot be used \(No space left on device\); what is on disk is whole"
  ):
    sapr.save(tmp_path / "model", tiny.model, tiny.variables)
  assert isinstance(sapr.load(tmp_path / "model")[0], sapr.NarrowModule)
  assert [file.name for file in tmp_path.iterdir()] == ["model"]


def flip_a_bit(file):
  content = bytearray(file.read_bytes())
  content[-5] ^= 1
  file.write_bytes(content)


def change_definition(file, **changes):
  definition = json.loads(file.read_text())
  del definition["sha256"]["model.json"]  # as in the files of older versions
  file.write_text(json.dumps(definition | changes))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda d: (d / "weights.safetensors").unlink(), r"weights\.safetensors is missing"),
    (lambda d: flip_a_bit(d / "weights.safetensors"), r"weights\.safetensors is damaged: its SHA-256"),
    (lambda d: (d / "weights.safetensors").write_bytes(b"x"), r"weights\.safetensors is damaged"),
    (lambda d: (d / "model.json").unlink(), r"model\.json is missing"),
    (lambda d: (d / "model.json").write_text("{"), r"model\.json is damaged"),
    (lambda d: (d / "model.json").write_text("[]"), r"has format None; this version reads format 1"),
    (lambda d: change_definition(d / "model.json", format=2), r"has format 2; this version reads format 1"),
    (lambda d: change_definition(d / "model.json", variables={}), r"says None"),
    (
      lambda d: change_definition(d / "model.json", variables={"x": {}}),
      r"model\.json is damaged: entries are missing",
    ),
    (lambda d: change_definition(d / "model.json", base={"class": "os.system", "fields": {}}), r"holds a os\.system"),
    (
      lambda d: change_definition(d / "model.json", base={"class": "CifarResNet", "fields": {"deep": 3}}),
      r"CifarResNet does not take the fields \['deep'\]",
    ),
  ],
)
def test_damage_is_noticed_and_named(tmp_path, pruned, damage, message):
  sapr.save(tmp_path / "model", *pruned)
  damage(tmp_path / "model")
  with pytest.raises(sapr.InputError, match=message) as info:
    sapr.load(tmp_path / "model")
  assert "\n" not in str(info.value)
