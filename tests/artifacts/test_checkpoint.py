"""Checkpoints: the newest undamaged one comes back exactly, damaged ones are named and skipped."""

from __future__ import annotations

import errno
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import damage_a_file

from sapr_jax.artifacts import Checkpointer
from sapr_jax.errors import InputError


@pytest.fixture
def state():
  tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9))
  weights = jnp.asarray(np.random.default_rng(0).normal(size=(50, 40)), jnp.float32)
  return {"params": {"w": weights}, "opt_state": tx.init({"w": weights}), "masks": {"a": jnp.ones(2)}}


def plus(state, number):
  return jax.tree.map(lambda x: x + number, state)


def save_steps(folder, state, steps, **options):
  checkpointer = Checkpointer(folder, **options)
  for step in steps:
    checkpointer.save(step, plus(state, step), {"step": step, "loss": 0.1 + 0.2})
  checkpointer.close()


def restore(folder, like):
  checkpointer = Checkpointer(folder)
  try:
    return checkpointer.restore(like)
  finally:
    checkpointer.close()


def steps_in(folder):
  return sorted(int(d.name) for d in folder.iterdir() if d.name.isdigit())


def test_the_newest_state_comes_back_exactly(tmp_path, state):
  assert restore(tmp_path / "train", state) == (state, None)
  save_steps(tmp_path / "train", state, (1, 2, 3))
  restored, position = restore(tmp_path / "train", state)
  assert position == {"step": 3, "loss": 0.1 + 0.2}
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, plus(state, 3))
  assert steps_in(tmp_path / "train") == [2, 3]


def test_the_newest_and_one_an_interval_are_kept(tmp_path, state):
  save_steps(tmp_path / "train", state, range(1, 8), keep=2, keep_period=3)
  assert steps_in(tmp_path / "train") == [3, 6, 7]


def test_a_number_that_is_there_is_not_saved_again(tmp_path, state):
  save_steps(tmp_path / "train", state, (1, 2))
  checkpointer = Checkpointer(tmp_path / "train")
  checkpointer.save(2, plus(state, 9), {"step": 9})
  checkpointer.close()
  assert restore(tmp_path / "train", state)[1] == {"step": 2, "loss": 0.1 + 0.2}


def content_of(folder):
  return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_damaged_checkpoint_is_named_and_skipped_for_the_one_before(tmp_path, state, capfd):
  folder = tmp_path / "checkpoints" / "train"
  save_steps(folder, state, (1, 2, 3), keep=3)
  file = folder / "3" / "state" / "checkpoint.msgpack"
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 4
  file.write_bytes(content)
  restored, position = restore(folder, state)
  assert position["step"] == 2
  jax.tree.map(np.testing.assert_array_equal, restored, plus(state, 2))
  damaged = tmp_path / "checkpoints" / "damaged"
  assert capfd.readouterr().err == (
    f"warning: the checkpoint {folder}/3 is damaged (the SHA-256 of checkpoint.msgpack is not the one in"
    f" checkpoint.sha256); moved to {damaged}/train_3_0\n"
  )
  assert steps_in(folder) == [1, 2] and [d.name for d in damaged.iterdir()] == ["train_3_0"]
  # The number is free again.
  save_steps(folder, state, (3,), keep=3)
  assert restore(folder, state)[1]["step"] == 3


def test_any_damage_is_noticed_and_nothing_else_is_lost(tmp_path, state, capfd):
  """FUZZ=N in the environment tries N files, from another seed each time."""
  cases = int(os.environ.get("FUZZ", 40))
  rng = random.Random(0 if cases == 40 else None)
  save_steps(tmp_path / "train", state, (1, 2))
  for _ in range(cases):
    shutil.copytree(tmp_path / "train", tmp_path / "checkpoints" / "train")
    what = damage_a_file(tmp_path / "checkpoints" / "train" / "2", rng)
    restored, position = restore(tmp_path / "checkpoints" / "train", state)
    jax.tree.map(np.testing.assert_array_equal, restored, plus(state, position["step"]))
    printed = capfd.readouterr().err
    assert position["step"] == (1 if "is damaged" in printed else 2), what
    assert printed.count("\n") == 2 - position["step"], printed
    if "checkpoint.msgpack" in what or "checkpoint.sha256" in what:
      assert position["step"] == 1, what
    shutil.rmtree(tmp_path / "checkpoints")


def test_if_all_are_damaged_the_stage_begins_again(tmp_path, state, capfd):
  folder = tmp_path / "checkpoints" / "train"
  save_steps(folder, state, (1, 2))
  for file in folder.glob("*/state/checkpoint.*"):
    file.write_bytes(b"")
  assert restore(folder, state) == (state, None)
  assert capfd.readouterr().err.count("is damaged") == 2


def test_a_full_disk_is_said_and_leaves_the_older_checkpoint(tmp_path, state, monkeypatch, capfd):
  save_steps(tmp_path / "train", state, (1,))
  checkpointer = Checkpointer(tmp_path / "train")

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    checkpointer.save(2, state, {})  # in a thread
    with pytest.raises(OSError, match="No space left on device"):
      checkpointer.close()
  assert capfd.readouterr().err == ""
  assert restore(tmp_path / "train", state)[1]["step"] == 1
  assert [d.name for d in (tmp_path / "train").iterdir()] == ["1"]  # what was half written is gone


def test_a_checkpoint_of_another_network_stays_where_it_is(tmp_path, state):
  save_steps(tmp_path / "train", state, (1, 2))
  before = content_of(tmp_path)
  narrower = {**state, "masks": {"a": jnp.ones(3)}}
  for like, message in (
    (
      narrower,
      r"train/2 must be of the network and images that the run has now: masks/a is float32\[2\] in it and must",
    ),
    (
      {"params": state["params"]},
      r"masks/a is float32\[2\] in it and must be missing; give the same as when it was mad",
    ),
    (jax.tree.map(lambda x: x.astype(jnp.int32), state), r"float32\[2\] in it and must be int32\[2\]"),
  ):
    with pytest.raises(InputError, match=message):
      restore(tmp_path / "train", like)
  assert content_of(tmp_path) == before


def test_what_cannot_be_read_is_no_damage(tmp_path, state, monkeypatch):
  save_steps(tmp_path / "train", state, (1, 2))

  def stale(*args, **kwargs):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "checkpoint.msgpack")

  with monkeypatch.context() as patch:
    patch.setattr(os, "open", stale)
    with pytest.raises(OSError, match=r"Stale file handle: .checkpoint\.msgpack"):
      restore(tmp_path / "train", state)
  assert restore(tmp_path / "train", state)[1]["step"] == 2


def test_all_dtypes_and_keys_of_dictionaries_come_back(tmp_path):
  state = {name: jnp.arange(3).astype(name) for name in ("bfloat16", "float16", "int8", "uint32", "bool", "complex64")}
  state |= {"scalar": jnp.float32(2), "nothing": jnp.zeros((0, 4))}
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, state, {"record": {"z": 1, "a": [None, 2.5, "text"]}})
  checkpointer.close()
  restored, position = restore(tmp_path, state)
  assert list(position["record"]) == ["z", "a"] and position == {"record": {"z": 1, "a": [None, 2.5, "text"]}}
  for name, leaf in state.items():
    assert restored[name].dtype == leaf.dtype and restored[name].sharding == leaf.sharding
    np.testing.assert_array_equal(restored[name], leaf)
