"""Checkpoints: the newest undamaged one comes back exactly, damaged ones are named and skipped."""

from __future__ import annotations

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


def files_of(folder):
  return sorted((f for f in folder.rglob("*") if f.is_file() and f.stat().st_size), key=lambda f: f.stat().st_size)


def truncate(folder):
  file = files_of(folder / "state")[-1]
  os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(folder):
  file = files_of(folder / "state")[-1]
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 4
  file.write_bytes(content)


def remove_a_file(folder):
  files_of(folder / "state")[-1].unlink()


def change_the_position(folder):
  (file,) = (f for f in files_of(folder / "position") if b"0.3" in f.read_bytes())
  file.write_bytes(file.read_bytes().replace(b'"step": 3', b'"step": 4').replace(b'"step":3', b'"step":4'))


def empty_all(folder):
  for file in files_of(folder):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove_a_file, change_the_position, empty_all])
def test_a_damaged_checkpoint_is_named_and_skipped_for_the_one_before(tmp_path, state, damage, capfd):
  folder = tmp_path / "checkpoints" / "train"
  save_steps(folder, state, (1, 2, 3), keep=3)
  damage(folder / "3")
  restored, position = restore(folder, state)
  assert position["step"] == 2
  jax.tree.map(np.testing.assert_array_equal, restored, plus(state, 2))
  (warning,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("warning:"))
  assert f"{folder}/3 is damaged" in warning and "moved to" in warning
  assert steps_in(folder) == [1, 2]
  assert [d.name for d in (tmp_path / "checkpoints" / "damaged").iterdir()] == ["train_3_0"]
  # The number is free again.
  save_steps(folder, state, (3,), keep=3)
  assert restore(folder, state)[1]["step"] == 3


def test_if_all_are_damaged_the_stage_begins_again(tmp_path, state, capfd):
  folder = tmp_path / "checkpoints" / "train"
  save_steps(folder, state, (1, 2))
  for step in ("1", "2"):
    empty_all(folder / step)
  assert restore(folder, state) == (state, None)
  assert capfd.readouterr().err.count("is damaged") == 2


def test_a_full_disk_is_said_and_leaves_the_older_checkpoint(tmp_path, state, monkeypatch):
  import orbax.checkpoint as ocp

  save_steps(tmp_path / "train", state, (1,))
  checkpointer = Checkpointer(tmp_path / "train")

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(InputError, match=r"No checkpoint can be written to .*train \(No space left on device\); older"):
      checkpointer.save(2, state, {})
  checkpointer.close()
  assert restore(tmp_path / "train", state)[1]["step"] == 1


def test_a_place_that_cannot_be_written_is_said(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(InputError, match=r"No checkpoint can be written to .*file/train"):
    Checkpointer(tmp_path / "file" / "train")
