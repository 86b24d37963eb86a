"""One small run from training to the pruned model."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import small_config

import sapr_jax as sapr
from sapr_jax import artifacts, data, training
from sapr_jax.artifacts.files import write_json
from sapr_jax.method import IMPORTANCES, split_by_group
from sapr_jax.runtime import devices
from sapr_jax.training import experiment as parts, optimizers, passes, workdir

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
  assert [renewed <= record.keys() for record in records] == [False, True, True, True, False, False]
  assert ["hamming_distance" in record for record in records] == [False, False, True, True, False, False]
  assert [record["learning_rate"] for record in records] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.05, 0.005])


def test_the_masks_meet_the_budget_in_every_epoch(whole):
  shares = [record["cost_share"] for record in artifacts.read_records(whole[0]) if "cost_share" in record]
  assert len(shares) == 3
  assert all(0.4 < share <= 0.49 for share in shares)


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
  assert summary["dense"]["macs"] == 8 * 8 * 9 * (8 + 8 * 6) + 6 * 10
  assert 0.4 < summary["pruned"]["macs"] / summary["dense"]["macs"] < 0.5
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
  assert type(dense).__name__ == "Tiny"
  assert artifacts.count_params(dense_variables) == summary["dense"]["params"]


def test_new_statistics_are_those_of_so_many_training_batches():
  config = small_config(data__crop_padding=0, data__flip=False)
  run, size = parts.build(config), config.train.batch_size
  renewed = passes.recalibrate_batch_norm(run.passes, run.model, run.variables, batches=7, batch_size=size)
  jax.tree.map(np.testing.assert_array_equal, renewed["params"], jax.device_get(run.variables["params"]))

  # Five batches in an epoch, so that two are of the next.
  order = [
    data.epoch_batches(320, size, seed=config.seed, epoch=epoch, purpose=passes.Purpose.STATISTICS) for epoch in (0, 1)
  ]
  want, train = run.variables, jax.jit(lambda v, x: run.model.apply(v, x, train=True, mutable=["batch_stats"])[1])
  feed = run.passes.feed
  for batch in np.concatenate(order)[:7]:
    want = want | train(want, feed.preprocessing.normalize(feed.train.images[batch]))
  assert not np.allclose(renewed["batch_stats"]["bn0"]["mean"], run.variables["batch_stats"]["bn0"]["mean"])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), renewed["batch_stats"], want["batch_stats"]
  )


@pytest.mark.slow
def test_fine_tuning_starts_from_new_statistics(whole, tmp_path):
  config = small_config(
    init__weights=str(whole[0] / "dense"), prune__start_epoch=0, prune__p=1.0, train__epochs=1,
    train__decay_epochs=(), finetune__epochs=0, finetune__decay_epochs=(),
  )  # fmt: skip
  summary = training.run(config, tmp_path / "run").summary
  assert summary["run"]["statistics_batches"] == 7
  (_, dense), (_, pruned) = (sapr.load(tmp_path / "run" / name) for name in ("dense", "pruned"))
  jax.tree.map(np.testing.assert_array_equal, dense["params"], pruned["params"])  # nothing was cut
  assert not np.array_equal(dense["batch_stats"]["bn1"]["mean"], pruned["batch_stats"]["bn1"]["mean"])


def test_a_finished_run_is_not_run_again(whole, capsys, monkeypatch):
  monkeypatch.setattr(data, "load_dataset", lambda *args, **kwargs: pytest.fail("the run was started again"))
  assert training.run(small_config(), whole[0]).summary == whole[1]
  assert "holds a finished run" in capsys.readouterr().out


def without_results(run, path):
  """Copies a finished run as if it had been killed before it wrote its results."""
  shutil.copytree(run, path, ignore=shutil.ignore_patterns("dense", "pruned", "summary.json", "report.txt"))
  return path


def contents(path):
  return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != workdir.LOCK}


@pytest.mark.parametrize(
  ("what", "change"),
  [
    ("the checksum of the images was .* and is now", lambda images: images.at[0, 0, 0, 0].add(1)),
    (r"the shape of the images was \[8, 8, 1\] and is now \[8, 8, 3\]", lambda images: jnp.repeat(images, 3, axis=-1)),
  ],
)
def test_other_images_are_refused_and_touch_nothing(whole, tmp_path, monkeypatch, what, change):
  path, load = without_results(whole[0], tmp_path / "run"), data.load_dataset
  before = contents(path)

  def load_changed(spec):
    splits = {
      name: dataclasses.replace(split, images=np.asarray(change(jnp.asarray(split.images))))
      for name, split in vars(load(spec)).items()
      if name in ("train", "test")
    }
    return dataclasses.replace(load(spec), **splits)

  monkeypatch.setattr(data, "load_dataset", load_changed)
  with pytest.raises(sapr.InputError, match=f"a run on other images: .*{what}.*changed_ok=True"):
    training.run(small_config(), path)
  assert contents(path) == before


def test_other_images_may_be_allowed_and_are_then_those_of_the_run(whole, tmp_path, capsys):
  path = without_results(whole[0], tmp_path / "run")
  network = json.loads((path / workdir.NETWORK).read_text())
  for images in ({**network["images"], "the number of classes": 8}, None):  # None: of before there were fingerprints
    (path / workdir.NETWORK).write_text(json.dumps(network | {"images": images}))
    if images:
      with pytest.raises(sapr.InputError, match="the number of classes was 8 and is now 10"):
        training.run(small_config(), path)
    assert (
      training.run(small_config(data__changed_ok=images is not None), path).summary["pruned"]["accuracy"]
      == whole[1]["pruned"]["accuracy"]
    )
    assert ("goes on with other images" in capsys.readouterr().out) == (images is not None)
    assert json.loads((path / workdir.NETWORK).read_text())["images"] == network["images"]
    (path / "summary.json").unlink()


@pytest.mark.slow
def test_a_run_starts_from_a_saved_model(whole, tmp_path):
  config = small_config(init__weights=str(whole[0] / "dense"))
  dense, variables = sapr.load(whole[0] / "dense")
  model, got = parts.first_network(config, 10, (1, 8, 8, 1))
  assert model == dense
  jax.tree.map(np.testing.assert_array_equal, got, variables)

  # A pruned model can be pruned further.
  config = small_config(
    init__weights=str(whole[0] / "pruned"), prune__p=0.7, prune__start_epoch=0, train__epochs=1,
    train__decay_epochs=(), train__learning_rate=1e-6, finetune__epochs=0, finetune__decay_epochs=(),
  )  # fmt: skip
  summary = training.run(config, tmp_path / "further").summary
  params, want = (sapr.load(path)[1]["params"] for path in (tmp_path / "further" / "dense", whole[0] / "pruned"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params, want)  # the learning rate is tiny
  assert summary["dense"]["macs"] == whole[1]["pruned"]["macs"]
  assert summary["pruned"]["macs"] < 0.8 * summary["dense"]["macs"]
  assert sapr.load(tmp_path / "further" / "pruned")[0].base == dense

  config.model.width_multiplier = 0.5
  with pytest.raises(sapr.InputError, match=r"holds a Tiny with width_multiplier=1\.0; base has"):
    training.run(config, tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_a_trained_network_is_cut_at_once_and_learns_from_itself(whole, tmp_path, capsys):
  config = small_config(
    init__weights=str(whole[0] / "dense"), train__epochs=0, train__decay_epochs=(), prune__start_epoch=0,
    prune__proposer="l1_norm", finetune__epochs=3, finetune__decay_epochs=(), finetune__distillation__weight=1.0,
    evaluate__every_epochs=2, data__test_images=None, data__validation_images=50, prune__compensation_batches=2,
  )  # fmt: skip
  summary = training.run(config, tmp_path / "run").summary
  assert "cut at once, and the weights that stay are fitted on 2 batches to make up" in capsys.readouterr().out
  records = artifacts.read_records(tmp_path / "run")
  assert [record["stage"] for record in records] == ["finetune"] * 3
  assert ["test_accuracy" in record for record in records] == [False, True, True]  # every second, and the last
  assert summary["pruned"]["macs"] < 0.5 * summary["dense"]["macs"]
  # Nothing but the teacher is learned from: the loss is the divergence, and falls.
  assert records[-1]["train_loss"] < records[0]["train_loss"]
  (_, dense), (_, first) = (sapr.load(path / "dense") for path in (tmp_path / "run", whole[0]))
  jax.tree.map(np.testing.assert_array_equal, dense, first)


def test_weights_that_stay_make_up_for_a_cut_on_all_images(tmp_path):
  config = small_config(prune__compensation_batches=10)  # of two epochs, 64 images each
  experiment = parts.build(config)
  model, graph, variables, run = experiment.model, experiment.graph, experiment.variables, experiment.passes
  masks = experiment.project(sapr.random_scores(variables, graph, jax.random.key(0)))
  images, _ = run.shared(passes.Purpose.COMPENSATION).read(np.arange(320))
  want = sapr.compensate(model, variables, graph, masks, [run.feed.preprocessing.normalize(images)])
  got = passes.fit_to_cut(run, model, graph, variables, masks, batches=10, batch_size=64)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), got["params"], variables["params"])
  assert max(jax.tree.leaves(moved)) > 0.01
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)
  config.update_from_flattened_dict({"train.epochs": 0, "train.decay_epochs": (), "prune.start_epoch": 0})
  with pytest.raises(sapr.InputError, match=r"init\.weights must be given where train\.epochs=0"):
    training.run(config, tmp_path / "random")
  sapr.save(tmp_path / "trained", model, variables)
  config.init.weights = str(tmp_path / "trained")
  config.update_from_flattened_dict({"finetune.epochs": 0, "finetune.decay_epochs": (), "prune.proposer": "l2_norm"})
  training.run(config, tmp_path / "fitted")
  config.prune.compensation_batches = 0
  training.run(config, tmp_path / "plain")
  fitted, plain = (sapr.load(tmp_path / name / "pruned")[1]["params"] for name in ("fitted", "plain"))
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(fitted), jax.tree.leaves(plain), strict=True))


def test_a_run_starts_from_pytorch_weights(tmp_path):
  config = small_config(model__name="resnet8", model__width_multiplier=0.25)
  model = sapr.models.create("resnet8", width_multiplier=0.25)
  variables = jax.jit(model.init)(jax.random.key(5), np.zeros((1, 8, 8, 1)))
  sapr.export_torch(tmp_path / "weights.safetensors", model, variables)
  config.init.weights = str(tmp_path / "weights.safetensors")
  _, got = parts.first_network(config, 10, (1, 8, 8, 1))
  jax.tree.map(np.testing.assert_array_equal, got, variables)
  config.init.weights = str(tmp_path / "nothing.safetensors")
  with pytest.raises(sapr.InputError, match=r"nothing\.safetensors"):
    parts.first_network(config, 10, (1, 8, 8, 1))


@pytest.mark.parametrize("form", ["penalty", "proximal"])
def test_the_optimizer_of_training_regularizes_in_the_form_that_is_asked_for(tiny, form):
  config = small_config(prune__form=form, train__weight_decay=0.0)
  params, graph, phase, gamma = tiny.params, tiny.graph, config.train, config.prune.gamma
  tx = optimizers.regularized_optimizer(
    phase, lambda step: phase.learning_rate, graph, optimizers.Regularization(form, gamma)
  )
  masks = {name: np.arange(len(mask)) % 2 for name, mask in graph.full_masks().items()}
  still = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(still, tx.init(params), params, masks=masks)
  if form == "penalty":  # whose momentum has no past yet
    slope = jax.grad(sapr.partial_group_lasso)(params, graph, masks)
    want = jax.tree.map(lambda w, g: w - phase.learning_rate * gamma * g, params, slope)
  else:
    threshold = phase.learning_rate / (1 - phase.momentum) * gamma
    want = sapr.prox_partial_group_lasso(params, graph, masks, threshold)
  got = optax.apply_updates(params, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True))


def test_a_shrinkage_is_what_a_dropped_channel_loses_in_all():
  config = small_config(prune__shrinkage=2.0)  # regularized: two epochs at a rate of 0.1, and one at 0.01
  gamma = optimizers.regularization(config, 5).gamma
  assert gamma * 5 * (0.1 + 0.1 + 0.01) / (1 - 0.9) == pytest.approx(2.0)
  assert optimizers.regularization(small_config(), 5).gamma == 0.1


SHORT = {"train__epochs": 2, "train__decay_epochs": (), "finetune__epochs": 0, "finetune__decay_epochs": ()}


@pytest.mark.slow
def test_the_other_choices_run_too(tmp_path):
  config = small_config(fast_cpu=False, prune__form="penalty", prune__round_to=4, prune__statistics_batches=0, **SHORT)
  result = training.run(config, tmp_path / "run", weighting=lambda dropped: jnp.ones_like(dropped) / dropped.size)
  summary = result.summary
  assert all(width % 4 == 0 or width == 6 for width in summary["run"]["widths"].values())
  assert summary["run"]["round_to"] == 4
  assert summary["pruned"]["accuracy"] == summary["subnetwork"]["accuracy"]
  # Masked and compact are the same network, if its statistics are kept.
  last = artifacts.read_records(tmp_path / "run")[-1]
  assert summary["subnetwork"]["accuracy"] == pytest.approx(last["subnetwork_accuracy"])


@pytest.mark.parametrize(
  ("cost", "limit", "unit"), [("macs", None, "macs"), ("params", None, "params"), ("macs", 15e3, "macs")]
)
def test_a_budget_is_a_share_or_an_amount_of_what_the_user_says(tmp_path, cost, limit, unit):
  config = small_config(prune__proposer="l1_norm", prune__cost=cost, prune__limit=limit, prune__p=0.6, **SHORT)
  summary = training.run(config, tmp_path / "run").summary
  most = 0.6 * summary["dense"][unit] if limit is None else limit
  counted = summary["pruned"]["macs"]
  if cost == "params":  # without running statistics
    counted, dense = (
      sum(leaf.size for leaf in jax.tree.leaves(sapr.load(tmp_path / "run" / name)[1]["params"]))
      for name in ("pruned", "dense")
    )
    most = 0.6 * dense
  assert 0.8 * most < counted <= most


@pytest.mark.parametrize("name", IMPORTANCES)
def test_an_importance_proposes_the_channels_that_it_ranks_highest(name):
  competing = {"importance__compare": "group_mean", "importance__cost_exponent": 0.0}
  run = parts.build(small_config(prune__proposer=name, **competing))
  proposer = parts.make_proposer(run)
  variables = devices.replicate(run.variables, run.passes.mesh)
  state, scores, measured = proposer.propose(proposer.init(), variables, epoch=0)
  assert (state, measured) == ((), {})
  assert {group: mask.shape for group, mask in scores.items()} == {g.name: (g.size,) for g in run.graph.groups}
  if name != "random":
    assert all(np.mean(values) == pytest.approx(1) for values in scores.values())
  if name == "l1_norm":
    want = np.abs(run.variables["params"]["conv0"]["kernel"]).sum(axis=(0, 1, 2))
    np.testing.assert_allclose(scores["conv0"], want / want.mean(), rtol=1e-5)
  _, again, _ = proposer.propose((), variables, epoch=0)
  jax.tree.map(np.testing.assert_array_equal, scores, again)
  assert run.budget.cost(run.graph.kept(run.project(scores))) <= run.budget.limit


def test_globs_of_the_configuration_choose_groups():
  run = parts.build(small_config(prune__include=("conv*",), prune__exclude=("conv0",)))
  assert [group.name for group in run.graph.groups] == ["conv1"]


def test_channels_compete_in_shares_and_by_their_cost():
  def widths(**fields):
    run = parts.build(small_config(prune__proposer="l2_norm", prune__p=0.4, **fields))
    scores = parts.make_proposer(run).propose((), devices.replicate(run.variables, run.passes.mesh), 0)[1]
    return [mask.mean() for mask in run.project(scores).values()]

  shares, tilted = widths(importance__cost_exponent=0.0), widths(importance__cost_exponent=5.0)
  assert abs(shares[0] - shares[1]) < 0.2  # of 8 and 6 channels
  assert tilted != shares


@pytest.mark.slow
def test_a_search_begins_before_its_masks_are_in_force_and_ends_before_training(tmp_path, capsys):
  config = small_config(
    search__start_epoch=0, search__end_epoch=3, prune__start_epoch=2, **SHORT | {"train__epochs": 4}
  )
  training.run(config, tmp_path / "run")
  records = artifacts.read_records(tmp_path / "run")
  assert ["generator_learned" in record for record in records] == [True, True, True, False]
  assert ["subnetwork_accuracy" in record for record in records] == [False, False, True, True]
  assert records[2]["widths"] == records[3]["widths"]
  assert "hamming_distance" not in records[2] | records[3]
  first = records[0]  # of one pass: the ranking before it is the untrained one
  assert first["generator_overlap_untrained"] == first["generator_overlap_last"]
  assert 0 <= first["generator_learned"] < 0.5 and first["generator_cost_share"] > 0.9
  warned = [line for line in capsys.readouterr().out.splitlines() if "mostly that of a random start" in line]
  assert len(warned) == sum(record.get("generator_learned", 1) < 0.5 for record in records[2:])


@pytest.mark.slow
def test_a_generator_begins_with_what_it_knows():
  config = small_config(generator__prior="l2_norm", generator__prior_strength=20.0, generator__order="l1_norm")
  run = parts.build(config)
  known = parts.make_proposer(run)
  variables = devices.replicate(run.variables, run.passes.mesh)
  want = run.project(known.knowledge.prior.propose((), variables, 0)[1])
  state, scores, record = known.propose(devices.replicate(known.init(), run.passes.mesh), variables, 0)
  norms = sapr.l1_norm(run.variables["params"], run.graph)
  for name, mask in run.project(scores).items():  # whatever the widths, the largest norms fill them
    assert norms[name][mask > 0].min() >= norms[name][mask == 0].max(initial=0.0)
  first = run.project(split_by_group(jax.device_get(state.untrained), run.graph))
  jax.tree.map(np.testing.assert_array_equal, first, want)
  assert record["generator_overlap_untrained"] > 0.8 and "generator_learned" not in record
  assert record["generator_cost_share"] == pytest.approx(run.budget.share, abs=0.15)
  begun, steps = jax.device_get(state.untrained), int(state.step)
  again, _, _ = known.propose(state, variables, 1)  # a later pass goes on from there
  np.testing.assert_array_equal(again.untrained, begun)
  assert int(again.step) == 2 * steps > 0


def test_a_proposer_of_the_callers_own_may_hold_the_masks(tmp_path):
  class First:
    """Keeps the first channels, and holds these masks from the next epoch on."""

    def __init__(self, experiment):
      self.graph = experiment.graph

    def init(self):
      return np.zeros((), np.int32)

    def propose(self, state, variables, epoch):
      scores = {group.name: -np.arange(group.size, dtype=float) for group in self.graph.groups}
      return state + 1, scores if epoch == 1 else None, {"seen": epoch}

  training.run(small_config(**SHORT | {"train__epochs": 3}), tmp_path / "run", proposer=First)
  records = artifacts.read_records(tmp_path / "run")
  assert [record.get("seen") for record in records] == [None, 1, 2]
  assert records[1]["widths"] == records[2]["widths"]
  assert "hamming_distance" not in records[2]


def test_a_log_that_is_no_terminal_has_one_plain_line_an_epoch(whole_and_log):
  _, _, out, err = whole_and_log
  lines = [line for line in out.splitlines() if line.startswith(("train ", "finetune "))]
  assert len(lines) == 6
  assert re.match(r"train 1/4: loss \d\.\d+, test accuracy [\d.]+%, [\d.]+ s; (\d+ min )?\d+ s left$", lines[0])
  assert "% if cut now), dropped channels shrunk to" in lines[1] and "choice changed" in lines[2]
  phases = re.findall(r"^((?:Training|Search|Pruning|Fine-tuning), .*?):", out, re.MULTILINE)
  assert phases == ["Training, epochs 1 to 1 of 4", "Pruning, epochs 2 to 4 of 4", "Fine-tuning, 2 epochs"]
  assert lines[5].startswith("finetune 2/2") and not lines[5].endswith("left")
  assert "\r" not in out + err and "\x1b" not in out + err


@dataclasses.dataclass(frozen=True)
class Rounded:
  """The part of an experiment that says what widths are multiples of."""

  round_to: int


def test_a_run_that_goes_on_keeps_the_rounding_it_began_with(tmp_path):
  keep = sys.modules["sapr_jax.training.run"]._as_it_began  # `training.run` is the function
  assert keep(Rounded(8), tmp_path, ["a", "b"]).round_to == 8
  write_json(tmp_path / workdir.NETWORK, {"groups": {}, "round_to": 1})
  assert keep(Rounded(8), tmp_path, ["a", "b"]).round_to == 1
  write_json(tmp_path / workdir.NETWORK, {"round_to": 1, "functions": ["a", "c"]})
  with pytest.raises(sapr.InputError, match="a run with the proposer and weighting"):
    keep(Rounded(8), tmp_path, ["a", "b"])


def test_a_proposer_that_proposes_nothing_is_refused_at_the_end_of_training(tmp_path):
  class Silent:
    def __init__(self, experiment):
      pass

    def init(self):
      return ()

    def propose(self, state, variables, epoch):
      return state, None, {}

  with pytest.raises(sapr.InputError, match=r"masks after training must cost at most .* prunable_macs, got"):
    training.run(small_config(**SHORT), tmp_path / "run", proposer=Silent)


@pytest.mark.slow
def test_scores_that_diverge_are_divergence(tmp_path):
  config = small_config(**SHORT | {"generator__learning_rate": 1e38})
  with pytest.raises(sapr.DivergedError, match="hold a NaN before epoch 2 of train"):
    training.run(config, tmp_path / "run")
