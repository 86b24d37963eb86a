"""What the claims are judged by, on numbers that one can judge by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
from entries import entry

from study.chosen import CHOSEN_ELSEWHERE, FITTED_ROW, LATER_ROW, MAIN_ROW
from study.claims import (
  CLAIMS,
  beats_alternatives,
  larger_gamma,
  later_claims,
  mean_of_epochs,
  nothing_lost,
  open_choices,
  pretrained_claims,
  selection,
  stable_architecture,
)
from study.results import Results, combined, difference, estimate
from study.sizes import LONGER


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


def test_a_gamma_of_0_that_was_not_run_gives_no_turn(results):
  entries = [e for e in results.entries if e["row"] != "gamma=0"]
  assert "The turn: gamma = 0 was not run" in larger_gamma(dataclasses.replace(results, entries=entries)).remark


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


def test_the_main_row_is_compared_with_all_others_at_once_and_apart_from_its_variations():
  main = f"p=0.3,{MAIN_ROW}"
  at_once = main.replace("penalty", "cut")
  pruned = {main: 75.0, at_once: 70.0, "p=0.3,random,cut": 74.9, "p=0.3,random,penalty": 72.0}
  pruned |= {f"{main},distilled": 80.0, f"{main},rate=0.1": 90.0, f"{main},round_to=8": 73.0}
  entries = []
  for seed, noise in enumerate((0.0, 0.2, -0.2, 0.1, -0.1)):
    entries.append(entry("dense", seed, pruned=75.5))
    for row, value in pruned.items():
      mine = noise if row.startswith(main) else 0.0
      entries.append(entry(row, seed, pruned=value + mine, subnetwork=75.0 + mine))
  beaten, worth, before, rounded = pretrained_claims(Results(entries, 0.0, [0.0]), "p=0.3", MAIN_ROW)
  lines = {line.split(" | ")[0].strip("| "): line for line in beaten.table.splitlines()[2:]}
  assert lines.keys() == {main, at_once, "p=0.3,random,cut"}
  assert lines[at_once].endswith("| 0.000 | holds |") and lines["p=0.3,random,cut"].endswith("| undecided |")
  assert beaten.verdict == "undecided"
  assert "| +3.00 [+2.85, +3.15] | 0.000 | holds |" in worth.table and worth.verdict == "holds"
  assert before.verdict == "holds" and "-0.50 [-0.65, -0.35]" in before.table
  assert rounded.verdict == "fails" and rounded.short == "-2.00 [-2.00, -2.00] points."


def test_a_later_row_is_compared_with_what_others_do_and_with_our_other_forms():
  at_once = f"p=0.3,{LATER_ROW}"
  others = {"p=0.3,torch_pruning=group_norm": 72.0, "p=0.3,l1_norm,cut,shares=equal": 73.9}
  own = {at_once.replace("cut", "penalty"): 74.0, at_once.replace("scaled", "tilted"): 71.0}
  apart = {f"{at_once},distilled": 80.0, "p=0.3,random,penalty": 60.0, "p=0.5,l2_norm,cut,shares=scaled": 84.0}
  entries = [
    entry(row, seed, pruned=value + (noise if row == at_once else 0.0), subnetwork=20.0)
    for seed, noise in enumerate((0.0, 0.2, -0.2, 0.1, -0.1))
    for row, value in {at_once: 74.0, **others, **own, **apart}.items()
  ]
  beaten, forms = later_claims(Results(entries, 0.0, [0.0]), "p=0.3", LATER_ROW)
  for claim, rows in ((beaten, others), (forms, own)):
    lines = claim.table.splitlines()[2:]
    assert {line.split(" | ")[0].strip("| ") for line in lines} == {at_once, *rows}
    assert claim.verdict == "undecided"
    assert [line.endswith("| holds |") for line in lines[1:]].count(True) == 1


def test_the_fitted_row_is_compared_with_the_whole_network_before_fine_tuning_and_with_other_channels_when_distilled():
  fitted, elsewhere = f"p=0.3,{FITTED_ROW}", f"p=0.3,{CHOSEN_ELSEWHERE}"
  pruned = {fitted: 76.0, elsewhere: 74.0, f"{fitted},distilled": 78.0, f"{elsewhere},distilled": 77.0}
  entries = [
    entry(row, seed, pruned=value + (noise if "distilled" in row else 0.0), subnetwork=60.0, dense=80.0)
    for seed, noise in enumerate((0.0, 0.5, -0.5))
    for row, value in pruned.items()
  ]
  beaten, _, before, distilled = later_claims(Results(entries, 0.0, [0.0]), "p=0.3", FITTED_ROW)
  assert elsewhere in beaten.table and "distilled" not in beaten.table and beaten.verdict == "holds"
  assert not before.was_tested and "| of the same run | -20.00 [-20.00, -20.00] |" in before.table
  assert distilled.verdict == "holds" and distilled.short == "+1.00 [+1.00, +1.00] points." and distilled.was_tested
  whole = [entry("dense", seed, pruned=60.5) for seed in (0, 1)]
  before = later_claims(Results([*entries, *whole], 0.0, [0.0]), "p=0.3", FITTED_ROW)[2]
  assert before.verdict == "holds" and before.short == "-0.50 [-0.50, -0.50] points."
