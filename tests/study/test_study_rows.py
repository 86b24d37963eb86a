"""The grid: sizes, rows, configurations, what is chosen of them."""

from __future__ import annotations

import functools
import pathlib

import jax
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax import models
from sapr_jax.artifacts.files import read_json
from sapr_jax.method import make_comparable
from sapr_jax.training import check_config
from study.__main__ import parse_settings
from study.chosen import CANDIDATES, FITTED_ROW, ROUNDED, TILTED
from study.rows import ADAPTED, TRAINED, chosen, config_of, gamma_name, grid, job_of
from study.sizes import SIZES
from study.variants import VARIANTS, Sampled, Variant, older_comparisons, uniform_weights, variant_of

ROOT = pathlib.Path(__file__).parents[2]
FULL, REDUCED, FIFTH = (grid(SIZES[size]) for size in ("full", "reduced", "fifth"))


@pytest.mark.parametrize("size", SIZES)
def test_every_row_has_a_valid_configuration_and_a_name_of_its_own(size, tmp_path):
  rows = grid(SIZES[size])
  assert len({row.path for row in rows}) == len(rows)
  for row in rows:
    with older_comparisons():
      check_config(job_of(row, 0, tmp_path, "DIR", {}).config)
    assert row.source is None or row.source in {other.name for other in rows if other.experiment is row.experiment}


@pytest.mark.parametrize("size", SIZES)
def test_no_two_rows_are_the_same_run(size):
  runs = [
    (row.experiment.network, row.kind, row.choice, row.source, VARIANTS.get(row.name.rsplit(",", 1)[-1]), row.overrides)
    for row in grid(SIZES[size])
  ]
  assert not [run for i, run in enumerate(runs) if run in runs[:i]]


def test_the_full_size_has_the_gammas_and_seeds_of_the_paper_and_its_schedules():
  rows = {row.path: row for row in FULL}
  for gamma in (0, 1e-4, 5e-4, 1e-3, 5e-3):
    row = rows[f"resnet56/{gamma_name(gamma)}"]
    config = config_of(row, 2, None, {})
    assert row.seeds == (0, 1, 2) and config.prune.gamma == gamma and config.seed == 2
    assert (config.train.epochs, config.finetune.epochs, config.data.source) == (200, 160, "tfds")


def test_the_fifth_of_the_schedule_has_the_proportions_of_the_whole():
  (row,) = (row for row in FIFTH if row.name == "gamma=0.04")
  (whole,) = (row for row in FULL if row.path == "resnet56/gamma=0.0005")
  ours, theirs = config_of(row, 0, None, {}), config_of(whole, 0, None, {})
  for phase in ("train", "finetune"):
    assert 5 * ours[phase].epochs == theirs[phase].epochs
    assert [5 * epoch for epoch in ours[phase].decay_epochs] == list(theirs[phase].decay_epochs)
  assert 5 * ours.prune.start_epoch == theirs.prune.start_epoch
  assert ours.train.learning_rate == ours.finetune.learning_rate


def test_an_ablation_changes_the_main_row_by_its_variant_alone():
  rows = {row.name: row for row in REDUCED}
  main, changed = (config_of(rows[name], 0, None, {}) for name in ("gamma=0.02", "masks=sampled"))
  assert main == changed


def test_every_variant_has_a_row_whose_name_ends_with_it():
  rows = [row for size in SIZES for row in grid(SIZES[size])]
  assert {name for name in VARIANTS for row in rows if row.name.endswith(name)} == VARIANTS.keys()
  assert variant_of("gamma=0.04,generator_statistics=batch") is VARIANTS["generator_statistics=batch"]
  assert variant_of("gamma=0.04,generator_data=0.5") == Variant()
  assert variant_of("gamma=0.04,weighting=uniform").weighting is uniform_weights


class Zeros:
  """Ranks no channel above another."""

  def __init__(self, graph):
    self.graph = graph

  def init(self):
    return ()

  def propose(self, state, variables, epoch):
    return state, {group.name: np.zeros(group.size, np.float32) for group in self.graph.groups}, {"seen": epoch}


