"""State dicts from files of torch.save: what is read, what is refused, and that nothing in a file is executed."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys

import numpy as np
import pytest

from sapr_jax import InputError
from sapr_jax.artifacts.torch_file import read_state_dict

WITHOUT_TORCH = "PyTorch is not installed: pip install 'sapr_jax[torch]'"


@pytest.fixture
def torch():
  return pytest.importorskip("torch", reason=WITHOUT_TORCH)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request, torch, tmp_path):
  """Writes an object in either format of torch.save."""

  def write(content, **options):
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=request.param, **options)
    return tmp_path / "weights.pth"

  return write


def assert_refused(path, message):
  with pytest.raises(InputError, match=message) as info:
    read_state_dict(path)
  assert str(path) in str(info.value) and "\n" not in str(info.value) and len(str(info.value)) < 500


# ----------------------------------------------------------------------------------------------------------------------
# What is read
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_checkpoint_of_a_training_script(torch, save, protocol):
  module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  base = torch.arange(24.0).reshape(4, 6)
  state = module.state_dict()
  state |= {"view": base[1:, ::2], "transposed": base.T, "half": base.half(), "bfloat16": base.bfloat16()[2:].T}
  state |= {"parameter": torch.nn.Parameter(base.double()), "empty": torch.zeros(0, 3), "integers": torch.arange(3)}
  state |= {"scalar": torch.tensor(2.0, dtype=torch.bfloat16), "expanded": base[:1].expand(5, 6)}
  optimizer = torch.optim.Adam(module.parameters())
  scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
  checkpoint = {"model": state, "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict(), "epoch": 3}
  checkpoint["args"] = argparse.Namespace(lr=0.1, device=torch.device("cpu"), inner=argparse.Namespace(x=1))
  got = read_state_dict(save(checkpoint, pickle_protocol=protocol))
  assert list(got) == list(state)
  for name, want in state.items():
    assert f"torch.{got[name].dtype.name}" == str(want.dtype)
    np.testing.assert_array_equal(got[name].astype(np.float64), want.detach().double().numpy())


@pytest.mark.parametrize(
  "wrap",
  [
    lambda state: state,
    lambda state: {"state_dict": state, "best": state["w"][0]},
    lambda state: {"model": {"depth": 8}, "net": state, "weights": {"gamma": 0.1}},
    lambda state: {"model": {"state_dict": state}, "epoch": 3},
  ],
  ids=["plain", "state_dict", "configuration", "nested"],
)
def test_the_state_dict_is_found_in_a_checkpoint(torch, save, wrap):
  got = read_state_dict(save(wrap({"w": torch.ones(2, 3), "count": 5})))
  assert list(got) == ["w"]
  np.testing.assert_array_equal(got["w"], np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
  ("make", "what"),
  [
    (lambda torch: torch.ones(2), "no dictionary"),
    (lambda torch: [1, 2], "no dictionary"),
    (lambda torch: {}, "a dictionary of nothing"),
    (lambda torch: {"epoch": 3, "models": {"w": torch.ones(2)}}, "a dictionary of epoch, models"),
    (lambda torch: {f"key{i}": i for i in range(20)}, "a dictionary of key0, .*, key7 and 12 more"),
    (lambda torch: {1: torch.ones(2)}, "a dictionary of 1"),
    (lambda torch: {"a\nb": 1}, r"a dictionary of 'a\\nb'"),
  ],
)
def test_a_file_without_a_state_dict_is_named(torch, save, make, what):
  assert_refused(save(make(torch)), rf"must hold tensors by name, .*it holds {what}\. Save model\.state_dict\(\)")


def test_without_pytorch_the_message_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  path = tmp_path / "weights.pth"
  assert_refused(path, "is missing")
  path.write_bytes(b"x")
  assert_refused(path, r"needs PyTorch.*pip install 'sapr_jax\[torch\]', or convert the file to \.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


class Calls:
  """Pickles as the call of a function."""

  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


HOSTILE = {
  "system": lambda marker: Calls(os.system, f"touch {marker}"),
  "eval": lambda marker: Calls(eval, f"open({str(marker)!r}, 'w').close()"),
  "call": lambda marker: Calls(subprocess.call, ["touch", str(marker)]),
  "touch": lambda marker: Calls(pathlib.Path.touch, marker),
  "loads": lambda marker: Calls(pickle.loads, pickle.dumps(HOSTILE["eval"](marker))),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_in_a_file_is_executed(torch, save, tmp_path, what):
  marker = tmp_path / "executed"
  hostile = HOSTILE[what](marker)
  pickle.loads(pickle.dumps(hostile))  # the attack works
  marker.unlink()
  for content in (
    hostile,
    {"w": torch.ones(2), "b": hostile},
    {"state_dict": {hostile: 1}},
    argparse.Namespace(x=hostile),
  ):
    assert_refused(save(content), "contains .*, which is not a tensor; save the state dict alone")
    assert_refused(save(content, pickle_protocol=5), "cannot be read as a file of torch.save|contains .*, which")
  path = tmp_path / "plain.pth"
  path.write_bytes(pickle.dumps(hostile, 2))
  assert_refused(path, "contains .*, which is not a tensor")
  assert not marker.exists()


def test_a_whole_model_is_refused(torch, save):
  path = save(torch.nn.Linear(2, 3))
  assert_refused(path, r"contains torch\.nn\.modules\.linear\.Linear, .*torch\.save\(model\.state_dict\(\), path\)")


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: t.to("meta")], ids=["sparse", "meta"])
def test_tensors_without_plain_numbers_are_refused(torch, save, make):
  assert_refused(save({"w": make(torch.ones(2, 2))}), "cannot be read as a file of torch.save .*can't convert")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", pickle.dumps({"a": 1}), b"\x80\x02ca\x1b[31m\nx\n."])
def test_other_files_are_named(torch, tmp_path, content):
  path = tmp_path / "weights.pth"
  path.write_bytes(content)
  assert_refused(path, r"cannot be read as a file of torch\.save|contains 'a\\x1b\[31m\.x', which is not a tensor")


def test_missing_files_and_directories_are_named(tmp_path):
  assert_refused(tmp_path / "lost.pth", r"lost\.pth is missing")
  assert_refused(tmp_path, r"cannot be read \(Is a directory\)")


def test_truncated_files_are_named(torch, save):
  path = save({"w": torch.ones(2, 3)})
  content = path.read_bytes()
  for length in (1, 30, 100, len(content) // 2, len(content) - 3):
    path.write_bytes(content[:length])
    assert_refused(path, r"cannot be read as a file of torch\.save")


def test_a_flipped_bit_in_an_archive_is_noticed(torch, tmp_path):
  path = tmp_path / "weights.pth"
  torch.save({"w": torch.arange(6.0)}, path)
  content = bytearray(path.read_bytes())
  content[content.index(struct.pack("<f", 3))] ^= 1
  path.write_bytes(content)
  assert_refused(path, r"the checksum of weights/data/0 is wrong")


def test_random_damage_raises_no_other_error(torch, save):
  path = save({"epoch": 1, "model": {"w": torch.randn(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}})
  content, rng, refused = path.read_bytes(), random.Random(0), 0
  for _ in range(200):
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
      damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    path.write_bytes(damaged)
    try:
      read_state_dict(path)
    except InputError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 100
