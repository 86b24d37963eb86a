"""The paper's sizes run piece by piece, on machines that are lent for minutes; what is done is carried between them."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

import pytest

from sapr_jax.artifacts.files import read_json
from study import __main__ as command

pytest.importorskip("sklearn", reason="the digits need pip install 'sapr_jax[demo]'")

ROW, RUN = "resnet56/gamma=0.0005", "full/resnet56/gamma=0.0005/seed_0"
TINY = {
  "data.source": "digits",
  "model.name": "resnet8",
  "model.width_multiplier": 0.25,
  "data.train_images": 256,
  "data.test_images": 64,
  "eval_batch_size": 64,
  "train.epochs": 3,
  "train.batch_size": 64,
  "train.decay_epochs": "(2,)",
  "prune.start_epoch": 1,
  "generator.data_share": 0.5,
  "generator.batch_size": 64,
  "finetune.epochs": 2,
  "finetune.batch_size": 64,
  "finetune.decay_epochs": "(1,)",
  "report.latency_repeats": 1,
  "report.latency_batch_sizes": "(1,)",
}


def piece(runs, results, monkeypatch):
  settings = [f"{name}={value}" for name, value in TINY.items()]
  arguments = ["--rows", ROW, "--seeds", "0", "--runs", str(runs), "--results", str(results), "--minutes", "9"]
  monkeypatch.setattr("sys.argv", ["study", "--size", "full", *arguments, "--set", *settings])
  return command.main()


def stop_after_the_first_epoch(records):
  def watch():
    while not (records.is_file() and records.read_text().count("\n")):
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  watcher = threading.Thread(target=watch, daemon=True)
  watcher.start()
  return watcher


@pytest.mark.slow
def test_a_run_goes_on_in_another_folder_as_if_nothing_had_happened(tmp_path, monkeypatch):
  here, there, whole, results = (tmp_path / name for name in ("here", "there", "whole", "results"))
  watcher = stop_after_the_first_epoch(here / RUN / "records.jsonl")
  assert piece(here, results, monkeypatch) == 75
  watcher.join()
  assert not (here / RUN / "study.json").exists()
  shutil.move(here, there)
  assert piece(there, results, monkeypatch) == 0
  assert piece(whole, tmp_path / "others", monkeypatch) == 0
  entries = [read_json(runs / RUN / "study.json") for runs in (there, whole)]
  assert entries[0]["accuracy"] == entries[1]["accuracy"] and entries[0]["curves"] == entries[1]["curves"]
  for model in ("dense", "pruned"):
    files = [runs / RUN / model / "weights.safetensors" for runs in (there, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
  assert len(read_json(results / "cifar10_study_full.json")["rows"]) == 1
