"""Records on Weights & Biases, without a network."""

from __future__ import annotations

import json
import sys

import pytest

from sapr_jax.artifacts import weights_and_biases
from sapr_jax.errors import InputError


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with (
    pytest.raises(InputError, match=r"report\.wandb_project needs wandb, .*pip install 'sapr_jax\[wandb\]'"),
    weights_and_biases(tmp_path, "project", {}),
  ):
    pass
  assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_goes_on_under_its_id(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="needs pip install 'sapr_jax[wandb]'")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  ids = []
  for step in (1, 2):
    with weights_and_biases(tmp_path, "project", {"train.epochs": 2}) as write:
      write({"stage": "train", "epoch": step, "step": step, "loss": 0.5, "widths": {"conv": 3}})
    ids.append(json.loads((tmp_path / "wandb.json").read_text())["id"])
  assert ids[0] == ids[1]
  files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
  assert files
  content = b"".join(file.read_bytes() for file in files)
  assert b"train/loss" in content and b"widths" not in content and b"train.epochs" in content
