"""One small run from training to the pruned model, and what a killed one does."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest

import sapr_jax as sapr
from configs import digits
from sapr_jax import artifacts, data, training
from sapr_jax.training import setup

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")

SMALL = {
  "data.train_images": 320,
  "data.test_images": 100,
  "eval_batch_size": 64,
  "train.epochs": 4,
  "train.decay_epochs": (3,),
  "prune.start_epoch": 1,
  "prune.gamma": 0.1,  # strong, as there are only five steps in an epoch
  "finetune.epochs": 2,
  "finetune.decay_epochs": (1,),
  "report.latency_batch_sizes": (1,),
  "report.latency_repeats": 1,
}


def small_config(**overrides):
  config = digits.get_config()
  config.update_from_flattened_dict(SMALL | {name.replace("__", "."): value for name, value in overrides.items()})
  return config


@pytest.fixture(scope="module")
def whole_and_log(tmp_path_factory):
  """(work directory, summary) of a run that nothing disturbed, and what it printed."""
  workdir = tmp_path_factory.mktemp("run") / "whole"
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    summary = training.run(small_config(), workdir)
  return workdir, summary, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def whole(whole_and_log):
  return whole_and_log[:2]


def without_times(records):
  return [{name: value for name, value in record.items() if not name.endswith("seconds")} for record in records]


def test_every_epoch_has_its_record(whole):
  records = artifacts.read_records(whole[0])
  assert [(r["stage"], r["epoch"], r["step"]) for r in records] == [
    *(("train", i, i) for i in (1, 2, 3, 4)),
    *(("finetune", i, 4 + i) for i in (1, 2)),
  ]
  common = {"learning_rate", "train_loss", "train_accuracy", "test_accuracy", "test_loss", "weight_seconds"}
  searched = {
    *("subnetwork_accuracy", "macs_share", "macs_share_of_network", "dropped_norm_mean", "dropped_norm_max"),
    *("kept_norm_mean", "generator_loss", "generator_macs_share", "generator_seconds", "widths"),
  }
  assert all(common <= record.keys() for record in records)
  assert [searched <= record.keys() for record in records] == [False, True, True, True, False, False]
  assert ["hamming_distance" in record for record in records] == [False, False, True, True, False, False]
  assert [record["learning_rate"] for record in records] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.05, 0.005])


def test_the_masks_meet_the_budget_in_every_epoch(whole):
  shares = [record["macs_share"] for record in artifacts.read_records(whole[0]) if "macs_share" in record]
  assert len(shares) == 3
  assert all(0.48 <= share <= 0.49 for share in shares)


def test_the_dropped_channels_lose_their_norm(whole):
  first = artifacts.read_records(whole[0])[1]
  assert first["dropped_norm_mean"] < 0.6 * first["kept_norm_mean"]


def test_tensorboard_gets_the_numbers(whole):
  (events,) = (whole[0] / "tensorboard").glob("events.*")
  content = events.read_bytes()
  for tag in (b"train/subnetwork_accuracy", b"train/hamming_distance", b"finetune/test_accuracy"):
    assert tag in content


def test_the_summary_is_about_the_last_epoch_and_the_compact_model(whole):
  workdir, summary = whole
  records = artifacts.read_records(workdir)
  assert summary == json.loads((workdir / "summary.json").read_text())
  assert summary["dense"]["accuracy"] == pytest.approx(records[3]["test_accuracy"])
  # Masked and compact are the same network.
  assert summary["subnetwork"]["accuracy"] == pytest.approx(records[3]["subnetwork_accuracy"])
  assert summary["pruned"]["accuracy"] == pytest.approx(records[5]["test_accuracy"])
  assert summary["dense"]["macs"] == 747_136
  assert 0.45 < summary["pruned"]["macs"] / summary["dense"]["macs"] < 0.5
  assert summary["pruned"]["params"] < summary["dense"]["params"]
  table = (workdir / "report.txt").read_text()
  assert [line.split("  ")[0] for line in table.splitlines()[2:]] == [
    "dense",
    "sub-network, before fine-tuning",
    "pruned, after fine-tuning",
  ]


def test_the_pruned_model_can_be_loaded_and_has_what_the_table_says(whole):
  workdir, summary = whole
  model, variables = sapr.load(workdir / "pruned")
  assert artifacts.count_params(variables) == summary["pruned"]["params"]
  assert sapr.count_macs(model, variables, (1, 8, 8, 1)) == summary["pruned"]["macs"]
  dense, dense_variables = sapr.load(workdir / "dense")
  assert dense.depth == 8
  assert artifacts.count_params(dense_variables) == summary["dense"]["params"] == 75_002


def test_a_finished_run_is_not_run_again(whole, capsys, monkeypatch):
  monkeypatch.setattr(data, "load_dataset", lambda *args, **kwargs: pytest.fail("the run was started again"))
  assert training.run(small_config(), whole[0]) == whole[1]
  assert "holds a finished run" in capsys.readouterr().out


def test_a_run_stopped_in_each_stage_ends_as_if_it_had_not_been(whole, tmp_path, monkeypatch):
  class StoppedError(Exception):
    pass

  write = artifacts.Recorder.write

  def stop_at(step):
    def stopping(recorder, record):
      write(recorder, record)  # the record is there, its checkpoint is not
      if record["step"] == step:
        raise StoppedError

    return stopping

  for step in (3, 6):
    monkeypatch.setattr(artifacts.Recorder, "write", stop_at(step))
    with pytest.raises(StoppedError):
      training.run(small_config(), tmp_path / "run")
  monkeypatch.setattr(artifacts.Recorder, "write", write)
  training.run(small_config(), tmp_path / "run")

  got, want = artifacts.read_records(tmp_path / "run"), artifacts.read_records(whole[0])
  assert without_times(got) == without_times(want)
  for name in ("dense", "pruned"):
    (_, got_variables), (_, want_variables) = sapr.load(tmp_path / "run" / name), sapr.load(whole[0] / name)
    jax.tree.map(np.testing.assert_array_equal, got_variables, want_variables)


def test_a_run_stopped_within_an_epoch_goes_on_at_the_step(whole, tmp_path, monkeypatch):
  class StoppedError(Exception):
    pass

  save, places = artifacts.Checkpointer.save, []

  def stop_at(stop):
    def saving(checkpointer, step, state, position):
      save(checkpointer, step, state, position)
      places.append((position["epoch"], position["step"]))
      if places[-1] == stop:
        raise StoppedError

    return saving

  config = small_config(checkpoint__every_steps=3)
  for stop in ((2, 2), (0, 3)):  # in the third epoch of training, and in the first of fine-tuning
    monkeypatch.setattr(artifacts.Checkpointer, "save", stop_at(stop))
    with pytest.raises(StoppedError):
      training.run(config, tmp_path / "run")
    places.append("stopped")
  monkeypatch.setattr(artifacts.Checkpointer, "save", stop_at(None))
  training.run(config, tmp_path / "run")
  train = [(0, 3), (1, 0), (1, 1), (1, 4), (2, 0), (2, 2), "stopped", (3, 0), (3, 3), (4, 0)]
  assert places == [*train, (0, 3), "stopped", (1, 0), (1, 1), (1, 4), (2, 0)]

  got, want = artifacts.read_records(tmp_path / "run"), artifacts.read_records(whole[0])
  assert without_times(got) == without_times(want)
  for name in ("dense", "pruned"):
    (_, got_variables), (_, want_variables) = sapr.load(tmp_path / "run" / name), sapr.load(whole[0] / name)
    jax.tree.map(np.testing.assert_array_equal, got_variables, want_variables)


def test_data_that_has_changed_is_noticed(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "run")
  (tmp_path / "run" / "summary.json").unlink()
  (tmp_path / "run" / "config.json").write_text((tmp_path / "run" / "config.json").read_text().replace("320", "256"))
  with pytest.raises(
    sapr.InputError, match="The data has changed since the run began: an epoch had 5 steps and now has"
  ):
    training.run(small_config(data__train_images=256), tmp_path / "run")


def test_a_run_starts_from_a_saved_model(whole, tmp_path):
  weights = str(whole[0] / "dense")
  config = small_config(init__weights=weights, finetune__epochs=0, finetune__decay_epochs=(), train__learning_rate=1e-6)
  config.update_from_flattened_dict({"train.epochs": 1, "train.decay_epochs": (), "prune.start_epoch": 0})
  training.run(config, tmp_path / "again")
  params, want = (sapr.load(path / "dense")[1]["params"] for path in (tmp_path / "again", whole[0]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params, want)  # the learning rate is tiny

  # A pruned model can be pruned further.
  config.init.weights, config.prune.p = str(whole[0] / "pruned"), 0.7
  summary = training.run(config, tmp_path / "further")
  assert summary["dense"]["macs"] == whole[1]["pruned"]["macs"]
  assert summary["pruned"]["macs"] < 0.8 * summary["dense"]["macs"]
  assert sapr.load(tmp_path / "further" / "pruned")[0].base == sapr.load(whole[0] / "dense")[0]

  config.model.width_multiplier = 0.5
  with pytest.raises(sapr.InputError, match=r"holds a CifarResNet with width_multiplier=1\.0; base has"):
    training.run(config, tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_a_run_starts_from_pytorch_weights(tmp_path):
  config = small_config(model__width_multiplier=0.25)
  model = sapr.models.create("resnet8", width_multiplier=0.25)
  variables = jax.jit(model.init)(jax.random.key(5), np.zeros((1, 8, 8, 1)))
  sapr.export_torch(tmp_path / "weights.safetensors", model, variables)
  config.init.weights = str(tmp_path / "weights.safetensors")
  _, got = setup.initial_network(config, 10, (1, 8, 8, 1))
  jax.tree.map(np.testing.assert_array_equal, got, variables)
  config.init.weights = str(tmp_path / "nothing.pth")
  with pytest.raises(sapr.InputError, match=r"nothing\.pth"):
    setup.initial_network(config, 10, (1, 8, 8, 1))


def test_training_that_diverges_stops_with_advice(tmp_path):
  with pytest.raises(
    sapr.InputError, match=r"train_loss is nan in epoch 1 of train, step \d of 5, at learning rate 1e\+30: training"
  ):
    training.run(small_config(train__learning_rate=1e30), tmp_path / "run")


def test_a_run_whose_checkpoints_were_lost_starts_again(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "train")
  (tmp_path / "run" / "summary.json").write_text("{")
  training.run(small_config(), tmp_path / "run")
  assert without_times(artifacts.read_records(tmp_path / "run")) == without_times(artifacts.read_records(whole[0]))


def test_the_penalty_form_and_another_weighting_run_too(tmp_path):
  config = small_config(
    prune__form="penalty", prune__weighting="share", prune__round_to=4, finetune__epochs=0, train__epochs=2,
    train__decay_epochs=(), finetune__decay_epochs=(),
  )  # fmt: skip
  summary = training.run(config, tmp_path / "run")
  assert all(width % 4 == 0 for width in summary["run"]["widths"].values())
  assert summary["pruned"]["accuracy"] == summary["subnetwork"]["accuracy"]


def test_a_log_that_is_no_terminal_has_one_plain_line_an_epoch(whole_and_log):
  _, _, out, err = whole_and_log
  lines = [line for line in out.splitlines() if line.startswith(("train ", "finetune "))]
  assert len(lines) == 6
  assert re.match(r"train 1/4: loss \d\.\d+, test [\d.]+%, [\d.]+ s, \d:\d\d:\d\d left$", lines[0])
  assert "sub-network" in lines[1] and "dropped" in lines[1]
  assert lines[5].startswith("finetune 2/2") and not lines[5].endswith("left")
  assert "\r" not in out + err and "\x1b" not in out + err