def test_sampled_masks_are_reproducible_and_likely_at_the_end(tiny):
  def scores(seed, epoch):
    proposer = Sampled(Zeros(tiny.graph), tiny.graph, jax.random.key(seed), last_epoch=11)
    return np.concatenate(list(proposer.propose((), None, epoch)[1].values()))

  np.testing.assert_array_equal(scores(0, 5), scores(0, 5))
  assert (scores(0, 5) != scores(0, 6)).all() and (scores(0, 5) != scores(1, 5)).all()
  assert not scores(0, 11).any()


@pytest.mark.parametrize(
  ("size", "epochs", "budgets"), [("pretrained", 8, (0.3, 0.5)), ("pretrained_short", 2, (0.3, 0.5))]
)
def test_rows_of_a_pretrained_network_start_from_the_adapted_one_and_have_equal_epochs(tmp_path, size, epochs, budgets):
  rows = grid(SIZES[size])
  (first,) = (row for row in rows if row.name == ADAPTED)
  assert job_of(first, 3, tmp_path, None, {}, "resnet20.th").config.init.weights == "resnet20.th"
  for row in rows:
    config = job_of(row, 3, tmp_path, None, {}, "resnet20.th").config
    if row is not first:
      want = None if row.kind == "width" else str(tmp_path / "resnet20" / ADAPTED / "seed_3" / "dense")
      assert config.init.weights == want
      assert config.train.epochs + config.finetune.epochs == epochs
  names = {row.name for row in rows}
  main = SIZES[size][0].main_row
  for p in SIZES[size][0].budgets:
    assert {f"p={p},{way}{how}" for way in ("l2_norm", "random") for how in (",cut", ",penalty")} <= names
    assert {f"p={p},{main}", f"p={p},{FITTED_ROW},distilled", f"p={p},torch_pruning=group_taylor"} <= names


def test_rows_of_a_network_that_was_trained_here_all_start_from_one_training_that_saw_no_held_out_image(tmp_path):
  rows = grid(SIZES["mobilenetv2_short"])
  first, *others = sorted(rows, key=lambda row: row.name != TRAINED)
  config = config_of(first, 0, None, {})
  assert (first.seeds, config.data.validation_images, config.data.train_images) == ((0,), 5000, None)
  assert config.init.weights is None and (config.train.epochs, config.train.schedule) == (8, "cosine")
  assert {row.name.split(",", 1)[-1] for row in others} == set(SIZES["mobilenetv2_short"][0].only)
  for row in others:
    job = job_of(row, 3, tmp_path, None, {})
    assert job.source == tmp_path / "mobilenetv2_quarter" / TRAINED / "seed_0"
    assert job.config.init.weights == str(job.source / "dense")
    assert job.config.train.epochs + job.config.finetune.epochs == 2
    assert (job.config.data.train_images, job.config.data.validation_images) == (10_000, None)
  assert [str(seed) + row.name for row, seed in chosen(rows, ["dense"], [2])] == [f"0{TRAINED}", "2dense"]


def test_what_changes_one_thing_in_the_main_row_is_otherwise_like_it():
  (experiment,) = SIZES["pretrained_choice"]
  rows = {row.name: row for row in grid([experiment])}
  main = rows[f"p=0.5,{experiment.main_row}"]
  changed = {
    name.removeprefix(f"{main.name},"): {
      field: value for field, value in row.overrides.items() if value != main.overrides.get(field)
    }
    for name, row in rows.items()
    if name.startswith(f"{main.name},")
  }
  assert changed == {**CANDIDATES, "round_to=8": ROUNDED}
  assert all(rows[f"{main.name},{name}"].overrides.keys() >= main.overrides.keys() for name in changed)


