"""One small run from training to the pruned model."""

from __future__ import annotations

import contextlib
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import small_config

import sapr_jax as sapr
from sapr_jax import artifacts, data, training
from sapr_jax.training import epochs, loop, setup

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")


def test_every_epoch_has_its_record(whole):
  records = artifacts.read_records(whole[0])
  assert [(r["stage"], r["epoch"], r["step"]) for r in records] == [
    *(("train", i, i) for i in (1, 2, 3, 4)),
    *(("finetune", i, 4 + i) for i in (1, 2)),
  ]
  common = {"learning_rate", "train_loss", "train_accuracy", "test_accuracy", "test_loss", "weight_seconds"}
  searched = {
    *("subnetwork_accuracy", "cost", "cost_share", "macs_share_of_network", "dropped_norm_mean", "dropped_norm_max"),
    *("kept_norm_mean", "widths"),
  }
  renewed = {"generator_loss", "generator_cost_share", "generator_seconds"}
  assert all(common <= record.keys() for record in records)
  assert [searched <= record.keys() for record in records] == [False, True, True, True, False, False]
  assert [renewed <= record.keys() for record in records] == [False, True, True, False, False, False]
  assert ["hamming_distance" in record for record in records] == [False, False, True, False, False, False]
  assert [record["learning_rate"] for record in records] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.05, 0.005])


def test_the_masks_meet_the_budget_in_every_epoch(whole):
  shares = [record["cost_share"] for record in artifacts.read_records(whole[0]) if "cost_share" in record]
  assert len(shares) == 3
  assert all(0.48 <= share <= 0.49 for share in shares)


def test_held_masks_are_those_of_a_generator_that_has_come_to_rest(whole, quick_compilation):
  run = setup.build(small_config())
  with contextlib.closing(artifacts.Checkpointer(whole[0] / "checkpoints" / "train")) as checkpointer:
    state, position = loop.restore(run, loop.pruning_stage(run), checkpointer)
  assert position.epoch == 4
  assert int(state["generator"].step) == 2 * (len(run.generator_images) // run.config.generator.batch_size)
  proposed = epochs.masks_in_force(run, state["generator"], epoch=2)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["masks"]), proposed)


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


def test_new_statistics_are_those_of_so_many_training_batches(quick_compilation):
  config = small_config(model__width_multiplier=0.25, data__crop_padding=0, data__flip=False)
  run = setup.build(config)
  calls = []
  renewed = epochs.renew_statistics(run, run.model, run.variables, batches=7, between_calls=lambda: calls.append(None))
  assert calls
  jax.tree.map(np.testing.assert_array_equal, renewed["params"], jax.device_get(run.variables["params"]))

  # Five batches in an epoch, so that two are of the next.
  stream = {"seed": config.seed, "stream": setup.STATISTICS}
  order = [data.epoch_batches(320, config.train.batch_size, epoch=epoch, **stream) for epoch in (0, 1)]
  want, train = run.variables, jax.jit(lambda v, x: run.model.apply(v, x, train=True, mutable=["batch_stats"])[1])
  for batch in np.concatenate(order)[:7]:
    want = want | train(want, run.feed.preprocessing.evaluate(run.feed.train.images[batch]))
  assert not np.allclose(renewed["batch_stats"]["bn"]["mean"], run.variables["batch_stats"]["bn"]["mean"])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), renewed["batch_stats"], want["batch_stats"]
  )


def test_fine_tuning_starts_from_new_statistics(whole, quick_compilation, tmp_path):
  config = small_config(
    init__weights=str(whole[0] / "dense"), prune__start_epoch=0, prune__hold_epoch=None, train__epochs=1,
    train__decay_epochs=(), finetune__epochs=0, finetune__decay_epochs=(),
  )  # fmt: skip
  summary = training.run(config, tmp_path / "run")
  assert summary["run"]["statistics_batches"] == 7
  (_, dense), (_, pruned) = (sapr.load(tmp_path / "run" / name) for name in ("dense", "pruned"))
  np.testing.assert_array_equal(dense["params"]["bn"]["scale"], pruned["params"]["bn"]["scale"])  # of the stem
  assert not np.array_equal(dense["batch_stats"]["bn"]["mean"], pruned["batch_stats"]["bn"]["mean"])


def test_a_finished_run_is_not_run_again(whole, capsys, monkeypatch):
  monkeypatch.setattr(data, "load_dataset", lambda *args, **kwargs: pytest.fail("the run was started again"))
  assert training.run(small_config(), whole[0]) == whole[1]
  assert "holds a finished run" in capsys.readouterr().out


