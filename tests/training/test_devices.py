"""One, two, four and eight devices do the same: the same gradients, masks and counts."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax_options import virtual_devices
from small_run import small_config

import sapr_jax as sapr
from sapr_jax import training
from sapr_jax.runtime import devices

ROOT = pathlib.Path(__file__).parent.parent.parent


COUNTS = (1, 2, 8)
"""Numbers of devices."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """What `many_devices.py` found on them."""
  file = tmp_path_factory.mktemp("devices") / "results.npz"
  environment = os.environ | virtual_devices(max(COUNTS)) | {"PYTHONPATH": str(ROOT)}
  script = pathlib.Path(__file__).with_name("many_devices.py")
  command = [sys.executable, str(script), str(file), *map(str, COUNTS)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return dict(np.load(file))


def of(found, prefix):
  return {name[len(prefix) + 1 :]: value for name, value in found.items() if name.startswith(f"{prefix}/")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "norm", "generator"])
def test_the_same_global_batch_gives_the_same_updates(found, kind):
  want = of(found, f"{kind}/1")
  assert any("params" in name for name in want)
  for count in COUNTS[1:]:
    got = of(found, f"{kind}/{count}")
    assert got.keys() == want.keys()
    for name in want.keys() - {"masks"}:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} on {count}")


@pytest.mark.slow
def test_all_devices_sample_the_same_masks(found):
  for count in COUNTS:
    masks = found[f"generator/{count}/masks"]
    assert len(masks) == count
    assert set(np.unique(masks)) == {0, 1}
    for copy in masks:
      np.testing.assert_array_equal(copy, found["generator/1/masks"][0])


@pytest.mark.slow
def test_evaluation_counts_every_image_once_on_any_number_of_devices(found):
  want = of(found, "evaluation/1/8")
  for count in COUNTS:
    for size in (8, 16):
      got = of(found, f"evaluation/{count}/{size}")
      assert got["count"] == 21
      assert got["correct"] == want["correct"]
      np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)


@pytest.mark.slow
def test_the_steady_state_compiles_nothing(found):
  programs = {name: value for name, value in found.items() if name.endswith("programs")}
  assert len(programs) == 3 * len(COUNTS)
  assert all(value == 1 for value in programs.values())


def test_a_run_compiles_each_step_once_and_transfers_nothing_by_the_way(tmp_path, monkeypatch):
  place, call, used = devices.MappedStep.place, devices.MappedStep.__call__, set()

  def guarded(action):
    def guarded_action(step, *arguments):
      used.add(step)
      with jax.transfer_guard("disallow"):
        return action(step, *arguments)

    return guarded_action

  monkeypatch.setattr(devices.MappedStep, "place", guarded(place))
  monkeypatch.setattr(devices.MappedStep, "__call__", guarded(call))
  config = small_config(checkpoint__every_steps=3)
  training.run(config, tmp_path / "run")
  # Weights, generator, loss of its masks, evaluation; of the pruned network statistics, weights, evaluation.
  assert len(used) == 7
  assert all(step._many._cache_size() == 1 for step in used)


def test_processes_with_unequal_numbers_of_devices_are_refused(monkeypatch):
  class Device:
    def __init__(self, number, process):
      self.id, self.process_index = number, process

  monkeypatch.setattr(jax, "devices", lambda: [Device(0, 0), Device(1, 1), Device(2, 1)])
  with pytest.raises(sapr.InputError, match="1 on process 0, 2 on process 1"):
    devices.data_mesh()


def test_devices_of_a_process_are_neighbours(monkeypatch):
  class Device:
    def __init__(self, number, process):
      self.id, self.process_index = number, process

  found = []
  monkeypatch.setattr(jax, "devices", lambda: [Device(i, p) for i, p in enumerate((0, 0, 1, 1, 0, 0, 1, 1))])
  monkeypatch.setattr(devices, "Mesh", lambda array, names: found.extend(array))
  devices.data_mesh()
  assert [(device.process_index, device.id) for device in found] == [
    *((0, i) for i in (0, 1, 4, 5)),
    *((1, i) for i in (2, 3, 6, 7)),
  ]
