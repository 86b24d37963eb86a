"""The CIFAR-10 study: its grid, what it judges by, and the pieces that are its own."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from configs import default, digits
from sapr_jax.artifacts.files import write_json
from sapr_jax.training import epochs, schedules, setup
from sapr_jax.training.checks import check_config
from sapr_jax.training.interruption import Interruption
from study import __main__ as cifar10_study
from study import ours as study_ours
from study import page as study_page
from study.__main__ import parse_settings
from study.claims import (
  CLAIMS,
  Results,
  beats_alternatives,
  combined,
  difference,
  estimate,
  larger_gamma,
  mean_of_epochs,
  nothing_lost,
  open_choices,
  selection,
  stable_architecture,
)
from study.records import check_folder, entry_of, head_of, is_finished, recorded, update
from study.rows import LONGER, SIZES, chosen, config_of, gamma_name, grid, job_of

FULL, REDUCED, QUARTER, FIFTH = (grid(SIZES[size]) for size in ("full", "reduced", "quarter", "fifth"))


def test_every_size_has_its_part_of_the_page():
  assert list(study_page.ABOUT_SIZES) == list(SIZES)
  assert all(text.endswith(".") for text in study_page.ABOUT_SIZES.values())


@pytest.mark.parametrize("size", SIZES)
def test_every_row_has_a_valid_configuration_and_a_name_of_its_own(size):
  rows = grid(SIZES[size])
  assert len({row.path for row in rows}) == len(rows)
  for row in rows:
    check_config(config_of(row, 0, "DIR", {}))
    assert row.source is None or row.source in {other.name for other in rows if other.experiment is row.experiment}


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


def test_an_ablation_changes_one_field_of_the_main_row():
  rows = {row.name: row for row in REDUCED}
  main, changed = (config_of(rows[name], 0, None, {}) for name in ("gamma=0.02", "masks=sampled"))
  changed.prune.masks = "likely"
  assert main == changed


def test_the_most_informative_runs_come_first():
  names = [(row.name, seed) for row, seed in chosen(REDUCED, [], None)]
  assert names[:4] == [("gamma=0.02", 0), ("gamma=0", 0), ("gamma=0.02", 1), ("gamma=0", 1)]
  assert names.index(("one_shot_l1=uniform", 2)) < names.index(("gamma=0.2", 0)) < names.index(("masks=sampled", 0))


def test_rows_are_chosen_by_patterns_and_seeds():
  assert [(row.name, seed) for row, seed in chosen(REDUCED, ["uniform*", "*/form=*"], [1])] == [
    ("form=penalty", 1),
    ("uniform_width", 1),
  ]
  with pytest.raises(sapr.InputError, match="'nothing' matches no row"):
    chosen(REDUCED, ["nothing"], None)
  with pytest.raises(sapr.InputError, match="--seeds 7: none of these rows"):
    chosen(REDUCED, [], [7])


def test_settings_are_literals_or_text():
  assert parse_settings(["a.b=(2,)", "c=resnet8", "d=1e-3"]) == {"a.b": (2,), "c": "resnet8", "d": 1e-3}
  with pytest.raises(sapr.InputError, match="no NAME=VALUE"):
    parse_settings(["train.epochs"])
  with pytest.raises(sapr.InputError, match=r"--set train\.epoch=3: configs/default\.py has no such field"):
    config_of(REDUCED[0], 0, None, {"train.epoch": 3})
  with pytest.raises(sapr.InputError, match=r"--set seed=3: rows, --seeds and --data say that"):
    config_of(REDUCED[0], 0, None, {"seed": 3})


def test_estimate_against_the_t_distribution_by_hand():
  # Mean 2, standard error 1 / sqrt(3); the 95 % quantile with two degrees of freedom is 2.920.
  found = estimate([1.0, 2.0, 3.0])
  assert found.mean == 2 and found.low == pytest.approx(2 - 2.920 / math.sqrt(3), abs=1e-3)
  assert (found.verdict(0.0), found.verdict(0.5), found.verdict(4.0)) == ("holds", "undecided", "fails")
  assert estimate([5.0]).verdict() == estimate([]).verdict() == "undecided"


def test_differences_are_paired_by_seed():
  assert difference({0: 50.0, 1: 70.0, 2: 1.0}, {0: 49.0, 1: 69.0}).verdict(0.5) == "holds"


def test_a_verdict_over_parts():
  assert combined(["holds", "undecided", "fails"]) == "fails"
  assert combined(["holds", "undecided"]) == "undecided"
  assert combined(["holds"]) == "holds"
  assert combined([]) == "undecided"


def test_mean_of_epochs():
  curve = {"first": 5, "values": [0.4, 0.2, 0.1]}
  assert mean_of_epochs(curve, 6, 7) == pytest.approx(0.15)
  assert mean_of_epochs(curve, 5, 7) == pytest.approx(0.7 / 3)
  assert mean_of_epochs(curve, 4, 6) is None
  assert mean_of_epochs(curve, 6, 8) is None


def entry(row, seed, **accuracy):
  return {
    "network": "resnet20",
    "row": row,
    "seed": seed,
    "accuracy": accuracy,
    "macs_share": 0.5,
    "start_epoch": 2,
    "train_epochs": 4,
    "p": 0.48,
    "curves": {"full_model": {"first": 1, "values": [10.0, 20.0, 30.0, 40.0]}},
    "seconds": {"total": 60.0},
    "machine": "one",
    "versions": {"jax": "0"},
  }


@pytest.fixture
def results():
  """Ours is 2 points better than a narrow network after fine-tuning, and as good as one-shot pruning."""
  entries = []
  for seed in (0, 1, 2):
    entries += [
      entry("gamma=0.02", seed, dense=60.0 + seed, subnetwork=55.0 + seed, pruned=61.0 + seed),
      entry("gamma=0", seed, dense=61.0 + seed, subnetwork=30.0 + seed, pruned=60.0),
      entry("uniform_width", seed, pruned=59.0 + seed),
      entry("one_shot_l1=uniform", seed, dense=61.0 + seed, subnetwork=20.0, pruned=60.0 + 2 * seed),
    ]
  return Results(entries, 0.02, [0.0, 0.02])


def test_claims_on_numbers_that_one_can_judge_by_hand(results):
  verdicts = {judge.__name__: judge(results).verdict for judge in CLAIMS}
  assert verdicts == {
    "nothing_lost": "holds",
    "better_subnetwork": "undecided",  # Torch-Pruning was not run
    "larger_gamma": "holds",
    "stable_architecture": "undecided",  # four epochs
    "cheap_generator": "undecided",  # no seconds
    "beats_alternatives": "undecided",  # one-shot pruning is as good
  }
  assert "| uniform_width | 50.0 ± 0.0 | 60.00 ± 1.00 | +2.00 [+2.00, +2.00] | holds |" in (
    beats_alternatives(results).table
  )


def test_gammas_are_compared_on_the_seeds_that_all_of_them_have(results):
  entries = [e for e in results.entries if (e["row"], e["seed"]) != ("gamma=0", 2)]
  claim = larger_gamma(dataclasses.replace(results, entries=entries))
  assert "| 0.02 | 60.50 ± 0.71 | 55.50 ± 0.71 | 61.50 ± 0.71 | +1.00 [+1.00, +1.00] |" in claim.table
  assert "Seeds 0, 1, which all of these have" in claim.rule and "clearly worse from gamma = 0.02 on" in claim.remark


def test_a_gamma_that_was_not_run_leaves_the_others_comparable(results):
  # The name of another row begins with its own.
  entries = [*results.entries, entry("gamma=0.06,form=penalty", 0, dense=50.0)]
  claim = larger_gamma(dataclasses.replace(results, entries=entries, gammas=[0.0, 0.02, 0.06]))
  assert "Seeds 0, 1, 2, which all of these have" in claim.rule and "| 0.06 |" not in claim.table


@pytest.mark.parametrize(
  ("early", "late", "verdict"), [(0.04, 0.01, "holds"), (0.06, 0.01, "fails"), (0.04, 0.05, "fails")]
)
def test_whether_the_architecture_settles_is_told_by_the_longer_schedule(results, early, late, verdict):
  # E_start is 2: the distances are those of the epochs 4 to 40, or 2 to 38 after it.
  values = [0.5] * 6 + [early] * 5 + [0.04] * 16 + [late] * 10
  entries = []
  for seed in (0, 1, 2):
    curves = {"hamming": {"first": 4, "values": [value * (1 + seed / 100) for value in values]}}
    entries.append(entry(LONGER, seed) | {"train_epochs": 40, "curves": curves})
  claim = stable_architecture(dataclasses.replace(results, entries=[*results.entries, *entries]))
  assert claim.verdict == verdict
  assert f"| epochs 8 to 12 | {early * 1.01:.4f} ± {early / 100:.4f} |" in claim.table
  short = [entry | {"train_epochs": 33} for entry in entries]
  assert stable_architecture(dataclasses.replace(results, entries=short)).verdict == "undecided"


def test_a_folder_of_runs_belongs_to_one_study(tmp_path):
  head = head_of("reduced", SIZES["reduced"], {}, "JPEG copy of CIFAR-10")
  check_folder(tmp_path / "reduced", head)
  check_folder(tmp_path / "reduced", head)
  other = head | {"set": {"train.epochs": 2}}
  check_folder(tmp_path / "reduced", other)  # no run has begun
  check_folder(tmp_path / "reduced", head)
  write_json(tmp_path / "reduced" / "resnet20" / "gamma=0" / "seed_0" / "config.json", {})
  with pytest.raises(sapr.InputError, match=r"holds runs with another 'set': {}, now {\"train.epochs\": 2}; name"):
    check_folder(tmp_path / "reduced", other)
  check_folder(tmp_path / "reduced", head)


def test_a_damaged_entry_is_no_finished_run(tmp_path):
  write_json(tmp_path / "study.json", {"row": 1})
  assert not is_finished(tmp_path)
  write_json(tmp_path / "study.json", entry("gamma=0", 0))
  assert is_finished(tmp_path)


def test_results_files_keep_what_other_machines_ran(tmp_path):
  head = head_of("reduced", SIZES["reduced"], {}, "JPEG copy of CIFAR-10")
  file, folder = tmp_path / "study.json", tmp_path / "reduced"
  for seed in (0, 1):
    write_json(folder / "resnet20" / "gamma=0" / f"seed_{seed}" / "study.json", entry("gamma=0", seed, dense=50.0))
    update(file, head, folder)
    (folder / "resnet20" / "gamma=0" / f"seed_{seed}" / "study.json").unlink()
  assert [row["seed"] for row in recorded(file, head)] == [0, 1]
  assert recorded(tmp_path / "none.json", head) == []
  with pytest.raises(sapr.InputError, match=r"has 2 runs with another 'data': \"JPEG.*, now \"another\"; name another"):
    recorded(file, head | {"data": "another"})


def jobs_of(names, folder):
  return [job_of(row, seed, folder, None, {}) for row, seed in chosen(REDUCED, names, [0])]


def finish(job):
  write_json(job.workdir / "study.json", entry(job.row.name, job.seed))


def test_a_run_that_cannot_be_done_does_not_keep_the_others_from_it(tmp_path, monkeypatch, capsys):
  def run(job):
    if job.row.name == "gamma=0":
      raise sapr.InputError("training diverged.")
    finish(job)

  monkeypatch.setattr(study_ours, "KINDS", dict.fromkeys(study_ours.KINDS, run))
  monkeypatch.setattr(cifar10_study, "write_entry", lambda job: None)
  jobs = jobs_of(["gamma=0", "uniform_width", "one_shot_l1=global"], tmp_path)
  left, failed = cifar10_study.run_all(jobs, Interruption(), lambda: None)
  assert [job.row.name for job in left] == ["one_shot_l1=global"] and [job.row.name for job in failed] == ["gamma=0"]
  assert {job.row.name for job in jobs if is_finished(job.workdir)} == {"uniform_width"}
  assert "error: resnet20/gamma=0, seed 0: training diverged.\n" in capsys.readouterr().err
  assert cifar10_study.waits_for_nobody(left[0])
  with cifar10_study._lock(left[0].source):
    assert not cifar10_study.waits_for_nobody(left[0])
  finish(failed[0])
  assert not cifar10_study.waits_for_nobody(left[0])


def test_what_stops_two_runs_alike_stops_all(tmp_path, monkeypatch):
  def run(job):
    raise sapr.InputError("no images.")

  monkeypatch.setattr(study_ours, "KINDS", dict.fromkeys(study_ours.KINDS, run))
  with pytest.raises(sapr.InputError, match="no images"):
    cifar10_study.run_all(jobs_of(["gamma=0", "gamma=0.02", "uniform_width"], tmp_path), Interruption(), None)


def test_a_recorded_run_is_done_again_where_another_starts_from_it(tmp_path):
  jobs = jobs_of(["gamma=0", "gamma=0.02", "one_shot_l1=*"], tmp_path)
  known = {("resnet20", name, 0) for name in ("gamma=0", "gamma=0.02", "one_shot_l1=uniform")}
  left = cifar10_study.without_recorded(jobs, known)
  assert [job.row.name for job in left] == ["gamma=0", "one_shot_l1=global"]


def test_the_entry_of_a_run(tmp_path):
  job = job_of(REDUCED[0], 1, tmp_path, None, {})
  summary = {
    "dense": {"accuracy": 0.5, "macs": 200},
    "subnetwork": {"accuracy": 0.25, "macs": 100},
    "pruned": {"accuracy": 0.51234, "macs": 100},
    "run": {"device": "cpu", "versions": {}},
  }
  records = [
    {"step": 1, "test_accuracy": 0.5, "weight_seconds": 3.0},
    {"step": 2, "test_accuracy": 0.51234, "weight_seconds": 1.0, "generator_seconds": 0.5, "hamming_distance": 0.1},
  ]
  found = entry_of(job, summary, records)
  assert found["accuracy"] == {"dense": 50.0, "subnetwork": 25.0, "pruned": 51.234} and found["macs_share"] == 0.5
  assert found["curves"]["full_model"] == {"first": 1, "values": [50.0, 51.23]}
  assert found["curves"]["hamming"] == {"first": 2, "values": [0.1]}
  assert found["seconds"] == {"total": 4.5, "weight_epoch": 1.0, "generator_epoch": 0.5}


def test_the_page_says_which_size_it_is_and_shows_every_claim(tmp_path, results):
  pytest.importorskip("matplotlib", reason="figures need pip install 'sapr_jax[report]'")
  head = head_of("reduced", SIZES["reduced"], {}, "JPEG copy of CIFAR-10")
  write_json(tmp_path / "cifar10_study_reduced.json", {**head, "rows": list(results.entries)})
  study_page.renew(tmp_path, tmp_path / "results.md")
  page = (tmp_path / "results.md").read_text()
  assert "no reproduction of the paper's numbers" in page and "gamma=0.02" in page
  assert all(f"({letter})" in page for letter in "abcdef")
  for line in page.splitlines():
    if "](images/" in line:
      assert (tmp_path / line.split("](")[1].rstrip(")")).is_file()


def test_the_mean_history_over_seeds(results):
  changed = [dataclasses.replace(results, entries=[]), results]
  assert study_page.mean_history(changed[0], "gamma=0.02", "", {0, 1, 2}) is None
  history = study_page.mean_history(changed[1], "gamma=0.02", "", {0, 1, 2})
  assert history.series("test_accuracy") == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
  results.entries[0]["curves"]["full_model"]["values"] = [40.0, 50.0, 60.0, 70.0]  # seed 0
  history = study_page.mean_history(results, "gamma=0.02", "", {1, 0})
  assert history.series("test_accuracy") == ([1, 2, 3, 4], pytest.approx([0.25, 0.35, 0.45, 0.55]))


def test_l1_scores_by_hand(tiny):
  group = tiny.graph.groups[0]
  params = jax.tree.map(lambda leaf: np.zeros_like(leaf), tiny.params)
  filters = next(member for member in group.members if member.role == "out")
  module = params
  for name in filters.path[:-1]:
    module = module[name]
  kernel = np.zeros(module["kernel"].shape)
  kernel[0, 0, 0, :] = [4.0, -1.0, 3.0, -8.0]
  module["kernel"] = kernel
  for other in tiny.graph.groups[1:]:
    path = next(member for member in other.members if member.role == "out").path
    params[path[0]][path[1]]["kernel"] = np.ones_like(params[path[0]][path[1]]["kernel"])
  within = study_ours.l1_scores(tiny.graph, params, within_layers=True)
  np.testing.assert_array_equal(within[group.name], [0.75, 0.25, 0.5, 1.0])
  overall = study_ours.l1_scores(tiny.graph, params, within_layers=False)
  np.testing.assert_array_equal(overall[group.name], [1.0, 0.25, 0.75, 2.0])
  kept = {name: mask.mean() for name, mask in sapr.project_to_budget(tiny.graph, within, p=0.5).items()}
  assert set(kept.values()) == {0.5}


def test_the_schedule_from_scratch_has_all_epochs():
  phase = study_ours.scratch_phase(config_of(FULL[0], 0, None, {}))
  assert (phase.epochs, phase.decay_epochs, phase.learning_rate) == (360, (180, 270), 0.1)


def test_choices_of_channels_are_compared_with_the_simplest(results):
  assert selection(results) == ""
  entries = [
    entry(f"selection={name}", seed, subnetwork=value + seed)
    for name, value in (("generator,statistics=batch", 30.0), ("l1_uniform", 20.0))  # sorted, as in a file
    for seed in (0, 1)
  ]
  assert selection(dataclasses.replace(results, entries=entries)).splitlines()[2:] == [
    "| selection=generator,statistics=batch | 30.50 ± 0.71 | +10.00 [+10.00, +10.00] |",
    "| selection=l1_uniform | 20.50 ± 0.71 |  |",
  ]


def test_what_is_left_open_is_compared_with_the_row_that_was_changed(results):
  entries = [
    *results.entries,
    *(entry("masks=sampled", seed, dense=61.0 + seed, pruned=60.0 + seed) for seed in (0, 1)),
    *(entry("gamma=0,bn=recalibrated", seed, subnetwork=40.0 + seed) for seed in (0, 1)),
  ]
  assert open_choices(dataclasses.replace(results, entries=entries)).splitlines()[2:] == [
    "| masks=sampled | gamma=0.02 | +1.00 [+1.00, +1.00] | - | -1.00 [-1.00, -1.00] |",
    "| gamma=0,bn=recalibrated | gamma=0 | - | +10.00 [+10.00, +10.00] | - |",
  ]


def test_of_several_changed_choices_the_last_is_the_one_that_is_compared(results):
  entries = [
    *(entry("gamma=0.06,form=penalty", seed, pruned=60.0 + seed) for seed in (0, 1)),
    *(entry("gamma=0.06,form=penalty,weight_decay=scaled", seed, pruned=63.0 + seed) for seed in (0, 1)),
  ]
  last = open_choices(dataclasses.replace(results, entries=entries)).splitlines()[-1]
  assert last.startswith("| gamma=0.06,form=penalty,weight_decay=scaled | gamma=0.06,form=penalty | - | - | +3.00 ")


def test_the_default_form_stands_beside_the_main_row(results):
  entries = [*results.entries, *(entry("form=penalty", seed, dense=60.0, pruned=62.0 + seed) for seed in (0, 1))]
  both = dataclasses.replace(results, entries=entries)
  lost, beaten = nothing_lost(both), beats_alternatives(both)
  # Over seeds 0 and 1, which both have.
  assert "| form=penalty | with gamma = 0 | 61.50 ± 0.71 | 62.50 ± 0.71 | +1.00 [+1.00, +1.00] | holds |" in lost.table
  assert "| 60.00 ± 1.00 | +2.00 [+2.00, +2.00] | holds | +3.00 [+3.00, +3.00] | holds |" in beaten.table
  assert (lost.verdict, beaten.verdict) == (nothing_lost(results).verdict, beats_alternatives(results).verdict)
  assert beaten.remark == "Of form=penalty the same rule says: undecided."  # one-shot pruning: +2.0 and +1.0
  assert nothing_lost(results).table.count("form=penalty") == 0


def test_a_gamma_of_0_that_was_not_run_gives_no_turn(results):
  entries = [e for e in results.entries if e["row"] != "gamma=0"]
  assert "The turn: gamma = 0 was not run" in larger_gamma(dataclasses.replace(results, entries=entries)).remark


def test_a_generator_chooses_within_the_budget_by_what_it_has_learned():
  pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'sapr_jax[demo]'")
  config = digits.get_config()
  config.update_from_flattened_dict(
    {"model.width_multiplier": 0.25, "data.train_images": 320, "eval_batch_size": 64, "prune.start_epoch": 6}
    | {"prune.hold_epoch": 8, "prune.round_to": 1, "generator.learning_rate": 0.1}
  )
  run = setup.build(config)
  masks = study_ours.generator_masks(run, run.variables, Interruption())
  assert 0.8 * config.prune.p < run.graph.prunable_macs(masks) / run.graph.prunable_macs() <= config.prune.p
  untrained = epochs.masks_in_force(run, run.initial_generator(), epoch=7)
  assert any((masks[name] != untrained[name]).any() for name in masks)


@dataclasses.dataclass
class FakeSetup:
  """What `epochs.masks_in_force` reads of a run."""

  config: object
  graph: object
  outputs: jax.Array
  hold_epoch: int
  round_to: int = 1

  def key(self, stream):
    return jax.random.fold_in(jax.random.key(self.config.seed), stream)

  def generator_outputs(self, variables):
    return self.outputs


def test_sampled_masks_are_reproducible_within_the_budget_and_likely_at_the_end(tiny):
  rows = {row.name: row for row in REDUCED}
  outputs = jnp.zeros((len(tiny.graph.groups), max(group.size for group in tiny.graph.groups)))
  state = type("State", (), {"variables": None})()

  def masks(name, epoch, seed=0, hold_epoch=12):
    setup = FakeSetup(config_of(rows[name], seed, None, {}), tiny.graph, outputs, hold_epoch)
    found = epochs.masks_in_force(setup, state, epoch=epoch)
    assert tiny.graph.prunable_macs(found) <= setup.config.prune.p * tiny.graph.prunable_macs()
    return np.concatenate([found[group.name] for group in tiny.graph.groups])

  np.testing.assert_array_equal(masks("masks=sampled", 5), masks("masks=sampled", 5))
  assert (masks("masks=sampled", 5) != masks("masks=sampled", 6)).any()
  assert (masks("masks=sampled", 5) != masks("masks=sampled", 5, seed=1)).any()
  np.testing.assert_array_equal(masks("masks=sampled", 11), masks("gamma=0.02", 11))
  np.testing.assert_array_equal(masks("masks=sampled", 5, hold_epoch=6), masks("gamma=0.02", 5))


def test_pytorch_networks_cost_what_ours_do_and_are_cut_within_the_budget():
  torch = pytest.importorskip("torch", reason="the alternatives in PyTorch need pip install 'sapr_jax[bench]'")
  pytest.importorskip("torch_pruning")
  from study import torch_runs as study_torch

  ours = sapr.models.create("resnet8", width_multiplier=0.5)
  variables = ours.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  model, image = study_torch.make_network(ours, variables), torch.randn(1, 3, 32, 32)
  np.testing.assert_allclose(
    model.eval()(image).detach().numpy(),
    ours.apply(variables, jnp.asarray(image.permute(0, 2, 3, 1).numpy())),
    rtol=1e-4,
    atol=1e-5,
  )
  macs = sapr.trace_channels(ours, variables, (1, 32, 32, 3)).macs()
  assert study_torch.count_macs(model, image) == macs
  pruner = study_torch.make_pruner(model, image, reg=0.0)
  pruner.current_step = 100
  while study_torch.count_macs(model, image) > 0.5 * macs:
    pruner.step()
  assert study_torch.count_macs(model, image) > 0.4 * macs
  widths = {n: m.weight.shape[0] for n, m in model.named_modules() if n.endswith(("conv1", "conv2"))}
  assert [widths[f"layer{stage}.0.conv2"] for stage in (1, 2, 3)] == [8, 16, 32]
  assert widths["conv1"] == 8 and sum(widths[f"layer{stage}.0.conv1"] for stage in (1, 2, 3)) < 8 + 16 + 32
  assert model(image).shape == (1, 10)


def test_sparse_learning_takes_off_as_much_as_the_recipe_does():
  pytest.importorskip("torch_pruning", reason="the alternatives in PyTorch need pip install 'sapr_jax[bench]'")
  from study.torch_runs import scaled_reg

  recipe = 390 * (60 * 0.01 + 20 * 0.001 + 20 * 0.0001)
  assert scaled_reg(1.0, recipe) == pytest.approx(5e-4)
  assert scaled_reg(2.0, recipe / 10) == pytest.approx(1e-2)


@pytest.mark.parametrize("of", ["all", "kernels", "convolutions"])
def test_weight_decay_shrinks_in_pytorch_what_it_shrinks_here(of):
  pytest.importorskip("torch_pruning", reason="the alternatives in PyTorch need pip install 'sapr_jax[bench]'")
  from study import torch_runs as study_torch

  ours = sapr.models.create("resnet8", width_multiplier=0.5)
  variables = ours.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  phase = default.phase()
  phase.weight_decay, phase.weight_decay_of = 1.0, of
  groups = study_torch.decay_groups(study_torch.make_network(ours, variables), phase)
  # Without a gradient, a step of rate 1 and decay 1 takes away all that is decayed.
  phase.momentum = 0.0
  tx = schedules.sgd(phase, lambda step: 1.0)
  params = variables["params"]
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  decayed = sum(float((w.detach() ** 2).sum()) for group in groups if group["weight_decay"] for w in group["params"])
  assert decayed == pytest.approx(sum(float((u**2).sum()) for u in jax.tree.leaves(updates)), rel=1e-4)
  assert sum(w.numel() for group in groups for w in group["params"]) == sum(w.size for w in jax.tree.leaves(params))


def test_a_torch_crop_is_a_window_of_the_padded_image():
  torch = pytest.importorskip("torch")
  pytest.importorskip("torch_pruning")
  from study.torch_runs import augment

  images = torch.arange(1, 2 * 4 * 4 + 1, dtype=torch.uint8).reshape(2, 4, 4, 1)
  found = augment(images, torch.Generator().manual_seed(0), padding=1, flip=True)
  padded = torch.nn.functional.pad(images, (0, 0, 1, 1, 1, 1))
  for image, whole in zip(found, padded, strict=True):
    windows = [whole[y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    assert any(torch.equal(image, other) for window in windows for other in (window, window.flip(1)))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "--runs is missing; name a folder for the work directories."),
    (["--runs", __file__], f"--runs {__file__}: .*File exists.*; name a folder that can be written."),
    (["--runs", "{folder}", "--minutes", "inf"], "--minutes inf is out of range; expected a number above 0, .*"),
    (
      ["--runs", "{folder}", "--data", "{folder}"],
      r"--data \S+ holds no train/<class>/\* files; give the folder above.*",
    ),
    (["--runs", "{folder}", "--set", "train.batch_size=0"], "train.batch_size=0 is .*"),
    (["--runs", "{folder}", "--set", "eval={[]: 1}"], r"--set eval={\[\]: 1}: configs/default.py has no such field.*"),
  ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
  given = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
  monkeypatch.setattr(cifar10_study, "run_all", lambda *_: pytest.fail("it ran"))
  results = ["--results", str(tmp_path / "results")]
  monkeypatch.setattr("sys.argv", ["cifar10_study", "--size", "reduced", "--rows", "gamma=0", *results, *given])
  assert cifar10_study.main() == 2
  assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