@pytest.mark.parametrize("size", ["pretrained", "pretrained_short"])
def test_what_was_chosen_was_chosen_with_other_seeds_and_no_test_images(size):
  judged, tried = grid(SIZES[size]), grid(SIZES[f"{size}_choice"])
  assert not {s for row in judged for s in row.seeds} & {s for row in tried for s in row.seeds}
  assert {config_of(row, 100, None, {}).data.validation_images for row in tried} == {5000}
  assert {config_of(row, 0, None, {}).data.validation_images for row in judged} == {None}


def test_the_tilted_shares_are_those_that_were_recorded():
  model = models.create("resnet20", num_classes=10)
  variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), np.zeros((1, 32, 32, 3)))
  graph = sapr.trace_channels(model, variables, (1, 32, 32, 3))
  scores = {group.name: np.arange(1.0, group.size + 1) for group in graph.groups}  # only ranks count
  probes = read_json(ROOT / "results/pretrained_probe.json")["rows"]
  recorded = {row["p"]: row["widths"] for row in probes if row["row"] == "tilted"}
  assert recorded.keys() == {0.3, 0.5}
  for p, widths in recorded.items():
    budget = sapr.macs_budget(graph, p)
    with older_comparisons():
      compare, exponent = TILTED["importance.compare"], TILTED["importance.cost_exponent"]
      compared = make_comparable(scores, graph, budget.cost, compare=compare, cost_exponent=exponent)
    masks = sapr.project_to_budget(graph, compared, budget, round_to=1)
    assert [int(mask.sum()) for mask in masks.values()] == widths


def test_uniform_weights_do_not_depend_on_what_is_dropped():
  np.testing.assert_array_equal(uniform_weights(np.array([0, 3, 5, 0])), [0.25] * 4)


def test_the_most_informative_runs_come_first():
  names = [(row.name, seed) for row, seed in chosen(REDUCED)]
  assert names[:4] == [("gamma=0.02", 0), ("gamma=0", 0), ("gamma=0.02", 1), ("gamma=0", 1)]
  assert names.index(("one_shot_l1=uniform", 2)) < names.index(("gamma=0.2", 0)) < names.index(("masks=sampled", 0))


def test_rows_are_chosen_by_patterns_and_seeds():
  assert [(row.name, seed) for row, seed in chosen(REDUCED, ["uniform*", "*/form=*"], [1])] == [
    ("form=penalty", 1),
    ("uniform_width", 1),
  ]
  with pytest.raises(sapr.InputError, match="'nothing' matches no row"):
    chosen(REDUCED, ["nothing"])
  with pytest.raises(sapr.InputError, match="--seeds 7: none of these rows"):
    chosen(REDUCED, [], [7])


def test_a_row_brings_along_the_one_that_it_starts_from():
  names = [row.name for row, _ in chosen(REDUCED, ["one_shot_l1=*"], [0])]
  assert names == ["gamma=0", "one_shot_l1=uniform", "one_shot_l1=global"]
  known = {("resnet20", name, 0) for name in ("gamma=0", "gamma=0.02", "one_shot_l1=uniform")}
  left = chosen(REDUCED, ["gamma=0", "gamma=0.02", "one_shot_l1=*"], [0], known)
  assert [row.name for row, _ in left] == ["gamma=0", "one_shot_l1=global"]
  assert chosen(REDUCED, ["gamma=0"], [0], known) == []


def test_settings_are_literals_or_text():
  assert parse_settings(["a.b=(2,)", "c=resnet8", "d=1e-3"]) == {"a.b": (2,), "c": "resnet8", "d": 1e-3}
  with pytest.raises(sapr.InputError, match="--set must be NAME=VALUE, got 'train"):
    parse_settings(["train.epochs"])
  with pytest.raises(sapr.InputError, match=r"--set train\.epoch=3: configs/default\.py has no such field"):
    config_of(REDUCED[0], 0, None, {"train.epoch": 3})
  with pytest.raises(sapr.InputError, match=r"--set seed=3: the rows, --seeds and --data set this"):
    config_of(REDUCED[0], 0, None, {"seed": 3})