def test_data_that_has_changed_is_noticed(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "run")
  (tmp_path / "run" / "summary.json").unlink()
  (tmp_path / "run" / "config.json").write_text((tmp_path / "run" / "config.json").read_text().replace("320", "256"))
  with pytest.raises(
    sapr.InputError, match="The data has changed since the run began: an epoch had 5 steps and now has"
  ):
    training.run(small_config(data__train_images=256), tmp_path / "run")


def test_a_run_starts_from_a_saved_model(whole, quick_compilation, tmp_path):
  config = small_config(init__weights=str(whole[0] / "dense"))
  dense, variables = sapr.load(whole[0] / "dense")
  model, got = setup.initial_network(config, 10, (1, 8, 8, 1))
  assert model == dense
  jax.tree.map(np.testing.assert_array_equal, got, variables)

  # A pruned model can be pruned further.
  config = small_config(
    init__weights=str(whole[0] / "pruned"), prune__p=0.7, prune__start_epoch=0, prune__hold_epoch=None, train__epochs=1,
    train__decay_epochs=(), train__learning_rate=1e-6, finetune__epochs=0, finetune__decay_epochs=(),
  )  # fmt: skip
  summary = training.run(config, tmp_path / "further")
  params, want = (sapr.load(path)[1]["params"] for path in (tmp_path / "further" / "dense", whole[0] / "pruned"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params, want)  # the learning rate is tiny
  assert summary["dense"]["macs"] == whole[1]["pruned"]["macs"]
  assert summary["pruned"]["macs"] < 0.8 * summary["dense"]["macs"]
  assert sapr.load(tmp_path / "further" / "pruned")[0].base == dense

  config.model.width_multiplier = 0.5
  with pytest.raises(sapr.InputError, match=r"holds a CifarResNet with width_multiplier=1\.0; base has"):
    training.run(config, tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_a_run_starts_from_pytorch_weights(quick_compilation, tmp_path):
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


@pytest.mark.parametrize("form", ["penalty", "proximal"])
def test_the_optimizer_of_training_regularizes_in_the_form_that_is_asked_for(quick_compilation, form):
  made = setup.build(small_config(prune__form=form, model__width_multiplier=0.25, train__weight_decay=0.0))
  params, graph, phase = made.variables["params"], made.graph, made.config.train
  masks = {name: np.arange(len(mask)) % 2 for name, mask in graph.full_masks().items()}
  still = jax.tree.map(jnp.zeros_like, params)
  updates, _ = made.train_tx.update(still, made.train_tx.init(params), params, masks=masks)
  gamma = made.config.prune.gamma
  if form == "penalty":  # whose momentum has no past yet
    slope = jax.grad(sapr.partial_group_lasso)(params, graph, masks)
    want = jax.tree.map(lambda w, g: w - phase.learning_rate * gamma * g, params, slope)
  else:
    threshold = phase.learning_rate / (1 - phase.momentum) * gamma
    want = sapr.prox_partial_group_lasso(params, graph, masks, threshold)
  got = optax.apply_updates(params, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True))


def test_the_other_choices_run_too(quick_compilation, tmp_path):
  config = small_config(
    prune__form="penalty", prune__weighting="share", prune__round_to=4, prune__hold_epoch=None,
    prune__statistics_batches=0, generator__statistics="batch", train__epochs=2, train__decay_epochs=(),
    finetune__epochs=0, finetune__decay_epochs=(),
  )  # fmt: skip
  summary = training.run(config, tmp_path / "run")
  assert all(width % 4 == 0 for width in summary["run"]["widths"].values())
  assert summary["run"]["round_to"] == 4
  assert summary["pruned"]["accuracy"] == summary["subnetwork"]["accuracy"]
  # Masked and compact are the same network, if its statistics are kept.
  last = artifacts.read_records(tmp_path / "run")[-1]
  assert summary["subnetwork"]["accuracy"] == pytest.approx(last["subnetwork_accuracy"])


def test_a_log_that_is_no_terminal_has_one_plain_line_an_epoch(whole_and_log):
  _, _, out, err = whole_and_log
  lines = [line for line in out.splitlines() if line.startswith(("train ", "finetune "))]
  assert len(lines) == 6
  assert re.match(r"train 1/4: loss \d\.\d+, test [\d.]+%, [\d.]+ s, \d:\d\d:\d\d left$", lines[0])
  assert "sub-network" in lines[1] and "dropped" in lines[1]
  assert lines[5].startswith("finetune 2/2") and not lines[5].endswith("left")
  assert "\r" not in out + err and "\x1b" not in out + err
